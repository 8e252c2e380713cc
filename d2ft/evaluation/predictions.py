"""
Predictions in COCO's results form, and the file of them that a run leaves.

One prediction is ``{"image_id", "category_id", "bbox", "score", "segmentation"}``: ``bbox`` is
``[x, y, width, height]`` in pixels, ``segmentation`` a run-length code, there only if the model
has masks: https://cocodataset.org/#format-results. ``category_id`` is that of the dataset's
annotation file, or, for a dataset without one, the index into its classes.
"""

import collections
import json
import logging
import math
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm

from d2ft.errors import UserError
from d2ft.evaluation.masks import RleMasks, run_length_codes
from d2ft.files import atomic_write

logger = logging.getLogger(__name__)

PREDICTIONS_FOLDER = "predictions"

# What a process sends at once; the main process never holds more than this of each.
_CHUNK_BYTES = 16 << 20


def predictions_file(output_dir: str | Path, dataset_name: str) -> Path:
    """Return where a run keeps the predictions on a dataset."""
    return Path(output_dir) / PREDICTIONS_FOLDER / f"{dataset_name}.json"


def category_ids(dataset_name: str) -> list[int]:
    """Return for each class of a dataset the category id that files of predictions have."""
    metadata = MetadataCatalog.get(dataset_name)
    of_file = metadata.get("thing_dataset_id_to_contiguous_id")
    if of_file is None:
        return list(range(len(metadata.thing_classes)))
    return sorted(of_file, key=of_file.__getitem__)


def results_json(results: dict[str, Any]) -> str:
    """Return results as JSON with every digit; a metric that could not be computed is null."""
    return json.dumps(_without_nan(results), indent=2, allow_nan=False)


def instances_to_results(
    instances: Instances, image_id: int | str, ids: Sequence[int]
) -> list[dict[str, Any]]:
    """
    Return the predictions of one image in results form.

    Numbers keep every digit, so that :func:`results_to_instances` gives the same tensors again.

    Args:
        instances: on the CPU, with ``pred_boxes``, ``scores``, ``pred_classes`` and, of a model
            with masks, ``pred_masks``.
        image_id: of the dataset dict.
        ids: of :func:`category_ids`.

    Raises:
        UserError: if a box or a score is not finite.
    """
    # In float64 the differences of float32 corners are kept.
    boxes = instances.pred_boxes.tensor.double()
    finite = boxes.isfinite().all(dim=1) & instances.scores.isfinite()
    if not finite.all():
        raise UserError(
            f"{int((~finite).sum())} of {len(instances)} predictions for the image {image_id!r} "
            "have a box or a score that is not finite; the model has diverged, or its weights do "
            "not fit it"
        )
    boxes[:, 2:] -= boxes[:, :2]
    results = [
        {"image_id": image_id, "category_id": ids[category], "bbox": box, "score": score}
        for category, box, score in zip(
            instances.pred_classes.tolist(), boxes.tolist(), instances.scores.tolist(), strict=True
        )
    ]
    if instances.has("pred_masks"):
        for result, rle in zip(results, run_length_codes(instances.pred_masks), strict=True):
            result["segmentation"] = rle
    return results


def results_to_instances(
    results: Sequence[dict[str, Any]],
    size: tuple[int, int],
    class_of_category: dict[int, int],
    *,
    with_masks: bool,
) -> Instances:
    """
    Return the predictions of one image as a model gives them.

    Scores are float32, as of a model, unless one of them has more digits: then they are float64.

    Args:
        results: of one image, checked.
        size: (height, width) of the image.
        class_of_category: the index of the class by category id.
        with_masks: ``pred_masks`` is to be there: :class:`RleMasks`.
    """
    boxes = torch.tensor([r["bbox"] for r in results], dtype=torch.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    scores = torch.tensor([r["score"] for r in results], dtype=torch.float64)
    instances = Instances(size)
    instances.pred_boxes = Boxes(boxes.float())
    instances.scores = scores.float() if (scores.float() == scores).all() else scores
    instances.pred_classes = torch.tensor(
        [class_of_category[r["category_id"]] for r in results], dtype=torch.int64
    )
    if with_masks:
        instances.pred_masks = RleMasks([r["segmentation"] for r in results])
    return instances


def _without_nan(results: Any) -> Any:
    if isinstance(results, dict):
        return {key: _without_nan(value) for key, value in results.items()}
    return None if isinstance(results, float) and math.isnan(results) else results


class PredictionWriter(DatasetEvaluator):
    """
    Writes all predictions to one file in results form; measures nothing.

    Each process writes its share beside the target while inference runs, and the main process
    puts the shares together in the order of their ranks. They are sent, not read from its disk,
    so machines without a common file system need nothing else. The file is there whole or not at
    all. An image without predictions does not occur in it.
    """

    def __init__(self, dataset_name: str, path: str | Path) -> None:
        """
        Prepare for a dataset.

        Args:
            dataset_name: a registered dataset.
            path: the file, e.g. of :func:`predictions_file`; its folder is made.
        """
        self._category_ids = category_ids(dataset_name)
        self._path = Path(path)
        self._share: Any = None

    def reset(self) -> None:
        """Forget all predictions, and remove the file of an evaluation before."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if comm.is_main_process():
            self._path.unlink(missing_ok=True)
        if self._share is not None:
            self._share.close()
        # Has no name, so it goes with its process, however that ends.
        self._share = tempfile.TemporaryFile(dir=self._path.parent)  # noqa: SIM115

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """
        Write the predictions of a batch.

        Raises:
            UserError: as :func:`instances_to_results`.
        """
        for sample, output in zip(inputs, outputs, strict=True):
            instances = output["instances"].to("cpu")
            for result in instances_to_results(instances, sample["image_id"], self._category_ids):
                self._share.write(b",\n" + json.dumps(result, separators=(",", ":")).encode())

    def evaluate(self) -> dict[str, Any]:
        """Put the file together; return no results."""
        if comm.is_main_process():
            with atomic_write(self._path, "wb") as file:
                file.write(b"[")
                # Every prediction begins with the comma that parts it from the one before.
                skipped = 1
                for data in self._gather():
                    file.write(data[skipped:])
                    skipped = 0
                file.write(b"\n]\n")
            logger.info("The predictions are in %s", self._path)
        else:
            collections.deque(self._gather(), maxlen=0)
        self._share.close()
        return {}

    def _gather(self) -> Iterator[bytes]:
        """Yield all shares in order on the main process, and take part in it on the others."""
        sizes = comm.all_gather(self._share.tell())
        self._share.seek(0)
        for rank, size in enumerate(sizes):
            for _ in range(0, size, _CHUNK_BYTES):
                mine = self._share.read(_CHUNK_BYTES) if rank == comm.get_rank() else b""
                gathered = comm.gather(mine)
                if gathered:
                    yield gathered[rank]
