"""Tell how far a run is and how long it will take."""

import datetime
import logging
import resource
import time
from typing import Any

import torch
from detectron2.engine import HookBase

from d2ft.progress import open_bar

logger = logging.getLogger(__name__)

# The first steps allocate memory and start the loader's workers.
_WARMUP, _MEASURED = 3, 20


class ExpectedTime(HookBase):
    """Says once, after the first 20 iterations, how long the training will take."""

    def before_train(self) -> None:
        """Start."""
        self._start = time.perf_counter()

    def after_step(self) -> None:
        """Measure the steps after the first three."""
        done = self.trainer.iter + 1 - self.trainer.start_iter
        if done == _WARMUP:
            self._start = time.perf_counter()
        left = self.trainer.max_iter - self.trainer.iter - 1
        if done == _MEASURED and left > 0:
            seconds = (time.perf_counter() - self._start) / (_MEASURED - _WARMUP)
            logger.info(
                "Expected time: %s for the %d iterations left, at %.3f s each, and the evaluations",
                datetime.timedelta(seconds=round(seconds * left)),
                left,
                seconds,
            )


class ProgressBar(HookBase):
    """A bar on stderr with epoch, loss, learning rate, time left and memory; for a terminal."""

    def __init__(self, iterations_per_epoch: int = 0) -> None:
        """
        Take the length of an epoch.

        Args:
            iterations_per_epoch: 0 to show no epochs.
        """
        self._per_epoch = iterations_per_epoch

    def before_train(self) -> None:
        """Open the bar."""
        trainer = self.trainer
        self._bar = open_bar(total=trainer.max_iter, initial=trainer.start_iter, unit="it")

    def after_step(self) -> None:
        """Move the bar."""
        shown: dict[str, Any] = {}
        if self._per_epoch:
            shown["epoch"] = f"{(self.trainer.iter + 1) / self._per_epoch:.1f}"
        latest = self.trainer.storage.latest()
        for title, name in (("loss", "total_loss"), ("lr", "lr")):
            if name in latest:
                shown[title] = f"{latest[name][0]:.4g}"
        shown["memory"] = f"{_peak_memory() / 2**20:.0f}M"
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update()

    def after_train(self) -> None:
        """Close the bar."""
        self._bar.close()


def _peak_memory() -> int:
    """Return the most bytes that tensors took on the GPU, without one all of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
