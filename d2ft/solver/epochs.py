"""Resolve a schedule that is written in epochs, or for another batch, into iterations."""

import itertools
import logging
from typing import Any

from detectron2.config import CfgNode

from d2ft.config import get_value, set_value, who_set
from d2ft.errors import UserError
from d2ft.solver.schedule import (
    iterations_per_epoch,
    scale_iterations,
    scale_rate,
    steps_to_iterations,
    to_iterations,
)

logger = logging.getLogger(__name__)

# A key in epochs -> the key in iterations that it decides.
_IN_ITERATIONS = {
    "SOLVER.EPOCHS": "SOLVER.MAX_ITER",
    "SOLVER.STEPS_EPOCHS": "SOLVER.STEPS",
    "SOLVER.WARMUP_EPOCHS": "SOLVER.WARMUP_ITERS",
    "SOLVER.CHECKPOINT_EPOCHS": "SOLVER.CHECKPOINT_PERIOD",
    "TEST.EVAL_EPOCHS": "TEST.EVAL_PERIOD",
}

# SGD rates by image in a batch. Detectron2's and MMDetection's COCO models train with 0.02 for 16
# images; above twice that, losses of a detector become NaN in its first iterations.
_COMMON_RATE = 0.02 / 16


def resolve_schedule(cfg: CfgNode, num_samples: int) -> CfgNode:
    """
    Return a frozen copy of ``cfg`` whose schedule is in iterations alone, for its own batch.

    The keys in epochs become 0 and REFERENCE_BATCH 0, so that resolving the copy, or the
    ``config.yaml`` that is written of it, changes nothing.

    Args:
        cfg: with the keys of :func:`~d2ft.config.add_d2ft_config`.
        num_samples: of one pass over DATASETS.TRAIN, after filters, repeats and sampling.

    Raises:
        UserError: if a value is given in epochs and in iterations, or epochs lie beyond EPOCHS.
    """
    cfg = cfg.clone()
    cfg.defrost()
    per_epoch = iterations_per_epoch(num_samples, cfg.SOLVER.IMS_PER_BATCH)
    if cfg.SOLVER.REFERENCE_BATCH:
        _scale_by_batch(cfg)
    else:
        _warn_of_rate(cfg)
    _check_epochs(cfg)
    for key, target in _IN_ITERATIONS.items():
        value = get_value(cfg, key)
        if not value:
            continue
        setter = who_set(cfg, target)
        # A schedule that came along with a model of the zoo is COCO's, and nobody's wish here.
        if setter != "default" and not setter.startswith("zoo://"):
            raise UserError(
                f"{key} ({who_set(cfg, key)}) and {target} ({setter}) both say when; "
                f"keep one: {key} {'()' if isinstance(value, tuple) else 0} leaves it to {target}"
            )
        in_iterations: Any = (
            steps_to_iterations(value, per_epoch)
            if isinstance(value, (tuple, list))
            else to_iterations(value, per_epoch)
        )
        set_value(cfg, target, in_iterations, origin=f"{key} of {who_set(cfg, key)}")
        set_value(cfg, key, () if isinstance(value, (tuple, list)) else 0.0, origin="resolved")
    if cfg.FINETUNE.PHASES:
        cfg.FINETUNE.PHASES = [
            {**{k: v for k, v in phase.items() if k != "EPOCHS"}, "ITERS": _iters(phase, per_epoch)}
            for phase in cfg.FINETUNE.PHASES
        ]
    cfg.freeze()
    return cfg


def _iters(phase: dict[str, Any], per_epoch: int) -> int:
    if "EPOCHS" in phase:
        return to_iterations(phase["EPOCHS"], per_epoch)
    return int(phase["ITERS"])


def _check_epochs(cfg: CfgNode) -> None:
    epochs, steps = cfg.SOLVER.EPOCHS, tuple(cfg.SOLVER.STEPS_EPOCHS)
    if any(later <= earlier for earlier, later in itertools.pairwise(steps)):
        raise UserError(
            f"SOLVER.STEPS_EPOCHS ({who_set(cfg, 'SOLVER.STEPS_EPOCHS')}) is {steps}; each must be "
            "above the one before it"
        )
    if epochs and any(step >= epochs for step in steps):
        raise UserError(
            f"SOLVER.STEPS_EPOCHS ({who_set(cfg, 'SOLVER.STEPS_EPOCHS')}) is {steps}, but the run "
            f"has {epochs:g} epochs ({who_set(cfg, 'SOLVER.EPOCHS')}); drop the rate before its end"
        )


def _scale_by_batch(cfg: CfgNode) -> None:
    batch, reference = cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.REFERENCE_BATCH
    cfg.SOLVER.REFERENCE_BATCH = 0
    if batch == reference:
        return
    before = cfg.SOLVER.BASE_LR
    origin = f"SOLVER.REFERENCE_BATCH {reference}, IMS_PER_BATCH {batch}"
    set_value(cfg, "SOLVER.BASE_LR", scale_rate(before, batch, reference), origin=origin)
    # What is counted in epochs shows the same images with any batch.
    for key, target in _IN_ITERATIONS.items():
        value = get_value(cfg, target)
        if get_value(cfg, key) or not value or target.startswith("TEST."):
            continue
        scaled: Any = (
            tuple(scale_iterations(v, batch, reference) for v in value)
            if isinstance(value, (tuple, list))
            else scale_iterations(value, batch, reference)
        )
        set_value(cfg, target, scaled, origin=origin)
    if cfg.TEST.EVAL_PERIOD:
        period = scale_iterations(cfg.TEST.EVAL_PERIOD, batch, reference)
        set_value(cfg, "TEST.EVAL_PERIOD", period, origin=origin)
    logger.info("%s: BASE_LR %g -> %g", origin, before, cfg.SOLVER.BASE_LR)


def _warn_of_rate(cfg: CfgNode) -> None:
    if cfg.SOLVER.OPTIMIZER != "SGD":
        return
    rate, common = cfg.SOLVER.BASE_LR, _COMMON_RATE * cfg.SOLVER.IMS_PER_BATCH
    if rate > 2 * common:
        logger.warning(
            "SOLVER.BASE_LR %g (%s) is high for IMS_PER_BATCH %d (%s): detectors are commonly "
            "trained with %g for that batch, and the loss may become NaN. SOLVER.REFERENCE_BATCH, "
            "set to the batch that BASE_LR was made for, scales rate and schedule",
            rate,
            who_set(cfg, "SOLVER.BASE_LR"),
            cfg.SOLVER.IMS_PER_BATCH,
            who_set(cfg, "SOLVER.IMS_PER_BATCH"),
            common,
        )
