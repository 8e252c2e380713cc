"""End a run whose metric has stopped getting better."""

import logging
from collections.abc import Mapping
from typing import Any

from d2ft.engine.hooks.evaluated import EvaluatedHook, Mode, gain, shared_metrics
from d2ft.engine.stop import stop_training

logger = logging.getLogger(__name__)


class EarlyStopping(EvaluatedHook):
    """
    Stops after ``patience`` evaluations in a row that gained too little over the best before.

    All processes stop in the same iteration. A stopped run is complete: ``--resume`` without
    early stopping trains on.
    """

    def __init__(
        self, period: int, metric: str, mode: Mode, *, patience: int, min_gain: float = 0.0
    ) -> None:
        """
        Take the rule.

        Args:
            period: as for :class:`EvaluatedHook`.
            metric: as for :class:`BestCheckpointer`.
            mode: as there.
            patience: number of evaluations, at least 1.
            min_gain: a gain up to this does not count, in the unit of the metric.
        """
        super().__init__(period)
        self._metric, self._mode = metric, mode
        self._patience, self._min_gain = patience, min_gain
        self._best: float | None = None
        self._waited = 0

    def after_train(self) -> None:
        """Do nothing: there is nothing left to stop."""

    def evaluated(self) -> None:
        """Count the evaluation, and stop the run if it was the last to wait for."""
        metrics = shared_metrics(self.trainer.storage, self._metric, "FINETUNE.BEST.METRIC")
        value = metrics[self._metric]
        if self._best is None or self._best != self._best:  # NaN is no best
            self._best, better = value, value == value
        else:
            better = gain(value, self._best, self._mode) > self._min_gain
        self._waited = 0 if better else self._waited + 1
        if better:
            self._best = value
        if self._waited >= self._patience:
            stop_training(
                self.trainer,
                f"{self._metric} has not been better than {self._best:.4f} for {self._waited} "
                "evaluations",
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the best value and the evaluations since."""
        return {"metric": self._metric, "best": self._best, "waited": self._waited}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take what :meth:`state_dict` gave; a run that has waited long enough is complete."""
        if state_dict["metric"] != self._metric:
            return
        self._best, self._waited = state_dict["best"], state_dict["waited"]
        if self._waited >= self._patience:
            logger.info("The run was stopped early; set EARLY_STOPPING.PATIENCE 0 to train on")
            self.trainer.max_iter = self.trainer.iter + 1
