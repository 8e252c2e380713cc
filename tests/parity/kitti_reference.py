"""
KITTI's 2D AP, written out as the official evaluate_object.cpp reads, object by object.

Its rules in plain Python, without any array: what ``d2ft.evaluation.kitti_ap`` is compared with.
"""

from functools import reduce
from operator import add

from d2ft.evaluation.kitti_ap import LEVELS, MIN_OVERLAP

HEIGHT, OCCLUSION, TRUNCATION = (40, 25, 25), (0, 1, 2), (0.15, 0.3, 0.5)
NONE = -10000000


def overlap(a, b, criterion):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    both = width * height
    area_a = (a[2] - a[0]) * (a[3] - a[1])
    area_b = (b[2] - b[0]) * (b[3] - b[1])
    return both / (area_a + area_b - both) if criterion == "union" else both / area_a


def clean(name, level, truth, found):
    """Return the role of each object and detection: 0 counts, 1 is ignored, -1 is not there."""
    truth_roles, dont_care = [], []
    for kind, box, truncated, occluded in truth:
        hard = (
            occluded > OCCLUSION[level]
            or truncated > TRUNCATION[level]
            or box[3] - box[1] <= HEIGHT[level]
        )
        neighbour = {"Pedestrian": "Person_sitting", "Car": "Van"}.get(name) == kind
        if kind == name:
            truth_roles.append(1 if hard else 0)
        else:
            truth_roles.append(1 if neighbour else -1)
        if kind == "DontCare":
            dont_care.append(box)
    found_roles = []
    for kind, box, _ in found:
        if int(abs(box[3] - box[1])) < HEIGHT[level]:
            found_roles.append(1)
        else:
            found_roles.append(0 if kind == name else -1)
    return truth_roles, dont_care, found_roles


def statistics(  # noqa: C901 - in one piece, as the official function is
    minimum, truth, found, truth_roles, dont_care, found_roles, threshold=None
):
    """Return true and false positives at a score, and the scores of the true ones."""
    assigned = [False] * len(found)
    below = [threshold is not None and score < threshold for _, _, score in found]
    true, scores = 0, []
    for (_, truth_box, _, _), role in zip(truth, truth_roles, strict=True):
        if role == -1:
            continue
        chosen, valid, largest, chosen_ignored = -1, NONE, 0.0, False
        for j, (_, box, score) in enumerate(found):
            if found_roles[j] == -1 or assigned[j] or below[j]:
                continue
            o = overlap(box, truth_box, "union")
            if o <= minimum:
                continue
            if threshold is None:
                if score > valid:
                    chosen, valid = j, score
            elif found_roles[j] == 0 and (o > largest or chosen_ignored):
                chosen, valid, largest, chosen_ignored = j, 1, o, False
            elif found_roles[j] == 1 and valid == NONE:
                chosen, valid, chosen_ignored = j, 1, True
        if valid == NONE:
            continue
        assigned[chosen] = True
        if role == 0 and found_roles[chosen] == 0:
            true += 1
            scores.append(found[chosen][2])
    false = sum(not assigned[j] and found_roles[j] == 0 and not below[j] for j in range(len(found)))
    for region in dont_care:
        for j, (_, box, _) in enumerate(found):
            if assigned[j] or found_roles[j] != 0 or below[j]:
                continue
            if overlap(box, region, "first") > minimum:
                assigned[j] = True
                false -= 1
    return true, false, scores


def recall_thresholds(scores, total):
    scores = sorted(scores, reverse=True)
    thresholds, recall = [], 0.0
    for i, score in enumerate(scores):
        left = (i + 1) / total
        right = (i + 2) / total if i < len(scores) - 1 else left
        if right - recall < recall - left and i < len(scores) - 1:
            continue
        thresholds.append(score)
        recall += 1.0 / 40.0
    return thresholds


def reference_ap(images):
    """
    Return (class, level) -> (AP at 40, AP at 11), 0 where no object counts.

    Args:
        images: of each the objects (type, box, truncated, occluded) and the detections (type, box,
            score).
    """
    results = {}
    for name, minimum in MIN_OVERLAP.items():
        for level, level_name in enumerate(LEVELS):
            cases = [(truth, found, *clean(name, level, truth, found)) for truth, found in images]
            total = sum(case[2].count(0) for case in cases)
            scores = [s for case in cases for s in statistics(minimum, *case)[2]]
            precision = [0.0] * 41
            for t, threshold in enumerate(recall_thresholds(scores, total)):
                true = false = 0
                for case in cases:
                    counts = statistics(minimum, *case, threshold=threshold)
                    true, false = true + counts[0], false + counts[1]
                precision[t] = true / (true + false) if true + false else 0.0
            precision = [max(precision[i:]) for i in range(41)]
            # Not sum(), which rounds otherwise from Python 3.12 on.
            ap_40, ap_11 = (reduce(add, samples) for samples in (precision[1:], precision[::4]))
            results[name, level_name] = ap_40 / 40, ap_11 / 11
    return results
