"""Put the hooks of a run in their order."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase, hooks
from detectron2.utils import comm

from d2ft.engine.finite import FiniteLosses
from d2ft.engine.hooks.best_checkpointer import BestCheckpointer, Comparison
from d2ft.engine.hooks.early_stopping import EarlyStopping
from d2ft.engine.hooks.ema import EMAEvaluation, EMAHook
from d2ft.engine.hooks.progress import ExpectedTime, ProgressBar
from d2ft.engine.hooks.validation_loss import ValidationLoss, build_validation_loader
from d2ft.engine.interrupt import Interruption
from d2ft.engine.phases import FreezePhases
from d2ft.engine.resume import ResumeInStep
from d2ft.engine.rng import StepSeed
from d2ft.engine.setup import cfg_below
from d2ft.progress import shows_bars
from d2ft.solver import Phases

Test = Callable[[CfgNode, torch.nn.Module], dict[str, Any]]


def build_hooks(
    cfg: CfgNode,
    stock: Sequence[HookBase | None],
    test: Test,
    model: torch.nn.Module,
    *,
    iterations_per_epoch: int = 0,
) -> list[HookBase]:
    """
    Return the hooks of ``DefaultTrainer`` with those of ``cfg`` where they belong.

    What changes state at a step comes before the checkpoint of that step; what uses an evaluation
    comes after it and before the writers; what ends the run comes last, so that the metrics of its
    step are written.

    Args:
        cfg: the resolved config.
        stock: what ``DefaultTrainer.build_hooks`` gave.
        test: ``FinetuneTrainer.test``.
        model: the model of the trainer.
        iterations_per_epoch: for the progress bar.
    """
    present = [hook for hook in stock if hook is not None]
    writers = [hook for hook in present if isinstance(hook, hooks.PeriodicWriter)]
    for writer in writers:
        writer._period = cfg.LOG_PERIOD
    first: list[HookBase] = [FiniteLosses(cfg.SOLVER.MAX_SKIPPED_STEPS, cfg.OUTPUT_DIR)]
    if cfg.FINETUNE.PHASES:
        first.append(FreezePhases(Phases(cfg.FINETUNE.PHASES)))
    ema = EMAHook(cfg.FINETUNE.EMA.DECAY) if cfg.FINETUNE.EMA.ENABLED else None
    return [
        *first,
        StepSeed(),
        *([ema] if ema else []),
        *(hook for hook in present if hook not in writers),
        *(_evaluation_hooks(cfg, ema, test, model) if cfg.DATASETS.TEST else []),
        *_progress_hooks(iterations_per_epoch),
        *writers,
        *_stopping_hooks(cfg),
    ]


def make_interruptible(
    built: list[HookBase], interruption: Interruption, resume: ResumeInStep
) -> list[HookBase]:
    """Put both behind the checkpointer: what follows is what a resumed run has still to do."""
    at = next(i for i, hook in enumerate(built) if isinstance(hook, hooks.EvalHook))
    evaluation = built[at]
    evaluation._func = interruption.guard(evaluation._func)
    return [*built[:at], interruption, resume, *built[at:]]


def _evaluation_hooks(
    cfg: CfgNode, ema: EMAHook | None, test: Test, model: torch.nn.Module
) -> list[HookBase]:
    period, best_of = cfg.TEST.EVAL_PERIOD, cfg.FINETUNE.BEST
    built: list[HookBase] = []
    if cfg.TEST.VALIDATION_LOSS:
        loaders = {name: partial(build_validation_loader, cfg, name) for name in cfg.DATASETS.TEST}
        built.append(ValidationLoss(period, loaders))
    if ema is not None:
        # The results and predictions of the raw weights stay where others read them.
        built.append(EMAEvaluation(period, ema, partial(test, cfg_below(cfg, "ema"), model)))
    best = None
    if best_of.METRIC:
        best = BestCheckpointer(period, best_of.METRIC, best_of.MODE, ema)
        built.append(best)
    if best is not None or ema is not None:
        built.append(Comparison(cfg.OUTPUT_DIR, best))
    return built


def _stopping_hooks(cfg: CfgNode) -> list[HookBase]:
    best_of, stopping = cfg.FINETUNE.BEST, cfg.FINETUNE.EARLY_STOPPING
    if not (cfg.DATASETS.TEST and best_of.METRIC and stopping.PATIENCE):
        return []
    rule = {"patience": stopping.PATIENCE, "min_gain": stopping.MIN_GAIN}
    return [EarlyStopping(cfg.TEST.EVAL_PERIOD, best_of.METRIC, best_of.MODE, **rule)]


def _progress_hooks(iterations_per_epoch: int) -> list[HookBase]:
    if not comm.is_main_process():
        return []
    bar = [ProgressBar(iterations_per_epoch)] if shows_bars() else []
    return [ExpectedTime(), *bar]
