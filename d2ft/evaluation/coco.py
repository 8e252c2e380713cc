"""COCO-style box and mask AP for any registered dataset."""

import itertools
import logging
import tempfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator

from d2ft.errors import UserError
from d2ft.evaluation.coco_ap import describe_backend, evaluate_coco, fastest_backend

logger = logging.getLogger(__name__)


class CocoEvaluator(COCOEvaluator):
    """
    Same as :class:`COCOEvaluator`, but for three things.

    1. The ground truth is always that of the registered dataset. Detectron2 writes a converted
       dataset to the output folder, remembers that file in the metadata of the dataset and uses it
       in later runs, also when the dataset has changed. Here it is made anew in a temporary folder
       for every evaluator.
    2. hotcoco counts where it is installed, with the numbers of pycocotools.
    3. Predictions are checked, and none at all are an AP of 0, not of nan.
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
        Prepare the ground truth.

        Args:
            dataset_name: a registered dataset.
            tasks: of "bbox", "segm".
            max_dets_per_image: the detections of an image that AP counts, best first; 100 is
                COCO's own and the default.
            result_names: task -> key in the results, where another evaluator has the task's name.
        """
        metadata = MetadataCatalog.get(dataset_name)
        converted = not hasattr(metadata, "json_file")
        with tempfile.TemporaryDirectory(prefix="d2ft_coco_") as folder:
            super().__init__(
                dataset_name,
                tasks=tuple(tasks),
                output_dir=folder,
                max_dets_per_image=max_dets_per_image,
                use_fast_impl=False,
                allow_cached_coco=False,
            )
        if converted:
            del metadata.json_file
        self._output_dir = None
        self._dataset_name = dataset_name
        self._result_names = dict(result_names or {})

    def evaluate(self, img_ids: Sequence[int] | None = None) -> dict[str, Any]:
        """
        Return task -> metric -> percent on the main process and nothing on the others.

        Raises:
            UserError: for a prediction that no model of this dataset can make: of an unknown image
                or class, with a mask of another size, not finite, or of an image seen twice.
        """
        results = super().evaluate(img_ids)
        return OrderedDict((self._result_names.get(task, task), v) for task, v in results.items())

    def _eval_predictions(
        self, predictions: list[dict[str, Any]], img_ids: Sequence[int] | None = None
    ) -> None:
        if not self._do_evaluation:
            logger.info("%s has no annotations to evaluate on", self._dataset_name)
            return
        self._require_known_images([prediction["image_id"] for prediction in predictions])
        results = list(itertools.chain.from_iterable(p["instances"] for p in predictions))
        results = self._with_category_ids(results)
        backend = fastest_backend()
        for task in sorted(self._tasks):
            logger.info(
                "Counting %d predictions for COCO's %s AP with %s ...",
                len(results),
                task,
                describe_backend(backend),
            )
            numbers = evaluate_coco(
                self._coco_api.dataset,
                results,
                task,
                max_dets=self._max_dets_per_image,
                image_ids=img_ids,
                backend=backend,
            )
            self._results[task] = self._derive_coco_results(
                numbers, task, class_names=self._metadata.get("thing_classes")
            )

    def _require_known_images(self, image_ids: list[int | str]) -> None:
        seen: set[int | str] = set()
        for image_id in image_ids:
            if image_id not in self._coco_api.imgs:
                raise UserError(
                    f"{self._dataset_name}: there are predictions for the image {image_id!r}, "
                    "which the dataset does not have"
                )
            if image_id in seen:
                raise UserError(
                    f"{self._dataset_name}: the image {image_id!r} was predicted twice; every "
                    "image is evaluated once"
                )
            seen.add(image_id)

    def _with_category_ids(self, results: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the results with the category ids of the dataset, once all are sound."""
        classes = self._metadata.get("thing_classes")
        to_contiguous = self._metadata.get("thing_dataset_id_to_contiguous_id")
        if to_contiguous is None:
            to_contiguous = {i: i for i in range(len(classes))}
        category_of_class = {index: category for category, index in to_contiguous.items()}
        for result in results:
            image = self._coco_api.imgs[result["image_id"]]
            where = f"{self._dataset_name}: a prediction for the image {result['image_id']!r}"
            if result["category_id"] not in category_of_class:
                raise UserError(
                    f"{where} is of class {result['category_id']}, but the dataset has "
                    f"{len(category_of_class)} classes, counted from 0"
                )
            if not np.isfinite([*result["bbox"], result["score"]]).all():
                raise UserError(
                    f"{where} has the box {result['bbox']} and the score {result['score']}; both "
                    "have to be finite"
                )
            size = [image["height"], image["width"]]
            if "segm" in self._tasks and list(result["segmentation"]["size"]) != size:
                raise UserError(
                    f"{where} has a mask of (height, width) "
                    f"{tuple(result['segmentation']['size'])}; the image has {tuple(size)}"
                )
        return [{**r, "category_id": category_of_class[r["category_id"]]} for r in results]
