"""Go on from a checkpoint as if the run had not been stopped, in its metrics too."""

import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from detectron2.engine import HookBase, hooks
from detectron2.utils import comm
from detectron2.utils.events import EventWriter, JSONWriter, TensorboardXWriter

from d2ft.checkpoint.checkpointer import FinetuneCheckpointer

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.json"

# Iterations over which Detectron2's writers take the median of a loss.
_WINDOW = 20

# What tells of the machine is measured anew. Step times are not taken for the first steps of a
# resumed run, so that a time from before would get a line of its own.
_NOT_KEPT = {"time", "data_time", "rank_data_time", "eta_seconds"}


class ResumeInStep(HookBase):
    """
    Keep the metrics of a run across an interruption, and end the step that a checkpoint is from.

    A checkpoint is saved in the middle of ``after_step``: the evaluation and the log line of its
    iteration come after it. A resumed run brings back the metrics, takes out of ``metrics.json``
    what was written after the checkpoint, and first runs the hooks behind this one for the
    iteration of the checkpoint. So an evaluation that was pending is done, and each line is there
    once and says what it would have said.
    """

    def __init__(self, checkpointer: FinetuneCheckpointer, output_dir: str) -> None:
        """
        Take what the run is saved by.

        Args:
            checkpointer: that the run was loaded with.
            output_dir: folder of ``metrics.json``.
        """
        self._checkpointer = checkpointer
        self._metrics = Path(output_dir) / METRICS_FILE
        self._loaded: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """
        Return the latest metrics as plain data.

        Returns:
            ``last_write``: the last iteration in ``metrics.json``, -1 if there is none;
            ``scalars``: name -> ``{"smoothed": bool, "values": [[value, iteration], ...]}``.
            Empty outside of training.
        """
        storage = getattr(self.trainer, "storage", None)
        if storage is None:
            return {}
        scalars = {}
        for name in storage.latest():
            if name in _NOT_KEPT:
                continue
            values = storage.history(name).values()
            scalars[name] = {
                "smoothed": storage.smoothing_hints()[name],
                "values": [
                    [value, iteration]
                    for value, iteration in values[-storage.count_samples(name, _WINDOW) :]
                ],
            }
        last_write = max((writer._last_write for writer in self._writers()), default=-1)
        return {"last_write": last_write, "scalars": scalars}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the metrics until the storage of the run is there."""
        self._loaded = state_dict

    def before_train(self) -> None:
        """Bring the metrics to where they were when the checkpoint was saved."""
        if self.trainer.start_iter == 0:
            self._loaded = {"last_write": -1, "scalars": {}}
        if self._loaded is None:
            logger.warning(
                "The checkpoint holds no metrics: in %s lines may be missing or come twice, and the "
                "first losses are smoothed over fewer steps",
                self._metrics,
            )
            return
        for name, scalar in self._loaded["scalars"].items():
            for value, iteration in scalar["values"]:
                self.trainer.storage.put_scalar(
                    name, value, smoothing_hint=scalar["smoothed"], cur_iter=iteration
                )
        for writer in self._writers():
            writer._last_write = self._loaded["last_write"]
        if comm.is_main_process() and self._metrics.is_file():
            cut_metrics(self._metrics, self._loaded["last_write"])

    def end_step(self) -> None:
        """Run what was still to be done for the iteration of the checkpoint."""
        trainer = self.trainer
        if trainer.start_iter == 0:
            return
        # Where no step is left, the loop counts on from here to what the last evaluation expects.
        trainer.iter = trainer.storage.iter = trainer.start_iter - 1
        if trainer.start_iter == trainer.max_iter and not self._checkpointer.resumed_final:
            self._checkpointer.save("model_final", iteration=trainer.iter)
        own = next(i for i, hook in enumerate(trainer._hooks) if hook is self)
        for hook in trainer._hooks[own + 1 :]:
            hook.after_step()

    def _writers(self) -> Iterator[EventWriter]:
        for hook in self.trainer._hooks:
            if isinstance(hook, hooks.PeriodicWriter):
                for writer in hook._writers:
                    if isinstance(writer, (JSONWriter, TensorboardXWriter)):
                        yield writer


def warn_of_other_order(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Say which of the values that decide the order of the data a checkpoint has otherwise."""
    for name, value in now.items():
        if saved.get(name, value) != value:
            logger.warning(
                "The checkpoint was written with %s %s, now it is %s: the run goes on with other "
                "batches than it would have had",
                name,
                saved[name],
                value,
            )


def cut_metrics(path: Path, last_write: int) -> None:
    """
    Take the lines of iterations after ``last_write``, and a line that is not whole, out of a file.

    The file is shortened in place: its writer has opened it already.
    """
    end = dropped = 0
    with path.open("rb") as file:
        for line in file:
            if dropped or not _is_whole(line) or json.loads(line)["iteration"] > last_write:
                dropped += 1
            else:
                end += len(line)
    if dropped:
        logger.info("%s: %d lines after iteration %d taken out", path, dropped, last_write)
        os.truncate(path, end)


def _is_whole(line: bytes) -> bool:
    return line.startswith(b"{") and line.endswith(b"}\n")
