"""What happens after an evaluation, on all processes together."""

from typing import Any, Literal

from detectron2.engine import HookBase
from detectron2.utils import comm

from d2ft.errors import UserError

Mode = Literal["max", "min"]


class EvaluatedHook(HookBase):
    """Calls :meth:`evaluated` whenever ``detectron2.engine.hooks.EvalHook`` has evaluated."""

    def __init__(self, period: int) -> None:
        """
        Take the period of the evaluation.

        Args:
            period: TEST.EVAL_PERIOD in iterations; 0 for the end of the run only.
        """
        self._period = period

    def after_step(self) -> None:
        """Call :meth:`evaluated` on the condition of EvalHook."""
        done = self.trainer.iter + 1
        if self._period > 0 and done % self._period == 0 and done != self.trainer.max_iter:
            self.evaluated()

    def after_train(self) -> None:
        """Call :meth:`evaluated` if the run came to its end."""
        if self.trainer.iter >= self.trainer.max_iter:
            self.evaluated()

    def evaluated(self) -> None:
        """Use the metrics of the evaluation that has just been."""
        raise NotImplementedError


def latest_metrics(storage: Any) -> dict[str, float]:
    """Return the metrics that were stored in this iteration, by their path such as "segm/AP"."""
    # What is smoothed was measured on the batch of a training step.
    smoothed = storage.smoothing_hints()
    return {
        name: value
        for name, (value, at) in storage.latest().items()
        if at == storage.iter and not smoothed[name]
    }


def shared_metrics(storage: Any, metric: str, key: str) -> dict[str, float]:
    """
    Return the metrics of this iteration as the main process has them, on every process.

    Only the main process knows the results, and a decision that processes take apart from each
    other would leave some waiting for the rest.

    Args:
        storage: the ``EventStorage`` of the run.
        metric: path that has to be among them.
        key: the config key that names it, for the message.

    Raises:
        UserError: on all processes, if ``metric`` was not computed.
    """
    mine = latest_metrics(storage) if comm.is_main_process() else {}
    metrics: dict[str, float] = comm.all_gather(mine)[0]
    if metric not in metrics:
        known = ", ".join(name for name in sorted(metrics) if "/" in name)
        raise UserError(f"{key} is {metric!r}, but the evaluation gave only: {known or 'nothing'}")
    return metrics


def gain(value: float, best: float, mode: Mode) -> float:
    """Return by how much ``value`` is better than ``best``; NaN if either is NaN."""
    return value - best if mode == "max" else best - value
