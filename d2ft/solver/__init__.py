"""Optimizer and schedule."""

from d2ft.solver.optimizer import build_optimizer

__all__ = ["build_optimizer"]
