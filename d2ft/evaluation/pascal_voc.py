"""Pascal VOC's AP of boxes and masks as an evaluator."""

import logging
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
from detectron2.data import MetadataCatalog
from tabulate import tabulate

from d2ft.evaluation.box_predictions import BoxEvaluator, ImagePredictions, annotation_boxes
from d2ft.evaluation.pascal_voc_ap import average_precision, best_matches, box_overlaps
from d2ft.progress import open_bar

logger = logging.getLogger(__name__)

# As Detectron2 writes them: 55 / 100 is not what np.arange gives.
_THRESHOLDS = [percent / 100 for percent in range(50, 100, 5)]


class PascalVocEvaluator(BoxEvaluator):
    """
    Same as Detectron2's ``PascalVOCDetectionEvaluator``, but in memory, and with masks.

    It differs where that one loses something: scores and boxes keep all digits (there, scores
    have three, so that many are equal, and coordinates one); equal scores count in the order of
    the images (there, in any); a class without objects is nan and left out of the mean (there, a
    division by zero); and the truth is that of the registered dataset, ``difficult`` and all, not
    of XML files, so that an object without width or height, which the loader leaves out, is not
    missed. Where none of this matters the numbers are Detectron2's:
    ``tests/parity/test_evaluators_official.py``.

    The metadata entry ``year`` is 2007 for the AP at 11 recalls; other years are an area.
    """

    def __init__(self, dataset_name: str, tasks: tuple[str, ...] = ("bbox",)) -> None:
        """
        Prepare for a dataset.

        Args:
            dataset_name: a registered dataset.
            tasks: of "bbox", "segm". Masks are judged on the images all of whose objects have
                one, which in VOC are those with a SegmentationObject file.
        """
        super().__init__(dataset_name, with_masks="segm" in tasks)
        self._tasks = tasks
        self._eleven_points = int(MetadataCatalog.get(dataset_name).get("year", 2012)) == 2007

    def _evaluate(
        self,
        records: list[dict[str, Any]],
        predictions: list[ImagePredictions],
    ) -> dict[str, dict[str, float]]:
        images = list(zip(records, predictions, strict=True))
        results = {}
        for task in self._tasks:
            if task == "segm":
                images = [pair for pair in images if _has_all_masks(pair[0])]
                logger.info(
                    "%s: masks are judged on the %d of %d images that have them",
                    self._dataset_name,
                    len(images),
                    len(records),
                )
            results[task] = self._task_results(task, images)
        return results

    def _task_results(self, task: str, images: list[Any]) -> dict[str, float]:
        by_class = np.array(
            [
                self._class_results(task, index, images)
                for index in open_bar(
                    range(len(self._classes)), desc=f"VOC {task} AP", unit="class"
                )
            ]
        ).reshape(-1, len(_THRESHOLDS))
        by_class *= 100
        present = by_class[~np.isnan(by_class).any(axis=1)]
        means = present.mean(axis=0) if len(present) else np.full(len(_THRESHOLDS), np.nan)
        results = {"AP": float(means.mean()), "AP50": float(means[0]), "AP75": float(means[5])}
        results |= {
            f"AP-{name}": float(row.mean())
            for name, row in zip(self._classes, by_class, strict=True)
        }
        results |= {
            f"AP50-{name}": float(row[0]) for name, row in zip(self._classes, by_class, strict=True)
        }
        rows = [(name, results[f"AP-{name}"], results[f"AP50-{name}"]) for name in self._classes]
        rows.append(("average", results["AP"], results["AP50"]))
        table = tabulate(rows, headers=("class", "AP", "AP50"), floatfmt=".3f")
        kind = "at 11 recalls" if self._eleven_points else "area"
        logger.info("Pascal VOC %s AP (%s) in percent:\n%s", task, kind, table)
        return results

    def _class_results(self, task: str, index: int, images: list[Any]) -> list[float]:
        overlaps, all_scores, difficult = [], [], []
        for record, (boxes, scores, classes, masks) in images:
            truth = [
                a
                for a in record["annotations"]
                if a["category_id"] == index and not a.get("iscrowd")
            ]
            rows = np.flatnonzero(classes == index)
            if task == "segm":
                objects = [_run_length_code(a["segmentation"], record) for a in truth]
                found = [masks[row] for row in rows]
                matrix = (
                    mask_util.iou(found, objects, [0] * len(objects)) if found and objects else []
                )
                overlaps.append(np.reshape(matrix, (len(found), len(objects))))
            else:
                overlaps.append(box_overlaps(boxes[rows], annotation_boxes(truth)))
            all_scores.append(scores[rows])
            difficult.append(np.array([bool(a.get("difficult", 0)) for a in truth], dtype=bool))
        matches = best_matches(overlaps, all_scores, difficult)
        return [
            average_precision(matches, threshold, eleven_points=self._eleven_points)
            for threshold in _THRESHOLDS
        ]


def _has_all_masks(record: dict[str, Any]) -> bool:
    annotations = record["annotations"]
    return bool(annotations) and all("segmentation" in a for a in annotations)


def _run_length_code(segmentation: Any, record: dict[str, Any]) -> dict[str, Any]:
    size = record["height"], record["width"]
    if isinstance(segmentation, list):
        return dict(mask_util.merge(mask_util.frPyObjects(segmentation, *size)))
    if isinstance(segmentation["counts"], list):
        return dict(mask_util.frPyObjects(segmentation, *size))
    return dict(segmentation)
