import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2ft.data.class_lists import choose_classes, join, rename_classes
from d2ft.errors import UserError
from tests.data.test_wrappers import RECORDS, annotation, instances, record

CLASSES = ["car", "van", "dog", "cat", "cow"]


def by_name(records, classes):
    return {classes[category]: n for category, n in instances(records).items()}


@given(RECORDS, st.permutations(CLASSES), st.integers(1, 5))
def test_chosen_classes_keep_their_instances_and_all_images_stay(records, order, count):
    chosen, classes = choose_classes(records, CLASSES, order[:count])
    assert classes == order[:count]
    assert len(chosen) == len(records)
    expected = {c: n for c, n in by_name(records, CLASSES).items() if c in classes}
    assert by_name(chosen, classes) == expected


@given(RECORDS)
def test_merged_classes_have_the_instances_of_both(records):
    merged, classes = rename_classes(records, CLASSES, {"van": "car", "cow": "ox"})
    assert classes == ["car", "dog", "cat", "ox"]
    before, after = by_name(records, CLASSES), by_name(merged, classes)
    assert after.get("car", 0) == before.get("car", 0) + before.get("van", 0)
    assert after.get("ox", 0) == before.get("cow", 0)
    assert sum(after.values()) == sum(before.values())


@given(RECORDS, RECORDS)
def test_a_union_has_the_instances_of_both_by_name(first, second):
    other = ["cow", "car", "x", "y", "z"]
    joined, classes = join([(first, CLASSES), (second, other)])
    assert classes == ["car", "van", "dog", "cat", "cow", "x", "y", "z"]
    one, two, both = by_name(first, CLASSES), by_name(second, other), by_name(joined, classes)
    assert both == {c: one.get(c, 0) + two.get(c, 0) for c in both}
    assert len(joined) == len(first) + len(second)
    assert sum(both.values()) == sum(one.values()) + sum(two.values())


def test_images_of_a_union_know_what_their_set_labelled():
    joined, _ = join([([record(0, [])], ["a", "b"]), ([record(1, [])], ["b", "c"])])
    assert [r["labelled_classes"] for r in joined] == [[0, 1], [1, 2]]


def test_sets_with_the_same_classes_in_another_order_are_labelled_whole():
    joined, classes = join(
        [([record(0, [annotation(0)])], ["a", "b"]), ([record(1, [annotation(0)])], ["b", "a"])]
    )
    assert classes == ["a", "b"]
    assert [r["annotations"][0]["category_id"] for r in joined] == [0, 1]
    assert all("labelled_classes" not in r for r in joined)


def test_what_is_labelled_follows_the_classes():
    joined, classes = join([([record(0, [])], ["a", "b"]), ([record(1, [])], ["b", "c"])])
    chosen, _ = choose_classes(joined, classes, ["c", "b"])
    assert [r.get("labelled_classes") for r in chosen] == [[1], None]
    # A merged class counts as labelled only where all its parts were.
    merged, _ = rename_classes(joined, classes, {"a": "b"})
    assert [r.get("labelled_classes") for r in merged] == [[0], [1]]


def test_a_union_of_unions_keeps_what_is_labelled():
    inner, classes = join([([record(0, [])], ["a"]), ([record(1, [])], ["b"])])
    outer, _ = join([([record(2, [])], ["c"]), (inner, classes)])
    assert [r["labelled_classes"] for r in outer] == [[0], [1], [2]]


def test_mistakes_in_class_names_are_named():
    with pytest.raises(UserError, match="'vna' cannot be chosen: did you mean 'van'"):
        choose_classes([], CLASSES, ["vna"])
    with pytest.raises(UserError, match="'tractor' cannot be renamed. The classes are: car, van"):
        rename_classes([], CLASSES, {"tractor": "car"})
    with pytest.raises(UserError, match="'car' is chosen twice"):
        choose_classes([], CLASSES, ["car", "car"])
    with pytest.raises(UserError, match="no class is chosen"):
        choose_classes([], CLASSES, [])
    with pytest.raises(UserError, match="'Traffic Light' and 'traffic_light' .* spelling only"):
        join([([], ["Traffic Light"]), ([], ["traffic_light"])])
