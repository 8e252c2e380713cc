"""
The official instance AP of Cityscapes, from masks in memory.

Gives what ``evalInstanceLevelSemanticLabeling`` of cityscapesscripts gives, to the last bit; every
rule below is taken from there:
https://github.com/mcordts/cityscapesScripts/blob/v2.3.0/cityscapesscripts/evaluation/evalInstanceLevelSemanticLabeling.py

Shape shorthand in this module:

    H, W: height and width of a frame, in pixels
    U: distinct values of a frame's ``instanceIds`` image
    G, P: ground truth instances (groups among them) and predictions of a table
    M: pairs of a prediction and a ground truth instance of its class that share pixels
    L, T: the official classes, in the order of CITYSCAPES_INSTANCE_LABELS, and thresholds

Areas and intersections are in pixels.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from d2ft.labels import CITYSCAPES_INSTANCE_LABELS, CITYSCAPES_LABELS
from d2ft.structures.mask_window import Array, mask_window

# Not linspace: the official thresholds carry the drift of this sum, e.g. 0.6500000000000001.
OVERLAPS: Array = np.arange(0.5, 1.0, 0.05)

# Ground truth of fewer pixels is ignored.
MIN_AREA = 100

# In instanceIds an instance is label id * 1000 + number, and a group is the label id alone.
_INSTANCES_PER_LABEL = 1000

_LABEL_IDS: Array = np.array([label.id for label in CITYSCAPES_INSTANCE_LABELS])
_KNOWN_IDS: Array = np.array([label.id for label in CITYSCAPES_LABELS])
# Looked up among the values of instanceIds, where a single caravan is 29001 and so not void,
# while a group of caravans is.
_VOID_IDS: Array = np.array([label.id for label in CITYSCAPES_LABELS if label.ignore_in_eval])


class InstanceIndex(NamedTuple):
    """
    An ``instanceIds`` image, ready for counting.

    Attributes:
        positions: (H, W) for each pixel the position of its value in ``ids``.
        ids: (U,) the values, ascending.
        areas: (U,) pixels of each.
    """

    positions: Array
    ids: Array
    areas: Array


class MatchTable(NamedTuple):
    """
    All that the metric needs to know of one frame or of several.

    Attributes:
        gt_ids: (G,) values of ``instanceIds``; below 1000 for a group.
        gt_areas: (G,) pixels.
        pred_labels: (P,) label ids; predictions without any pixel are left out.
        pred_scores: (P,) float64.
        pred_areas: (P,) pixels.
        pred_void: (P,) pixels on void.
        pair_gt: (M,) index of the ground truth.
        pair_pred: (M,) index of the prediction; ascending.
        pair_pixels: (M,) pixels in both.
    """

    gt_ids: Array
    gt_areas: Array
    pred_labels: Array
    pred_scores: Array
    pred_areas: Array
    pred_void: Array
    pair_gt: Array
    pair_pred: Array
    pair_pixels: Array


def index_instances(instance_ids: Array) -> InstanceIndex:
    """
    Return the index of an ``instanceIds`` image.

    Args:
        instance_ids: (H, W) of integers that are not negative, with at least one pixel.

    Raises:
        ValueError: if a value belongs to no label of Cityscapes.
    """
    # By runs of equal pixels, which are a hundredth of the pixels.
    pixels = instance_ids.ravel()
    starts = np.flatnonzero(np.append(True, pixels[1:] != pixels[:-1]))
    lengths = np.diff(starts, append=pixels.size)
    values = pixels[starts]
    counts = np.bincount(values, weights=lengths).astype(np.int64)
    ids = np.flatnonzero(counts)
    unknown = ids[~np.isin(_labels_of(ids), _KNOWN_IDS)]
    if unknown.size:
        raise ValueError(f"the value {unknown[0]} belongs to no label of Cityscapes")
    position_of = np.zeros(len(counts), np.min_scalar_type(len(ids) - 1))
    position_of[ids] = np.arange(len(ids))
    positions = np.repeat(position_of[values], lengths).reshape(instance_ids.shape)
    return InstanceIndex(positions, ids, counts[ids])


def match_frame(
    index: InstanceIndex, masks: Iterable[Array], label_ids: Sequence[int], scores: Sequence[float]
) -> MatchTable:
    """
    Count the overlaps of a frame's predictions with its ground truth.

    Args:
        index: of the frame.
        masks: P arrays (H, W), bool; only one at a time is needed.
        label_ids: P ids of the official classes.
        scores: P scores, finite.

    Raises:
        ValueError: if a mask has another size than the frame.
    """
    overlaps = np.zeros((len(scores), len(index.ids)), np.int64)
    for row, mask in zip(overlaps, masks, strict=True):
        _count_overlaps(mask, index.positions, row)
    areas = overlaps.sum(axis=1)
    seen = areas > 0
    overlaps, labels = overlaps[seen], np.asarray(label_ids, np.int32)[seen]
    is_gt = np.isin(_labels_of(index.ids), _LABEL_IDS)
    gt_ids = index.ids[is_gt]
    shared = overlaps[:, is_gt] * (labels[:, None] == _labels_of(gt_ids))
    pair_pred, pair_gt = np.nonzero(shared)
    return MatchTable(
        gt_ids=gt_ids.astype(np.int32),
        gt_areas=index.areas[is_gt].astype(np.int32),
        pred_labels=labels,
        pred_scores=np.asarray(scores, np.float64)[seen],
        pred_areas=areas[seen].astype(np.int32),
        pred_void=overlaps[:, np.isin(index.ids, _VOID_IDS)].sum(axis=1, dtype=np.int32),
        pair_gt=pair_gt.astype(np.int32),
        pair_pred=pair_pred.astype(np.int32),
        pair_pixels=shared[pair_pred, pair_gt].astype(np.int32),
    )


def join_tables(tables: Sequence[MatchTable]) -> MatchTable:
    """Return the table of all frames of ``tables``, at least one; their order changes no result."""
    joined = MatchTable(*(np.concatenate(column) for column in zip(*tables, strict=True)))
    pairs = [len(table.pair_gt) for table in tables]
    first_gt = np.cumsum([0] + [len(table.gt_ids) for table in tables[:-1]])
    first_pred = np.cumsum([0] + [len(table.pred_scores) for table in tables[:-1]])
    return joined._replace(
        pair_gt=joined.pair_gt + np.repeat(first_gt, pairs),
        pair_pred=joined.pair_pred + np.repeat(first_pred, pairs),
    )


def average_precisions(table: MatchTable) -> Array:
    """
    Return the (L, T) average precisions, from 0 to 1, of each class at each of OVERLAPS.

    A class without ground truth is nan, and one with ground truth but without predictions 0. A
    class whose predictions are all ignored is 0 as well; the official code ends there with an
    IndexError.
    """
    gt_labels = _labels_of(table.gt_ids)
    counts = (table.gt_ids >= _INSTANCES_PER_LABEL) & (table.gt_areas >= MIN_AREA)
    gt_areas = table.gt_areas.astype(np.int64)[table.pair_gt]
    unions = gt_areas + table.pred_areas[table.pair_pred] - table.pair_pixels
    overlaps = table.pair_pixels / unions
    # A group of fewer than MIN_AREA pixels counts twice, as it does officially.
    ignored_gt = (table.gt_ids < _INSTANCES_PER_LABEL).astype(np.int64) + (
        table.gt_areas < MIN_AREA
    )
    ignored = table.pred_void + np.bincount(
        table.pair_pred,
        weights=table.pair_pixels * ignored_gt[table.pair_gt],
        minlength=len(table.pred_scores),
    )
    ignored_share = ignored / table.pred_areas
    result = np.full((len(_LABEL_IDS), len(OVERLAPS)), np.nan)
    for row, label in zip(result, _LABEL_IDS, strict=True):
        num_gt = np.count_nonzero(counts & (gt_labels == label))
        if not num_gt:
            continue
        of_class = table.pred_labels == label
        for column, threshold in enumerate(OVERLAPS):
            hits = (overlaps > threshold) & of_class[table.pair_pred]
            free = of_class & (ignored_share <= threshold)
            free[table.pair_pred[hits]] = False
            matches = hits & counts[table.pair_gt]
            matched_scores = table.pred_scores[table.pair_pred[matches]]
            best = _best_of_each(table.pair_gt[matches], matched_scores)
            row[column] = _average_precision(
                np.concatenate((best, np.zeros(np.count_nonzero(free)))),
                np.concatenate((matched_scores, table.pred_scores[free])),
                num_gt - np.count_nonzero(best),
            )
    return result


def summarize(precisions: Array) -> dict[str, float]:
    """
    Return ``AP``, ``AP50`` and both of each class as ``AP-<class>``, ``AP50-<class>``, in percent.

    Args:
        precisions: (L, T) of :func:`average_precisions`.
    """
    names = [label.name for label in CITYSCAPES_INSTANCE_LABELS]
    at_50 = precisions[:, 0]
    without_gt = np.isnan(at_50).all()
    return {
        "AP": float("nan") if without_gt else float(np.nanmean(precisions) * 100),
        "AP50": float("nan") if without_gt else float(np.nanmean(at_50) * 100),
        **{f"AP-{n}": float(np.mean(p) * 100) for n, p in zip(names, precisions, strict=True)},
        **{f"AP50-{n}": float(p * 100) for n, p in zip(names, at_50, strict=True)},
    }


def _labels_of(ids: Array) -> Array:
    return np.where(ids < _INSTANCES_PER_LABEL, ids, ids // _INSTANCES_PER_LABEL)


def _count_overlaps(mask: Array, positions: Array, counts: Array) -> None:
    """Write into ``counts`` (U,) how many pixels of the mask lie on each value."""
    if mask.shape != positions.shape:
        raise ValueError(f"a mask of shape {mask.shape} in a frame of {positions.shape}")
    window = mask_window(mask)
    if window is not None:
        counts[:] = np.bincount(positions[window][mask[window]], minlength=len(counts))


def _best_of_each(groups: Array, scores: Array) -> Array:
    """Return 1.0 at the highest score of each group, once, and 0.0 elsewhere."""
    order = np.lexsort((scores, groups))
    is_last = np.append(np.diff(groups[order]) != 0, True)[: len(order)]
    best = np.zeros(len(order))
    best[order[is_last]] = 1.0
    return best


def _average_precision(is_true: Array, scores: Array, num_missed: int) -> float:
    """
    Integrate one precision-recall curve in steps.

    Args:
        is_true: (N,) 1.0 for a prediction that matched and 0.0 for a false positive.
        scores: (N,) of the same.
        num_missed: ground truth instances without a match.
    """
    if not scores.size:
        return 0.0
    order = np.argsort(scores)
    ordered = scores[order]
    # Equal scores make one step of the curve.
    starts = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))
    cumulated = np.cumsum(is_true[order])
    below = np.append(0.0, cumulated)[starts]
    true = cumulated[-1] - below
    false = len(scores) - starts - true
    precision = np.append(true / (true + false), 1.0)
    recall = np.append(true / (true + below + num_missed), 0.0)
    # The same calls as in the official code, whose rounding differs from a plain subtraction's.
    padded = np.append(np.append(recall[0], recall), 0.0)
    return float(np.dot(precision, np.convolve(padded, [-0.5, 0, 0.5], "valid")))
