"""What happens when a loss is NaN or infinite."""

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.engine import HookBase
from detectron2.utils import comm

from d2ft.checkpoint.last_checkpoint import find_whole_checkpoint
from d2ft.engine.model import named_losses, unwrapped
from d2ft.errors import UserError

logger = logging.getLogger(__name__)


class FiniteLosses(HookBase):
    """
    Leave out a step whose loss is not finite, up to a number of times, then end the run.

    All processes leave out the same step: weights, momentum and weight decay of the optimizer stay
    as they were, and the log has 0 for the losses of that step. Detectron2 raises in the first
    process only, which then knows neither the images nor a checkpoint to go back to.
    """

    def __init__(self, max_skipped: int, output_dir: str) -> None:
        """
        Take the limit.

        Args:
            max_skipped: steps that a whole run may leave out (SOLVER.MAX_SKIPPED_STEPS).
            output_dir: where the last good checkpoint is looked for.
        """
        self._max_skipped = max_skipped
        self._output_dir = output_dir
        self._skipped = 0
        self._skips_this = False
        self._handles: list[Any] = []

    def state_dict(self) -> dict[str, int]:
        """Return how many steps were left out."""
        return {"skipped": self._skipped}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on counting."""
        self._skipped = state_dict["skipped"]

    def before_train(self) -> None:
        """Watch the losses that the model gives and the steps of the optimizer."""
        self._handles = [
            unwrapped(self.trainer.model).register_forward_hook(self._check),
            self.trainer.optimizer.register_step_pre_hook(self._drop_gradients),
        ]

    def after_train(self) -> None:
        """Watch no more."""
        for handle in self._handles:
            handle.remove()

    def _check(self, model: torch.nn.Module, inputs: tuple[Any, ...], losses: Any) -> Any:
        if not model.training:
            return None
        values = {name: loss.detach() for name, loss in named_losses(losses).items()}
        # One look at the device: the sum is finite if all of them are.
        finite = math.isfinite(sum(values.values(), torch.zeros(())).item()) if values else True
        found = (
            []
            if finite
            else [
                ", ".join(f"{name} {value.item():g}" for name, value in values.items()),
                *(str(record.get("file_name", "an image")) for record in inputs[0]),
            ]
        )
        problems = [found for found in comm.all_gather(found) if found]
        if not problems:
            return None
        self._skip_or_end(problems)
        if isinstance(losses, torch.Tensor):
            return _zero(losses)
        return {name: _zero(loss) for name, loss in losses.items()}

    def _skip_or_end(self, problems: Sequence[Sequence[str]]) -> None:
        iteration = self.trainer.iter
        what = "; ".join(f"{losses} on {', '.join(images)}" for losses, *images in problems)
        if not self._skips_this:
            self._skipped += 1
            self._skips_this = True
        if self._skipped <= self._max_skipped:
            logger.warning(
                "Iteration %d is left out, %d of at most %d: %s",
                iteration,
                self._skipped,
                self._max_skipped,
                what,
            )
            return
        raise UserError(
            f"the loss at iteration {iteration} is not finite: {what}. {self._last_good()} Look at "
            "these images and their annotations; lower SOLVER.BASE_LR or clip gradients "
            "(SOLVER.CLIP_GRADIENTS); or leave out up to N such steps by "
            f"SOLVER.MAX_SKIPPED_STEPS N (now {self._max_skipped})"
        )

    def _last_good(self) -> str:
        try:
            path = find_whole_checkpoint(self._output_dir)
        except UserError as error:
            return f"There is no good checkpoint: {error}"
        return f"The last good checkpoint is {path}." if path else "No checkpoint was saved yet."

    def _drop_gradients(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if not self._skips_this:
            return
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None  # which optimizers pass over

    def after_step(self) -> None:
        """Take the next step as any other."""
        self._skips_this = False


def _zero(loss: torch.Tensor) -> torch.Tensor:
    """Return 0 whose gradients are 0, or NaN: the step of the optimizer is left out."""
    return loss.nan_to_num(0, 0, 0) * 0
