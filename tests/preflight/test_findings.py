import numpy as np
import pytest

from d2ft.preflight.findings import (
    DatasetTable,
    compare_classes,
    find_bad_boxes,
    find_bad_classes,
    find_repeated_images,
    find_unfit_sizes,
    resized_lengths,
)


def table(boxes=(), categories=None, *, classes=("cat", "dog"), crowd=(), is_test=False, **other):
    """Describe annotations that are dealt to two images of 100x200 pixels in turn."""
    number = len(boxes)
    return DatasetTable(
        name=other.pop("name", "set"),
        classes=classes,
        is_test=is_test,
        file_names=other.pop("file_names", ["a.png", "b.png"]),
        image_ids=other.pop("image_ids", [1, 2]),
        sizes=np.array(other.pop("sizes", [(100, 200), (100, 200)]), dtype=float),
        boxes=np.array(boxes, dtype=float).reshape(-1, 4),
        categories=np.array(categories or [0] * number, dtype=int),
        image_of=np.arange(number) % 2,
        is_target=np.array([row not in crowd for row in range(number)], dtype=bool),
    )


@pytest.mark.parametrize(
    ("box", "code", "level"),
    [
        ((0, 0, float("nan"), 5), "box-not-finite", "error"),
        ((0, 0, float("inf"), 5), "box-not-finite", "error"),
        ((10, 10, 5, 20), "box-inverted", "error"),
        ((10, 10, 10, 20), "box-flat", "warning"),
        ((200, 10, 210, 20), "box-outside", "warning"),
        ((-9, 10, -1, 20), "box-outside", "warning"),
        ((190, 10, 202, 20), "box-beyond-edge", "warning"),
    ],
)
def test_a_bad_box_is_named_with_its_file(box, code, level):
    (found,) = find_bad_boxes(table([(0, 0, 200, 100), box]))
    assert (found.code, found.level) == (code, level)
    assert "1 box of 2" in found.message
    assert "b.png" in found.message


def test_boxes_up_to_a_rounding_past_the_edge_are_good():
    assert find_bad_boxes(table([(-0.5, 0, 201, 100.4)])) == []


def test_boxes_of_an_image_of_unknown_size_are_not_outside():
    sizes = [(float("nan"), float("nan"))] * 2
    assert find_bad_boxes(table([(500, 0, 900, 5)], sizes=sizes)) == []


def test_classes_out_of_range_empty_and_rare_are_found():
    found = find_bad_classes(table([(0, 0, 9, 9)] * 3, [0, 7, -1], classes=("cat", "dog")))
    assert [f.code for f in found] == ["class-unknown", "class-empty", "class-rare"]
    assert "-1, 7: a.png, b.png" in found[0].message
    assert "dog" in found[1].message
    assert "cat (1)" in found[2].message


def test_crowd_does_not_fill_a_class():
    found = find_bad_classes(table([(0, 0, 9, 9)] * 11, [0] * 10 + [1], crowd=(10,)))
    assert [f.code for f in found] == ["class-empty"]


@pytest.mark.parametrize(("is_test", "level"), [(True, "error"), (False, "warning")])
def test_an_id_of_two_files_is_an_error_where_it_is_evaluated(is_test, level):
    (found,) = find_repeated_images(table(image_ids=[5, 5], is_test=is_test))
    assert (found.code, found.level) == ("image-id-shared", level)
    assert "5: a.png, b.png" in found.message


def test_an_image_may_be_repeated_for_training_only():
    repeated = {"image_ids": [5, 5], "file_names": ["a.png", "a.png"]}
    assert find_repeated_images(table(**repeated)) == []
    assert [f.code for f in find_repeated_images(table(is_test=True, **repeated))] == [
        "image-repeated"
    ]


def test_classes_that_differ_are_named_on_both_sides():
    other = table(classes=("cat", "cow"), name="val")
    (found,) = compare_classes(table(), other)
    assert found.message == "only set has dog; only val has cow"
    (found,) = compare_classes(table(), table(classes=("dog", "cat")))
    assert "another order" in found.message


def test_a_class_that_is_evaluated_but_never_taught_is_named():
    (found,) = compare_classes(table([(0, 0, 9, 9)], [0]), table([(0, 0, 9, 9)], [1]))
    assert found.code == "class-untaught"
    assert "dog" in found.message


def test_sides_are_those_after_the_resizing_of_detectron2():
    boxes = table([(0, 0, 10, 10), (0, 0, 20, 5), (0, 0, 0, 9), (0, 0, 9, 9)], crowd=(3,))
    assert resized_lengths(boxes, 800, 4000).tolist() == [80, 80]
    assert resized_lengths(boxes, 800, 400).tolist() == [20, 20]
    assert resized_lengths(boxes, 0, 400).tolist() == [10, 10]


def test_instances_below_the_reach_of_the_smallest_anchor_are_reported():
    # 0.3 of the area of a 32-pixel anchor is a side of 17.5.
    assert find_unfit_sizes("set", np.array([18.0] * 10), [32, 64], 0.3) == []
    (found,) = find_unfit_sizes("set", np.array([17.0] * 2 + [40.0] * 8), [32, 64], 0.3)
    assert found.code == "instances-small"
    assert "20% of the instances" in found.message
    (found,) = find_unfit_sizes("set", np.array([120.0]), [32, 64], 0.3)
    assert found.code == "instances-large"
