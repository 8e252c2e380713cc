"""
Both backends of COCO's AP against pycocotools as it comes, with ``==``: every number of the
precision and recall arrays, and the 12 that are made of them.
"""

import contextlib
import copy
import io
import itertools
import json

import numpy as np
import pycocotools.mask as mask_util
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from d2ft.data.synthetic.scored_scenes import make_scored_scenes
from d2ft.evaluation.coco_ap import CocoDetections, evaluate_coco, join_categories

pytestmark = pytest.mark.parity

BACKENDS = ("pycocotools", "hotcoco")


def pycocotools_numbers(dataset, results, task, max_dets):
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = copy.deepcopy(dataset)
        truth.createIndex()
        dropped = "bbox" if task == "segm" else "segmentation"
        found = [{k: v for k, v in result.items() if k != dropped} for result in results]
        evaluation = COCOeval(truth, truth.loadRes(found), task)
        evaluation.params.maxDets = list(max_dets)
        evaluation.evaluate()
        evaluation.accumulate()
        if max_dets[-1] == 100:  # summarize has this number in its code
            evaluation.summarize()
    return evaluation.eval["precision"], evaluation.eval["recall"], evaluation.stats


def assert_equal_to_pycocotools(backend, dataset, results, max_dets=(1, 10, 100)):
    if backend == "hotcoco":
        pytest.importorskip("hotcoco")
    for task in ("bbox", "segm"):
        precision, recall, stats = pycocotools_numbers(dataset, results, task, max_dets)
        ours = evaluate_coco(
            dataset, CocoDetections.from_results(results), task, max_dets=max_dets, backend=backend
        )
        assert np.array_equal(ours.eval["precision"], precision)
        assert np.array_equal(ours.eval["recall"], recall)
        assert len(stats) == 0 or np.array_equal(ours.stats, stats)


def _cut(box):
    mask = np.zeros((480, 640), np.uint8, order="F")
    mask[int(box[1]) : int(box[1] + box[3]), int(box[0]) : int(box[0] + box[2])] = 1
    code = mask_util.encode(mask)
    return {"size": code["size"], "counts": code["counts"].decode()}


def _all_equal(dataset, results):
    return dataset, [{**result, "score": 0.5} for result in results]


def _all_crowds(dataset, results):
    crowds = [{**annotation, "iscrowd": 1} for annotation in dataset["annotations"]]
    return {**dataset, "annotations": crowds}, results


def _no_truth(dataset, results):
    return {**dataset, "annotations": []}, results


def _classes_absent(dataset, results):
    kept = [a for a in dataset["annotations"] if a["category_id"] != 2]
    return {**dataset, "annotations": kept}, [r for r in results if r["category_id"] != 3]


def _small(side):
    def change(dataset, results):
        return dataset, _with_boxes(results, [[*box[:2], side, side] for box in _boxes(results)])

    return change


def _shuffled(dataset, results):
    order = np.random.default_rng(0).permutation(len(results))
    return dataset, [results[i] for i in order]


def _of_one_image(dataset, results):
    return dataset, [result for result in results if result["image_id"] == 3]


def _eroded(dataset, results):
    boxes = [[x + w / 8, y + h / 8, w * 0.7, h * 0.7] for x, y, w, h in _boxes(results)]
    return dataset, _with_boxes(results, boxes)


def _merged(dataset, results):
    """Join each prediction with the next one."""
    joined = []
    for (x, y, w, h), (a, b, c, d) in itertools.pairwise([*_boxes(results), results[0]["bbox"]]):
        left, top = min(x, a), min(y, b)
        joined.append([left, top, max(x + w, a + c) - left, max(y + h, b + d) - top])
    return dataset, _with_boxes(results, joined)


def _at_borders(dataset, results):
    return dataset, _with_boxes(
        results, [[0.0, 0.0, x + w, y + h] for x, y, w, h in _boxes(results)]
    )


def _duplicated(dataset, results):
    return dataset, [*results, *results[::2]]


def _boxes(results):
    return [result["bbox"] for result in results]


def _with_boxes(results, boxes):
    return [
        {**result, "bbox": box, "segmentation": _cut(box)}
        for result, box in zip(results, boxes, strict=True)
    ]


DAMAGES = {
    "none": lambda dataset, results: (dataset, results),
    "all scores equal": _all_equal,
    "only crowds": _all_crowds,
    "no truth": _no_truth,
    "classes absent": _classes_absent,
    "one pixel": _small(1.0),
    "empty": _small(0.0),
    "eroded": _eroded,
    "merged": _merged,
    "touching borders": _at_borders,
    "duplicated": _duplicated,
    "shuffled": _shuffled,
    "of one image": _of_one_image,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_numbers_are_those_of_pycocotools(backend, damage):
    scenes = make_scored_scenes(25, seed=1, num_classes=5)
    assert_equal_to_pycocotools(backend, *DAMAGES[damage](*scenes))


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_area_range_after_the_other_and_classes_apart_count_the_same(backend, monkeypatch):
    if backend == "hotcoco":
        pytest.importorskip("hotcoco")
    dataset, results = make_scored_scenes(15, seed=5, num_classes=4)
    for task in ("bbox", "segm"):
        detections = CocoDetections.from_results(results)
        whole = evaluate_coco(dataset, detections, task, backend=backend)
        with monkeypatch.context() as patch:
            patch.setattr("d2ft.evaluation.coco_ap._DETECTIONS_AT_ONCE", 0)
            apart = evaluate_coco(dataset, detections, task, backend=backend)
        parts = []
        for categories in ([1, 3], [4], [2]):
            chosen = [r for r in results if r["category_id"] in categories]
            found = CocoDetections.from_results(chosen)
            parts.append(
                evaluate_coco(dataset, found, task, category_ids=categories, backend=backend)
            )
        joined = join_categories(parts)
        assert np.array_equal(apart.eval["precision"], whole.eval["precision"])
        assert np.array_equal(apart.eval["recall"], whole.eval["recall"])
        assert np.array_equal(apart.stats, whole.stats)
        order = [0, 2, 3, 1]
        assert np.array_equal(joined.eval["precision"], whole.eval["precision"][:, :, order])
        assert np.array_equal(joined.eval["recall"], whole.eval["recall"][:, order])


@pytest.mark.parametrize("max_dets", [(1, 2, 5), (1, 5, 10), (1, 10, 300)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_another_limit_of_detections_counts_as_in_pycocotools(backend, max_dets):
    scenes = make_scored_scenes(20, seed=2, num_classes=3)
    assert_equal_to_pycocotools(backend, *scenes, max_dets)


@pytest.mark.parametrize("backend", BACKENDS)
def test_numbers_on_real_annotations_are_those_of_pycocotools(backend, real_data):
    dataset = json.loads((real_data / "coco/annotations/instances_val2017.json").read_text())
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = dataset
        truth.createIndex()
    generator = np.random.default_rng(3)
    results = []
    for annotation in copy.deepcopy(dataset["annotations"]):
        code = truth.annToRLE(annotation)
        if isinstance(code["counts"], bytes):
            code["counts"] = code["counts"].decode()
        for _ in range(generator.integers(0, 3)):
            box = np.array(annotation["bbox"]) * generator.normal(1, 0.05, 4)
            results.append({
                "image_id": annotation["image_id"],
                "category_id": annotation["category_id"],
                "bbox": box.tolist(),
                "score": float(generator.random()),
                "segmentation": code,
            })  # fmt: skip
    assert_equal_to_pycocotools(backend, dataset, results)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_predictions_are_an_ap_of_0_and_string_ids_and_the_id_0_are_fine(backend):
    if backend == "hotcoco":
        pytest.importorskip("hotcoco")
    dataset, results = make_scored_scenes(10, seed=4, num_classes=2)
    assert (
        evaluate_coco(dataset, CocoDetections.from_results([]), "bbox", backend=backend).stats[0]
        == 0
    )
    expected = evaluate_coco(
        dataset, CocoDetections.from_results(results), "bbox", backend=backend
    ).stats
    renamed = copy.deepcopy(dataset)
    for image in renamed["images"]:
        image["id"] = f"{image['id']:03}"
    for annotation in renamed["annotations"]:
        annotation["image_id"] = f"{annotation['image_id']:03}"
        annotation["id"] -= 1
    found = [{**result, "image_id": f"{result['image_id']:03}"} for result in results]
    assert np.array_equal(
        evaluate_coco(renamed, CocoDetections.from_results(found), "bbox", backend=backend).stats,
        expected,
    )
