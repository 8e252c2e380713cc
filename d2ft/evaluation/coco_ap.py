"""
COCO's AP and AR of boxes and masks, by the fastest installed implementation.

pycocotools is the reference: https://github.com/cocodataset/cocoapi. Where hotcoco is installed
(``pip install "d2ft[hotcoco]"``), it does the counting: its precision, recall and score arrays are
those of pycocotools to the last bit, which ``tests/parity/test_coco_official.py`` asserts.

Shape shorthand in this module:

    T: overlap thresholds    R: recall thresholds    K: categories
    A: area ranges (all, small, medium, large)    M: limits of detections per image
"""

import contextlib
import importlib.metadata
import importlib.util
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pycocotools.coco
import pycocotools.cocoeval

_AREA_RANGES = ("all", "small", "medium", "large")


@dataclass(frozen=True)
class CocoNumbers:
    """
    What COCO's evaluation counts.

    Attributes:
        eval: ``precision`` (T, R, K, A, M) and ``recall`` (T, K, A, M), -1 without ground truth.
        stats: the 12 numbers in COCO's order, 0 to 1, or -1 where there is nothing to judge:
            https://cocodataset.org/#detection-eval. All but AR at the first two limits count
            detections up to the last limit, also where it is not 100.
    """

    eval: dict[str, np.ndarray]
    stats: np.ndarray


# Processes in which hotcoco has started its threads. A fork copies this set, but not the threads,
# for which hotcoco would wait there without end.
_USED_IN: set[int] = set()


def fastest_backend() -> str:
    """
    Return "hotcoco" if it is installed and can run in this process, and "pycocotools" otherwise.

    It cannot run in a process that was forked from one that has used it.
    """
    if (_USED_IN and os.getpid() not in _USED_IN) or not importlib.util.find_spec("hotcoco"):
        return "pycocotools"
    return "hotcoco"


def describe_backend(backend: str) -> str:
    """Return the name of a backend with its version, for the log."""
    return f"{backend} {importlib.metadata.version(backend)}"


def evaluate_coco(
    dataset: Mapping[str, Any],
    results: Sequence[Mapping[str, Any]],
    iou_type: str,
    *,
    max_dets: Sequence[int] = (1, 10, 100),
    image_ids: Sequence[int | str] | None = None,
    backend: str | None = None,
) -> CocoNumbers:
    """
    Count what COCO counts, in memory.

    Differs from pycocotools where that one is wrong or fails: an annotation of id 0 can be
    matched, no predictions at all are an AP of 0, image ids may be strings, and the 12 numbers
    follow ``max_dets``. Neither argument is changed.

    Args:
        dataset: in the form of https://cocodataset.org/#format-data.
        results: in the form of https://cocodataset.org/#format-results, finite, of known images
            and categories.
        iou_type: "bbox" or "segm". The area of a prediction is that of its box or of its mask.
        max_dets: three limits of detections per image and category, best first.
        image_ids: count these images only.
        backend: "hotcoco" or "pycocotools"; by default :func:`fastest_backend`.
    """
    # The order of images decides among equal scores; it is that of their sorted ids.
    ids = sorted(image["id"] for image in dataset["images"])
    number = {image_id: i for i, image_id in enumerate(ids, 1)}
    chosen = sorted(number[i] for i in (ids if image_ids is None else image_ids))
    key = "segmentation" if iou_type == "segm" else "bbox"
    ground_truth = _numbered_ground_truth(dataset, number, with_masks=iou_type == "segm")
    detections = [
        {
            "image_id": number[result["image_id"]],
            "category_id": result["category_id"],
            "score": result["score"],
            key: result[key],
        }
        for result in results
    ]
    evaluation = _load(ground_truth, detections, iou_type, backend or fastest_backend())
    evaluation.params.imgIds = chosen
    evaluation.params.maxDets = list(max_dets)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.evaluate()
        evaluation.accumulate()
    precision = np.asarray(evaluation.eval["precision"])
    recall = np.asarray(evaluation.eval["recall"])
    thresholds = np.asarray(evaluation.params.iouThrs)
    return CocoNumbers(
        {"precision": precision, "recall": recall}, _summary(precision, recall, thresholds)
    )


def _numbered_ground_truth(
    dataset: Mapping[str, Any], number: Mapping[int | str, int], *, with_masks: bool
) -> dict[str, Any]:
    annotations = []
    # From 1: pycocotools takes a match with the annotation of id 0 for none.
    for i, annotation in enumerate(dataset["annotations"], 1):
        keys = ("category_id", "bbox", "area", "iscrowd")
        copied = {key: annotation[key] for key in keys if key in annotation}
        copied |= {"id": i, "image_id": number[annotation["image_id"]]}
        copied.setdefault("iscrowd", 0)
        if with_masks:
            copied["segmentation"] = annotation["segmentation"]
        annotations.append(copied)
    images = [
        {"id": number[image["id"]], "height": image["height"], "width": image["width"]}
        for image in dataset["images"]
    ]
    categories = [{"id": c["id"], "name": c["name"]} for c in dataset["categories"]]
    return {"images": images, "annotations": annotations, "categories": categories}


def _load(
    dataset: dict[str, Any], detections: list[dict[str, Any]], iou_type: str, backend: str
) -> Any:
    with contextlib.redirect_stdout(io.StringIO()):
        if backend == "hotcoco":
            import hotcoco

            _USED_IN.add(os.getpid())
            fast_truth = hotcoco.COCO(dataset)
            return hotcoco.COCOeval(fast_truth, fast_truth.loadRes(detections), iou_type)
        truth, found = pycocotools.coco.COCO(), pycocotools.coco.COCO()
        truth.dataset = dataset
        truth.createIndex()
        if detections:
            found = truth.loadRes(detections)
        else:  # which loadRes cannot read
            found.dataset = {**dataset, "annotations": []}
            found.createIndex()
        return pycocotools.cocoeval.COCOeval(truth, found, iou_type)


def _summary(precision: np.ndarray, recall: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    def mean(values: np.ndarray) -> float:
        counted = values[values > -1]
        return float(np.mean(counted)) if counted.size else -1.0

    def ap(area: int, threshold: float | None = None) -> float:
        rows = precision if threshold is None else precision[thresholds == threshold]
        return mean(rows[:, :, :, area, -1])

    areas = range(1, len(_AREA_RANGES))
    return np.array(
        [
            *(ap(0), ap(0, 0.5), ap(0, 0.75)),
            *(ap(area) for area in areas),
            *(mean(recall[:, :, 0, limit]) for limit in range(recall.shape[-1])),
            *(mean(recall[:, :, area, -1]) for area in areas),
        ]
    )
