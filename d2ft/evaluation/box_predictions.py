"""Collect the boxes that a model finds, image by image, over all processes."""

from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.structures import BoxMode
from detectron2.utils import comm

from d2ft.errors import UserError

# boxes (n, 4) XYXY, scores (n,), classes (n,), as float32, float32 and int64
ImagePredictions = tuple[np.ndarray, np.ndarray, np.ndarray]


class BoxEvaluator(DatasetEvaluator):
    """
    Keeps boxes, scores and classes of each image, and gathers them at the end.

    A subclass says in ``_evaluate`` what it counts. An image without predictions is an image in
    which nothing was found. Scores keep every digit.
    """

    def __init__(self, dataset_name: str) -> None:
        """Prepare for a registered dataset."""
        self._dataset_name = dataset_name
        self._classes: list[str] = list(MetadataCatalog.get(dataset_name).thing_classes)
        self.reset()

    def reset(self) -> None:
        """Forget all predictions."""
        self._predictions: list[tuple[int | str, ImagePredictions, Any]] = []

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """
        Keep the predictions of a batch.

        Raises:
            UserError: if a box or score is not finite, or a class is not one of the dataset's.
        """
        for sample, output in zip(inputs, outputs, strict=True):
            instances = output["instances"].to("cpu")
            boxes = instances.pred_boxes.tensor.numpy()
            scores, classes = instances.scores.numpy(), instances.pred_classes.numpy()
            image_id = sample["image_id"]
            finite = np.isfinite(boxes).all(axis=1) & np.isfinite(scores)
            if not finite.all():
                raise UserError(
                    f"{self._dataset_name}: {int((~finite).sum())} of {len(scores)} predictions "
                    f"for the image {image_id!r} have a box or a score that is not finite; the "
                    "model has diverged, or its weights do not fit it"
                )
            wrong = classes[(classes < 0) | (classes >= len(self._classes))]
            if len(wrong):
                raise UserError(
                    f"{self._dataset_name}: a prediction for the image {image_id!r} is of class "
                    f"{wrong[0]}, but the dataset has {len(self._classes)} classes, counted from 0"
                )
            more = self._encode_masks(instances)
            self._predictions.append((image_id, (boxes, scores, classes), more))

    def evaluate(self) -> dict[str, dict[str, float]]:
        """
        Return task -> metric -> percent on the main process and nothing on the others.

        Raises:
            UserError: if there are predictions for an image that the dataset does not have, or
                twice for the same.
        """
        gathered = comm.gather(self._predictions, dst=0)
        if not comm.is_main_process():
            return {}
        records = DatasetCatalog.get(self._dataset_name)
        known = {record["image_id"] for record in records}
        by_image: dict[int | str, tuple[ImagePredictions, Any]] = {}
        for share in gathered:
            for image_id, boxes, more in share:
                if image_id not in known:
                    raise UserError(
                        f"{self._dataset_name}: there are predictions for the image {image_id!r}, "
                        "which the dataset does not have"
                    )
                if image_id in by_image:
                    raise UserError(
                        f"{self._dataset_name}: the image {image_id!r} was predicted twice; every "
                        "image is evaluated once"
                    )
                by_image[image_id] = boxes, more
        nothing = np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64)
        return self._evaluate(
            records, [by_image.get(record["image_id"], (nothing, [])) for record in records]
        )

    def _encode_masks(self, instances: Any) -> Any:
        """Return what ``_evaluate`` needs of the masks; here nothing."""
        return []

    def _evaluate(
        self,
        records: list[dict[str, Any]],
        predictions: list[tuple[ImagePredictions, Any]],
    ) -> dict[str, dict[str, float]]:
        raise NotImplementedError


def annotation_boxes(annotations: list[dict[str, Any]]) -> np.ndarray:
    """Return the (n, 4) XYXY boxes of annotations in float64."""
    boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations]
    return np.array(boxes, dtype=np.float64).reshape(-1, 4)
