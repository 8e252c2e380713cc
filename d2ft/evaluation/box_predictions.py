"""Collect the predictions of a model, image by image, over all processes."""

import logging
import time
from typing import Any, NamedTuple

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.structures import BoxMode, Instances
from detectron2.utils import comm

from d2ft.errors import UserError
from d2ft.evaluation.masks import PackedRles, run_length_codes

logger = logging.getLogger(__name__)

ImageId = int | str


class ImagePredictions(NamedTuple):
    """
    The predictions for one image, as the model gives them.

    Attributes:
        boxes: (n, 4) XYXY in pixels, float32.
        scores: (n,) float32, or float64 where a file had more digits.
        classes: (n,) int64.
        masks: n run-length codes; none where no task needs masks.
    """

    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray
    masks: PackedRles


NO_PREDICTIONS = ImagePredictions(
    np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64), PackedRles([])
)


class BoxEvaluator(DatasetEvaluator):
    """
    Keeps boxes, scores, classes and masks of each image, and gathers them at the end.

    A subclass says in ``_evaluate`` what it counts. An image without predictions is an image in
    which nothing was found. Scores keep every digit. Masks are kept as run-length codes, so that
    a prediction takes some 30 bytes and the length of its code.
    """

    def __init__(self, dataset_name: str, *, with_masks: bool = False) -> None:
        """
        Prepare for a registered dataset.

        Args:
            dataset_name: its name.
            with_masks: keep masks as well.
        """
        self._dataset_name = dataset_name
        self._with_masks = with_masks
        self._classes: list[str] = list(MetadataCatalog.get(dataset_name).thing_classes)
        self.reset()

    def reset(self) -> None:
        """Forget all predictions."""
        self._predictions: list[tuple[ImageId, ImagePredictions]] = []

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """
        Keep the predictions of a batch.

        Raises:
            UserError: if a box or score is not finite, a class is not one of the dataset's, or
                the masks are not of the size of the predictions.
        """
        for sample, output in zip(inputs, outputs, strict=True):
            image_id, instances = sample["image_id"], output["instances"].to("cpu")
            try:
                self._predictions.append((image_id, self._check(instances)))
            except ValueError as error:
                raise UserError(
                    f"{self._dataset_name}: what was predicted for the image {image_id!r} {error}"
                ) from error

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
        by_image: dict[ImageId, ImagePredictions] = {}
        for share in gathered:
            for image_id, found in share:
                if image_id in by_image:
                    raise UserError(
                        f"{self._dataset_name}: the image {image_id!r} was predicted twice; every "
                        "image is evaluated once"
                    )
                by_image[image_id] = found
        start = time.perf_counter()
        results = self._evaluate_images(by_image)
        seconds, found = time.perf_counter() - start, sum(len(f.scores) for f in by_image.values())
        logger.info(
            "%s: %d predictions on %d images evaluated in %.1f s, %.2f ms an image",
            *(self._dataset_name, found, len(by_image), seconds),
            seconds / max(len(by_image), 1) * 1e3,
        )
        return results

    def _check(self, instances: Instances) -> ImagePredictions:
        boxes = instances.pred_boxes.tensor.numpy()
        scores, classes = instances.scores.numpy(), instances.pred_classes.numpy()
        finite = np.isfinite(boxes).all(axis=1) & np.isfinite(scores)
        if not finite.all():
            raise ValueError(
                f"has a box or a score that is not finite in {int((~finite).sum())} of "
                f"{len(scores)} cases; the model has diverged, or its weights do not fit it"
            )
        wrong = classes[(classes < 0) | (classes >= len(self._classes))]
        if len(wrong):
            raise ValueError(
                f"is of class {wrong[0]}, but the dataset has {len(self._classes)} classes, "
                "counted from 0"
            )
        rles = run_length_codes(instances.pred_masks) if self._with_masks else []
        masks = PackedRles(rles)
        if self._with_masks and len(masks) != len(scores):
            raise ValueError(f"has {len(masks)} masks for {len(scores)} scores")
        return ImagePredictions(boxes, scores, classes, masks)

    def _evaluate_images(
        self, by_image: dict[ImageId, ImagePredictions]
    ) -> dict[str, dict[str, float]]:
        records = DatasetCatalog.get(self._dataset_name)
        sizes = {r["image_id"]: (r.get("height"), r.get("width")) for r in records}
        require_images(self._dataset_name, by_image, sizes)
        predictions = [by_image.get(record["image_id"], NO_PREDICTIONS) for record in records]
        return self._evaluate(records, predictions)

    def _evaluate(
        self, records: list[dict[str, Any]], predictions: list[ImagePredictions]
    ) -> dict[str, dict[str, float]]:
        raise NotImplementedError


def require_images(
    dataset_name: str,
    by_image: dict[ImageId, ImagePredictions],
    sizes: dict[Any, tuple[Any, Any]],
) -> None:
    """
    Refuse predictions for images that are not there, and masks of another size than the image.

    Args:
        dataset_name: for the message.
        by_image: image id -> predictions.
        sizes: image id -> (height, width), of all images of the dataset.

    Raises:
        UserError: with the first such image.
    """
    for image_id, found in by_image.items():
        if image_id not in sizes:
            raise UserError(
                f"{dataset_name}: there are predictions for the image {image_id!r}, which the "
                "dataset does not have"
            )
        if found.masks.size not in (None, sizes[image_id]):
            raise UserError(
                f"{dataset_name}: the masks predicted for the image {image_id!r} have (height, "
                f"width) {found.masks.size}; the image has {sizes[image_id]}"
            )


def annotation_boxes(annotations: list[dict[str, Any]]) -> np.ndarray:
    """Return the (n, 4) XYXY boxes of annotations in float64."""
    boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations]
    return np.array(boxes, dtype=np.float64).reshape(-1, 4)
