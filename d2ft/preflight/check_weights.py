"""Check that the weights of a config can be read and fit its model, without building it."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model

from d2ft.checkpoint.convert.build import check_required_config
from d2ft.checkpoint.load_report import check_coverage
from d2ft.checkpoint.weights import (
    build_load_report,
    check_class_names,
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
        ``{"source", "loaded", "skipped", "missing"}``, the last three as numbers of tensors.

    Raises:
        UserError: if the file is missing, unreadable, unsafe, gives the model too little, or needs
            another config than this one.
    """
    last_checkpoint = _last_checkpoint(cfg) if resume else ""
    source = last_checkpoint or cfg.MODEL.WEIGHTS
    if not source:
        if eval_only:
            raise UserError(
                "MODEL.WEIGHTS is empty, so there is nothing to evaluate: set MODEL.WEIGHTS "
                f"{os.path.join(cfg.OUTPUT_DIR, 'model_final.pth')} or give --resume"
            )
        return {"source": "", "loaded": 0, "skipped": 0, "missing": 0}
    checkpoint = read_weights(source)
    check_required_config(cfg, checkpoint, source)
    shapes = _model_shapes(cfg)
    if shapes is None:
        return {"source": source}
    report = build_load_report(shapes, checkpoint, source)
    check_coverage(report, every_tensor=eval_only or bool(last_checkpoint))
    file_classes = known_classes(checkpoint, source, cfg.FINETUNE.SOURCE_CLASSES)
    check_class_names(report, file_classes, thing_classes)
    return {
        "source": source,
        "loaded": len(report.loaded),
        "skipped": len(report.skipped),
        "missing": len(report.missing),
    }


def _last_checkpoint(cfg: CfgNode) -> str:
    tag = Path(cfg.OUTPUT_DIR) / "last_checkpoint"
    return str(tag.with_name(tag.read_text(encoding="utf-8").strip())) if tag.is_file() else ""


def _model_shapes(cfg: CfgNode) -> dict[str, tuple[int, ...]] | None:
    """Return the shapes of the model's state dict, or None if only building it can tell."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "meta"
    try:
        # On the meta device nothing is allocated or initialised.
        with torch.device("meta"):
            model = build_model(cfg)
    except (NotImplementedError, RuntimeError) as error:
        logger.warning(
            "The weights are compared with the model only when it is loaded: %s computes with "
            "values while it is built (%s)",
            cfg.MODEL.META_ARCHITECTURE,
            error,
        )
        return None
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
