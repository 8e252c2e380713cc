"""Say before training what learns how fast, and for how long."""

from collections.abc import Iterator
from typing import Any

import torch
from detectron2.config import CfgNode
from tabulate import tabulate

from d2ft.solver.lr_scheduler import build_lr_scheduler
from d2ft.solver.param_depth import PARTS, is_match
from d2ft.solver.schedule import iterations_per_epoch


def describe_parameters(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """
    Return a table of the parts of a model: parameters, how many of them learn, learning rate.

    The rate is the one before the schedule is applied; a range where it differs inside of a part.
    """
    rates = {
        id(parameter): group.get("initial_lr", group["lr"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    parts: dict[str, list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        parts.setdefault(_part(name), []).append(parameter)
    rows: list[list[Any]] = []
    for part, parameters in parts.items():
        learning = [p for p in parameters if p.requires_grad]
        used = sorted({rates[id(p)] for p in learning if id(p) in rates})
        rate = " to ".join(f"{r:g}" for r in dict.fromkeys((used[0], used[-1]))) if used else "-"
        rows.append(
            [part, sum(p.numel() for p in parameters), sum(p.numel() for p in learning), rate]
        )
    total = [sum(row[column] for row in rows) for column in (1, 2)]
    rows.append(["all", *total, ""])
    return tabulate(rows, headers=["module", "parameters", "that learn", "rate"], intfmt=",")


def _part(name: str) -> str:
    # A part inside of another one, such as fpn in backbone, is the later of the two.
    fitting = [part for part in PARTS if part != "backbone" and is_match(name, part)]
    return fitting[-1] if fitting else ".".join(name.split(".")[:2])


def describe_schedule(cfg: CfgNode, *, num_images: int, num_samples: int) -> dict[str, Any]:
    """
    Return the resolved schedule, in the order in which a reader asks for it.

    Args:
        cfg: resolved, see :func:`~d2ft.solver.resolve_schedule`.
        num_images: of the training sets after filters.
        num_samples: of one pass, after repeats and sampling.

    Returns:
        What is counted -> number or text; JSON-able.
    """
    batch, last = cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER
    per_epoch = iterations_per_epoch(num_samples, batch)
    period = cfg.TEST.EVAL_PERIOD
    return {
        "images": num_images,
        "samples of an epoch": num_samples,
        "batch": batch,
        "iterations of an epoch": per_epoch,
        "epochs": round(last / per_epoch, 2),
        "iterations": last,
        "learning rate": ", ".join(f"{rate:.3g} at {it}" for it, rate in _rates(cfg)),
        "evaluations": (last - 1) // period + 1 if period else 1,
        "checkpoints": (last - 1) // cfg.SOLVER.CHECKPOINT_PERIOD + 1,
    }


def _rates(cfg: CfgNode) -> Iterator[tuple[int, float]]:
    """Yield the iterations at which the rate turns, and the rate at each."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=cfg.SOLVER.BASE_LR)
    multiplier = build_lr_scheduler(cfg, optimizer)._multiplier  # type: ignore[attr-defined]
    last = cfg.SOLVER.MAX_ITER
    turns = {0, min(cfg.SOLVER.WARMUP_ITERS, last - 1), last - 1}
    if cfg.SOLVER.LR_SCHEDULER_NAME == "WarmupMultiStepLR":
        turns |= {step for step in cfg.SOLVER.STEPS if step < last}
    if cfg.SOLVER.LR_SCHEDULER_NAME == "WarmupFlatCosineLR":
        turns |= {round(cfg.SOLVER.FLAT_RATIO * last)}
    for iteration in sorted(turns):
        yield iteration, cfg.SOLVER.BASE_LR * multiplier(iteration / last)
