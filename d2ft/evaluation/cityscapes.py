"""The official Cityscapes instance metric as an evaluator."""

import logging
import time
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.structures import Instances
from detectron2.utils import comm
from PIL import Image
from tabulate import tabulate

from d2ft.errors import UserError
from d2ft.evaluation.cityscapes_ap import (
    MatchTable,
    average_precisions,
    index_instances,
    join_tables,
    match_frame,
    summarize,
)
from d2ft.labels import CITYSCAPES_INSTANCE_LABELS
from d2ft.progress import open_bar

logger = logging.getLogger(__name__)

_LABEL_ID_OF_NAME = {label.name: label.id for label in CITYSCAPES_INSTANCE_LABELS}


def require_official_classes(dataset_name: str) -> list[str]:
    """
    Return the classes of a dataset that the official metric is to judge.

    Raises:
        UserError: if one of them is not among the official eight.
    """
    classes = list(MetadataCatalog.get(dataset_name).thing_classes)
    unknown = [name for name in classes if name not in _LABEL_ID_OF_NAME]
    if unknown:
        raise UserError(
            f"dataset {dataset_name!r} has the class {unknown[0]!r}, which the Cityscapes "
            f"instance metric does not know; it knows {', '.join(_LABEL_ID_OF_NAME)}. "
            "Register the dataset with evaluator_type 'coco'"
        )
    return classes


class CityscapesInstanceEvaluator(DatasetEvaluator):
    """
    Official instance AP and AP50 of Cityscapes, in total and per class.

    The official AP50m and AP100m are not among them: they need the disparity of each frame, which
    the datasets here do not have, as cityscapesscripts leaves them out without.

    Each frame is compared with its ground truth as soon as it is predicted. What is kept of it
    are counts of pixels, some kilobytes, and no masks. There is no limit to the predictions of a
    frame; each takes about the time of decoding one mask. A frame without predictions counts as
    empty, and so does one that no process has seen. The average is over the official eight
    classes, also for a dataset with some of them.
    """

    def __init__(self, dataset_name: str) -> None:
        """
        Prepare for a dataset whose dicts have ``instance_file_name``.

        Raises:
            UserError: as :func:`require_official_classes`.
        """
        self._classes = require_official_classes(dataset_name)
        self._label_ids = [_LABEL_ID_OF_NAME[name] for name in self._classes]
        self._dataset_name = dataset_name
        self._files = {
            record["image_id"]: record["instance_file_name"]
            for record in DatasetCatalog.get(dataset_name)
        }
        self.reset()

    def reset(self) -> None:
        """Forget all predictions."""
        self._tables: dict[Any, MatchTable] = {}

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """
        Compare the predictions of a batch with the ground truth.

        Raises:
            UserError: if an image does not belong to the dataset or comes a second time, a score
                is not finite, a class is not one of the dataset's, or the masks have another size than the ground truth.
        """
        for sample, output in zip(inputs, outputs, strict=True):
            image_id = sample["image_id"]
            if image_id not in self._files:
                raise UserError(
                    f"the image {image_id!r} was predicted, but {self._dataset_name!r} has no such "
                    f"image; its ids are like {next(iter(self._files), None)!r}"
                )
            if image_id in self._tables:
                raise UserError(f"the image {image_id!r} was predicted twice")
            self._tables[image_id] = self._match(image_id, output["instances"].to("cpu"))

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Return ``{"segm": {"AP", "AP50", "AP-<class>", "AP50-<class>"}}`` in percent."""
        joined = join_tables(list(self._tables.values())) if self._tables else None
        gathered = comm.gather((list(self._tables), joined))
        if not comm.is_main_process():
            return {}
        seen = [image_id for image_ids, _ in gathered for image_id in image_ids]
        if len(seen) != len(set(seen)):
            twice = next(image_id for image_id in seen if seen.count(image_id) > 1)
            raise UserError(f"the image {twice!r} was predicted by two processes")
        tables = [table for _, table in gathered if table is not None]
        tables += self._empty_tables(set(self._files) - set(seen))
        if not tables:
            raise UserError(f"the dataset {self._dataset_name!r} has no images to evaluate")
        start = time.perf_counter()
        official = summarize(average_precisions(join_tables(tables)))
        logger.info(
            "%s: official AP of %d frames from their overlaps in %.1f s",
            *(self._dataset_name, len(self._files), time.perf_counter() - start),
        )
        results = {"AP": official["AP"], "AP50": official["AP50"]}
        for metric in ("AP", "AP50"):
            results |= {f"{metric}-{n}": official[f"{metric}-{n}"] for n in self._classes}
        rows = [(name, results[f"AP-{name}"], results[f"AP50-{name}"]) for name in self._classes]
        rows.append(("average", results["AP"], results["AP50"]))
        table = tabulate(rows, headers=("class", "AP", "AP50"), floatfmt=".3f")
        logger.info("Official Cityscapes instance AP in percent:\n%s", table)
        return {"segm": results}

    def _empty_tables(self, image_ids: set[Any]) -> list[MatchTable]:
        if not image_ids:
            return []
        logger.warning("%d frames were not predicted and count as empty", len(image_ids))
        return [
            self._match(image_id, None)
            for image_id in open_bar(sorted(image_ids), desc="Reading missing frames", unit="frame")
        ]

    def _match(self, image_id: Any, instances: Instances | None) -> MatchTable:
        path = self._files[image_id]
        try:
            with Image.open(path) as image:
                index = index_instances(np.asarray(image))
        except (OSError, SyntaxError, ValueError, TypeError) as error:
            raise UserError(f"the instance image {path} is broken: {error}") from error
        if instances is None or not len(instances):
            return match_frame(index, (), (), ())
        classes = instances.pred_classes
        wrong = classes[(classes < 0) | (classes >= len(self._classes))].tolist()
        if wrong:
            raise UserError(
                f"a prediction for the image {image_id!r} is of class {wrong[0]}, but "
                f"{self._dataset_name!r} has {len(self._classes)} classes, counted from 0"
            )
        if not instances.scores.isfinite().all():
            raise UserError(
                f"a prediction for the image {image_id!r} has a score that is not finite"
            )
        if instances.image_size != index.positions.shape:
            raise UserError(
                f"the predictions for the image {image_id!r} have the size {instances.image_size}, "
                f"and its ground truth {index.positions.shape} in {path}"
            )
        return match_frame(
            index,
            (mask.bool().numpy() for mask in instances.pred_masks),
            [self._label_ids[category] for category in classes.tolist()],
            instances.scores.tolist(),
        )
