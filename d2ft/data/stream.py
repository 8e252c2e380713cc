"""
The order of training samples and their augmentation, as a function of seed and iteration.

Detectron2 draws the next sample and its augmentation from generators whose state a checkpoint
does not hold, so a resumed run sees other data than one that was never stopped. Here the batch of
an iteration depends on (seed, iteration, batch size, number of processes) only: whatever the
number of loader workers, wherever the run was interrupted.
"""

import logging
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import torch
from detectron2.utils.serialize import PicklableWrapper
from torch.utils.data import IterableDataset, Sampler, get_worker_info

from d2ft.data.bad_images import BadImageError, BadImages
from d2ft.errors import UserError

logger = logging.getLogger(__name__)

# How often a mapper may return None ("skip this sample") in a row before that is an error.
_MAX_REPLACEMENTS = 10


def seed_generators(*words: int) -> None:
    """Seed ``random``, NumPy and PyTorch (all devices) with one number made of ``words``."""
    torch.manual_seed(_seed_python_and_numpy(words))


@contextmanager
def seeded_generators(*words: int) -> Iterator[None]:
    """Run the block with the CPU generators seeded by ``words``; their state is restored after."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    # Not torch.manual_seed: it would also reseed the GPUs, whose state is not saved here.
    torch.random.default_generator.manual_seed(_seed_python_and_numpy(words))
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)


def _seed_python_and_numpy(words: Sequence[int]) -> int:
    """Seed two of the three generators; return the seed for the third."""
    states = np.random.SeedSequence([word & 0xFFFFFFFF for word in words]).generate_state(3)
    random.seed(int(states[0]))
    np.random.seed(states[1])
    return int(states[2])


def group_batches(
    indices: Iterator[int], batch_size: int, groups: Sequence[int] | None
) -> Iterator[list[int]]:
    """
    Gather a stream of indices into batches whose members are all of one group.

    Same rule as Detectron2's ``AspectRatioGroupedDataset``, on indices instead of loaded samples:
    a batch is given as soon as its group has ``batch_size`` members.

    Args:
        indices: endless stream of sample indices.
        batch_size: members of a batch.
        groups: group number of each sample, or None for a single group.
    """
    buckets: dict[int, list[int]] = {}
    for index in indices:
        group = 0 if groups is None else groups[index]
        bucket = buckets.setdefault(group, [])
        bucket.append(index)
        if len(bucket) == batch_size:
            yield bucket
            del buckets[group]


class SampleStream(IterableDataset[Any]):
    """
    Endless stream of mapped training samples for one process, beginning at any iteration.

    Batches are formed from the sampler's stream and dealt to the processes in turn: process ``r``
    of ``W`` takes batch ``iteration * W + r``. Each sample is mapped with the random generators
    seeded by (seed, number of the batch, place in the batch). Loader workers take whole batches
    in turn, which is the order in which PyTorch's DataLoader asks them.

    ``seed`` and ``start_iter`` may be changed until the loader is first iterated.
    """

    def __init__(
        self,
        dataset: Sequence[dict[str, Any]],
        mapper: Callable[[dict[str, Any]], Any],
        build_sampler: Callable[[int], Sampler[int]],
        *,
        batch_size: int,
        seed: int,
        groups: Sequence[int] | None = None,
        rank: int = 0,
        world_size: int = 1,
        start_iter: int = 0,
        bad_images: BadImages | None = None,
    ) -> None:
        """
        Describe the stream; nothing is read or shuffled here.

        Args:
            dataset: dataset dicts; indexing must return a copy that the mapper may change.
            mapper: dataset dict -> sample. It may return None for a sample to be replaced.
            build_sampler: seed -> one of Detectron2's training samplers over ``dataset``.
            batch_size: samples of this process in one iteration.
            seed: of order and augmentation, the same in all processes.
            groups: see :func:`group_batches`.
            rank: of this process.
            world_size: number of processes.
            start_iter: first iteration that the stream gives.
            bad_images: where images that the mapper cannot read are noted and replaced; if None,
                one is an error.
        """
        super().__init__()
        self.dataset = dataset
        # Detectron2's wrapper pickles lambdas and local functions for spawned workers.
        self.mapper = PicklableWrapper(mapper)
        self.build_sampler = PicklableWrapper(build_sampler)
        self.batch_size = batch_size
        self.seed = seed
        self.groups = groups
        self.rank = rank
        self.world_size = world_size
        self.start_iter = start_iter
        self.bad_images = bad_images

    def batches(self) -> Iterator[tuple[int, list[int]]]:
        """Yield (number of the batch, sample indices) of this process from ``start_iter`` on."""
        sampler = self.build_sampler(self.seed)
        # The sampler's own iterator deals single samples to the processes; here batches are dealt.
        indices = sampler._infinite_indices()
        numbered = enumerate(group_batches(indices, self.batch_size, self.groups))
        first = self.start_iter * self.world_size + self.rank
        return islice(numbered, first, None, self.world_size)

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        batches = self.batches()
        if worker is not None:
            batches = islice(batches, worker.id, None, worker.num_workers)
        for number, batch in batches:
            for place, index in enumerate(batch):
                with seeded_generators(self.seed, number, place):
                    sample = self._map(index)
                # Outside the block: the consumer's generators are its own while we wait.
                yield sample

    def _map(self, index: int) -> Any:
        for _ in range(_MAX_REPLACEMENTS):
            record = self.dataset[index]
            file_name = record.get("file_name", f"sample {index}")
            try:
                sample = self.mapper(record)
            except BadImageError as error:
                if self.bad_images is None:
                    raise
                self.bad_images.add(file_name, str(error))
                sample = None
            except (OSError, SyntaxError, ValueError) as error:
                raise UserError(f"cannot load the training sample {file_name}: {error}") from error
            if sample is not None:
                return sample
            logger.debug("The mapper left out %s; another sample takes its place", file_name)
            index = int(np.random.randint(len(self.dataset)))
        raise UserError(
            f"the mapper returned None for {_MAX_REPLACEMENTS} samples in a row, last for {file_name}"
        )
