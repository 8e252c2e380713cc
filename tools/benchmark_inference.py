"""The task ``inference`` of ``benchmark.py``: from an image to predictions in COCO's form."""

from collections.abc import Callable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pycocotools.mask as mask_util
import torch
from benchmark_sides import Side, build_seeded
from detectron2.data import DatasetCatalog
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.modeling import build_model

from d2ft.config import load_cfg
from d2ft.data import register_builtin_datasets
from d2ft.data.mapper import FinetuneDatasetMapper
from d2ft.engine.trainer import FinetuneTrainer
from d2ft.evaluation.predictions import instances_to_results

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "cityscapes_ft.yaml"

# How far random weights are turned up, so that some boxes score high, and how sure the mask head
# is that a box is filled. Without it a mask would be noise.
_SCORE_SPREAD = 40.0
_MASK_BIAS = 2.0

# name, unit, values of ours, values of the stock way, peak memory of both in MiB
Row = tuple[str, str, list[float], list[float], float, float]


def benchmark_inference(_: Path, *, quick: bool) -> Iterator[Row]:
    """Compare the time an image takes, through the model and into run-length codes."""
    for height in (256,) if quick else (512, 1024):
        sides = {name: Side(build_detector, name == "ours", height) for name in ("ours", "stock")}
        found = _assert_equal_detections(*(side(0)[0] for side in sides.values()))
        times: dict[str, list[float]] = {name: [] for name in sides}
        for frame in range(1, 2 if quick else 7):
            for name, side in sides.items():
                times[name].append(side(frame)[1])
        peaks = (side.close() for side in sides.values())
        title = f"inference at {height}x{height * 2}, {found} detections"
        yield title, "s an image", times["ours"], times["stock"], *peaks


def build_detector(fast: bool, height: int) -> Callable[[int], list[dict[str, Any]]]:
    """
    Build a model with random weights that finds something.

    Args:
        fast: build it as d2ft does, with MODEL.FAST_CPU; else as Detectron2 does.
        height: of the resized image in pixels; it is twice as wide.

    Returns:
        A function that takes the number of a frame and returns its predictions in COCO's form.
    """
    register_builtin_datasets()
    overrides = ["MODEL.DEVICE", "cpu", "INPUT.MIN_SIZE_TEST", str(height)]
    cfg = load_cfg(CONFIG, overrides)
    model = build_seeded(cfg, FinetuneTrainer.build_model if fast else build_model).eval()
    with torch.no_grad():
        model.roi_heads.box_predictor.cls_score.weight.mul_(_SCORE_SPREAD)
        model.roi_heads.mask_head.predictor.bias.fill_(_MASK_BIAS)
    mapper = FinetuneDatasetMapper(cfg, is_train=False)
    records = DatasetCatalog.get("cityscapes_instance_train")
    samples = [mapper(record) for record in records[:8]]

    def detect(frame: int) -> list[dict[str, Any]]:
        with torch.inference_mode():
            output = model([samples[frame % len(samples)]])[0]["instances"].to("cpu")
        if fast:
            return instances_to_results(output, frame, range(8))
        return instances_to_coco_json(output, frame)

    return detect


def _assert_equal_detections(ours: list[dict[str, Any]], stock: list[dict[str, Any]]) -> int:
    """Compare the predictions on an image, in their order; return how many there are."""
    assert stock, "the model finds nothing"
    for detection, expected in zip_longest(ours, stock):
        assert detection["category_id"] == expected["category_id"]
        assert abs(detection["score"] - expected["score"]) < 1e-4
        boxes = zip(detection["bbox"], expected["bbox"], strict=True)
        assert all(abs(a - b) < 0.01 for a, b in boxes), (detection["bbox"], expected["bbox"])
        rle, expected_rle = detection["segmentation"], expected["segmentation"]
        assert mask_util.iou([rle], [expected_rle], [0])[0, 0] > 0.99
    return len(stock)
