"""Build the learning rate schedule of a config."""

import torch
from detectron2.config import CfgNode
from detectron2.solver import LRMultiplier, WarmupParamScheduler
from detectron2.solver import build_lr_scheduler as build_detectron2_lr_scheduler
from fvcore.common.param_scheduler import (
    CompositeParamScheduler,
    ConstantParamScheduler,
    CosineParamScheduler,
    LinearParamScheduler,
    ParamScheduler,
)
from torch.optim.lr_scheduler import LRScheduler


def build_lr_scheduler(cfg: CfgNode, optimizer: torch.optim.Optimizer) -> LRScheduler:
    """
    Same as ``detectron2.solver.build_lr_scheduler``, but with two more LR_SCHEDULER_NAMEs.

    ``WarmupLinearLR`` falls on a line to BASE_LR_END; ``WarmupFlatCosineLR`` keeps BASE_LR for the
    share FLAT_RATIO of the run, then falls on a cosine to BASE_LR_END.
    """
    end = cfg.SOLVER.BASE_LR_END / cfg.SOLVER.BASE_LR
    flat = cfg.SOLVER.FLAT_RATIO
    name = cfg.SOLVER.LR_SCHEDULER_NAME
    schedule: ParamScheduler
    if name == "WarmupLinearLR":
        schedule = LinearParamScheduler(1.0, end)
    elif name == "WarmupFlatCosineLR":
        schedule = CompositeParamScheduler(
            [ConstantParamScheduler(1.0), CosineParamScheduler(1.0, end)],
            lengths=[flat, 1.0 - flat],
            interval_scaling=["fixed", "rescaled"],
        )
    else:
        return build_detectron2_lr_scheduler(cfg, optimizer)
    with_warmup = WarmupParamScheduler(
        schedule,
        cfg.SOLVER.WARMUP_FACTOR,
        min(cfg.SOLVER.WARMUP_ITERS / cfg.SOLVER.MAX_ITER, 1.0),
        cfg.SOLVER.WARMUP_METHOD,
        cfg.SOLVER.RESCALE_INTERVAL,
    )
    return LRMultiplier(optimizer, multiplier=with_warmup, max_iter=cfg.SOLVER.MAX_ITER)
