"""Use a fine-tuned model: from a checkpoint and images to drawn pictures and COCO results."""

import glob
import json
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from detectron2.data.catalog import Metadata
from detectron2.data.detection_utils import read_image
from detectron2.engine import DefaultPredictor
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.modeling import build_model
from detectron2.structures import Instances
from detectron2.utils.visualizer import Visualizer
from PIL import Image

from d2ft.checkpoint.checkpointer import FinetuneCheckpointer
from d2ft.checkpoint.class_names import known_classes
from d2ft.checkpoint.safe_load import METADATA_KEY
from d2ft.checkpoint.weights import read_weights
from d2ft.config import load_cfg, load_cfg_text
from d2ft.engine.fast_cpu import use_fast_cpu
from d2ft.engine.setup import resolve_cfg
from d2ft.errors import UserError
from d2ft.files import atomic_write
from d2ft.labels import COCO_CATEGORY_IDS, COCO_CLASSES

logger = logging.getLogger(__name__)

# What a folder is searched for. A file that is named itself may be of any type that Pillow reads.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".tif", ".tiff", ".webp")
_WRITABLE_SUFFIXES = (".jpg", ".jpeg", ".png")


class CheckpointPredictor(DefaultPredictor):
    """
    Same as :class:`DefaultPredictor`, but made from a checkpoint that describes itself.

    The file is read safely, has to fill the whole model, and tells the config and class names.

    Args:
        weights: file or URL.
        config_file: the config, if the file does not hold one or another is wanted.
        threshold: lowest score of a detection, in [0, 1].
        opts: KEY, VALUE, ... on top of the config.

    Attributes:
        thing_classes: names in the order of ``pred_classes``; empty if nobody knows them.

    Raises:
        UserError: if the file is refused, does not fit, or no config is known.
    """

    def __init__(
        self,
        weights: str,
        config_file: str | None = None,
        *,
        threshold: float = 0.5,
        opts: Sequence[Any] = (),
    ) -> None:
        # Not DefaultPredictor's: that one reads the weights as a program.
        if not 0 <= threshold <= 1:
            raise UserError(f"the threshold is {threshold}; a score is between 0 and 1")
        checkpoint = read_weights(weights)
        cfg = _cfg_of(checkpoint, weights, config_file, opts)
        cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = threshold
        cfg.MODEL.RETINANET.SCORE_THRESH_TEST = threshold
        self.cfg = resolve_cfg(cfg)
        self.thing_classes = known_classes(checkpoint, weights, cfg.FINETUNE.SOURCE_CLASSES) or ()
        del checkpoint  # the checkpointer reads it once more; both at a time take twice the memory
        self.metadata = Metadata(name=weights)
        if self.thing_classes:
            self.metadata.thing_classes = list(self.thing_classes)
        self.model = use_fast_cpu(self.cfg, build_model(self.cfg))
        self.model.eval()
        FinetuneCheckpointer(self.model, every_tensor=True).load(weights)
        # What DefaultPredictor.__call__ reads.
        size = self.cfg.INPUT.MIN_SIZE_TEST
        self.aug = T.ResizeShortestEdge([size, size], self.cfg.INPUT.MAX_SIZE_TEST)
        self.input_format = self.cfg.INPUT.FORMAT
        if self.input_format not in ("RGB", "BGR"):
            raise UserError(
                f"INPUT.FORMAT is {self.input_format!r}; pictures are read as RGB or BGR"
            )


def _cfg_of(
    checkpoint: dict[str, Any], weights: str, config_file: str | None, opts: Sequence[Any]
) -> CfgNode:
    if config_file:
        return load_cfg(config_file, opts)
    description = checkpoint.get(METADATA_KEY)
    text = description.get("config") if isinstance(description, dict) else None
    if not isinstance(text, str):
        raise UserError(
            f"{weights} does not hold the config of its model, as files that d2ft saves do: give "
            "it with --config-file"
        )
    return load_cfg_text(text, f"the config in {weights}", opts)


def find_images(arguments: Sequence[str], *, recursive: bool = False) -> list[Path]:
    """
    Return the files that the arguments name, each once, in their order.

    Args:
        arguments: files, folders (the images directly in them), or patterns of :mod:`glob`, where
            ``**`` stands for folders of any depth.
        recursive: take the images in the folders below a folder as well.

    Raises:
        UserError: if an argument names no image.
    """
    found: dict[Path, None] = {}
    for argument in arguments:
        path = Path(argument)
        if path.is_dir():
            inside = path.rglob("*") if recursive else path.iterdir()
            matches = sorted(p for p in inside if p.suffix.lower() in IMAGE_SUFFIXES)
        elif path.is_file():
            matches = [path]
        else:
            matches = [Path(p) for p in sorted(glob.glob(argument, recursive=True))]
            matches = [p for p in matches if p.is_file()]
        if not matches:
            kind = "holds no image" if path.is_dir() else "is no file, folder or matching pattern"
            raise UserError(f"{argument} {kind} (from {os.getcwd()})")
        found.update(dict.fromkeys(matches))
    return list(found)


def predict_images(
    predictor: CheckpointPredictor,
    images: Sequence[Path],
    *,
    output: Path | None = None,
    json_file: Path | None = None,
) -> Iterator[tuple[Path, str]]:
    """
    Predict images one by one, and write what is asked for.

    Args:
        predictor: the model.
        images: from :func:`find_images`.
        output: folder for the pictures, with the subfolders that tell the images apart; PNG where
            the image is neither PNG nor JPEG.
        json_file: gets the detections in the format of COCO results. ``image_id`` is the number
            that all file names consist of, as in COCO, else the place in ``images``, from 0;
            ``file_name`` is added. ``category_id`` is that of COCO for COCO's classes, else the
            index of the class.

    Yields:
        Each image with "" or the reason why it could not be read and was skipped.

    Raises:
        UserError: if a picture would replace an image.
    """
    targets = _targets(images, output) if output else {}
    numbers = _image_ids(images)
    is_coco = predictor.thing_classes == COCO_CLASSES
    results: list[dict[str, Any]] = []
    for path in images:
        try:
            image = read_image(str(path), format="BGR")
        # A broken PNG is a SyntaxError to Pillow, an image of absurd size an error of its own.
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            yield path, f"{type(error).__name__}: {error}"
            continue
        instances = predictor(image)["instances"].to("cpu")
        for row in instances_to_coco_json(instances, numbers[path]) if json_file else ():
            if is_coco:
                row["category_id"] = COCO_CATEGORY_IDS[row["category_id"]]
            results.append({**row, "file_name": str(path)})
        if output:
            draw(image, instances, predictor.metadata, targets[path])
        yield path, ""
    if json_file:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(json_file) as file:
            json.dump(results, file)


def draw(image: np.ndarray, instances: Instances, metadata: Metadata, target: Path) -> None:
    """
    Write a picture of the detections with class names and scores.

    Args:
        image: (H, W, 3) uint8 in BGR order.
        instances: on the CPU, in pixels of ``image``.
        metadata: its ``thing_classes`` are the names.
        target: the file; its folder is made if need be.
    """
    picture = Visualizer(image[:, :, ::-1], metadata).draw_instance_predictions(instances)
    target.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture.get_image()).save(target)


def _image_ids(images: Sequence[Path]) -> dict[Path, int]:
    ids = [int(path.stem) for path in images if path.stem.isdecimal()]
    if len(set(ids)) < len(images):
        ids = list(range(len(images)))
    return dict(zip(images, ids, strict=True))


def _targets(images: Sequence[Path], output: Path) -> dict[Path, Path]:
    """Return where the picture of each image goes."""
    absolute = {path: path.absolute() for path in images}
    shared = os.path.commonpath([path.parent for path in absolute.values()])
    targets = {}
    for path, full in absolute.items():
        target = output / full.relative_to(shared)
        if target.suffix.lower() not in _WRITABLE_SUFFIXES:
            target = target.with_name(f"{target.name}.png")
        targets[path] = target
    sources = {path.resolve() for path in images}
    replaced = [target for target in targets.values() if target.resolve() in sources]
    if replaced:
        raise UserError(f"{replaced[0]} would replace an image: choose another folder for --output")
    return targets
