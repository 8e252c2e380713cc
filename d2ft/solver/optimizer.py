"""Build the optimizer of a config."""

from collections.abc import Callable
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping

from d2ft.errors import UserError
from d2ft.solver.param_depth import MAX_DEPTH, param_depth, select


def build_optimizer(cfg: CfgNode, model: torch.nn.Module) -> torch.optim.Optimizer:
    """
    Same as ``detectron2.solver.build_optimizer``, but SOLVER.OPTIMIZER may be AdamW as well.

    Learning rate, weight decay and their exceptions for norm layers and biases are read from the
    same keys for both; AdamW keeps PyTorch's own betas, and MOMENTUM and NESTEROV are SGD's.
    FINETUNE.LAYER_DECAY and FINETUNE.LR_FACTORS multiply the rate of each parameter.
    CLIP_GRADIENTS.CLIP_TYPE "full_model" limits the norm of all gradients together, where "norm"
    limits that of each parameter.

    Raises:
        UserError: if OPTIMIZER is not known, or a pattern of LR_FACTORS means no parameter.
    """
    params = get_default_optimizer_params(
        model,
        base_lr=cfg.SOLVER.BASE_LR,
        weight_decay_norm=cfg.SOLVER.WEIGHT_DECAY_NORM,
        bias_lr_factor=cfg.SOLVER.BIAS_LR_FACTOR,
        weight_decay_bias=cfg.SOLVER.WEIGHT_DECAY_BIAS,
        lr_factor_func=_lr_factor(cfg, model),
    )
    arguments: dict[str, Any] = {
        "params": params,
        "lr": cfg.SOLVER.BASE_LR,
        "weight_decay": cfg.SOLVER.WEIGHT_DECAY,
    }
    if cfg.SOLVER.OPTIMIZER == "SGD":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(
            **arguments,
            momentum=cfg.SOLVER.MOMENTUM,
            nesterov=cfg.SOLVER.NESTEROV,
            foreach=True,
        )
    elif cfg.SOLVER.OPTIMIZER == "AdamW":
        optimizer = torch.optim.AdamW(**arguments)
    else:
        raise UserError(f"SOLVER.OPTIMIZER {cfg.SOLVER.OPTIMIZER!r} is not known; use SGD or AdamW")
    clip = cfg.SOLVER.CLIP_GRADIENTS
    if clip.ENABLED and clip.CLIP_TYPE == "full_model":
        _clip_full_model(optimizer, clip.CLIP_VALUE, clip.NORM_TYPE)
        return optimizer
    clipped: torch.optim.Optimizer = maybe_add_gradient_clipping(cfg, optimizer)
    return clipped


def _clip_full_model(optimizer: torch.optim.Optimizer, limit: float, norm_type: float) -> None:
    """Before each step, scale all gradients together to a norm of ``limit`` at most."""

    def clip(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        params = [p for group in optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(params, limit, norm_type)

    optimizer.register_step_pre_hook(clip)


def _lr_factor(cfg: CfgNode, model: torch.nn.Module) -> Callable[[str], float] | None:
    decay, factors = cfg.FINETUNE.LAYER_DECAY, dict(cfg.FINETUNE.LR_FACTORS)
    if decay == 1.0 and not factors:
        return None
    names = [name for name, _ in model.named_parameters()]
    by_name = dict.fromkeys(names, 1.0)
    for pattern, factor in factors.items():
        key = f"FINETUNE.LR_FACTORS.{pattern}"
        if not isinstance(factor, (int, float)) or not factor >= 0:
            raise UserError(f"{key} is {factor!r}; it must be a number of at least 0")
        try:
            by_name |= dict.fromkeys(select(names, [pattern]), float(factor))
        except LookupError as error:
            raise UserError(f"{key}: {error.args[0]}") from error
    return lambda name: by_name[name] * decay ** (MAX_DEPTH - param_depth(name))
