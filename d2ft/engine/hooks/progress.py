"""
Tell how far a run is and how long it will take.

Bars are for a terminal, on stderr. Lines of the log are written above them.
"""

import datetime
import logging
import resource
import sys
import time
from collections.abc import Iterable
from typing import IO, Any

import torch
from detectron2.data import DatasetCatalog
from detectron2.engine import HookBase
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from tqdm import tqdm

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


class EvaluationBar(DatasetEvaluator):
    """Evaluates nothing, and shows a bar over the images of a test set."""

    def __init__(self, dataset_name: str) -> None:
        """Take the test set."""
        images = len(DatasetCatalog.get(dataset_name))
        # Of several processes the main one has the largest share.
        self._total, self._name = -(-images // comm.get_world_size()), dataset_name

    def reset(self) -> None:
        """Open the bar."""
        self._bar = open_bar(total=self._total, desc=self._name, unit="image", leave=False)

    def process(self, inputs: list[Any], outputs: list[Any]) -> None:
        """Move the bar."""
        self._bar.update(len(inputs))

    def evaluate(self) -> None:
        """Close the bar."""
        self._bar.close()


def _peak_memory() -> int:
    """Return the most bytes that tensors took on the GPU, without one all of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def shows_bars() -> bool:
    """Tell whether this is the main process, and its stderr a terminal."""
    return comm.is_main_process() and sys.stderr.isatty()


def open_bar(iterable: Iterable[Any] | None = None, **arguments: Any) -> Any:
    """
    Return a ``tqdm`` bar, which is shown if :func:`shows_bars`.

    Args:
        iterable: to go over with the bar.
        arguments: of ``tqdm``.
    """
    shown = shows_bars()
    if shown:
        _write_lines_above_bars()
    return tqdm(iterable, file=sys.stderr, dynamic_ncols=True, disable=not shown, **arguments)


class _AboveBars:
    """A stream that takes the bars away while it writes."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        with tqdm.external_write_mode(file=self._stream):
            self._stream.write(text)

    def flush(self) -> None:
        self._stream.flush()


def _write_lines_above_bars() -> None:
    for name in ("detectron2", "fvcore", "d2ft"):
        for handler in logging.getLogger(name).handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream in (
                sys.stdout,
                sys.stderr,
            ):
                handler.setStream(_AboveBars(handler.stream))
