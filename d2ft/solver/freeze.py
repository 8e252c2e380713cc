"""What of a model learns: freezing by name, for the whole run or for its first phases."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from d2ft.errors import UserError
from d2ft.solver.param_depth import select


def freeze(model: torch.nn.Module, patterns: Iterable[str], *, key: str) -> None:
    """
    Let what the patterns name learn no more, and hold the statistics of norm layers among it.

    Args:
        model: changed in place.
        patterns: as in FINETUNE.FREEZE, see :func:`d2ft.solver.param_depth.select`.
        key: where the patterns come from, for the message.

    Raises:
        UserError: if a pattern means nothing, or nothing is left that learns.
    """
    set_trainable(model, trainable_names(model), patterns, key=key)


def trainable_names(model: torch.nn.Module) -> frozenset[str]:
    """Return the names of the parameters that learn."""
    return frozenset(name for name, p in model.named_parameters() if p.requires_grad)


def set_trainable(
    model: torch.nn.Module, trainable: frozenset[str], patterns: Iterable[str], *, key: str
) -> None:
    """
    Let ``trainable`` learn except for what the patterns name, and nothing else.

    An optimizer leaves parameters without a gradient as they are, so one that was built while all
    of ``trainable`` learned may go on.

    Raises:
        UserError: as :func:`freeze`.
    """
    parameters = dict(model.named_parameters())
    try:
        frozen = select(list(parameters), patterns)
    except LookupError as error:
        raise UserError(f"{key}: {error.args[0]}") from error
    if not trainable - frozen:
        raise UserError(f"{key} leaves nothing of the model that learns")
    for name, parameter in parameters.items():
        learns = name in trainable and name not in frozen
        parameter.requires_grad_(learns)
        if not learns:
            parameter.grad = None
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            _hold_with_parameters(module)


def _hold_with_parameters(module: _BatchNorm) -> None:
    """Make a norm layer use its statistics as they are while none of its parameters learns."""
    if getattr(module, "_d2ft_is_held", None) is not None:
        return
    module._d2ft_is_held = True  # type: ignore[assignment]
    module.register_forward_pre_hook(_hold)


def _hold(module: torch.nn.Module, _: Any) -> None:
    # Mode is set by model.train() and model.eval() for all layers at once, so it is mended where
    # the layer is used.
    parameters = list(module.parameters(recurse=False))
    if parameters:
        module.train(module.training and any(p.requires_grad for p in parameters))


class Phases:
    """
    What is frozen at an iteration, from FINETUNE.PHASES.

    Args:
        phases: each with ITERS, a whole number above 0, and FREEZE, a list of patterns.
    """

    def __init__(self, phases: Sequence[dict[str, Any]]) -> None:
        self._patterns = [tuple(phase["FREEZE"]) for phase in phases]
        self._ends = [sum(phase["ITERS"] for phase in phases[: i + 1]) for i in range(len(phases))]

    def __len__(self) -> int:
        return len(self._ends)

    def number_at(self, iteration: int) -> int:
        """Return the phase of an iteration, from 0; ``len(self)`` after the last."""
        return sum(iteration >= end for end in self._ends)

    def patterns(self, number: int) -> tuple[str, ...]:
        """Return what a phase freezes; nothing after the last."""
        return self._patterns[number] if number < len(self._patterns) else ()
