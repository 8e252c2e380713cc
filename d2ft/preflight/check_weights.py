"""Check that the weights of a config can be read and fit its model, without building it."""

import logging
import os
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model

from d2ft.checkpoint.class_names import check_class_names, known_classes
from d2ft.checkpoint.convert.build import check_required_config
from d2ft.checkpoint.coverage import check_coverage
from d2ft.checkpoint.head_remap import HeadInit
from d2ft.checkpoint.last_checkpoint import find_whole_checkpoint
from d2ft.checkpoint.weights import (
    build_head_init,
    build_load_report,
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
        ``{"source", "loaded", "remapped", "skipped", "missing"}``, all but the first as numbers
        of tensors, and "seed" of a run that is resumed.

    Raises:
        UserError: if the model cannot be built, the file is missing, unreadable, unsafe, gives
            the model too little, needs another config than this one, or its class names do not
            fit the datasets.
    """
    shapes = _model_shapes(cfg)
    last_checkpoint = find_whole_checkpoint(cfg.OUTPUT_DIR) if resume else ""
    source = last_checkpoint or cfg.MODEL.WEIGHTS
    if not source:
        if eval_only:
            raise UserError(
                "MODEL.WEIGHTS is empty, so there is nothing to evaluate: set MODEL.WEIGHTS "
                f"{os.path.join(cfg.OUTPUT_DIR, 'model_final.pth')} or give --resume"
            )
        return {"source": "", "loaded": 0, "remapped": 0, "skipped": 0, "missing": 0}
    checkpoint = read_weights(source)
    check_required_config(cfg, checkpoint, source)
    found: dict[str, Any] = {"source": source}
    if last_checkpoint:
        found["seed"] = checkpoint.get("trainer", {}).get("seed")
    if shapes is None:
        return found
    as_it_is = eval_only or bool(last_checkpoint)
    head_init = HeadInit() if as_it_is else build_head_init(cfg)
    # What the user says of MODEL.WEIGHTS is not about our own checkpoint.
    given = () if last_checkpoint else cfg.FINETUNE.SOURCE_CLASSES
    file_classes = known_classes(checkpoint, source, given)
    report = build_load_report(
        shapes,
        checkpoint,
        source,
        thing_classes=thing_classes,
        file_classes=file_classes,
        head_init=head_init,
    )
    check_coverage(report, every_tensor=as_it_is)
    check_class_names(
        report,
        file_classes,
        thing_classes,
        class_map=head_init.class_map,
        every_tensor=as_it_is,
    )
    return found | {
        "loaded": len(report.loaded),
        "remapped": len(report.remapped),
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
