"""COCO-style box and mask AP for any registered dataset."""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.data.datasets.coco import convert_to_coco_dict
from detectron2.utils.file_io import PathManager
from tabulate import tabulate

from d2ft.evaluation.box_predictions import (
    BoxEvaluator,
    ImageId,
    ImagePredictions,
    require_images,
)
from d2ft.evaluation.coco_ap import (
    CocoDetections,
    CocoNumbers,
    describe_backend,
    evaluate_coco,
    fastest_backend,
    join_categories,
)
from d2ft.evaluation.predictions import category_ids
from d2ft.progress import open_bar

logger = logging.getLogger(__name__)

# So many predictions are counted at once, of some classes; always all of a class. The arrays of
# COCO's counting take about 1 kB a prediction.
_PREDICTIONS_AT_ONCE = 500_000


class CocoEvaluator(BoxEvaluator):
    """
    COCO's AP and AR of boxes and masks.

    Gives the results of Detectron2's ``COCOEvaluator``, and the six AR beside them, but:

    1. The ground truth is always that of the registered dataset. Detectron2 writes a converted
       dataset to the output folder, remembers that file in the metadata of the dataset and uses it
       in later runs, also when the dataset has changed.
    2. hotcoco counts where it is installed, with the numbers of pycocotools.
    3. Predictions are kept in arrays and counted some classes at a time: 40,000 images with 100
       masks each, of 80 classes, take 2.7 GiB at most (``tools/benchmark_memory.py``). All of one
       class are counted at once, which a million of it does within 3 GiB.
    4. Predictions are checked, and none at all are an AP of 0, not of nan.
    """

    def __init__(
        self,
        dataset_name: str,
        tasks: Sequence[str],
        *,
        max_dets_per_image: int | None = None,
        result_names: Mapping[str, str] | None = None,
    ) -> None:
        """
        Prepare for a dataset.

        Args:
            dataset_name: a registered dataset.
            tasks: of "bbox", "segm".
            max_dets_per_image: the detections of an image and class that AP counts, best first;
                100 is COCO's own and the default.
            result_names: task -> key in the results, where another evaluator has the task's name.
        """
        super().__init__(dataset_name, with_masks="segm" in tasks)
        self._tasks = sorted(tasks)
        self._max_dets = sorted((1, 10, max_dets_per_image or 100))
        self._result_names = dict(result_names or {})

    def _evaluate_images(
        self, by_image: dict[ImageId, ImagePredictions]
    ) -> dict[str, dict[str, float]]:
        self._category_ids = category_ids(self._dataset_name)
        truth = _ground_truth(self._dataset_name)
        if "annotations" not in truth:
            logger.info("%s has no annotations to evaluate on", self._dataset_name)
            return {}
        sizes = {image["id"]: (image["height"], image["width"]) for image in truth["images"]}
        require_images(self._dataset_name, by_image, sizes)
        found = _AllPredictions(by_image, self._category_ids)
        return {
            self._result_names.get(task, task): self._task_results(task, truth, found)
            for task in self._tasks
        }

    def _task_results(
        self, task: str, truth: Mapping[str, Any], found: "_AllPredictions"
    ) -> dict[str, float]:
        backend, parts = fastest_backend(), []
        logger.info("%s counts COCO's %s AP", describe_backend(backend), task)
        with open_bar(total=len(found.classes), desc=f"COCO {task} AP", unit="prediction") as bar:
            for classes in _chunks(np.bincount(found.classes, minlength=len(self._category_ids))):
                chosen = found.of(classes, with_masks=task == "segm")
                parts.append(
                    evaluate_coco(
                        truth,
                        chosen,
                        task,
                        max_dets=self._max_dets,
                        category_ids=[self._category_ids[c] for c in classes],
                        backend=backend,
                    )
                )
                bar.update(len(chosen.scores))
        return self._results(task, join_categories(parts))

    def _results(self, task: str, numbers: CocoNumbers) -> dict[str, float]:
        names = ("AP", "AP50", "AP75", "APs", "APm", "APl")
        recalls = [f"AR@{limit}" for limit in self._max_dets]
        recalls += [f"AR{size}@{self._max_dets[-1]}" for size in "sml"]
        results = {
            name: float(value) * 100 if value >= 0 else float("nan")
            for name, value in zip((*names, *recalls), numbers.stats, strict=True)
        }
        rows = zip(results, results.values(), strict=True)
        logger.info("COCO's %s AP and AR in percent:\n%s", task, tabulate(rows, floatfmt=".3f"))
        if len(self._classes) == 1:  # as in Detectron2: it would be AP once more
            return results
        by_class = {}
        for index, name in enumerate(self._classes):
            precision = numbers.eval["precision"][:, :, index, 0, -1]
            precision = precision[precision > -1]
            by_class[f"AP-{name}"] = float(precision.mean() * 100) if precision.size else np.nan
        rows = zip(self._classes, by_class.values(), strict=True)
        table = tabulate(rows, headers=("class", "AP"), floatfmt=".3f")
        logger.info("COCO's %s AP by class in percent:\n%s", task, table)
        return {**results, **by_class}


class _AllPredictions:
    """
    The predictions for all images, one after the other in arrays.

    Attributes:
        classes: (N,) int32.
    """

    def __init__(self, by_image: dict[ImageId, ImagePredictions], ids: Sequence[int]) -> None:
        self._category_ids = np.array(ids)
        self._image_ids = list(by_image)
        lengths = [len(found.scores) for found in by_image.values()]
        self._ends = np.cumsum([0, *lengths])
        total = int(self._ends[-1])
        self.classes = np.empty(total, np.int32)
        self._boxes = np.empty((total, 4), np.float32)
        self._scores = np.empty(total, np.float64)
        self._masks = []
        for i, image_id in enumerate(self._image_ids):
            found = by_image[image_id]
            rows = slice(self._ends[i], self._ends[i + 1])
            self.classes[rows], self._scores[rows] = found.classes, found.scores
            self._boxes[rows] = found.boxes
            self._masks.append(found.masks)

    def of(self, classes: Sequence[int], *, with_masks: bool) -> CocoDetections:
        """Return the predictions of these classes in COCO's terms."""
        rows = np.flatnonzero(np.isin(self.classes, classes))
        images = np.searchsorted(self._ends, rows, side="right") - 1
        boxes = self._boxes[rows]
        # In float32, as Detectron2 does.
        boxes[:, 2:] -= boxes[:, :2]
        places = rows - self._ends[images]
        return CocoDetections(
            image_ids=[self._image_ids[i] for i in images],
            category_ids=self._category_ids[self.classes[rows]],
            boxes=boxes.astype(np.float64),
            scores=self._scores[rows],
            masks=[self._masks[i][j] for i, j in zip(images, places, strict=True)]
            if with_masks
            else [],
        )


def _chunks(counts: np.ndarray) -> Iterator[list[int]]:
    """Yield runs of classes that have at most _PREDICTIONS_AT_ONCE together, or are one."""
    chunk: list[int] = []
    for index, count in enumerate(counts):
        if chunk and counts[chunk].sum() + count > _PREDICTIONS_AT_ONCE:
            yield chunk
            chunk = []
        chunk.append(index)
    yield chunk


def _ground_truth(dataset_name: str) -> dict[str, Any]:
    """Return the dataset in the form of https://cocodataset.org/#format-data."""
    json_file = MetadataCatalog.get(dataset_name).get("json_file")
    if json_file is None:
        return dict(convert_to_coco_dict(dataset_name))
    with open(PathManager.get_local_path(json_file), encoding="utf-8") as file:
        return dict(json.load(file))
