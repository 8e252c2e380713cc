import resource

import numpy as np
import pytest
import torch
from detectron2.evaluation import verify_results
from detectron2.structures import Boxes, BoxMode, Instances

from d2ft.config import get_cfg
from d2ft.data import register_instances
from d2ft.errors import UserError
from d2ft.evaluation import build_evaluator
from d2ft.evaluation.masks import RleMasks, encode_mask
from tests.conftest import REAL_DATA

KITTI = ["Car", "Pedestrian", "Cyclist"]


def _record(image_id, boxes, **more):
    annotations = [
        {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": category, "iscrowd": 0, **keys}
        for category, box, keys in boxes
    ]
    record = {"file_name": f"{image_id}.jpg", "image_id": image_id, "height": 400, "width": 400}
    return {**record, "annotations": annotations, **more}


def _instances(boxes, masks=None):
    instances = Instances((400, 400))
    instances.pred_boxes = Boxes(torch.tensor([box for _, box, _ in boxes]).reshape(-1, 4))
    instances.pred_classes = torch.tensor([c for c, _, _ in boxes], dtype=torch.int64)
    instances.scores = torch.tensor([score for _, _, score in boxes])
    if masks is not None:
        instances.pred_masks = torch.from_numpy(masks)
    return instances


def _evaluate(evaluator_type, classes, records, predictions, *, mask_on=False, **metadata):
    register_instances(
        "some", lambda: records, thing_classes=classes, evaluator_type=evaluator_type, **metadata
    )
    cfg = get_cfg()
    cfg.MODEL.MASK_ON = mask_on
    evaluator = build_evaluator(cfg, "some")
    evaluator.reset()
    for image_id, instances in predictions:
        evaluator.process([{"image_id": image_id}], [{"instances": instances}])
    return evaluator.evaluate()


BOX_TYPES = ("coco", "pascal_voc", "kitti", "wider_face")
CAR, PERSON = [10.0, 10.0, 110.0, 60.0], [200.0, 100.0, 240.0, 200.0]


def test_kitti_ignores_dontcare_and_vans_and_gives_every_level():
    records = [
        _record(
            "000001",
            [
                (0, CAR, {"kitti_type": "Car", "truncated": 0.0, "occluded": 0}),
                (1, PERSON, {"kitti_type": "Pedestrian", "truncated": 0.0, "occluded": 1}),
                (0, [300.0, 10.0, 380.0, 90.0], {"kitti_type": "Van", "ignore": 1}),
                (0, [0.0, 300.0, 90.0, 390.0], {"kitti_type": "DontCare", "ignore": 1}),
            ],
        )
    ]
    found = [
        (0, CAR, 0.5),
        (0, [300.0, 10.0, 380.0, 90.0], 0.9),
        (0, [10.0, 310.0, 80.0, 380.0], 0.8),
    ]
    results = _evaluate("kitti", KITTI, records, [("000001", _instances(found))])["bbox"]
    # One car gives one threshold, at recall 0, which 11 positions count and 40 do not.
    assert results["AP-Car-easy-R11"] == pytest.approx(100 / 11)
    assert results["AP-Car-easy"] == 0
    assert np.isnan(results["AP-Pedestrian-easy"])  # occluded
    assert results["AP-Pedestrian-moderate"] == 0  # missed
    assert results["AP"] == results["AP-moderate"]


def test_kitti_classes_are_found_by_name_among_more():
    records = [_record("a", [(3, CAR, {})])]
    classes = ["Tram", "Van", "Truck", "Car"]
    results = _evaluate("kitti", classes, records, [("a", _instances([(3, CAR, 0.5)]))])["bbox"]
    assert results["AP-Car-moderate-R11"] == pytest.approx(100 / 11)
    with pytest.raises(UserError, match="none of the classes Car, Pedestrian, Cyclist"):
        _evaluate("kitti", ["cat"], [], [])


def test_voc_does_not_count_difficult_objects_and_judges_masks_where_they_are():
    square = [[10.0, 10.0, 110.0, 10.0, 110.0, 60.0, 10.0, 60.0]]
    records = [
        _record("a", [(0, CAR, {"segmentation": square})]),
        _record("b", [(0, PERSON, {"difficult": 1})]),
    ]
    mask = np.zeros((1, 400, 400), dtype=bool)
    mask[0, 10:60, 10:110] = True
    predictions = [
        ("a", _instances([(0, CAR, 0.9)], mask)),
        ("b", _instances([(0, PERSON, 0.95)], mask)),
    ]
    results = _evaluate("pascal_voc", ["car", "bus"], records, predictions, mask_on=True, year=2007)
    assert results["bbox"]["AP50"] == pytest.approx(100)
    assert results["segm"]["AP50-car"] == pytest.approx(100)
    assert np.isnan(results["bbox"]["AP-bus"])


@pytest.mark.parametrize("evaluator_type", BOX_TYPES)
def test_detectron2_verifies_the_results_by_the_headline_metric(evaluator_type):
    records = [_record(i, [(0, CAR, {}), (0, PERSON, {})]) for i in range(3)]
    predictions = [(i, _instances([(0, CAR, 0.9 - i / 10)])) for i in range(3)]
    results = _evaluate(evaluator_type, ["Car"], records, predictions)
    cfg = get_cfg()
    cfg.TEST.EXPECTED_RESULTS = [["bbox", "AP", results["bbox"]["AP"], 0.01]]
    assert verify_results(cfg, results)
    cfg.TEST.EXPECTED_RESULTS = [["bbox", "AP", 101.0, 0.01]]
    with pytest.raises(SystemExit):
        verify_results(cfg, results)


def test_an_image_without_predictions_is_one_in_which_nothing_was_found():
    records = [_record("a", [(0, CAR, {})]), _record("b", [(0, CAR, {})])]
    results = _evaluate("pascal_voc", ["car"], records, [("a", _instances([(0, CAR, 0.9)]))])
    assert results["bbox"]["AP50"] == pytest.approx(50)
    assert _evaluate("pascal_voc", ["car"], records, [])["bbox"]["AP"] == 0


def test_wider_face_without_lists_is_one_ap_over_valid_faces(caplog):
    caplog.set_level("INFO")
    records = [_record("a", [(0, CAR, {}), (0, PERSON, {"ignore": 1})])]
    found = [(0, CAR, 0.5), (0, PERSON, 0.9)]
    results = _evaluate("wider_face", ["face"], records, [("a", _instances(found))])
    assert results == {"bbox": {"AP": 100.0}}
    assert "over all valid faces, not an official number" in caplog.text


def test_wider_face_with_lists_says_how_many_images_it_judged(caplog, real_data):
    pytest.importorskip("scipy")
    caplog.set_level("INFO")
    name = "0--Parade/0_Parade_Parade_0_102.jpg"
    records = [_record("a", [], file_name=f"images/{name}")]
    folder = str(REAL_DATA / "widerface" / "ground_truth")
    results = _evaluate("wider_face", ["face"], records, [], ground_truth_dir=folder)["bbox"]
    assert set(results) == {"AP", "AP-easy", "AP-medium", "AP-hard"}
    assert "on 1 of their 3226 images" in caplog.text


def test_wider_face_lists_that_are_missing_are_named(tmp_path):
    with pytest.raises(UserError, match=r"lacks wider_face_val\.mat"):
        _evaluate("wider_face", ["face"], [], [], ground_truth_dir=str(tmp_path))


@pytest.mark.parametrize("evaluator_type", BOX_TYPES)
@pytest.mark.parametrize(
    ("image_ids", "found", "message"),
    [
        (["c"], [(0, CAR, 0.5)], "the image 'c', which the dataset does not have"),
        (["a", "a"], [(0, CAR, 0.5)], "'a' was predicted twice"),
        (["a"], [(1, CAR, 0.5)], "of class 1, but the dataset has 1 classes"),
        (["a"], [(0, CAR, float("nan"))], "finite"),
        (["a"], [(0, [0.0, 0.0, float("inf"), 9.0], 0.5)], "finite"),
    ],
)
def test_malformed_predictions_are_refused(evaluator_type, image_ids, found, message):
    records = [_record("a", [(0, CAR, {})])]
    with pytest.raises(UserError, match=message):
        _evaluate(
            evaluator_type, ["Car"], records, [(image, _instances(found)) for image in image_ids]
        )


@pytest.mark.parametrize("evaluator_type", ["coco", "pascal_voc"])
def test_masks_of_another_size_than_the_image_are_refused(evaluator_type):
    square = [[10.0, 10.0, 110.0, 10.0, 110.0, 60.0, 10.0, 60.0]]
    records = [_record("a", [(0, CAR, {"segmentation": square})])]
    found = _instances([(0, CAR, 0.5), (0, CAR, 0.4)], np.zeros((2, 300, 400), dtype=bool))
    with pytest.raises(UserError, match=r"'a' have \(height, width\) \(300, 400\); the image has"):
        _evaluate(evaluator_type, ["Car"], records, [("a", found)], mask_on=True)
    sizes = [np.zeros((300, 400), bool), np.zeros((400, 400), bool)]
    found.pred_masks = RleMasks([encode_mask(mask) for mask in sizes])
    with pytest.raises(UserError, match=r"the image 'a' has masks of different sizes"):
        _evaluate(evaluator_type, ["Car"], records, [("a", found)], mask_on=True)


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("evaluator_type", BOX_TYPES)
def test_a_million_boxes_in_an_image_are_counted_in_little_memory(evaluator_type):
    objects = [[10.0 * i, 5.0, 10.0 * i + 90, 95.0] for i in range(30)]
    boxes = torch.tensor(objects).repeat(33_334, 1) + torch.rand(1_000_020, 1) * 20
    instances = Instances((400, 400))
    instances.pred_boxes = Boxes(boxes)
    instances.scores = torch.linspace(1, 0, len(boxes))
    instances.pred_classes = torch.zeros(len(boxes), dtype=torch.int64)
    records = [_record("a", [(0, box, {}) for box in objects])]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    results = _evaluate(evaluator_type, ["Car"], records, [("a", instances)])["bbox"]
    assert 0 < results["AP"] <= 100
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2 << 20  # KiB


def test_mask_ap_of_rectangles_is_their_box_ap():
    generator = np.random.default_rng(0)
    records, predictions = [], []
    for image_id in range(6):
        corners = generator.integers(0, 300, (5, 2))
        boxes = np.hstack([corners, corners + generator.integers(5, 90, (5, 2))])
        truth = [
            (i % 2, list(map(float, box)), {"difficult": i // 4}) for i, box in enumerate(boxes)
        ]
        for _, box, more in truth:
            x0, y0, x1, y1 = box
            more["segmentation"] = [[x0, y0, x1, y0, x1, y1, x0, y1]]
        records.append(_record(image_id, truth))
        moved = boxes + generator.integers(-5, 6, boxes.shape)
        moved[:, 2:] = np.maximum(moved[:, 2:], np.maximum(moved[:, :2], 0) + 1)
        masks = np.zeros((5, 400, 400), dtype=bool)
        for mask, (x0, y0, x1, y1) in zip(masks, moved.clip(0), strict=True):
            mask[y0:y1, x0:x1] = True
        found = [
            (i % 2, list(map(float, box)), float(generator.random()))
            for i, box in enumerate(moved.clip(0))
        ]
        predictions.append((image_id, _instances(found, masks)))
    results = _evaluate("pascal_voc", ["car", "bus"], records, predictions, mask_on=True)
    assert 0 < results["bbox"]["AP"] < 100
    assert results["segm"] == results["bbox"]
