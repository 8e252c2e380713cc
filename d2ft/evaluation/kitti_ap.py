"""
KITTI's 2D detection AP: easy, moderate and hard, at 40 and at 11 recall positions.

The rules are those of the official development kit, ``cpp/evaluate_object.cpp`` in
https://s3.eu-central-1.amazonaws.com/avg-kitti/devkit_object.zip, also described at
https://www.cvlibs.net/datasets/kitti/eval_object.php. 40 positions replaced 11 in 2019.

Shape shorthand in this module:

    G: labelled objects of an image, DontCare regions among them    D: detections of an image
    T: score thresholds, at most 41
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from d2ft.evaluation.blocks import row_blocks

# Smallest overlap (intersection over union) of a match; it has to be larger than this.
MIN_OVERLAP = {"Car": 0.7, "Pedestrian": 0.5, "Cyclist": 0.5}
LEVELS = ("easy", "moderate", "hard")

# Of each level: an object that is not higher (pixels), more occluded or more truncated is ignored.
_MIN_HEIGHT = (40, 25, 25)
_MAX_OCCLUSION = (0, 1, 2)
_MAX_TRUNCATION = (0.15, 0.3, 0.5)
# Class -> another one that looks like it, and is neither to be found nor a false positive.
_NEIGHBOUR = {"car": "van", "pedestrian": "person_sitting"}
_SAMPLES = 41


@dataclass(frozen=True)
class KittiObjects:
    """
    The labels of an image.

    Attributes:
        types: G names as in the label file, such as "Car", "Van", "DontCare".
        boxes: (G, 4) XYXY in pixels.
        truncated: (G,) 0 to 1.
        occluded: (G,) 0 to 3.
    """

    types: Sequence[str]
    boxes: np.ndarray
    truncated: np.ndarray
    occluded: np.ndarray


@dataclass(frozen=True)
class KittiDetections:
    """
    The detections in an image, of all classes: small ones of another class count as well.

    Attributes:
        types: D names of classes.
        boxes: (D, 4) XYXY in pixels.
        scores: (D,) finite.
    """

    types: Sequence[str]
    boxes: np.ndarray
    scores: np.ndarray


def kitti_average_precision(
    objects: Sequence[KittiObjects],
    detections: Sequence[KittiDetections],
    min_overlap: Mapping[str, float] = MIN_OVERLAP,
) -> dict[tuple[str, str], tuple[float, float]]:
    """
    Return AP at 40 and at 11 recall positions for each class and level, 0 to 1.

    The number is that of the development kit, but where no object counts: nan here, 0 there.

    Args:
        objects: one entry an image.
        detections: of the same images, in the same order.
        min_overlap: class -> overlap above which a detection matches.

    Returns:
        (class, level) -> (AP at 40 positions, AP at 11 positions).
    """
    overlaps = [_overlaps(o.boxes, d.boxes) for o, d in zip(objects, detections, strict=True)]
    results = {}
    for name, minimum in min_overlap.items():
        for level, level_name in enumerate(LEVELS):
            images = [
                _Image.prepare(name, level, minimum, *each)
                for each in zip(objects, detections, overlaps, strict=True)
            ]
            results[name, level_name] = _average_precision(images)
    return results


@dataclass(frozen=True)
class _Image:
    """
    An image as one class at one level sees it.

    Attributes:
        counted: (g,) whether an object of the class or its neighbour is to be found.
        candidates: for each of these objects the detections that overlap it enough, the ones to
            take first at the head, as (before thresholds are known, with them).
        scores: (D,)
        judged: (D,) detections of the class that are high enough.
        excused: (D,) those that lie in a DontCare region.
    """

    counted: np.ndarray
    candidates: list[tuple[np.ndarray, np.ndarray]]
    scores: np.ndarray
    judged: np.ndarray
    excused: np.ndarray

    @classmethod
    def prepare(
        cls,
        name: str,
        level: int,
        minimum: float,
        objects: KittiObjects,
        detections: KittiDetections,
        overlaps: tuple[np.ndarray, np.ndarray],
    ) -> "_Image":
        wanted = name.lower()
        types = np.array([t.lower() for t in objects.types], dtype=object)
        of_class = types == wanted
        height = objects.boxes[:, 3] - objects.boxes[:, 1]
        too_hard = (
            (objects.occluded > _MAX_OCCLUSION[level])
            | (objects.truncated > _MAX_TRUNCATION[level])
            | (height <= _MIN_HEIGHT[level])
        )
        rows = np.flatnonzero(of_class | (types == _NEIGHBOUR.get(wanted)))
        counted = (of_class & ~too_hard)[rows]

        height = np.abs(detections.boxes[:, 3] - detections.boxes[:, 1])
        low = height < _MIN_HEIGHT[level]
        found = np.array([t.lower() == wanted for t in detections.types], dtype=bool)
        judged = found & ~low

        union, inside = overlaps
        candidates = []
        for row in rows:
            near = np.flatnonzero((union[row] > minimum) & (judged | low))
            by_score = near[np.argsort(-detections.scores[near], kind="stable")]
            high = near[judged[near]]
            by_overlap = high[np.argsort(-union[row, high], kind="stable")]
            candidates.append((by_score, np.concatenate([by_overlap, near[low[near]]])))
        excused = (inside[types == "dontcare"] > minimum).any(axis=0)
        return cls(counted, candidates, detections.scores, judged, excused)

    def found_scores(self) -> list[float]:
        """Return the scores of the counted objects' detections, each object taking its best."""
        free = np.ones(len(self.scores), dtype=bool)
        scores = []
        for counted, (by_score, _) in zip(self.counted, self.candidates, strict=True):
            left = by_score[free[by_score]]
            if len(left):
                free[left[0]] = False
                if counted and self.judged[left[0]]:
                    scores.append(float(self.scores[left[0]]))
        return scores

    def count(self, thresholds: np.ndarray) -> np.ndarray:
        """Return (T, 2) true and false positives among the detections of at least each score."""
        free = self.scores >= thresholds[:, None]
        true = np.zeros(len(thresholds), dtype=np.int64)
        for counted, (_, by_overlap) in zip(self.counted, self.candidates, strict=True):
            if not len(by_overlap):
                continue
            choice = free[:, by_overlap]
            taken = np.flatnonzero(choice.any(axis=1))
            detections = by_overlap[choice.argmax(axis=1)[taken]]
            free[taken, detections] = False
            if counted:
                true[taken] += self.judged[detections]
        false = (free & self.judged & ~self.excused).sum(axis=1)
        return np.stack([true, false], axis=1)


def _average_precision(images: list[_Image]) -> tuple[float, float]:
    total = sum(int(image.counted.sum()) for image in images)
    if total == 0:
        return float("nan"), float("nan")
    scores = [score for image in images for score in image.found_scores()]
    thresholds = np.array(_recall_thresholds(scores, total))
    counts = np.zeros((len(thresholds), 2), dtype=np.int64)
    for image in images:
        counts += image.count(thresholds)
    precision = np.zeros(_SAMPLES)
    # Where nothing is left to judge, the development kit divides 0 by 0.
    precision[: len(thresholds)] = counts[:, 0] / np.maximum(counts.sum(axis=1), 1)
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    # One after the other, as the development kit adds: np.sum rounds otherwise, and so does the
    # built-in sum from Python 3.12 on.
    ap_40, ap_11 = (np.cumsum(samples)[-1] for samples in (precision[1:], precision[::4]))
    return float(ap_40) / 40, float(ap_11) / 11


def _recall_thresholds(scores: list[float], total: int) -> list[float]:
    """Return the scores at which recall passes 0, 1/40, ... 1 most closely, falling."""
    thresholds = []
    recall = 0.0
    scores = sorted(scores, reverse=True)
    for i, score in enumerate(scores):
        last = i == len(scores) - 1
        left = (i + 1) / total
        right = left if last else (i + 2) / total
        if right - recall < recall - left and not last:
            continue
        thresholds.append(score)
        recall += 1 / (_SAMPLES - 1.0)
    return thresholds


def _overlaps(objects: np.ndarray, detections: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (G, D) intersection over union, and intersection over the detection's area."""
    union = np.empty((len(objects), len(detections)))
    inside = np.empty_like(union)
    for part in row_blocks(len(detections), len(objects)):
        union[:, part], inside[:, part] = _block_overlaps(objects, detections[part])
    return union, inside


def _block_overlaps(objects: np.ndarray, detections: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a, b = objects[:, None].astype(np.float64), detections[None].astype(np.float64)
    size = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    both = np.where((size > 0).all(axis=-1), size[..., 0] * size[..., 1], 0.0)
    area_a = (a[..., 2] - a[..., 0]) * (a[..., 3] - a[..., 1])
    area_b = (b[..., 2] - b[..., 0]) * (b[..., 3] - b[..., 1])
    union = np.divide(both, area_a + area_b - both, out=np.zeros_like(both), where=both > 0)
    inside = np.divide(
        both, np.broadcast_to(area_b, both.shape), out=np.zeros_like(both), where=both > 0
    )
    return union, inside
