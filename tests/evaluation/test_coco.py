import multiprocessing

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, BoxMode, Instances

from d2ft.data import register_instances
from d2ft.evaluation import CocoEvaluator
from d2ft.evaluation.coco_ap import CocoDetections, evaluate_coco


def _records(boxes):
    annotations = [
        {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": i % 2, "iscrowd": 0}
        for i, box in enumerate(boxes)
    ]
    return [
        {
            "file_name": "a.png",
            "image_id": 1,
            "height": 100,
            "width": 100,
            "annotations": annotations,
        }
    ]


def _evaluate(name, boxes, **options):
    evaluator = CocoEvaluator(name, ["bbox"], **options)
    evaluator.reset()
    instances = Instances((100, 100))
    instances.pred_boxes = Boxes(torch.tensor(boxes))
    instances.scores = torch.linspace(0.9, 0.5, len(boxes))
    instances.pred_classes = torch.arange(len(boxes)) % 2
    evaluator.process([{"image_id": 1}], [{"instances": instances}])
    return evaluator.evaluate()


BOXES = [[10.0, 10.0, 50.0, 50.0], [20.0, 30.0, 90.0, 95.0]]


@pytest.fixture
def dataset():
    register_instances("boxes", lambda: _records(BOXES), thing_classes=["cat", "dog"])
    return "boxes"


def test_perfect_boxes_have_an_ap_of_100(dataset):
    results = _evaluate(dataset, BOXES)["bbox"]
    assert results["AP"] == pytest.approx(100.0)
    assert results["AP-dog"] == pytest.approx(100.0)


def test_a_task_can_be_given_under_another_name(dataset):
    assert list(_evaluate(dataset, BOXES, result_names={"bbox": "bbox_coco"})) == ["bbox_coco"]


def test_only_the_best_detections_of_an_image_count(dataset):
    assert _evaluate(dataset, BOXES[::-1][:1] + BOXES, max_dets_per_image=1)["bbox"]["AP"] < 60


def test_the_twelve_numbers_and_the_classes_are_there_by_the_limit_of_detections(dataset):
    results = _evaluate(dataset, BOXES, max_dets_per_image=5)["bbox"]
    assert list(results) == [
        *("AP", "AP50", "AP75", "APs", "APm", "APl", "AR@1", "AR@5", "AR@10"),
        *("ARs@10", "ARm@10", "ARl@10", "AP-cat", "AP-dog"),
    ]
    assert list(_evaluate(dataset, BOXES, max_dets_per_image=300)["bbox"])[8] == "AR@300"


def test_no_image_predicted_is_an_ap_of_0(dataset):
    evaluator = CocoEvaluator(dataset, ["bbox"])
    assert evaluator.evaluate()["bbox"]["AP"] == 0


def test_classes_counted_apart_have_the_same_numbers(dataset, monkeypatch):
    moved = [[x0 + 3, y0, x1 + 9, y1] for x0, y0, x1, y1 in BOXES]
    whole = _evaluate(dataset, moved + BOXES)
    monkeypatch.setattr("d2ft.evaluation.coco._PREDICTIONS_AT_ONCE", 1)
    np.testing.assert_equal(_evaluate(dataset, moved + BOXES), whole)


def test_a_dataset_that_changed_is_not_evaluated_against_its_old_annotations(dataset):
    assert _evaluate(dataset, BOXES)["bbox"]["AP"] == pytest.approx(100.0)
    moved = [[x0 + 45, y0, x1 + 45, y1] for x0, y0, x1, y1 in BOXES]
    DatasetCatalog.remove(dataset)
    DatasetCatalog.register(dataset, lambda: _records(moved))
    assert _evaluate(dataset, BOXES)["bbox"]["AP"] == pytest.approx(0.0)
    assert not hasattr(MetadataCatalog.get(dataset), "json_file")


def test_a_forked_process_counts_without_the_threads_that_it_lacks():
    pytest.importorskip("hotcoco")
    dataset = {
        "images": [{"id": 1, "height": 9, "width": 9}],
        "categories": [{"id": 1, "name": "a"}],
        "annotations": [
            {
                "id": 1,
                "image_id": 1,
                "category_id": 1,
                "bbox": [0, 0, 4, 4],
                "area": 16,
                "iscrowd": 0,
            }
        ],
    }
    results = CocoDetections.from_results(
        [{"image_id": 1, "category_id": 1, "bbox": [0, 0, 4, 4], "score": 0.5}]
    )
    expected = evaluate_coco(dataset, results, "bbox", backend="hotcoco").stats.tolist()
    with multiprocessing.get_context("fork").Pool(1) as pool:
        found = pool.apply_async(evaluate_coco, (dataset, results, "bbox")).get(timeout=60)
    assert found.stats.tolist() == expected
