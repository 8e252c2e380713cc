"""
Pascal VOC's AP against Detectron2's ``voc_eval``, which reads files.

Recalls, precisions and overlaps are equal to the last bit: coordinates are whole numbers or
multiples of 1/8, so that the 1 which Detectron2 adds to widths rounds nothing.
"""

import math
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from detectron2.evaluation.pascal_voc_evaluation import voc_eval

from d2ft.evaluation.pascal_voc_ap import average_precision, best_matches, box_overlaps
from tests.parity.damage import damage_boxes

pytestmark = pytest.mark.parity

# What makes a continuous box the pixel numbers of a VOC file.
FROM_ONE = np.array([1, 1, 0, 0])

DAMAGES = (
    "shifted", "duplicated", "touching borders", "one pixel", "only difficult", "none", "eroded",
    "merged", "empty", "class absent",
)  # fmt: skip


def seeded_images(seed, num_images):
    """Return of each image the objects, XYXY from 0 with their flags, all of one class."""
    generator = np.random.default_rng(seed)
    images = []
    for _ in range(num_images):
        corners = generator.integers(0, 300, (generator.integers(0, 6), 2))
        sizes = generator.integers(1, 150, corners.shape)
        boxes = np.hstack([corners, corners + sizes]).astype(float)
        images.append((boxes, generator.random(len(boxes)) < 0.2))
    return images


def damaged(images, seed, damage):
    """Return truth and (boxes, scores) of each image; all scores differ."""
    generator = np.random.default_rng(seed)
    truth, found = [], []
    for boxes, difficult in images:
        if damage == "only difficult":
            difficult = np.ones_like(difficult)
        repeats = generator.integers(0, 4 if damage == "duplicated" else 2, len(boxes))
        detections = np.repeat(boxes, repeats, axis=0)
        detections += generator.integers(-80, 80, detections.shape) / 8
        invented = generator.integers(0, 200, (generator.integers(0, 4), 4)).astype(float)
        invented[:, 2:] += invented[:, :2] + 5
        detections = np.vstack([detections, invented])
        detections = damage_boxes(detections, damage)
        if damage == "empty":
            detections[:, 2:] = detections[:, :2]
        if damage == "class absent":
            boxes, difficult = boxes[:0], difficult[:0]
        if damage == "touching borders":
            detections[:, :2] = 0
        if damage == "one pixel":
            detections[:, 2:] = detections[:, :2] + 1
        if damage == "none":
            detections = detections[:0]
        detections[:, 2:] = np.maximum(detections[:, 2:], detections[:, :2])
        truth.append((boxes, difficult))
        found.append((detections, generator.random(len(detections))))
    return truth, found


def detectron2_ap(folder, truth, found, threshold, eleven_points):
    names = []
    for i, (boxes, difficult) in enumerate(truth):
        root = ET.Element("annotation")
        for box, flag in zip(boxes, difficult, strict=True):
            object_ = ET.SubElement(root, "object")
            fields = {"name": "cell", "pose": "", "truncated": 0, "difficult": int(flag)}
            for tag, value in fields.items():
                ET.SubElement(object_, tag).text = str(value)
            bounds = ET.SubElement(object_, "bndbox")
            for tag, value in zip(("xmin", "ymin", "xmax", "ymax"), box + FROM_ONE, strict=True):
                ET.SubElement(bounds, tag).text = str(int(value))
        names.append(f"{folder.name}_{i}")
        ET.ElementTree(root).write(folder / f"{names[-1]}.xml")
    (folder / "set.txt").write_text("\n".join(names))
    lines = [
        f"{name} {score!r} {' '.join(repr(float(v)) for v in box + FROM_ONE)}"
        for name, (boxes, scores) in zip(names, found, strict=True)
        for box, score in zip(boxes, scores.tolist(), strict=True)
    ]
    (folder / "cell.txt").write_text("\n".join(lines))
    with np.errstate(invalid="ignore", divide="ignore"):
        return voc_eval(
            str(folder / "{}.txt"), str(folder / "{}.xml"), str(folder / "set.txt"), "cell",
            ovthresh=threshold, use_07_metric=eleven_points,
        )[2]  # fmt: skip


def our_ap(truth, found, threshold, eleven_points):
    matches = best_matches(
        [
            box_overlaps(boxes, objects)
            for (boxes, _), (objects, _) in zip(found, truth, strict=True)
        ],
        [scores for _, scores in found],
        [difficult for _, difficult in truth],
    )
    return average_precision(matches, threshold, eleven_points=eleven_points)


def assert_equal_to_detectron2(folder, truth, found):
    for threshold in (0.5, 0.55, 0.75, 0.95):
        for eleven_points in (True, False):
            ours = our_ap(truth, found, threshold, eleven_points)
            if all(difficult.all() for _, difficult in truth):
                assert math.isnan(ours)  # Detectron2 divides by 0 there
                continue
            theirs = detectron2_ap(folder, truth, found, threshold, eleven_points)
            assert ours == theirs


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("num_images", [1, 5, 20])
def test_ap_is_that_of_detectron2(tmp_path, damage, num_images):
    truth, found = damaged(seeded_images(num_images, num_images), 5, damage)
    assert_equal_to_detectron2(tmp_path, truth, found)


def test_ap_on_real_blood_cells_is_that_of_detectron2(tmp_path, real_data):
    images = []
    folder = real_data / "VOC_BCCD" / "VOCdevkit" / "VOC2007"
    for name in (folder / "ImageSets" / "Main" / "val.txt").read_text().split()[:10]:
        boxes = [
            [int(bounds.find(tag).text) for tag in ("xmin", "ymin", "xmax", "ymax")]
            for bounds in ET.parse(folder / "Annotations" / f"{name}.xml").iter("bndbox")
        ]
        boxes = np.array(boxes, dtype=float).reshape(-1, 4) - [1, 1, 0, 0]
        images.append((boxes, np.zeros(len(boxes), dtype=bool)))
    for damage in DAMAGES[:2]:
        assert_equal_to_detectron2(tmp_path, *damaged(images, 2, damage))


def plain_ap(truth, found, threshold, total):
    """Return the area AP, one detection after the other, equal scores in their order."""
    detections = [
        (score, image, box)
        for image, (boxes, scores) in enumerate(found)
        for box, score in zip(boxes, scores.tolist(), strict=True)
    ]
    detections.sort(key=lambda each: -each[0])
    taken, true, false, curve = set(), 0, 0, []
    for _, image, box in detections:
        objects, difficult = truth[image]
        overlaps = box_overlaps(box[None], objects)[0].tolist()
        best = max(overlaps, default=-1)
        nearest = overlaps.index(best) if overlaps else None
        if best > threshold:
            if not difficult[nearest]:
                true += (image, nearest) not in taken
                false += (image, nearest) in taken
                taken.add((image, nearest))
        else:
            false += 1
        curve.append((true / total, true / max(true + false, 1)))
    area, recall = 0.0, 0.0
    for i, (reached, _) in enumerate(curve):
        area += (reached - recall) * max(precision for _, precision in curve[i:])
        recall = reached
    return area


def test_equal_scores_count_in_their_order():
    truth, found = damaged(seeded_images(30, 30), 5, "duplicated")
    found = [(boxes, scores.round(1)) for boxes, scores in found]
    total = sum(int((~difficult).sum()) for _, difficult in truth)
    expected = plain_ap(truth, found, 0.5, total)
    # The reference adds one product after the other, NumPy pairs of them.
    assert our_ap(truth, found, 0.5, False) == pytest.approx(expected, rel=0, abs=1e-12)
