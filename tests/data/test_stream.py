import functools
import random
from itertools import islice

import numpy as np
import pytest
import torch
from detectron2.data.common import AspectRatioGroupedDataset
from detectron2.data.samplers import RepeatFactorTrainingSampler, TrainingSampler
from torch.utils.data import DataLoader

from d2ft.data.stream import SampleStream, group_batches, seeded_generators
from d2ft.errors import UserError

SIZE = 13
GROUPS = [i % 3 == 0 for i in range(SIZE)]


class _Records(list):
    """Gives copies, as DatasetFromList does."""

    def __getitem__(self, index):
        return dict(super().__getitem__(index))


RECORDS = _Records({"file_name": f"{i}.png", "index": i} for i in range(SIZE))


def _draw(record):
    return record["index"], random.random(), float(np.random.rand()), float(torch.rand(()))


def _training_sampler(seed):
    return TrainingSampler(SIZE, seed=seed)


def _stream(**changes):
    options = {"batch_size": 2, "seed": 7, "groups": GROUPS, **changes}
    mapper = options.pop("mapper", _draw)
    sampler = options.pop("sampler", _training_sampler)
    return SampleStream(RECORDS, mapper, sampler, **options)


def _batches(stream, count, workers=0):
    loader = DataLoader(
        stream, batch_size=stream.batch_size, num_workers=workers, collate_fn=lambda batch: batch
    )
    return list(islice(loader, count))


def test_without_groups_the_order_is_that_of_detectron2s_sampler():
    stream = _stream(groups=None)
    ours = [index for _, batch in islice(stream.batches(), 30) for index in batch]
    assert ours == list(islice(iter(_training_sampler(7)), 60))


def test_groups_are_formed_as_detectron2_forms_them():
    indices = list(islice(_training_sampler(3), 500))
    samples = [{"width": 2 - GROUPS[i], "height": 1 + GROUPS[i], "index": i} for i in indices]
    stock = [[d["index"] for d in batch] for batch in AspectRatioGroupedDataset(samples, 4)]
    groups = [int(group) for group in GROUPS]
    assert list(group_batches(iter(indices), 4, groups)) == stock


def test_every_batch_is_of_one_group_and_every_epoch_gives_each_sample_once():
    stream = _stream()
    seen = []
    for _, batch in islice(stream.batches(), 13 * 2):
        assert len({GROUPS[index] for index in batch}) == 1
        seen += batch
    counts = np.bincount(seen, minlength=SIZE)
    # 52 samples are four epochs of 13; at most one sample of each group waits for its batch.
    assert counts.min() >= 3
    assert counts.max() <= 5


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_samples_do_not_depend_on_the_number_of_workers(workers):
    assert _batches(_stream(), 20, workers) == _batches(_stream(), 20)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("start_iter", [1, 7, 40])
def test_a_stream_begun_later_goes_on_as_one_that_never_stopped(start_iter, workers):
    whole = _batches(_stream(), start_iter + 5)
    assert _batches(_stream(start_iter=start_iter), 5, workers) == whole[start_iter:]


def test_processes_deal_the_batches_in_turn():
    alone = [batch for _, batch in islice(_stream().batches(), 20)]
    shares = [
        [batch for _, batch in islice(_stream(rank=rank, world_size=2).batches(), 10)]
        for rank in range(2)
    ]
    assert [batch for pair in zip(*shares, strict=True) for batch in pair] == alone


def test_a_stream_of_several_processes_begins_at_an_iteration_too():
    for rank in range(3):
        whole = list(islice(_stream(rank=rank, world_size=3).batches(), 9))
        resumed = list(islice(_stream(rank=rank, world_size=3, start_iter=4).batches(), 5))
        assert resumed == whole[4:]


def test_a_seed_gives_its_own_order_and_its_own_augmentation():
    first, second = _batches(_stream(groups=None), 7), _batches(_stream(groups=None, seed=8), 7)
    assert first != second
    drawn = [sample[1:] for batch in first for sample in batch]
    assert len(set(drawn)) == len(drawn)


def test_mapping_leaves_the_generators_of_the_process_alone():
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = random.random(), np.random.rand(), torch.rand(3).tolist()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    list(islice(_stream(), 6))
    assert (random.random(), np.random.rand(), torch.rand(3).tolist()) == expected


def test_generators_are_restored_after_an_error():
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError), seeded_generators(1, 2):
        torch.rand(3)
        raise RuntimeError
    assert torch.equal(torch.get_rng_state(), state)


def test_repeat_factors_keep_their_meaning():
    factors = torch.ones(SIZE)
    factors[4] = 3.0
    stream = _stream(
        sampler=functools.partial(_repeat_sampler, factors), groups=None, batch_size=SIZE + 2
    )
    counts = np.bincount(next(iter(stream.batches()))[1], minlength=SIZE)
    assert counts.tolist() == [3 if i == 4 else 1 for i in range(SIZE)]


def _repeat_sampler(factors, seed):
    return RepeatFactorTrainingSampler(factors, seed=seed)


def _skip_odd(record):
    return None if record["index"] % 2 else record["index"]


def test_a_sample_that_the_mapper_leaves_out_is_replaced_the_same_way_every_time():
    first = _batches(_stream(mapper=_skip_odd), 30)
    assert all(index % 2 == 0 for batch in first for index in batch)
    assert _batches(_stream(mapper=_skip_odd), 30, workers=2) == first


def _skip_all(record):
    return None


def test_a_mapper_that_leaves_out_everything_is_an_error():
    with pytest.raises(UserError, match="returned None for 10 samples in a row"):
        _batches(_stream(mapper=_skip_all), 1)


def _fail(record):
    raise OSError("image file is truncated")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_sample_that_cannot_be_loaded_is_named(workers):
    with pytest.raises(UserError, match=r"training sample \d+\.png: image file is truncated"):
        _batches(_stream(mapper=_fail), 1, workers)
