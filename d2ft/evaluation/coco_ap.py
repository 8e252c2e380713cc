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
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pycocotools.coco
import pycocotools.cocoeval
import pycocotools.mask as mask_util

# COCO's thresholds and area ranges, and pycocotools' names of these.
_PARAMS = pycocotools.cocoeval.Params()

# Above so many detections the four area ranges are counted one after the other: pycocotools and
# hotcoco keep some 200 bytes of each detection for each range at a time.
_DETECTIONS_AT_ONCE = 500_000


@dataclass(frozen=True)
class CocoDetections:
    """
    N detections, in the order that decides among equal scores of an image.

    Attributes:
        image_ids: N ids of the dataset's images.
        category_ids: (N,)
        boxes: (N, 4) XYWH in pixels, float64, finite.
        scores: (N,) float64, finite.
        masks: N run-length codes with compressed counts; needed for "segm" alone.
    """

    image_ids: Sequence[int | str]
    category_ids: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray
    masks: list[Any] = field(default_factory=list)

    @classmethod
    def from_results(cls, results: Sequence[Mapping[str, Any]]) -> "CocoDetections":
        """Take what is in the form of https://cocodataset.org/#format-results."""
        return cls(
            image_ids=[result["image_id"] for result in results],
            category_ids=np.array([result["category_id"] for result in results], np.int64),
            boxes=np.array([result["bbox"] for result in results], np.float64).reshape(-1, 4),
            scores=np.array([result["score"] for result in results], np.float64),
            masks=[r["segmentation"] for r in results if "segmentation" in r],
        )


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

    @classmethod
    def of(cls, precision: np.ndarray, recall: np.ndarray) -> "CocoNumbers":
        """Return the numbers of these arrays."""
        return cls({"precision": precision, "recall": recall}, _summary(precision, recall))


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
    detections: CocoDetections,
    iou_type: str,
    *,
    max_dets: Sequence[int] = (1, 10, 100),
    category_ids: Sequence[int] | None = None,
    backend: str | None = None,
) -> CocoNumbers:
    """
    Count what COCO counts, in memory.

    Differs from pycocotools where that one is wrong or fails: an annotation of id 0 can be
    matched, no predictions at all are an AP of 0, image ids may be strings, and the 12 numbers
    follow ``max_dets``. No argument is changed.

    Args:
        dataset: in the form of https://cocodataset.org/#format-data.
        detections: of known images, and of the categories that are counted.
        iou_type: "bbox" or "segm". The area of a prediction is that of its box or of its mask.
        max_dets: three limits of detections per image and category, ascending, best first.
        category_ids: count these categories only, and in this order; by default all, ascending.
        backend: "hotcoco" or "pycocotools"; by default :func:`fastest_backend`.
    """
    # The order of images decides among equal scores; it is that of their sorted ids.
    number = {i: n for n, i in enumerate(sorted(image["id"] for image in dataset["images"]), 1)}
    if category_ids is None:
        category_ids = sorted(category["id"] for category in dataset["categories"])
    truth = _numbered_ground_truth(dataset, number, set(category_ids), iou_type == "segm")
    images = np.array([number[image_id] for image_id in detections.image_ids], np.int64)
    load = _load_hotcoco if (backend or fastest_backend()) == "hotcoco" else _load_pycocotools
    evaluation = load(truth, images, detections, iou_type)
    evaluation.params.maxDets = list(max_dets)
    ranges = list(zip(_PARAMS.areaRng, _PARAMS.areaRngLbl, strict=True))
    parts = [ranges] if len(images) <= _DETECTIONS_AT_ONCE else [[each] for each in ranges]
    precisions, recalls = [], []
    for part in parts:
        evaluation.params.areaRng, evaluation.params.areaRngLbl = map(list, zip(*part, strict=True))
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation.evaluate()
            evaluation.accumulate()
        precisions.append(np.asarray(evaluation.eval["precision"]))
        recalls.append(np.asarray(evaluation.eval["recall"]))
    # Both backends sort the categories.
    order = np.searchsorted(np.sort(category_ids), category_ids)
    return CocoNumbers.of(
        np.concatenate(precisions, axis=3)[:, :, order], np.concatenate(recalls, axis=2)[:, order]
    )


def join_categories(parts: Sequence[CocoNumbers]) -> CocoNumbers:
    """Return the numbers of all categories from those of some each; limits have to be equal."""
    return CocoNumbers.of(
        np.concatenate([part.eval["precision"] for part in parts], axis=2),
        np.concatenate([part.eval["recall"] for part in parts], axis=1),
    )


def _numbered_ground_truth(
    dataset: Mapping[str, Any],
    number: Mapping[int | str, int],
    category_ids: Collection[int],
    with_masks: bool,
) -> dict[str, Any]:
    annotations: list[dict[str, Any]] = []
    for annotation in dataset["annotations"]:
        if annotation["category_id"] not in category_ids:
            continue
        keys = ("category_id", "bbox", "area", "iscrowd")
        copied = {key: annotation[key] for key in keys if key in annotation}
        # From 1: pycocotools takes a match with the annotation of id 0 for none.
        copied |= {"id": len(annotations) + 1, "image_id": number[annotation["image_id"]]}
        copied.setdefault("iscrowd", 0)
        if with_masks:
            copied["segmentation"] = annotation["segmentation"]
        annotations.append(copied)
    images = [
        {"id": number[image["id"]], "height": image["height"], "width": image["width"]}
        for image in dataset["images"]
    ]
    categories = [
        {"id": c["id"], "name": c["name"]} for c in dataset["categories"] if c["id"] in category_ids
    ]
    return {"images": images, "annotations": annotations, "categories": categories}


def _load_hotcoco(
    truth: dict[str, Any], images: np.ndarray, detections: CocoDetections, iou_type: str
) -> Any:
    import hotcoco

    _USED_IN.add(os.getpid())
    rows = np.column_stack(
        [images, detections.boxes, detections.scores, detections.category_ids]
    ).astype(np.float64)
    with contextlib.redirect_stdout(io.StringIO()):
        fast_truth = hotcoco.COCO(truth)
        if not len(rows):
            found = fast_truth.loadRes([])
        elif iou_type == "bbox":
            found = fast_truth.loadRes(rows)
        else:
            found = fast_truth.loadRes(rows, segmentation=detections.masks)
            # Rows have boxes, and so it takes the areas of these.
            areas = [float(mask_util.area(mask)) for mask in detections.masks]
            found.update_anns(ids=np.arange(1, len(rows) + 1), area=areas)
        return hotcoco.COCOeval(fast_truth, found, iou_type)


def _load_pycocotools(
    truth: dict[str, Any], images: np.ndarray, detections: CocoDetections, iou_type: str
) -> Any:
    key = "segmentation" if iou_type == "segm" else "bbox"
    shapes = detections.masks if iou_type == "segm" else detections.boxes.tolist()
    results = [
        {"image_id": image, "category_id": category, "score": score, key: shape}
        for image, category, score, shape in zip(
            images.tolist(),
            detections.category_ids.tolist(),
            detections.scores.tolist(),
            shapes,
            strict=True,
        )
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        slow_truth, found = pycocotools.coco.COCO(), pycocotools.coco.COCO()
        slow_truth.dataset = truth
        slow_truth.createIndex()
        if results:
            found = slow_truth.loadRes(results)
        else:  # which loadRes cannot read
            found.dataset = {**truth, "annotations": []}
            found.createIndex()
        return pycocotools.cocoeval.COCOeval(slow_truth, found, iou_type)


def _summary(precision: np.ndarray, recall: np.ndarray) -> np.ndarray:
    def mean(values: np.ndarray) -> float:
        counted = values[values > -1]
        return float(np.mean(counted)) if counted.size else -1.0

    def ap(area: int, threshold: float | None = None) -> float:
        rows = precision if threshold is None else precision[_PARAMS.iouThrs == threshold]
        return mean(rows[:, :, :, area, -1])

    areas = range(1, len(_PARAMS.areaRng))
    return np.array(
        [
            *(ap(0), ap(0, 0.5), ap(0, 0.75)),
            *(ap(area) for area in areas),
            *(mean(recall[:, :, 0, limit]) for limit in range(recall.shape[-1])),
            *(mean(recall[:, :, area, -1]) for area in areas),
        ]
    )
