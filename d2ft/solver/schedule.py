"""
The arithmetic of a schedule: epochs to iterations, and a batch to its learning rate.

An epoch is one pass over the samples of the training set, after filters and repeats, the last
batch included that is not full, as in MMDetection: ``ceil(samples / batch)`` iterations, whatever
the number of processes that share the batch.
"""

import math
from collections.abc import Sequence


def iterations_per_epoch(num_samples: int, ims_per_batch: int) -> int:
    """
    Return the iterations of one pass over the data.

    Args:
        num_samples: of one pass, at least 1.
        ims_per_batch: images in an iteration over all processes, at least 1.

    Raises:
        ValueError: if either is below 1.
    """
    if num_samples < 1 or ims_per_batch < 1:
        raise ValueError(f"got {num_samples} samples and a batch of {ims_per_batch}")
    return math.ceil(num_samples / ims_per_batch)


def to_iterations(epochs: float, per_epoch: int) -> int:
    """Return the whole number of iterations next to ``epochs`` of ``per_epoch`` each, at least 1."""
    return max(1, round(epochs * per_epoch))


def steps_to_iterations(steps_epochs: Sequence[float], per_epoch: int) -> tuple[int, ...]:
    """Return the iterations after which the rate drops, from the epochs after which it does."""
    return tuple(to_iterations(epochs, per_epoch) for epochs in steps_epochs)


def scale_rate(base_lr: float, ims_per_batch: int, reference_batch: int) -> float:
    """
    Return the rate for a batch, if ``base_lr`` is that of ``reference_batch``.

    The linear scaling rule of Goyal et al., https://arxiv.org/abs/1706.02677.
    """
    return base_lr * ims_per_batch / reference_batch


def scale_iterations(iterations: int, ims_per_batch: int, reference_batch: int) -> int:
    """Return how many iterations show the images of ``iterations`` with ``reference_batch``."""
    return max(1, round(iterations * reference_batch / ims_per_batch))
