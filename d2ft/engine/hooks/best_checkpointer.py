"""Keep the best model of a run, and tell at the end how it compares."""

import json
import logging
import math
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from detectron2.utils import comm
from tabulate import tabulate

from d2ft.engine.hooks.ema import EMAHook
from d2ft.engine.hooks.evaluated import EvaluatedHook, Mode, gain, latest_metrics, shared_metrics
from d2ft.files import atomic_write

logger = logging.getLogger(__name__)


class BestCheckpointer(EvaluatedHook):
    """
    Same as ``detectron2.engine.hooks.BestCheckpointer``, but survives ``--resume``.

    The file ``model_best.pth`` never becomes the checkpoint to resume from. With a metric of the
    moving average ("ema/...") its ``model`` is the average. All processes decide as the main one.

    Attributes:
        best: metric values of the evaluation that was best, by path; empty before the first.
        iteration: of that evaluation.
    """

    def __init__(
        self, period: int, metric: str, mode: Mode = "max", ema: EMAHook | None = None
    ) -> None:
        """
        Take what is best.

        Args:
            period: as for :class:`EvaluatedHook`.
            metric: path such as "segm/AP", "<dataset>/segm/AP", "ema/segm/AP" or "val/total_loss".
            mode: whether the highest or the lowest value is best.
            ema: the moving average, if there is one.
        """
        super().__init__(period)
        self._metric, self._mode, self._ema = metric, mode, ema
        self.best: dict[str, float] = {}
        self.iteration = -1

    def evaluated(self) -> None:
        """Save the model if it is better than the best; NaN never is."""
        metrics = shared_metrics(self.trainer.storage, self._metric, "FINETUNE.BEST.METRIC")
        value = metrics[self._metric]
        if math.isnan(value):
            logger.warning("%s is NaN: the best model stays as it is", self._metric)
            return
        if self.best and not gain(value, self.best[self._metric], self._mode) > 0:
            return
        self.best, self.iteration = metrics, self.trainer.storage.iter
        logger.info("%s is the best so far: %.4f", self._metric, value)
        averaged = self._metric.startswith("ema/") and self._ema is not None
        with self._ema.applied() if averaged and self._ema else nullcontext():
            self.trainer.checkpointer.save("model_best", tag=False, iteration=self.iteration)

    def state_dict(self) -> dict[str, Any]:
        """Return what was best, and when."""
        return {"metric": self._metric, "best": dict(self.best), "iteration": self.iteration}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take what :meth:`state_dict` gave; values of another metric are no measure."""
        if state_dict["metric"] != self._metric:
            logger.warning(
                "The checkpoint kept the best %s, now it is %s: the next evaluation begins anew",
                state_dict["metric"],
                self._metric,
            )
            return
        self.best, self.iteration = dict(state_dict["best"]), state_dict["iteration"]


class Comparison(EvaluatedHook):
    """At the end of a run, tells best, last and averaged model side by side in log and file."""

    def __init__(self, output_dir: str, best: BestCheckpointer | None) -> None:
        """
        Take what to compare.

        Args:
            output_dir: gets ``comparison.json``: column -> metric path -> value.
            best: the hook that knows the best evaluation, if there is one.
        """
        super().__init__(period=0)
        self._path, self._best = Path(output_dir) / "comparison.json", best

    def evaluated(self) -> None:
        """Write the comparison on the main process."""
        if not comm.is_main_process():
            return
        latest = latest_metrics(self.trainer.storage)
        columns = {"last": _plain(latest), "ema": _averaged(latest)}
        if self._best is not None and self._best.best:
            columns = {"best": _plain(self._best.best), **columns}
            columns["ema at best"] = _averaged(self._best.best)
        columns = {title: values for title, values in columns.items() if values}
        paths = dict.fromkeys(path for values in columns.values() for path in values)
        rows = [
            [path, *(values.get(path) for values in columns.values())]
            for path in paths
            if path.endswith(("/AP", "total_loss"))
        ]
        headers = ["", *columns]
        if "best" in columns and self._best is not None:
            headers[1] = f"best (iteration {self._best.iteration})"
        logger.info("Best, last and averaged:\n%s", tabulate(rows, headers, floatfmt=".3f"))
        content = {
            title: {path: None if math.isnan(value) else value for path, value in values.items()}
            for title, values in columns.items()
        }
        with atomic_write(self._path) as file:
            json.dump(content, file, indent=2, allow_nan=False)


def _plain(metrics: Mapping[str, float]) -> dict[str, float]:
    return {k: v for k, v in metrics.items() if "/" in k and not k.startswith("ema/")}


def _averaged(metrics: Mapping[str, float]) -> dict[str, float]:
    return {k.removeprefix("ema/"): v for k, v in metrics.items() if k.startswith("ema/")}
