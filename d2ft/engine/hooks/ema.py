"""Exponential moving average of the weights, kept, evaluated and saved beside the raw ones."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from detectron2.engine import HookBase
from detectron2.evaluation.testing import flatten_results_dict

from d2ft.engine.hooks.evaluated import EvaluatedHook
from d2ft.engine.model import unwrapped

logger = logging.getLogger(__name__)


def decay_at(update: int, decay: float) -> float:
    """
    Return ``min(decay, (1 + t) / (10 + t))`` for update t = 1, 2, ...

    The warm-up is TensorFlow's, so that the average leaves the first weights behind soon:
    https://www.tensorflow.org/api_docs/python/tf/train/ExponentialMovingAverage
    """
    return min(decay, (1 + update) / (10 + update))


class EMAHook(HookBase):
    """
    After step t: ``average = d_t * average + (1 - d_t) * weights``, in float32.

    The average starts at the weights that the run starts from, and has the parameters that learn.
    All else in the model, such as frozen layers and statistics of norms, is that of the model.
    A checkpoint holds it as ``trainer.hooks.EMAHook.average``, beside the raw ``model``.
    """

    def __init__(self, decay: float) -> None:
        """
        Take the decay.

        Args:
            decay: the highest d_t, in [0, 1); :func:`decay_at` for the first updates.
        """
        self._decay = decay
        self._updates = 0
        self._average: dict[str, torch.Tensor] = {}

    def before_train(self) -> None:
        """Start from the weights of the model, or go on from those of the checkpoint."""
        loaded = self._average
        # In a list once: names of hundreds of parameters need not be looked up at every step.
        self._parameters = _learning(self.trainer.model)
        if loaded and loaded.keys() != self._parameters.keys():
            logger.warning(
                "Other parameters learn than when the checkpoint was written: the moving average "
                "of the new ones starts now"
            )
        self._average = {
            name: loaded.get(name, parameter)
            .detach()
            .to(parameter.device, torch.float32, copy=True)
            for name, parameter in self._parameters.items()
        }

    @torch.no_grad()
    def after_step(self) -> None:
        """Move the average towards the weights."""
        self._updates += 1
        weight = 1 - decay_at(self._updates, self._decay)
        weights = [parameter.detach().float() for parameter in self._parameters.values()]
        torch._foreach_lerp_(list(self._average.values()), weights, weight)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Let the model have the average for the length of the block."""
        raw = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        self._write(self._average)
        try:
            yield
        finally:
            self._write(raw)

    @torch.no_grad()
    def _write(self, values: Mapping[str, torch.Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(values[name])

    def after_train(self) -> None:
        """Save the averaged model as ``model_ema``, which is no checkpoint to resume from."""
        if self.trainer.iter >= self.trainer.max_iter:
            with self.applied():
                self.trainer.checkpointer.save(
                    "model_ema", tag=False, with_state=False, iteration=self.trainer.iter
                )

    def state_dict(self) -> dict[str, Any]:
        """Return the average by parameter name, and the number of updates."""
        return {"updates": self._updates, "average": dict(self._average)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take what :meth:`state_dict` gave."""
        self._updates = state_dict["updates"]
        self._average = dict(state_dict["average"])


class EMAEvaluation(EvaluatedHook):
    """Evaluates the average as well; its metrics are those of the model with "ema/" before them."""

    def __init__(self, period: int, ema: EMAHook, test: Callable[[], dict[str, Any]]) -> None:
        """
        Take what to evaluate.

        Args:
            period: as for :class:`EvaluatedHook`.
            ema: the average.
            test: evaluates the model of the trainer, which has the average then.
        """
        super().__init__(period)
        self._ema, self._test = ema, test

    def evaluated(self) -> None:
        """Evaluate the average and store its metrics."""
        logger.info("Evaluating the moving average of the weights:")
        with self._ema.applied():
            results = self._test()
        metrics = {f"ema/{name}": value for name, value in flatten_results_dict(results).items()}
        self.trainer.storage.put_scalars(**metrics, smoothing_hint=False)


def _learning(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in unwrapped(model).named_parameters() if p.requires_grad}
