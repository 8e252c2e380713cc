"""Several processes give the digits of one, also where one of them has no images."""

import pytest
import torch
from detectron2.engine import launch
from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils import comm

from d2ft.config import get_cfg
from d2ft.data import register_instances
from d2ft.engine.setup import leave_process_group
from d2ft.evaluation import build_run_evaluator
from d2ft.evaluation.offline import evaluate_predictions
from d2ft.evaluation.predictions import predictions_file, results_json

# Images of each process.
SHARES = {1: [(0, 1, 2, 3, 4)], 2: [(0, 1, 2, 3, 4), ()], 3: [(0, 1), (), (2, 3, 4)]}
CLASSES = {"coco": ["Car", "bus"], "kitti": ["Car", "bus"], "pascal_voc": ["Car", "bus"], "wider_face": ["face"]}  # fmt: skip


def _boxes(image):
    return torch.tensor([[10.0 * i, 5.0, 10.0 * i + 90, 70.0 + image] for i in range(4)])


def _records():
    return [
        {
            "file_name": f"{image}.jpg", "image_id": image, "height": 400, "width": 400,
            "annotations": [
                {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0, "iscrowd": 0,
                 "segmentation": _polygon(box)}
                for box in _boxes(image).tolist()
            ],
        }
        for image in range(5)
    ]  # fmt: skip


def _polygon(box):
    x0, y0, x1, y1 = box
    return [[x0, y0, x1, y0, x1, y1, x0, y1]]


def _evaluate_all(processes, path):
    results = {
        evaluator_type: _evaluate(evaluator_type, processes, path.parent)
        for evaluator_type in CLASSES
    }
    if comm.is_main_process():
        path.write_text(repr(results))
    leave_process_group()  # as at the end of a run


def _cfg(evaluator_type, folder):
    cfg = get_cfg()
    cfg.OUTPUT_DIR = str(folder)
    cfg.MODEL.MASK_ON = evaluator_type in ("coco", "pascal_voc")
    return cfg


def _evaluate(evaluator_type, processes, folder):
    register_instances(
        "five", _records, thing_classes=CLASSES[evaluator_type], evaluator_type=evaluator_type
    )
    evaluator = build_run_evaluator(_cfg(evaluator_type, folder), "five")
    evaluator.reset()
    for image in SHARES[processes][comm.get_rank()]:
        instances = Instances((400, 400))
        boxes = _boxes(image)
        boxes[:, 0] += torch.tensor([0.0, 12.0, 30.0, 3.0]) * (image + 1) / 3
        instances.pred_boxes = Boxes(boxes)
        instances.scores = torch.tensor([0.9, 0.8, 0.7, 0.6]) - image / 10
        instances.pred_classes = torch.zeros(4, dtype=torch.int64)
        instances.pred_masks = torch.zeros(4, 400, 400, dtype=torch.bool)
        for mask, (x0, y0, x1, y1) in zip(instances.pred_masks, boxes.int().tolist(), strict=True):
            mask[y0:y1, x0:x1] = True
        evaluator.process([{"image_id": image}], [{"instances": instances}])
    return {task: dict(metrics) for task, metrics in evaluator.evaluate().items()}


@pytest.mark.parametrize("evaluator_type", CLASSES)
def test_kept_predictions_have_the_numbers_of_the_run_to_the_last_digit(evaluator_type, tmp_path):
    results = _evaluate(evaluator_type, 1, tmp_path)
    assert 0 < results["bbox"]["AP"] < 100
    assert set(results) == {"bbox", "segm"} or evaluator_type in ("kitti", "wider_face")
    path = predictions_file(tmp_path, "five")
    again = evaluate_predictions(_cfg(evaluator_type, tmp_path), "five", path)
    assert results_json(again) == results_json(results)


@pytest.mark.slow
@pytest.mark.ci
def test_several_processes_give_the_digits_of_one(tmp_path):
    found = []
    for processes in SHARES:
        path = tmp_path / str(processes)
        # As a run does it. It spawns: the threads of hotcoco do not survive a fork.
        launch(_evaluate_all, processes, dist_url="auto", args=(processes, path))
        found.append(path.read_text())
    assert found[0] == found[1] == found[2]
