"""
KITTI's 2D AP against the official rules in plain Python, and against recorded numbers.

The recorded numbers are of open-mmlab/OpenPCDet at 8cacccec11db6f59bf6934600c9a175dae254806,
``pcdet/datasets/kitti/kitti_object_eval_python/eval.py``, whose ``eval_class`` was run for boxes
on the same scenes. All comparisons are equalities: counts are whole numbers, and both sides divide
and add them in the same order.
"""

import numpy as np
import pytest

from d2ft.evaluation.kitti_ap import KittiDetections, KittiObjects, kitti_average_precision
from tests.parity.kitti_reference import reference_ap

pytestmark = pytest.mark.parity

TYPES = ("Car", "Pedestrian", "Cyclist", "Van", "Person_sitting", "Truck", "DontCare")


def seeded_truth(seed, num_images):
    generator = np.random.default_rng(seed)
    images = []
    for _ in range(num_images):
        objects = []
        for _ in range(generator.integers(0, 9)):
            kind = str(generator.choice(TYPES, p=(0.4, 0.2, 0.1, 0.1, 0.05, 0.05, 0.1)))
            height = float(generator.choice([24, 25, 26, 40, 41, 90, 150]))
            x, y = generator.uniform(0, 1000), generator.uniform(100, 250)
            box = [x, y, x + height * generator.uniform(0.4, 2), y + height]
            truncated = float(generator.choice([0, 0, 0.15, 0.2, 0.3, 0.5, 0.9]))
            objects.append((kind, box, truncated, int(generator.choice([0, 0, 0, 1, 2, 3]))))
        images.append(objects)
    return images


BOX_CHANGES = {
    "low": lambda x0, y0, x1, y1: [x0, y0, x1, y0 + 25],
    "eroded": lambda x0, y0, x1, y1: [x0 + 2, y0 + 2, x1 - 2, y1 - 2],
    "one pixel": lambda x0, y0, x1, y1: [x0, y0, x0 + 1, y0 + 1],
    "empty": lambda x0, y0, x1, y1: [x0, y0, x0, y0],
    "touching borders": lambda x0, y0, x1, y1: [0.0, 0.0, x1, y1],
}


def damaged(images, seed, damage):  # noqa: C901 - one damage after the other
    """Return each image with detections made from its objects."""
    generator = np.random.default_rng(seed)
    result = []
    for objects in images:
        found = []
        for kind, box, _, _ in objects:
            for _ in range(generator.choice([0, 1, 1, 2])):
                box = np.array(box)
                size = np.tile(box[2:] - box[:2], 2)
                shifted = box + generator.normal(0, generator.choice([0, 0.03, 0.1]), 4) * size
                found.append((kind if kind != "DontCare" else "Car", shifted.tolist()))
        for _ in range(generator.integers(0, 4)):
            x, y, height = (
                generator.uniform(0, 1000),
                generator.uniform(100, 250),
                generator.uniform(10, 90),
            )
            found.append((str(generator.choice(TYPES[:3])), [x, y, x + height, y + height]))
        scores = generator.random(len(found))
        if damage == "ties":
            scores = scores.round(1)
        if damage == "wrong class":
            found = [(str(generator.choice(TYPES[:4])), box) for _, box in found]
        if damage == "no predictions":
            found = []
        if damage == "class absent":
            found = [each for each in found if each[0] != "Pedestrian"]
        if damage == "duplicated":
            found, scores = found * 2, np.tile(scores, 2)
        if damage == "merged":
            found = [
                (k, [*np.minimum(b, a)[:2], *np.maximum(b, a)[2:]])
                for (k, b), (_, a) in zip(found, found[1:] + found[:1], strict=True)
            ]
        if damage in BOX_CHANGES:
            found = [(kind, BOX_CHANGES[damage](*box)) for kind, box in found]
        if damage == "only cars and vans":
            objects = [each for each in objects if each[0] in ("Car", "Van")]
        if damage == "only ignored":
            objects = [(k, b, t, 3) for k, b, t, _ in objects]
        result.append(
            (
                objects,
                [(k, b, float(s)) for (k, b), s in zip(found, scores[: len(found)], strict=True)],
            )
        )
    return result


def ours(images):
    objects = [
        KittiObjects(
            [kind for kind, *_ in truth],
            np.array([box for _, box, *_ in truth], dtype=float).reshape(-1, 4),
            np.array([truncated for *_, truncated, _ in truth], dtype=float),
            np.array([occluded for *_, occluded in truth], dtype=int),
        )
        for truth, _ in images
    ]
    detections = [
        KittiDetections(
            [kind for kind, *_ in found],
            np.array([box for _, box, _ in found], dtype=float).reshape(-1, 4),
            np.array([score for *_, score in found], dtype=float),
        )
        for _, found in images
    ]
    return kitti_average_precision(objects, detections)


def assert_equal_to_reference(images):
    expected = reference_ap(images)
    found = ours(images)
    assert list(found) == list(expected)
    for key, pair in found.items():
        # No object counts: the official 0 means nothing was found, ours that there was nothing.
        assert pair == expected[key] or (np.isnan(pair).all() and expected[key] == (0, 0)), key


DAMAGES = (
    "shifted", "ties", "wrong class", "no predictions", "class absent", "low", "eroded", "merged",
    "duplicated", "one pixel", "empty", "touching borders",
    "only cars and vans", "only ignored",
)  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("num_images", [1, 8, 60])
def test_ap_is_that_of_the_official_rules(damage, num_images):
    assert_equal_to_reference(damaged(seeded_truth(num_images, num_images), 7, damage))


def read_labels(folder):
    images = []
    for path in sorted(folder.glob("*.txt")):
        objects = []
        for line in path.read_text().splitlines():
            kind, truncated, occluded, _, *numbers = line.split()
            box = [float(number) for number in numbers[:4]]
            objects.append((kind, box, float(truncated), int(occluded)))
        images.append(objects)
    return images


@pytest.mark.parametrize("damage", DAMAGES)
def test_ap_on_real_labels_is_that_of_the_official_rules(real_data, damage):
    images = read_labels(real_data / "kitti" / "training" / "label_2")
    assert_equal_to_reference(damaged(images, 3, damage))


# (AP at 40, AP at 11) of seeded_truth(60, 60) with "ties".
RECORDED = {
    ("Car", "easy"): (0.03125, 0.03787878787878787),
    ("Car", "moderate"): (0.1855438468992248, 0.19303613053613056),
    ("Car", "hard"): (0.25687984496124033, 0.2793164200140944),
    ("Pedestrian", "easy"): (0.047789473684210534, 0.059011164274322174),
    ("Pedestrian", "moderate"): (0.1326357594379102, 0.16496545006026964),
    ("Pedestrian", "hard"): (0.24148447614257068, 0.24605706184653553),
    ("Cyclist", "easy"): (0.0023809523809523807, 0.008658008658008658),
    ("Cyclist", "moderate"): (0.024545454545454547, 0.10909090909090909),
    ("Cyclist", "hard"): (0.08137065637065635, 0.14145314145314145),
}


def test_ap_is_that_of_openpcdet():
    assert ours(damaged(seeded_truth(60, 60), 7, "ties")) == RECORDED
