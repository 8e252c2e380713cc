"""Freeze more at the beginning of a run, as FINETUNE.PHASES says."""

import logging

from detectron2.engine import HookBase
from detectron2.engine import defaults as detectron2_defaults
from torch.nn.parallel import DistributedDataParallel

from d2ft.engine.model import unwrapped
from d2ft.solver import Phases, set_trainable, trainable_names

logger = logging.getLogger(__name__)


class FreezePhases(HookBase):
    """
    Apply the phase of each iteration before its step.

    The phase is a function of the iteration, so a resumed run needs no saved state.
    """

    def __init__(self, phases: Phases) -> None:
        """Take the phases of the run, in iterations."""
        self._phases = phases
        self._number = -1

    def before_train(self) -> None:
        """Remember what learns after the last phase."""
        self._trainable = trainable_names(unwrapped(self.trainer.model))

    def before_step(self) -> None:
        """Change what learns if a phase begins here."""
        number = self._phases.number_at(self.trainer.iter)
        if number == self._number:
            return
        self._number = number
        model = unwrapped(self.trainer.model)
        patterns = self._phases.patterns(number)
        set_trainable(model, self._trainable, patterns, key=f"FINETUNE.PHASES, number {number + 1}")
        logger.info(
            "Iteration %d: %s",
            self.trainer.iter,
            f"phase {number + 1}, {', '.join(patterns)} frozen" if patterns else "all of it learns",
        )
        if isinstance(self.trainer.model, DistributedDataParallel):
            # It expects gradients of the parameters that learned when it was built.
            self.trainer._trainer.model = detectron2_defaults.create_ddp_model(
                model, broadcast_buffers=False
            )
