"""What a built model gets before it is trained or evaluated."""

from typing import Any

import torch
from detectron2.config import CfgNode
from torch.nn.parallel import DistributedDataParallel

from d2ft.config import who_set
from d2ft.data.derived import is_partially_labelled
from d2ft.engine.compile import compile_backbone
from d2ft.engine.fast_cpu import use_fast_cpu
from d2ft.errors import UserError
from d2ft.layers.partial_labels import mask_unlabelled_classes
from d2ft.solver import freeze


def unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """Return the model that Detectron2 built, if several processes train it through a wrapper."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def named_losses(losses: Any) -> dict[str, torch.Tensor]:
    """Return by name what a model in training gives: a dict of losses, or one tensor."""
    return {"total_loss": losses} if isinstance(losses, torch.Tensor) else losses


def prepare_model(cfg: CfgNode, model: torch.nn.Module) -> torch.nn.Module:
    """
    Freeze what FINETUNE.FREEZE names, fit the classifier to the training sets, make it fast.

    Args:
        cfg: the resolved config; its datasets are registered.
        model: as Detectron2's ``build_model`` returns it; changed in place.

    Returns:
        ``model``.

    Raises:
        UserError: if a pattern of FREEZE means nothing, or a training set is a union of different
            class lists and the model has no classifier that can learn from one.
    """
    if cfg.FINETUNE.FREEZE:
        key = f"FINETUNE.FREEZE ({who_set(cfg, 'FINETUNE.FREEZE')})"
        freeze(model, cfg.FINETUNE.FREEZE, key=key)
    union = next(filter(is_partially_labelled, cfg.DATASETS.TRAIN), None)
    if union and not mask_unlabelled_classes(model):
        raise UserError(
            f"DATASETS.TRAIN: {union!r} joins sets of different classes, from which only models "
            f"of Detectron2's Fast R-CNN heads learn; {cfg.MODEL.META_ARCHITECTURE} has none"
        )
    if cfg.MODEL.COMPILE:
        compile_backbone(model)
    return use_fast_cpu(cfg, model)
