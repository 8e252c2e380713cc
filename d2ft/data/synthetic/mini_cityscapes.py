"""Write street scenes as Cityscapes has them: pictures, instance and label ids, polygons."""

import json
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from d2ft.data.synthetic.arrangement import image_rng
from d2ft.data.synthetic.drawing import fill_outline
from d2ft.data.synthetic.folder import dataset_folder
from d2ft.data.synthetic.street import LabelledPolygon, StreetScene, make_street_scene
from d2ft.labels import CITYSCAPES_LABELS

# Invented towns; a split has towns of its own, as in Cityscapes.
_CITIES = {"train": ("ministadt", "kleinburg"), "val": ("nebenhausen",), "test": ("letzthain",)}
_OTHER_CITIES = ("irgendwo",)
# In a sequence of Cityscapes the annotated frame has the number 19.
_FRAME = 19
_LABELS = {label.name: label for label in CITYSCAPES_LABELS}


def write_mini_cityscapes(
    root: str | os.PathLike[str],
    *,
    splits: Mapping[str, int] | None = None,
    image_size: tuple[int, int] = (256, 512),
    num_objects: tuple[int, int] = (5, 14),
    seed: int = 0,
) -> None:
    """
    Write a synthetic data set in the layout and with the label ids of Cityscapes' fine set.

    Frame k of a split depends on ``seed``, the split's name and the sizes alone, not on how many
    frames there are. A ``root`` that already holds this very set is left as it is.

    Args:
        root: gets ``leftImg8bit`` and ``gtFine``.
        splits: name -> number of frames; by default 24 for train and 8 for val.
        image_size: (height, width) in pixels.
        num_objects: least and largest number of annotated road objects in a frame.
        seed: at least 0.

    Raises:
        UserError: if ``root`` holds something else.
    """
    splits = {"train": 24, "val": 8} if splits is None else dict(splits)
    arguments = {"splits": splits, "image_size": image_size, "num_objects": num_objects}
    with dataset_folder(root, "mini_cityscapes", seed=seed, **arguments) as folder:
        if folder is None:
            return
        for split, count in splits.items():
            cities = _CITIES.get(split, _OTHER_CITIES)
            for index in range(count):
                rng = image_rng(seed, f"mini_cityscapes/{split}", index)
                scene = make_street_scene(rng, image_size, num_objects)
                city = cities[index % len(cities)]
                name = f"{city}_{index // len(cities):06d}_{_FRAME:06d}"
                _write_frame(folder, Path(split, city, name), scene)


def draw_ids(
    objects: tuple[LabelledPolygon, ...], image_size: tuple[int, int]
) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.uint8]]:
    """
    Return what ``instanceIds.png`` and ``labelIds.png`` hold, both (H, W).

    The rules are those of the official tools: polygons in order, instances of a class counted
    from 0, groups without a number, labels with a negative id left out.
    https://github.com/mcordts/cityscapesScripts/blob/v2.3.0/cityscapesscripts/preparation/json2instanceImg.py
    """
    height, width = image_size
    instances, labels = Image.new("I", (width, height), 0), Image.new("L", (width, height), 0)
    seen: Counter[str] = Counter()
    for name, polygon in objects:
        label = _LABELS.get(name) or _LABELS[name.removesuffix("group")]
        if label.id < 0:
            continue
        instance = label.id
        if label.has_instances and label.name == name:
            instance = label.id * 1000 + seen[name]
            seen[name] += 1
        corners = np.array(polygon, dtype=np.int32)
        fill_outline(instances, corners, instance)
        fill_outline(labels, corners, label.id)
    return np.asarray(instances).astype(np.uint16), np.asarray(labels)


def _write_frame(folder: Path, frame: Path, scene: StreetScene) -> None:
    """Write the four files of ``<split>/<city>/<name>``."""
    picture = folder / "leftImg8bit" / frame.with_name(f"{frame.name}_leftImg8bit.png")
    ground_truth = folder / "gtFine" / frame.with_name(f"{frame.name}_gtFine")
    for path in (picture, ground_truth):
        path.parent.mkdir(parents=True, exist_ok=True)
    # A noisy picture hardly gets smaller for more effort.
    Image.fromarray(scene.image).save(picture, compress_level=1)
    instance_ids, label_ids = draw_ids(scene.objects, scene.image.shape[:2])
    Image.fromarray(instance_ids).save(f"{ground_truth}_instanceIds.png")
    Image.fromarray(label_ids).save(f"{ground_truth}_labelIds.png")
    height, width = scene.image.shape[:2]
    annotation = {
        "imgHeight": height,
        "imgWidth": width,
        "objects": [
            {"label": label, "polygon": [list(corner) for corner in polygon]}
            for label, polygon in scene.objects
        ],
    }
    Path(f"{ground_truth}_polygons.json").write_text(json.dumps(annotation), encoding="utf-8")
