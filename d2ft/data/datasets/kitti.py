"""
KITTI 2D object detection.

Source format: ``training/image_2/<frame>.png`` and ``training/label_2/<frame>.txt``, a line of 15
fields for each object, as the readme of the development kit says:
https://www.cvlibs.net/datasets/kitti/eval_object.php. Box corners are 0-based pixel coordinates
with decimals, and the official evaluation computes areas as ``(x2 - x1) * (y2 - y1)``, without
adding 1. So they are taken as continuous XYXY_ABS as they are.
"""

import functools
import logging
import math
import os
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detectron2.structures import BoxMode
from tqdm import tqdm

from d2ft.data.cache import cached_records, warn_once
from d2ft.data.catalog import register_instances
from d2ft.data.datasets.image_size import read_image_size
from d2ft.errors import UserError
from d2ft.files import atomic_write

logger = logging.getLogger(__name__)

KITTI_CLASSES = ("Car", "Pedestrian", "Cyclist")
KITTI_RAW_CLASSES = (
    "Car", "Van", "Truck", "Pedestrian", "Person_sitting", "Cyclist", "Tram", "Misc",
)  # fmt: skip

_DONT_CARE = "DontCare"
# Neither target nor false positive for the class: evaluate_object.cpp of the development kit.
_NEIGHBOURS = {"Van": "Car", "Person_sitting": "Pedestrian"}
_FIELDS = 15
_PARSER_VERSION = 1


def register_kitti_instances(
    name: str,
    root: str | os.PathLike[str],
    split_file: str | os.PathLike[str] | None = None,
    thing_classes: Sequence[str] = KITTI_CLASSES,
) -> None:
    """
    Register frames of KITTI, evaluated by the official AP if that judges one of the classes.

    The arguments are those of :func:`load_kitti_instances`. The official AP is for the classes of
    :data:`KITTI_CLASSES`; a set without any of them is evaluated COCO-style.
    """
    root = Path(root).absolute()
    split_file = Path(split_file).absolute() if split_file is not None else None
    register_instances(
        name,
        functools.partial(load_kitti_instances, root, split_file, tuple(thing_classes)),
        thing_classes=thing_classes,
        evaluator_type="kitti" if set(thing_classes) & set(KITTI_CLASSES) else "coco",
        label_dir=str(root / "training" / "label_2"),
    )


def load_kitti_instances(
    root: str | os.PathLike[str],
    split_file: str | os.PathLike[str] | None = None,
    thing_classes: Sequence[str] = KITTI_CLASSES,
) -> list[dict[str, Any]]:
    """
    Return frames of KITTI as Detectron2 dataset dicts, cached on disk.

    Boxes are clipped to the image, those outside of it dropped; the log says how many. Objects of
    a type that is neither chosen nor a neighbour of a chosen class are left out.

    Args:
        root: the folder that holds ``training/image_2`` and ``training/label_2``.
        split_file: names a frame a line, as ``ImageSets/train.txt``; None is every label file.
        thing_classes: of the eight types of :data:`KITTI_RAW_CLASSES`.

    Returns:
        Dicts whose annotations also have ``kitti_type``, ``truncated`` (0 to 1), ``occluded`` (0
        to 3) and, where clipping changed it, ``kitti_bbox``, the box of the file. Vans for Car
        and sitting persons for Pedestrian (where these are no classes themselves), and DontCare
        once for each class, have ``ignore`` 1 and ``iscrowd`` 1: Detectron2 does not train on
        them and COCO's metric counts them as neither right nor wrong. Of DontCare, truncation and
        occlusion are unknown (-1 in the file) and left out.

    Raises:
        UserError: if a class is unknown, a file is missing or broken, or a line is malformed; with
            file and line.
    """
    root = Path(root).absolute()
    unknown = [name for name in thing_classes if name not in KITTI_RAW_CLASSES]
    if unknown:
        raise UserError(f"KITTI has no class {unknown[0]!r}; it has {', '.join(KITTI_RAW_CLASSES)}")
    images, labels = root / "training" / "image_2", root / "training" / "label_2"
    for folder in (images, labels):
        if not folder.is_dir():
            raise UserError(
                f"the KITTI folder {folder} does not exist. Built-in names look under "
                "$DETECTRON2_DATASETS/kitti, and DETECTRON2_DATASETS is "
                f"{os.environ.get('DETECTRON2_DATASETS', 'not set')}"
            )
    if split_file is None:
        unlabelled = {path.stem for path in images.glob("*.png")} - set(_frames_of(labels))
        if unlabelled:
            warn_once(logger, "%s: %d images have no label file; left out", root, len(unlabelled))
    frames = _read_split(Path(split_file)) if split_file is not None else _frames_of(labels)
    pairs = [(images / f"{frame}.png", labels / f"{frame}.txt") for frame in frames]
    for file in (file for pair in pairs for file in pair):
        # Unlike Path's, false for a name that no file can have.
        if not os.path.isfile(file):
            by = f", but {split_file} names its frame" if split_file is not None else ""
            raise UserError(f"the KITTI file {file} does not exist{by}")
    records = cached_records(
        f"KITTI instances of {root}, split {split_file}, classes {', '.join(thing_classes)}",
        [*(file for pair in pairs for file in pair), *([split_file] if split_file else [])],
        lambda: _parse(pairs, tuple(thing_classes)),
        version=_PARSER_VERSION,
    )
    dropped, clipped = (sum(r[key] for r in records) for key in ("dropped_boxes", "clipped_boxes"))
    if dropped or clipped:
        warn_once(
            logger,
            "%s: %d boxes lie outside the image and were dropped, %d were clipped to it",
            root,
            dropped,
            clipped,
        )
    return records


def write_kitti_split(
    root: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    val_fraction: float = 0.5,
    seed: int = 0,
) -> tuple[Path, Path]:
    """
    Write a seeded split of the labelled frames to ``folder``; return its train.txt and val.txt.

    Raises:
        UserError: if ``val_fraction`` is not between 0 and 1, or there are no labels.
    """
    if not 0 < val_fraction < 1:
        raise UserError(f"val_fraction is {val_fraction!r}; it must be between 0 and 1")
    frames = _frames_of(Path(root) / "training" / "label_2")
    chosen = set(random.Random(seed).sample(frames, round(len(frames) * val_fraction)))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "train.txt", folder / "val.txt"
    for path, in_val in zip(paths, (False, True), strict=True):
        with atomic_write(path) as file:
            file.writelines(f"{frame}\n" for frame in frames if (frame in chosen) == in_val)
    logger.info("Wrote the split of %s with seed %d to %s and %s", root, seed, *paths)
    return paths


def _frames_of(labels: Path) -> list[str]:
    frames = sorted(path.stem for path in labels.glob("*.txt"))
    if not frames:
        raise UserError(f"no label file {labels}/*.txt was found")
    return frames


def _read_split(path: Path) -> list[str]:
    if not path.is_file():
        raise UserError(
            f"the split file {path} does not exist; it names a frame a line, such as 000000. "
            "d2ft.data.datasets.kitti.write_kitti_split writes a seeded one"
        )
    frames = [line.strip() for line in _read_lines(path) if line.strip()]
    repeated = [frame for frame, count in Counter(frames).items() if count > 1]
    if repeated or not frames:
        problem = f"names {repeated[0]} twice" if repeated else "names no frame"
        raise UserError(f"the split file {path} {problem}")
    return frames


def _read_lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as text: {error}") from error


def _parse(
    pairs: Sequence[tuple[Path, Path]], thing_classes: tuple[str, ...]
) -> list[dict[str, Any]]:
    records = []
    for image, label in tqdm(pairs, desc="Reading KITTI labels", unit="frame", disable=None):
        width, height = read_image_size(image)
        annotations: list[dict[str, Any]] = []
        dropped = clipped = 0
        for number, line in enumerate(_read_lines(label), start=1):
            if not line.strip():
                continue
            try:
                kitti_type, truncated, occluded, box = _parse_line(line)
            except ValueError as error:
                raise UserError(f"{label}, line {number}: {error}") from error
            categories = _categories(kitti_type, thing_classes)
            if not categories:
                continue
            inside = [
                min(max(value, 0.0), float(limit))
                for value, limit in zip(box, (width, height, width, height), strict=True)
            ]
            if inside[0] >= inside[2] or inside[1] >= inside[3]:
                dropped += 1
                continue
            clipped += inside != box
            ignore = int(kitti_type not in thing_classes)
            extra: dict[str, Any] = {} if inside == box else {"kitti_bbox": box}
            if kitti_type != _DONT_CARE:
                extra |= {"truncated": truncated, "occluded": occluded}
            annotations.extend(
                {
                    "bbox": inside,
                    "bbox_mode": BoxMode.XYXY_ABS,
                    "category_id": category,
                    "iscrowd": ignore,
                    "ignore": ignore,
                    "kitti_type": kitti_type,
                    **extra,
                }
                for category in categories
            )
        records.append(
            {
                "file_name": str(image),
                "image_id": image.stem,
                "height": height,
                "width": width,
                "annotations": annotations,
                "dropped_boxes": dropped,
                "clipped_boxes": clipped,
            }
        )
    return records


def _categories(kitti_type: str, thing_classes: tuple[str, ...]) -> list[int]:
    if kitti_type == _DONT_CARE:
        return list(range(len(thing_classes)))
    name = kitti_type if kitti_type in thing_classes else _NEIGHBOURS.get(kitti_type)
    return [thing_classes.index(name)] if name in thing_classes else []


def _parse_line(line: str) -> tuple[str, float, int, list[float]]:
    fields = line.split()
    if len(fields) != _FIELDS:
        raise ValueError(f"has {len(fields)} fields, but an object has {_FIELDS}")
    kitti_type = fields[0]
    if kitti_type not in (*KITTI_RAW_CLASSES, _DONT_CARE):
        raise ValueError(f"{kitti_type!r} is no type of KITTI")
    values = [float(field) for field in fields[1:]]
    if not all(map(math.isfinite, values)):
        raise ValueError("has a value that is not finite")
    truncated, occluded, box = values[0], values[1], values[3:7]
    if box[2] <= box[0] or box[3] <= box[1]:
        raise ValueError(f"the box {box} has no area")
    if kitti_type != _DONT_CARE and (not 0 <= truncated <= 1 or occluded not in (0, 1, 2, 3)):
        raise ValueError(
            f"truncation {truncated} and occlusion {occluded} should be 0 to 1 and 0, 1, 2 or 3"
        )
    return kitti_type, truncated, int(occluded), box
