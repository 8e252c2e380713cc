"""Evaluate predictions that were kept, without a model."""

import logging
import os
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog

from d2ft.errors import UserError
from d2ft.evaluation.build import build_evaluator
from d2ft.evaluation.prediction_file import PredictionFile
from d2ft.progress import open_bar

logger = logging.getLogger(__name__)


def evaluate_predictions(
    cfg: CfgNode, dataset_name: str, path: str | os.PathLike[str]
) -> dict[str, Any]:
    """
    Return the results of a file of predictions: of a run's own, what the run had.

    Args:
        cfg: says which metrics: those of ``build_evaluator(cfg, dataset_name)``.
        dataset_name: a registered dataset.
        path: a file in COCO's results form; see :mod:`d2ft.evaluation.predictions`.

    Returns:
        task -> metric -> percent.

    Raises:
        UserError: as :class:`PredictionFile` and its ``read``, or if the metrics need masks and
            the predictions have none.
    """
    evaluator = build_evaluator(cfg, dataset_name)
    evaluator.reset()
    with PredictionFile(path, dataset_name) as predictions:
        if cfg.MODEL.MASK_ON and not predictions.has_masks:
            raise UserError(
                f"the predictions in {path} have no masks, and MODEL.MASK_ON is True; with "
                "MODEL.MASK_ON False their boxes are evaluated"
            )
        records = DatasetCatalog.get(dataset_name)
        logger.info("%d predictions for %d images in %s", len(predictions), len(records), path)
        for record in open_bar(records, desc="Reading predictions", unit="image"):
            evaluator.process([record], [{"instances": predictions.read(record)}])
    return dict(evaluator.evaluate())
