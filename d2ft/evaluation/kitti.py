"""KITTI's official 2D detection metric as an evaluator."""

import logging
from typing import Any

import numpy as np
from detectron2.data import MetadataCatalog
from tabulate import tabulate

from d2ft.errors import UserError
from d2ft.evaluation.box_predictions import BoxEvaluator, ImagePredictions, annotation_boxes
from d2ft.evaluation.kitti_ap import (
    LEVELS,
    MIN_OVERLAP,
    KittiDetections,
    KittiObjects,
    kitti_average_precision,
)
from d2ft.progress import open_bar

logger = logging.getLogger(__name__)


def require_kitti_classes(dataset_name: str) -> list[str]:
    """
    Return those of KITTI's three benchmark classes that a dataset has, in KITTI's spelling.

    Raises:
        UserError: if it has none of them.
    """
    classes = {name.lower() for name in MetadataCatalog.get(dataset_name).thing_classes}
    judged = [name for name in MIN_OVERLAP if name.lower() in classes]
    if not judged:
        raise UserError(
            f"dataset {dataset_name!r} has none of the classes {', '.join(MIN_OVERLAP)} that the "
            "KITTI metric judges. Register the dataset with evaluator_type 'coco'"
        )
    return judged


class KittiEvaluator(BoxEvaluator):
    """
    KITTI's official AP of boxes, easy, moderate and hard, for Car, Pedestrian and Cyclist.

    The dataset's classes may be these three or more; the others are not judged. The dataset's
    dicts hold every line of a label file as an annotation, those of other types and DontCare with
    ``ignore`` = 1, each with its ``kitti_type``, ``truncated`` and ``occluded``. An annotation
    without ``kitti_type`` is of the type its class is called by.
    """

    def __init__(self, dataset_name: str) -> None:
        """
        Prepare for a dataset.

        Raises:
            UserError: as :func:`require_kitti_classes`.
        """
        self._judged = require_kitti_classes(dataset_name)
        super().__init__(dataset_name)

    def _evaluate(
        self,
        records: list[dict[str, Any]],
        predictions: list[ImagePredictions],
    ) -> dict[str, dict[str, float]]:
        objects = [self._objects(record) for record in records]
        detections = [
            KittiDetections([self._classes[c] for c in classes], boxes, scores)
            for boxes, scores, classes, _ in predictions
        ]
        found: dict[tuple[str, str], tuple[float, float]] = {}
        for name in open_bar(self._judged, desc="KITTI AP", unit="class"):
            found |= kitti_average_precision(objects, detections, {name: MIN_OVERLAP[name]})
        results = {}
        for at, suffix in enumerate(("", "-R11")):
            percent = {key: value[at] * 100 for key, value in found.items()}
            for level in LEVELS:
                values = [percent[name, level] for name in self._judged]
                results[f"AP-{level}{suffix}"] = _mean_of_present(values)
            results |= {f"AP-{name}-{lv}{suffix}": v for (name, lv), v in percent.items()}
        rows = [
            (name, *(results[f"AP-{name}-{level}"] for level in LEVELS)) for name in self._judged
        ]
        rows.append(("average", *(results[f"AP-{level}"] for level in LEVELS)))
        table = tabulate(rows, headers=("class", *LEVELS), floatfmt=".3f")
        logger.info("KITTI's 2D AP at 40 recall positions in percent:\n%s", table)
        return {"bbox": {"AP": results["AP-moderate"], **results}}

    def _objects(self, record: dict[str, Any]) -> KittiObjects:
        # A loader that clips boxes to the image keeps what the label file has.
        annotations = [{**a, "bbox": a.get("kitti_bbox", a["bbox"])} for a in record["annotations"]]
        return KittiObjects(
            [a.get("kitti_type", self._classes[a["category_id"]]) for a in annotations],
            annotation_boxes(annotations),
            np.array([a.get("truncated", 0.0) for a in annotations], dtype=np.float64),
            np.array([a.get("occluded", 0) for a in annotations], dtype=np.int64),
        )


def _mean_of_present(values: list[float]) -> float:
    """Return the mean without nan, which a class without objects has; nan if all have none."""
    present = [value for value in values if not np.isnan(value)]
    return sum(present) / len(present) if present else float("nan")
