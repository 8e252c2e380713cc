"""Build the optimizer of a config."""

import torch
from detectron2.config import CfgNode
from detectron2.solver import build_optimizer as build_sgd
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping

from d2ft.errors import UserError


def build_optimizer(cfg: CfgNode, model: torch.nn.Module) -> torch.optim.Optimizer:
    """
    Same as ``detectron2.solver.build_optimizer``, but SOLVER.OPTIMIZER may be AdamW as well.

    Learning rate, weight decay and their exceptions for norm layers and biases are read from the
    same keys for both; AdamW keeps PyTorch's own betas, and MOMENTUM and NESTEROV are SGD's.
    """
    if cfg.SOLVER.OPTIMIZER == "SGD":
        return build_sgd(cfg, model)
    if cfg.SOLVER.OPTIMIZER == "AdamW":
        params = get_default_optimizer_params(
            model,
            base_lr=cfg.SOLVER.BASE_LR,
            weight_decay_norm=cfg.SOLVER.WEIGHT_DECAY_NORM,
            bias_lr_factor=cfg.SOLVER.BIAS_LR_FACTOR,
            weight_decay_bias=cfg.SOLVER.WEIGHT_DECAY_BIAS,
        )
        optimizer = maybe_add_gradient_clipping(cfg, torch.optim.AdamW)
        return optimizer(params, lr=cfg.SOLVER.BASE_LR, weight_decay=cfg.SOLVER.WEIGHT_DECAY)
    raise UserError(f"SOLVER.OPTIMIZER {cfg.SOLVER.OPTIMIZER!r} is not known; use SGD or AdamW")
