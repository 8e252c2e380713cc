"""Optimizer and schedule."""

from d2ft.solver.epochs import resolve_schedule
from d2ft.solver.freeze import Phases, freeze, set_trainable, trainable_names
from d2ft.solver.lr_scheduler import build_lr_scheduler
from d2ft.solver.optimizer import build_optimizer
from d2ft.solver.summary import describe_parameters, describe_schedule

__all__ = [
    "Phases",
    "build_lr_scheduler",
    "build_optimizer",
    "describe_parameters",
    "describe_schedule",
    "freeze",
    "resolve_schedule",
    "set_trainable",
    "trainable_names",
]
