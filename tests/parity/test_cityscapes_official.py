"""Cityscapes instance AP against cityscapesscripts: damaged ground truth, equal to the last bit."""

import os

import numpy as np
import pytest
from PIL import Image

from d2ft.evaluation.cityscapes_ap import (
    OVERLAPS,
    average_precisions,
    index_instances,
    join_tables,
    match_frame,
    summarize,
)
from d2ft.host import cityscapesscripts_bridge
from d2ft.labels import CITYSCAPES_INSTANCE_LABELS

pytestmark = pytest.mark.parity

LABEL_IDS = [label.id for label in CITYSCAPES_INSTANCE_LABELS]
SIZES = [(40, 64), (96, 160), (150, 301)]


def scene(seed, height, width, classes=(*LABEL_IDS, 29, 30)):
    """Draw single instances, groups, void and instances of fewer than 100 pixels."""
    rng = np.random.default_rng(seed)
    ids = np.full((height, width), 7, np.uint16)
    ids[: height // 6] = rng.choice([0, 3, 4, 10, 18])
    ids[-height // 8 :] = 1
    for number in range(rng.integers(8, 25)):
        label = int(rng.choice(classes))
        value = label if rng.random() < 0.25 else label * 1000 + number
        tall, wide = rng.integers(2, height // 2), rng.integers(2, width // 3)
        top, left = rng.integers(-3, height - 2), rng.integers(-3, width - 2)
        ids[max(top, 0) : top + tall, max(left, 0) : left + wide] = value
    return ids


def _shifted(mask, rng):
    return np.roll(mask, tuple(rng.integers(-4, 5, 2)), (0, 1))


def _eroded(mask, rng):
    steps = rng.integers(1, 4)
    return mask & np.roll(mask, steps, 0) & np.roll(mask, -steps, 1)


def _half(mask, rng):
    columns = np.flatnonzero(mask.any(axis=0))
    cut = mask.copy()
    # Often exactly at a threshold: half of a rectangle of even width, or a multiple of 5 %.
    cut[:, columns[int(len(columns) * rng.choice([0.5, 0.55, 0.6, 0.7, 0.95])) :]] = False
    return cut


def damaged(ids, seed, per_object=2):
    """Return (label id, score, mask) of predictions made from a frame's ground truth."""
    rng = np.random.default_rng(seed)
    values = [v for v in np.unique(ids) if (v if v < 1000 else v // 1000) in (*LABEL_IDS, 29, 30)]
    masks = [ids == value for value in values]
    labels = [int(v if v < 1000 else v // 1000) for v in values]
    found = []
    for mask, label in zip(masks, labels, strict=True):
        # Caravans and trailers cannot be predicted, so their predictions are of a wrong class.
        label = label if label in LABEL_IDS else int(rng.choice(LABEL_IDS))
        for _ in range(rng.integers(0, per_object + 1)):
            other = masks[rng.integers(len(masks))]
            kind = rng.integers(7)
            changed = [
                lambda m=mask: m,
                lambda m=mask: _shifted(m, rng),
                lambda m=mask: _eroded(m, rng),
                lambda m=mask: _half(m, rng),
                lambda m=mask, o=other: m | o,
                lambda m=mask: np.zeros_like(m),
                lambda m=mask: m & (np.cumsum(m).reshape(m.shape) == 1),
            ][kind]()
            wrong = rng.random() < 0.1
            # Few different scores, so that many are tied.
            score = float(np.float32(rng.integers(1, 12) / 12))
            found.append((int(rng.choice(LABEL_IDS)) if wrong else label, score, changed))
            if rng.random() < 0.2:
                found.append((label, score, changed))
    for region in (np.s_[:9], np.s_[-9:], np.s_[:, :7], np.s_[:, -7:], np.s_[:, :]):
        mask = np.zeros(ids.shape, bool)
        mask[region] = True
        found.append((int(rng.choice(LABEL_IDS)), float(np.float32(rng.random())), mask))
    return found


def official_results(folder, frames):
    """Run cityscapesscripts through files; return its matches, the AP matrix and the averages."""
    import cityscapesscripts.evaluation.evalInstanceLevelSemanticLabeling as official

    folder = folder.resolve()
    predictions, ground_truth = [], []
    for number, (ids, found) in enumerate(frames):
        ground_truth.append(str(folder / f"{number}_instanceIds.png"))
        Image.fromarray(ids).save(ground_truth[-1], compress_level=0)
        lines = []
        for i, (label, score, mask) in enumerate(found):
            name = f"{number}_{i:05d}.png"
            Image.fromarray(mask * np.uint8(255)).save(folder / name, compress_level=0)
            lines.append(f"{name} {label} {score}\n")
        predictions.append(str(folder / f"{number}.txt"))
        (folder / f"{number}.txt").write_text("".join(lines))
    args, before = official.args, dict(vars(official.args))
    args.predictionPath, args.quiet = str(folder), True
    args.gtInstancesFile = str(folder / "gtInstances.json")
    try:
        with cityscapesscripts_bridge():
            official.setInstanceLabels(args)
            instances = official.getGtInstances(ground_truth, args)
            matches = official.matchGtWithPreds(predictions, ground_truth, instances, args)
            precisions = official.evaluateMatches(matches, args)
            averages = official.computeAverages(precisions, args)
            assert args.overlaps.tolist() == OVERLAPS.tolist()
    finally:
        vars(args).clear()
        vars(args).update(before)
    return [matches[os.path.abspath(path)] for path in ground_truth], precisions[0], averages


def our_tables(frames):
    tables = []
    for ids, found in frames:
        labels, scores, masks = zip(*found, strict=True) if found else ((), (), ())
        tables.append(match_frame(index_instances(ids), masks, labels, scores))
    return tables


def assert_same_matches(table, matches):
    """Compare a frame's table with the two nested dicts of the official code."""
    names = [label.name for label in CITYSCAPES_INSTANCE_LABELS]
    gts = [gt for name in names for gt in matches["groundTruth"][name]]
    assert sorted((gt["instID"], gt["pixelCount"]) for gt in gts) == list(
        zip(table.gt_ids.tolist(), table.gt_areas.tolist(), strict=True)
    )
    preds = sorted(
        (p for name in names for p in matches["prediction"][name]), key=lambda p: p["predID"]
    )
    assert [
        (p["labelID"], p["confidence"], p["pixelCount"], p["voidIntersection"]) for p in preds
    ] == list(zip(*(column.tolist() for column in table[2:6]), strict=True))
    pairs = {(p["predID"], g["instID"], g["intersection"]) for p in preds for g in p["matchedGt"]}
    assert pairs == set(
        zip(
            table.pair_pred.tolist(),
            table.gt_ids[table.pair_gt].tolist(),
            table.pair_pixels.tolist(),
            strict=True,
        )
    )


def assert_equal(folder, frames):
    matches, precisions, averages = official_results(folder, frames)
    tables = our_tables(frames)
    for table, match in zip(tables, matches, strict=True):
        assert_same_matches(table, match)
    ours = average_precisions(join_tables(tables))
    np.testing.assert_array_equal(ours, precisions)
    expected = {"AP": averages["allAp"], "AP50": averages["allAp50%"]}
    for name, values in averages["classes"].items():
        expected |= {f"AP-{name}": values["ap"], f"AP50-{name}": values["ap50%"]}
    results = summarize(ours)
    assert set(results) == set(expected)
    for key, value in expected.items():
        assert results[key] == value * 100 or (np.isnan(results[key]) and np.isnan(value)), key
    return results


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("seed", range(5))
def test_damaged_scenes_have_the_official_numbers(tmp_path, size, seed):
    frames = []
    for number in range(4):
        ids = scene(100 * seed + number, *size)
        frames.append((ids, damaged(ids, 100 * seed + number)))
    assert 0 < assert_equal(tmp_path, frames)["AP"] < 100


def test_frames_without_predictions_or_without_objects_have_the_official_numbers(tmp_path):
    ids = scene(1, 96, 160)
    empty = np.full((96, 160), 7, np.uint16)
    frames = [(ids, []), (empty, damaged(ids, 2)), (ids, damaged(ids, 3)), (empty, [])]
    assert_equal(tmp_path, frames)


def test_no_prediction_at_all_is_0_and_a_class_without_ground_truth_is_nan(tmp_path):
    ids = scene(5, 96, 160, classes=(24, 26))
    results = assert_equal(tmp_path, [(ids, [])])
    assert results["AP"] == 0.0
    assert np.isnan(results["AP-bus"])
    results = assert_equal(tmp_path, [(ids, damaged(ids, 5))])
    assert np.isnan(results["AP50-train"])


def test_perfect_predictions_have_the_official_100(tmp_path):
    ids = scene(7, 150, 301)
    whole = [(v // 1000, 0.5, ids == v) for v in np.unique(ids) if v // 1000 in LABEL_IDS]
    assert assert_equal(tmp_path, [(ids, whole)])["AP"] == 100.0


def test_a_small_group_counts_twice_as_it_does_officially(tmp_path):
    ids = np.full((40, 64), 7, np.uint16)
    ids[:20, :30] = 26001
    ids[30:39, :9] = 26  # 81 pixels of a group of cars
    on_group = np.zeros(ids.shape, bool)
    on_group[30:39, :30] = True  # 30 % on it: only counted twice is more than 0.5 of it ignored
    frames = [(ids, [(26, 0.5, ids == 26001), (26, 0.9, on_group)])]
    assert assert_equal(tmp_path, frames)["AP50-car"] == 100.0


def test_void_is_a_group_of_caravans_but_not_a_single_one(tmp_path):
    for value, expected in ((29001, False), (29, True)):
        ids = np.full((40, 64), 7, np.uint16)
        ids[:20, :30] = 26001
        ids[25:, 40:] = value
        found = [(26, 0.5, ids == 26001), (26, 0.9, ids == value)]
        folder = tmp_path / str(value)
        folder.mkdir()
        results = assert_equal(folder, [(ids, found)])
        assert (results["AP"] == 100.0) is expected


def test_where_all_predictions_of_a_class_are_ignored_the_official_code_fails_and_we_say_0(
    tmp_path,
):
    ids = np.full((40, 64), 7, np.uint16)
    ids[:20, :30] = 26001
    ids[25:, 40:] = 26
    frames = [(ids, [(26, 0.9, ids == 26)])]
    with pytest.raises(IndexError):
        official_results(tmp_path, frames)
    results = summarize(average_precisions(join_tables(our_tables(frames))))
    assert (results["AP"], results["AP-car"]) == (0.0, 0.0)


@pytest.mark.slow
@pytest.mark.ci
def test_the_real_frames_have_the_official_numbers(tmp_path, real_data):
    files = sorted(real_data.glob("cityscapes*/gtFine/*/*/*_instanceIds.png"))
    assert len(files) == 14
    frames = []
    for seed, file in enumerate(files):
        ids = np.asarray(Image.open(file))
        frames.append((ids, damaged(ids, seed, per_object=1)))
    assert 0 < assert_equal(tmp_path, frames)["AP"] < 100
