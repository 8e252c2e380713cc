"""
WIDER FACE's AP against the official rules in plain Python, and against recorded numbers.

The recorded numbers are of wondervictor/WiderFace-Evaluation at
53474e0d35ecdd019052d4fff0813ea4037bd0cd, ``evaluation.py``, run on the whole validation set.
"""

import numpy as np
import pytest

from d2ft.evaluation.wider_face import LEVELS, read_face_lists
from d2ft.evaluation.wider_face_ap import (
    match_faces,
    stretch_scores,
    wider_face_average_precision,
)
from tests.parity.damage import damage_boxes
from tests.parity.wider_face_reference import reference_ap

pytestmark = pytest.mark.parity

DAMAGES = (
    "shifted", "ties", "duplicated", "one pixel", "only some images", "class absent", "eroded",
    "merged", "empty", "touching borders", "none",
)  # fmt: skip


def seeded_faces(seed, num_images):
    generator = np.random.default_rng(seed)
    images = []
    for _ in range(num_images):
        corners = generator.integers(0, 900, (generator.integers(0, 12), 2))
        sizes = np.exp(generator.uniform(1, 5, corners.shape)).round()
        boxes = np.hstack([corners, corners + sizes])
        images.append((boxes, generator.random(len(boxes)) < 0.6))
    return images


def damaged(faces, seed, damage):
    """Return the detections (boxes, scores) of each image, by falling score."""
    generator = np.random.default_rng(seed)
    found = []
    for boxes in faces:
        repeats = generator.integers(0, 3 if damage == "duplicated" else 2, len(boxes))
        detections = np.repeat(boxes, repeats, axis=0)
        sizes = np.tile(detections[:, 2:] - detections[:, :2], 2)
        spread = generator.choice([0, 0.05, 0.15])
        detections = (detections + generator.normal(0, 1, detections.shape) * sizes * spread).round(
            1
        )
        invented = generator.uniform(0, 500, (generator.integers(0, 4), 4)).round(1)
        invented[:, 2:] += invented[:, :2]
        detections = np.vstack([detections, invented])
        if damage == "one pixel":
            detections[::2, 2:] = detections[::2, :2]
        detections = damage_boxes(detections, damage)
        if damage == "empty":  # the last pixel belongs to a box
            detections[::2, 2:] = detections[::2, :2] - 1
        if damage == "touching borders":
            detections[:, :2] = 0
        if damage == "none":
            detections = detections[:0]
        if damage == "only some images" and generator.random() < 0.5:
            detections = detections[:0]
        if damage == "class absent":
            detections = detections[:1]
        scores = generator.uniform(0.05, 0.95, len(detections))
        scores = -np.sort(-scores.round(1 if damage == "ties" else 6))
        found.append((detections, scores))
    return found


def ours(faces, counted, found):
    scores = stretch_scores([scores for _, scores in found])
    matches = [
        match_faces(boxes, stretched, image)
        for (boxes, _), stretched, image in zip(found, scores, faces, strict=True)
    ]
    return wider_face_average_precision(matches, counted)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("num_images", [2, 10, 40])
def test_ap_is_that_of_the_official_rules(damage, num_images):
    images = seeded_faces(num_images, num_images)
    faces, counted = zip(*images, strict=True)
    found = damaged(faces, 3, damage)
    plain = [
        (
            list(zip(boxes.tolist(), flags.tolist(), strict=True)),
            list(zip(detections.tolist(), scores.tolist(), strict=True)),
        )
        for (boxes, flags), (detections, scores) in zip(images, found, strict=True)
    ]
    # The reference adds one product after the other, NumPy pairs of them.
    assert ours(faces, counted, found) == pytest.approx(reference_ap(plain), rel=0, abs=1e-12)


def test_where_only_faces_of_another_level_are_there_nothing_can_be_said():
    faces, counted = zip(*seeded_faces(5, 5), strict=True)
    ignored = [np.zeros_like(flags) for flags in counted]
    assert np.isnan(ours(faces, ignored, damaged(faces, 3, "shifted")))


# seed 11, "ties"
RECORDED = {
    "easy": 0.3130035736253786,
    "medium": 0.363619200083251,
    "hard": 0.41612400072825906,
}


def test_ap_on_the_whole_validation_set_is_that_of_the_published_port(real_data):
    pytest.importorskip("scipy")
    lists = read_face_lists(real_data / "widerface" / "ground_truth")
    assert len(lists) == 3226
    names = sorted(lists)
    faces = [lists[name].boxes for name in names]
    found = damaged(faces, 11, "ties")
    for level in LEVELS:
        counted = [lists[name].counted[level] for name in names]
        assert ours(faces, counted, found) == RECORDED[level]
