import math
from collections import Counter

import pytest
import torch
from detectron2.data.samplers import RepeatFactorTrainingSampler
from detectron2.structures import BoxMode
from hypothesis import given
from hypothesis import strategies as st

from d2ft.data import wrappers
from d2ft.errors import UserError


def annotation(category, *, iscrowd=0, ignore=0, size=9.0):
    box = {"bbox": [1.0, 1.0, size, 9.0], "bbox_mode": BoxMode.XYWH_ABS}
    return {**box, "category_id": category, "iscrowd": iscrowd, "ignore": ignore}


def record(index, annotations, folder="a"):
    name = f"{folder}/{index}.png"
    size = {"height": 20 + index, "width": 90}
    return {"file_name": name, "image_id": index, **size, "annotations": annotations}


ANNOTATIONS = st.builds(
    annotation,
    st.integers(0, 4),
    iscrowd=st.integers(0, 1),
    ignore=st.integers(0, 1),
    size=st.sampled_from([2.0, 8.0, 30.0]),
)
RECORDS = st.lists(st.lists(ANNOTATIONS, max_size=4), min_size=1, max_size=7).map(
    lambda images: [record(index, image) for index, image in enumerate(images)]
)
FRACTIONS = st.floats(0.01, 1.0)
SEEDS = st.integers(-5, 5)


def instances(records):
    return Counter(
        a["category_id"] for r in records for a in r["annotations"] if wrappers.is_instance(a)
    )


def names(records):
    return [r["file_name"] for r in records]


@given(RECORDS, st.integers(1, 9))
def test_repeating_multiplies_every_count(records, times):
    repeated = wrappers.repeat(records, times)
    assert len(repeated) == times * len(records)
    assert instances(repeated) == {c: times * n for c, n in instances(records).items()}


@given(RECORDS, FRACTIONS)
def test_balancing_repeats_each_image_by_the_rounded_up_factor(records, threshold):
    stock = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(records, threshold)
    factors = wrappers.balance_factors(records, threshold)
    # Detectron2 keeps its factors in 32 bits, where a whole number may come out beside itself.
    assert torch.all(torch.tensor(factors) >= stock - 1e-5)
    assert torch.all(torch.tensor(factors) < stock + 1 + 1e-5)
    counts = Counter(names(wrappers.balance(records, threshold)))
    assert [counts[name] for name in names(records)] == factors


def test_balance_follows_the_rule_of_lvis():
    records = [record(k, [annotation(0)]) for k in range(99)] + [record(99, [annotation(1)])]
    # The rare class is in 1 of 100 images: sqrt(0.05 / 0.01) = 2.24 -> 3.
    assert wrappers.balance_factors(records, 0.05) == [1] * 99 + [3]


@given(RECORDS, FRACTIONS, SEEDS)
def test_a_fraction_has_its_number_of_images_in_their_order(records, fraction, seed):
    chosen = wrappers.choose_share(records, fraction, seed)
    assert len(chosen) == max(1, round(fraction * len(records)))
    assert chosen == [r for r in records if r in chosen]


@given(RECORDS, SEEDS, st.randoms())
def test_a_choice_does_not_depend_on_the_order_or_the_folder_of_the_files(records, seed, random):
    other = [{**r, "file_name": r["file_name"].replace("a/", "b/c/")} for r in records]
    random.shuffle(other)

    def ids(chosen):
        return {r["image_id"] for r in chosen}

    assert ids(wrappers.choose_share(records, 0.5, seed)) == ids(
        wrappers.choose_share(other, 0.5, seed)
    )
    assert instances(wrappers.choose_shots(records, 1, seed)) == instances(
        wrappers.choose_shots(other, 1, seed)
    )


@given(RECORDS, SEEDS)
def test_a_smaller_fraction_is_a_part_of_a_larger_one(records, seed):
    small = names(wrappers.choose_share(records, 0.3, seed))
    assert set(small) <= set(names(wrappers.choose_share(records, 0.6, seed)))


def test_another_seed_chooses_other_images():
    records = [record(index, []) for index in range(30)]
    assert len({tuple(names(wrappers.choose_share(records, 0.3, seed))) for seed in range(5)}) == 5


@given(RECORDS.filter(lambda records: len(records) > 1), st.floats(0.01, 0.99), SEEDS)
def test_both_parts_of_a_split_make_the_whole(records, fraction, seed):
    train, val = wrappers.split(records, fraction, seed)
    size = round(fraction * len(records))
    assert len(val) == min(max(1, size), len(records) - 1)
    assert sorted(names(train) + names(val)) == sorted(names(records))


@given(RECORDS, st.integers(1, 4), SEEDS)
def test_every_class_has_its_shots_or_all_it_has(records, shots, seed):
    chosen = wrappers.choose_shots(records, shots, seed)
    assert instances(chosen) == {c: min(shots, n) for c, n in instances(records).items()}
    assert all(instances([r]) for r in chosen)
    assert names(chosen) == [name for name in names(records) if name in names(chosen)]


@given(RECORDS)
def test_dropping_crowd_keeps_all_instances_and_images(records):
    dropped = wrappers.drop_crowd(records)
    assert names(dropped) == names(records)
    assert instances(dropped) == instances(records)
    assert all(wrappers.is_instance(a) for r in dropped for a in r["annotations"])


@given(RECORDS)
def test_dropping_empty_images_keeps_all_instances(records):
    dropped = wrappers.drop_empty(records)
    assert instances(dropped) == instances(records)
    assert len(dropped) == sum(bool(instances([r])) for r in records)


@given(RECORDS)
def test_small_boxes_are_dropped_by_their_shorter_side(records):
    kept = [a for r in wrappers.drop_small_boxes(records, 8) for a in r["annotations"]]
    expected = [
        a
        for r in records
        for a in r["annotations"]
        if not wrappers.is_instance(a) or a["bbox"][2] >= 8
    ]
    assert kept == expected


@given(RECORDS, st.integers(15, 40))
def test_small_images_are_dropped_by_their_shorter_side(records, size):
    assert wrappers.drop_small_images(records, size) == [r for r in records if r["height"] >= size]


@given(RECORDS, SEEDS)
def test_nothing_that_was_given_is_changed(records, seed):
    before = repr(records)
    for shaped in (
        wrappers.choose_shots(records, 1, seed),
        wrappers.drop_crowd(records),
        wrappers.drop_small_boxes(records, 8),
    ):
        for r in shaped:
            r["annotations"].append(None)
    assert repr(records) == before


@pytest.mark.parametrize("value", [0, -1, 1.5, math.nan, True])
def test_shares_out_of_range_are_refused(value):
    records = [record(0, []), record(1, [])]
    with pytest.raises(UserError, match="above 0 and at most 1"):
        wrappers.choose_share(records, value, 0)
    with pytest.raises(UserError, match="above 0 and at most 1"):
        wrappers.balance(records, value)
    with pytest.raises(UserError, match="between 0 and 1"):
        wrappers.split(records, value, 0)


def test_whole_numbers_are_asked_for():
    with pytest.raises(UserError, match="at least once; got 0"):
        wrappers.repeat([], 0)
    with pytest.raises(UserError, match="at least 1, got 1.5"):
        wrappers.choose_shots([], 1.5, 0)
    with pytest.raises(UserError, match="1 image cannot be split"):
        wrappers.split([record(0, [])], 0.5, 0)
