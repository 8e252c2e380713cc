"""
Pascal VOC's average precision, at 11 recalls (2007) or as an area (2010 and later).

The rules are those of the development kit, http://host.robots.ox.ac.uk/pascal/VOC/voc2012/,
section 3.4: a detection is compared with the object of its class that it overlaps most. If the
overlap is larger than the threshold it is right the first time and wrong later; on an object
marked "difficult" it counts as neither.

Shape shorthand in this module:

    N: detections of one class in all images    G: objects of that class in all images
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from d2ft.evaluation.blocks import row_blocks


@dataclass(frozen=True)
class VocMatches:
    """
    The detections of one class, each with the object that it overlaps most.

    Attributes:
        scores: (N,) finite.
        overlaps: (N,) intersection over union with that object; -1 in an image without objects.
        objects: (N,) its number, from 0 to G - 1; any number where the overlap is -1.
        difficult: (G,) whether the object counts neither when found nor when missed.
    """

    scores: np.ndarray
    overlaps: np.ndarray
    objects: np.ndarray
    difficult: np.ndarray


def best_matches(
    overlaps: Sequence[np.ndarray], scores: Sequence[np.ndarray], difficult: Sequence[np.ndarray]
) -> VocMatches:
    """
    Find for each detection of one class the object that it overlaps most.

    Args:
        overlaps: (n, g) of each image, detections by objects.
        scores: (n,) of each image.
        difficult: (g,) of each image.
    """
    best, objects = [], []
    first = 0
    for image, (matrix, flags) in enumerate(zip(overlaps, difficult, strict=True)):
        if len(flags):
            nearest = matrix.argmax(axis=1)
            best.append(matrix[np.arange(len(matrix)), nearest])
        else:
            nearest = np.zeros(len(scores[image]), dtype=np.int64)
            best.append(np.full(len(nearest), -1.0))
        objects.append(nearest + first)
        first += len(flags)
    return VocMatches(
        scores=_joined(scores, float),
        overlaps=_joined(best, float),
        objects=_joined(objects, int),
        difficult=_joined(difficult, bool),
    )


def average_precision(matches: VocMatches, threshold: float, *, eleven_points: bool) -> float:
    """
    Return the AP of a class, 0 to 1, or nan if it has no object that counts.

    Detections of equal score count in the order in which they come.

    Args:
        matches: of :func:`best_matches`.
        threshold: the overlap has to be larger.
        eleven_points: the mean of the precisions at the recalls 0, 0.1, ... 1, as in 2007.
    """
    total = int((~matches.difficult).sum())
    if total == 0:
        return float("nan")
    order = np.argsort(-matches.scores, kind="stable")
    hit = matches.overlaps[order] > threshold
    objects = matches.objects[order]
    hits = np.flatnonzero(hit)
    right = np.zeros(len(order), dtype=bool)
    _, first = np.unique(objects[hits], return_index=True)
    right[hits[first]] = True
    no_matter = np.zeros(len(order), dtype=bool)
    no_matter[hits] = matches.difficult[objects[hits]]
    true = np.cumsum(right & ~no_matter)
    false = np.cumsum(~right & ~no_matter)
    recall = true / total
    # Before the first detection that counts there is none to be precise about.
    precision = true / np.maximum(true + false, np.finfo(np.float64).eps)
    if eleven_points:
        return _mean_at_eleven_recalls(recall, precision)
    return area_under_curve(recall, precision)


def area_under_curve(recall: np.ndarray, precision: np.ndarray) -> float:
    """Return the area under the curve whose precision is the best at this recall or a larger."""
    recall = np.concatenate([[0.0], recall, [1.0]])
    precision = np.concatenate([[0.0], precision, [0.0]])
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    steps = np.flatnonzero(recall[1:] != recall[:-1])
    return float(np.sum((recall[steps + 1] - recall[steps]) * precision[steps + 1]))


def box_overlaps(detections: np.ndarray, objects: np.ndarray) -> np.ndarray:
    """
    Return the (n, g) intersections over unions of boxes.

    Args:
        detections: (n, 4) XYXY in continuous coordinates, which are the development kit's pixel
            numbers less 1 at the left and top: its width ``xmax - xmin + 1`` is ``x1 - x0`` here.
        objects: (g, 4), the same.
    """
    overlaps = np.empty((len(detections), len(objects)))
    for part in row_blocks(len(detections), len(objects)):
        overlaps[part] = _block_overlaps(detections[part], objects)
    return overlaps


def _block_overlaps(detections: np.ndarray, objects: np.ndarray) -> np.ndarray:
    a, b = detections[:, None].astype(np.float64), objects[None].astype(np.float64)
    size = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    both = np.maximum(size, 0.0).prod(axis=-1)
    union = (a[..., 2:] - a[..., :2]).prod(axis=-1) + (b[..., 2:] - b[..., :2]).prod(axis=-1) - both
    # Two boxes without an area have no union.
    return np.divide(both, union, out=np.zeros_like(both), where=union > 0)


def _mean_at_eleven_recalls(recall: np.ndarray, precision: np.ndarray) -> float:
    result = 0.0
    # np.arange's 0.6000000000000001 decides in the development kit's Python ports, and so here.
    for least in np.arange(0.0, 1.1, 0.1):
        reached = precision[recall >= least]
        result += (float(reached.max()) if len(reached) else 0.0) / 11.0
    return result


def _joined(parts: Sequence[np.ndarray], kind: type) -> np.ndarray:
    return np.concatenate([np.zeros(0, kind), *parts]).astype(kind)
