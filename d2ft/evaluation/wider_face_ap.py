"""
WIDER FACE's average precision of one level (easy, medium or hard).

The rules are those of the official Matlab evaluation, http://shuoyang1213.me/WIDERFACE/, in the
reading of its Python port, https://github.com/wondervictor/WiderFace-Evaluation: scores are
stretched to 0 .. 1 over the whole set, precision and recall are taken at 1000 thresholds, and a
face that is not of the level is neither to be found nor a false positive.

Shape shorthand in this module:

    N: detections of an image    F: faces of an image
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from d2ft.evaluation.blocks import row_blocks
from d2ft.evaluation.pascal_voc_ap import area_under_curve

MIN_OVERLAP = 0.5
_NUM_THRESHOLDS = 1000


@dataclass(frozen=True)
class FaceMatches:
    """
    The detections of an image by falling score, each with the face that it overlaps most.

    Attributes:
        scores: (N,) 0 to 1, of :func:`stretch_scores`, falling.
        faces: (N,) the number of the face, -1 where the overlap is below 0.5.
        num_faces: F, of all levels.
    """

    scores: np.ndarray
    faces: np.ndarray
    num_faces: int


def stretch_scores(scores: Sequence[np.ndarray]) -> list[np.ndarray]:
    """
    Return the scores of each image, moved and scaled so that they run from 0 to 1 over all images.

    If all are equal they become 1: the official division by 0 would leave none.
    """
    every = np.concatenate([np.zeros(0), *scores])
    if not len(every):
        return [np.zeros(0) for _ in scores]
    # The official search for the smallest and largest starts from 1 and from 0.
    low, high = min(1.0, float(every.min())), max(0.0, float(every.max()))
    if low == high:
        return [np.ones(len(image)) for image in scores]
    return [(image.astype(np.float64) - low) / (high - low) for image in scores]


def match_faces(boxes: np.ndarray, scores: np.ndarray, faces: np.ndarray) -> FaceMatches:
    """
    Find for each detection the face that it overlaps most.

    Args:
        boxes: (N, 4) XYXY in pixels.
        scores: (N,) of :func:`stretch_scores`.
        faces: (F, 4) XYXY in pixels, of all levels.
    """
    order = np.argsort(-scores, kind="stable")
    nearest = np.full(len(order), -1)
    for part in row_blocks(len(order), len(faces)) if len(faces) else ():
        overlaps = _overlaps(boxes[order[part]], faces)
        best = overlaps.argmax(axis=1)
        enough = overlaps[np.arange(len(best)), best] >= MIN_OVERLAP
        nearest[part] = np.where(enough, best, -1)
    return FaceMatches(scores[order], nearest, len(faces))


def wider_face_average_precision(
    matches: Sequence[FaceMatches], counted: Sequence[np.ndarray]
) -> float:
    """
    Return the AP of a level, 0 to 1, or nan if no face is of that level.

    An image without any face is left out, as in the official evaluation: what is found there is
    no false positive.

    Args:
        matches: of each image.
        counted: (F,) of each image: whether the face is of the level.
    """
    total = sum(int(flags.sum()) for flags in counted)
    if total == 0:
        return float("nan")
    thresholds = 1 - np.arange(1, _NUM_THRESHOLDS + 1) / _NUM_THRESHOLDS
    curve = np.zeros((2, _NUM_THRESHOLDS))
    for image, flags in zip(matches, counted, strict=True):
        if image.num_faces and len(image.scores):
            curve += _counts(image, flags, thresholds)
    proposals, found = curve
    precision = np.divide(found, proposals, out=np.zeros_like(found), where=proposals > 0)
    return area_under_curve(found / total, precision)


def _counts(image: FaceMatches, counted: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Return (2, 1000): detections that count and faces of the level found, at each threshold."""
    matched = image.faces >= 0
    of_level = matched & counted[image.faces]
    first = np.zeros(len(matched), dtype=bool)
    rows = np.flatnonzero(of_level)
    _, earliest = np.unique(image.faces[rows], return_index=True)
    first[rows[earliest]] = True
    totals = np.zeros((2, len(matched) + 1))
    totals[0, 1:] = np.cumsum(~matched | of_level)
    totals[1, 1:] = np.cumsum(first)
    return totals[:, np.searchsorted(-image.scores, -thresholds, side="right")]


def _overlaps(boxes: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Return (N, F) intersections over unions; a box has its last pixel, so widths are one more."""
    a, b = boxes[:, None].astype(np.float64), faces[None].astype(np.float64)
    size = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2]) + 1
    both = np.where((size > 0).all(axis=-1), size[..., 0] * size[..., 1], 0.0)
    area_a = (a[..., 2] - a[..., 0] + 1) * (a[..., 3] - a[..., 1] + 1)
    area_b = (b[..., 2] - b[..., 0] + 1) * (b[..., 3] - b[..., 1] + 1)
    return np.divide(both, area_a + area_b - both, out=np.zeros_like(both), where=both > 0)
