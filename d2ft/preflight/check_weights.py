"""Check that the weights of a config can be read and fit its model, without building it."""

import logging
import os
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model

from d2ft.checkpoint.load_report import check_coverage
from d2ft.checkpoint.weights import (
    build_load_report,
    check_class_names,
    find_last_checkpoint,
    known_classes,
    read_weights,
)
from d2ft.errors import UserError

logger = logging.getLogger(__name__)


def check_weights(
    cfg: CfgNode, thing_classes: Sequence[str], *, eval_only: bool, resume: bool
) -> dict[str, Any]:
    """
    Read the weights that the run will start from and compare them with the model, by shapes.

    Args:
        cfg: MODEL describes the model; MODEL.WEIGHTS, or with ``resume`` the last checkpoint of
            OUTPUT_DIR, is read.
        thing_classes: of the datasets, in the order of the model's rows.
        eval_only: every tensor of the model must come from the file.
        resume: as ``--resume``.

    Returns:
        ``{"source", "loaded", "skipped", "missing"}``, the last three as numbers of tensors, and
        "seed" of a run that is resumed.

    Raises:
        UserError: if the model cannot be built, or the file is missing, unreadable, unsafe, or
            gives the model too little.
    """
    shapes = _model_shapes(cfg)
    last_checkpoint = find_last_checkpoint(cfg.OUTPUT_DIR) if resume else ""
    source = last_checkpoint or cfg.MODEL.WEIGHTS
    if not source:
        if eval_only:
            raise UserError(
                "MODEL.WEIGHTS is empty, so there is nothing to evaluate: set MODEL.WEIGHTS "
                f"{os.path.join(cfg.OUTPUT_DIR, 'model_final.pth')} or give --resume"
            )
        return {"source": "", "loaded": 0, "skipped": 0, "missing": 0}
    checkpoint = read_weights(source)
    found: dict[str, Any] = {"source": source}
    if last_checkpoint:
        found["seed"] = checkpoint.get("trainer", {}).get("seed")
    if shapes is None:
        return found
    report = build_load_report(shapes, checkpoint, source)
    check_coverage(report, every_tensor=eval_only or bool(last_checkpoint))
    given = () if last_checkpoint else cfg.FINETUNE.SOURCE_CLASSES
    check_class_names(report, known_classes(checkpoint, source, given), thing_classes)
    return found | {
        "loaded": len(report.loaded),
        "skipped": len(report.skipped),
        "missing": len(report.missing),
    }


def _model_shapes(cfg: CfgNode) -> dict[str, tuple[int, ...]] | None:
    """Return the shapes of the model's state dict, or None if only building it can tell."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "meta"
    try:
        # On the meta device nothing is allocated or initialised.
        with torch.device("meta"):
            model = build_model(cfg)
    except (AssertionError, KeyError, ValueError) as error:
        raise UserError(f"the model of the config cannot be built: {error}") from error
    except (NotImplementedError, RuntimeError) as error:
        logger.warning(
            "The weights are compared with the model only when it is loaded: %s computes with "
            "values while it is built (%s)",
            cfg.MODEL.META_ARCHITECTURE,
            error,
        )
        return None
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
