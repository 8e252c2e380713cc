"""The task ``mapper`` of ``benchmark.py``: from a dataset dict to what the model learns from."""

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from benchmark_timing import time_in_turn
from detectron2.data import DatasetCatalog, DatasetMapper
from detectron2.structures import BoxMode

from d2ft.config import load_cfg
from d2ft.data.image_cache import build_image_cache
from d2ft.data.mapper import FinetuneDatasetMapper
from d2ft.data.stream import seeded_generators
from d2ft.labels import CITYSCAPES_INSTANCE_CLASSES

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "cityscapes_ft.yaml"
MASK_SIZE = 28  # of the targets that the mask head learns

# Name of a way to set up our mapper -> its overrides.
OURS: dict[str, list[str]] = {
    "": [],
    ", RESIZE_TRAIN torch": ["INPUT.RESIZE_TRAIN", "torch"],
    ", image cache": ["DATALOADER.IMAGE_CACHE_GB", "1.0"],
    ", both": ["INPUT.RESIZE_TRAIN", "torch", "DATALOADER.IMAGE_CACHE_GB", "1.0"],
}

# name, unit, values of ours, values of the stock way
Row = tuple[str, str, list[float], list[float]]
Sample = dict[str, Any]


def benchmark_mapper(_: Path, *, quick: bool) -> Iterator[Row]:
    """Compare our mapper on exact masks with Detectron2's on those, and on polygons."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a loader worker
    try:
        exact = DatasetCatalog.get("cityscapes_instance_train")[: 4 if quick else 16]
        polygons = [_with_polygons(record) for record in exact]
        stock = {
            "the same masks": (DatasetMapper(load_cfg(CONFIG), is_train=True), exact),
            "polygons, inexact": (
                DatasetMapper(load_cfg(CONFIG, ["INPUT.MASK_FORMAT", "polygon"]), is_train=True),
                polygons,
            ),
        }
        for setting, overrides in OURS.items():
            cfg = load_cfg(CONFIG, overrides)
            limit = cfg.DATALOADER.IMAGE_CACHE_GB
            cache = build_image_cache(exact, cfg.INPUT.FORMAT, limit) if limit else None
            ours = FinetuneDatasetMapper(cfg, is_train=True, image_cache=cache)
            levels = 0 if cfg.INPUT.RESIZE_TRAIN == "pil" else 2
            for name, (mapper, records) in stock.items():
                _assert_equal_samples(
                    _map_all(ours, exact), _map_all(mapper, records), records is exact, levels
                )
                seconds = time_in_turn(
                    lambda ours=ours: _map_all(ours, exact),
                    lambda mapper=mapper, records=records: _map_all(mapper, records),
                    1 if quick else 5,
                )
                per_image = ([s / len(exact) * 1e3 for s in side] for side in seconds)
                yield f"mapper{setting}; stock with {name}", "ms an image", *per_image
    finally:
        torch.set_num_threads(threads)


def _map_all(mapper: Callable[[Any], Any], records: list[Any]) -> list[Sample]:
    """Map each record with random numbers that depend on its place alone."""
    samples = []
    for place, record in enumerate(records):
        with seeded_generators(place):
            samples.append(mapper(copy.deepcopy(record)))
    return samples


def _assert_equal_samples(
    ours: list[Sample], stock: list[Sample], same_masks: bool, levels: int
) -> None:
    """
    Compare images and what is learned from them.

    Args:
        ours: samples of our mapper.
        stock: samples of Detectron2's.
        same_masks: whether they were made of the same annotations.
        levels: of grey by which values of the images may differ.
    """
    for sample, expected in zip(ours, stock, strict=True):
        difference = sample["image"].int() - expected["image"].int()
        assert difference.abs().max() <= levels
        if not same_masks:
            continue
        found, wanted = sample["instances"], expected["instances"]
        assert torch.equal(found.gt_classes, wanted.gt_classes)
        assert torch.equal(found.gt_boxes.tensor, wanted.gt_boxes.tensor)
        boxes = wanted.gt_boxes.tensor
        targets = (i.gt_masks.crop_and_resize(boxes, MASK_SIZE) for i in (found, wanted))
        assert torch.equal(*targets)


def _with_polygons(record: dict[str, Any]) -> dict[str, Any]:
    """Return the record with the outlines of the annotation file, hidden parts included."""
    path = record["instance_file_name"].replace("_instanceIds.png", "_polygons.json")
    objects = json.loads(Path(path).read_bytes())["objects"]
    annotations = []
    for item in objects:
        if item["label"] in CITYSCAPES_INSTANCE_CLASSES:
            xs, ys = zip(*item["polygon"], strict=True)
            annotations.append(
                {
                    "bbox": [min(xs), min(ys), max(xs), max(ys)],
                    "bbox_mode": BoxMode.XYXY_ABS,
                    "segmentation": [[float(v) for corner in item["polygon"] for v in corner]],
                    "category_id": CITYSCAPES_INSTANCE_CLASSES.index(item["label"]),
                }
            )
    return {**record, "annotations": annotations}
