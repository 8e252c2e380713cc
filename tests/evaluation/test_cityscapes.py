import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.structures import Boxes, Instances
from PIL import Image

from d2ft.data import register_cityscapes_instances, register_instances
from d2ft.errors import UserError
from d2ft.evaluation import CityscapesInstanceEvaluator
from d2ft.evaluation.masks import RleMasks, encode_mask
from d2ft.labels import CITYSCAPES_INSTANCE_CLASSES

# Large enough that instances pass the 100 pixels below which the official metric ignores them.
HEIGHT, WIDTH = 120, 240


@pytest.fixture
def dataset(tmp_path):
    """Register two frames: a car, a person and a group of bicycles; and a lone bus."""
    frames = {
        "town_000000_000019": {26000: (10, 60, 20, 90), 24000: (20, 80, 150, 170), 33: (90, 120, 0, 60)},
        "town_000001_000019": {28000: (30, 90, 60, 200)},
    }  # fmt: skip
    for name, objects in frames.items():
        ids = np.full((HEIGHT, WIDTH), 7, np.uint16)
        for value, (top, bottom, left, right) in objects.items():
            ids[top:bottom, left:right] = value
        for folder, file, image in (
            ("leftImg8bit", "leftImg8bit", Image.new("RGB", (WIDTH, HEIGHT))),
            ("gtFine", "gtFine_instanceIds", Image.fromarray(ids)),
        ):
            (tmp_path / folder / "town").mkdir(parents=True, exist_ok=True)
            image.save(tmp_path / folder / "town" / f"{name}_{file}.png")
    register_cityscapes_instances("two_frames", tmp_path / "leftImg8bit", tmp_path / "gtFine")
    return "two_frames"


def _perfect(record):
    """Return the single instances of a frame as predictions."""
    ids = np.array(Image.open(record["instance_file_name"]))
    single = [a for a in record["annotations"] if not a["iscrowd"]]
    values = [int(value) for value in np.unique(ids) if value >= 1000]
    return [(a["category_id"], 0.9, ids == value) for a, value in zip(single, values, strict=True)]


def _instances(predictions):
    instances = Instances((HEIGHT, WIDTH))
    instances.pred_boxes = Boxes(torch.zeros(len(predictions), 4))
    instances.pred_classes = torch.tensor([p[0] for p in predictions], dtype=torch.int64)
    instances.scores = torch.tensor([p[1] for p in predictions])
    masks = np.array([p[2] for p in predictions], dtype=bool).reshape(-1, HEIGHT, WIDTH)
    instances.pred_masks = torch.from_numpy(masks)
    return instances


def _process(evaluator, record, predictions):
    evaluator.process([{"image_id": record["image_id"]}], [{"instances": _instances(predictions)}])


def _evaluate(dataset, predictions_of):
    evaluator = CityscapesInstanceEvaluator(dataset)
    evaluator.reset()
    for record in DatasetCatalog.get(dataset):
        _process(evaluator, record, predictions_of(record))
    return evaluator.evaluate()["segm"]


def test_perfect_predictions_have_an_ap_of_100_for_the_classes_that_are_there(dataset):
    results = _evaluate(dataset, _perfect)
    assert results["AP"] == results["AP50"] == 100.0
    assert [results[f"AP-{name}"] for name in ("car", "person", "bus")] == [100.0] * 3
    assert np.isnan(results["AP-train"])
    assert set(results) == {"AP", "AP50"} | {
        f"{metric}-{name}" for metric in ("AP", "AP50") for name in CITYSCAPES_INSTANCE_CLASSES
    }


def test_no_predictions_have_an_ap_of_0(dataset):
    results = _evaluate(dataset, lambda record: [])
    assert (results["AP"], results["AP-car"]) == (0.0, 0.0)
    assert np.isnan(results["AP-bicycle"])


def test_a_prediction_on_a_group_costs_nothing_and_one_on_the_road_does(dataset):
    def on_the_group(record):
        mask = np.zeros((HEIGHT, WIDTH), bool)
        mask[95:115, 5:50] = True
        return [*_perfect(record), (0, 0.95, mask)]

    def on_the_road(record):
        mask = np.zeros((HEIGHT, WIDTH), bool)
        mask[0:9, 200:240] = True
        return [*_perfect(record), (0, 0.95, mask)]

    # Person is predicted on bicycles: a group of another class does not excuse it.
    assert _evaluate(dataset, on_the_road)["AP-person"] < 100.0
    assert _evaluate(dataset, on_the_group)["AP-person"] < 100.0

    def as_bicycle(record):
        return [(7 if p[0] == 0 and p[1] == 0.95 else p[0], *p[1:]) for p in on_the_group(record)]

    assert _evaluate(dataset, as_bicycle)["AP"] == 100.0


def test_a_mask_over_half_of_the_object_counts_up_to_its_overlap(dataset):
    def shrunk(record):
        predictions = []
        for category, score, mask in _perfect(record):
            columns = np.flatnonzero(mask.any(axis=0))
            smaller = mask.copy()
            # Of every object 70 % of the columns stay: overlaps 0.5, 0.55, 0.6 and 0.65 are met.
            smaller[:, columns[int(len(columns) * 0.7) :]] = False
            predictions.append((category, score, smaller))
        return predictions

    results = _evaluate(dataset, shrunk)
    assert results["AP50"] == 100.0
    assert results["AP-car"] == pytest.approx(40.0)


def test_a_frame_that_was_not_predicted_counts_as_empty(dataset):
    everything = _evaluate(dataset, _perfect)
    without_a_bus = _evaluate(
        dataset, lambda record: _perfect(record) if "000000" in record["image_id"] else []
    )
    evaluator = CityscapesInstanceEvaluator(dataset)
    record = DatasetCatalog.get(dataset)[0]
    _process(evaluator, record, _perfect(record))
    assert evaluator.evaluate()["segm"] == pytest.approx(without_a_bus, nan_ok=True, abs=0)
    assert without_a_bus["AP-bus"] == 0.0 < everything["AP-bus"]


def test_masks_kept_as_run_lengths_have_the_same_numbers(dataset):
    evaluator = CityscapesInstanceEvaluator(dataset)
    for record in DatasetCatalog.get(dataset):
        instances = _instances(_perfect(record))
        instances.pred_masks = RleMasks([encode_mask(m.numpy()) for m in instances.pred_masks])
        evaluator.process([record], [{"instances": instances}])
    expected = _evaluate(dataset, _perfect)
    assert evaluator.evaluate()["segm"] == pytest.approx(expected, nan_ok=True, abs=0)


def test_an_image_of_another_dataset_is_refused(dataset):
    evaluator = CityscapesInstanceEvaluator(dataset)
    with pytest.raises(UserError, match="'rome' was predicted, but 'two_frames' has no such image"):
        _process(evaluator, {"image_id": "rome"}, [])


def test_an_image_that_comes_twice_is_refused(dataset):
    evaluator = CityscapesInstanceEvaluator(dataset)
    record = DatasetCatalog.get(dataset)[0]
    _process(evaluator, record, [])
    with pytest.raises(UserError, match="'town_000000_000019' was predicted twice"):
        _process(evaluator, record, [])
    evaluator.reset()
    _process(evaluator, record, [])


def test_masks_of_another_size_and_scores_that_are_no_numbers_are_refused(dataset):
    evaluator = CityscapesInstanceEvaluator(dataset)
    record = DatasetCatalog.get(dataset)[0]
    half = Instances((60, 120))
    half.pred_masks = torch.zeros(1, 60, 120, dtype=torch.bool)
    half.scores, half.pred_classes = torch.ones(1), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(UserError, match=r"size \(60, 120\), and its ground truth \(120, 240\)"):
        evaluator.process([record], [{"instances": half}])
    with pytest.raises(UserError, match="has a score that is not finite"):
        _process(evaluator, record, [(0, float("nan"), np.ones((HEIGHT, WIDTH), bool))])
    for category in (8, -1):
        with pytest.raises(
            UserError, match=f"is of class {category}, but 'two_frames' has 8 class"
        ):
            _process(evaluator, record, [(category, 0.5, np.ones((HEIGHT, WIDTH), bool))])


def test_ground_truth_with_an_unknown_label_is_refused(dataset):
    record = DatasetCatalog.get(dataset)[0]
    ids = np.full((HEIGHT, WIDTH), 35, np.uint16)
    Image.fromarray(ids).save(record["instance_file_name"])
    with pytest.raises(UserError, match="is broken: the value 35 belongs to no label"):
        _process(CityscapesInstanceEvaluator(dataset), record, [])


def test_a_class_that_the_metric_does_not_know_is_refused():
    register_instances("other", list, thing_classes=["car", "tree"])
    with pytest.raises(UserError, match="class 'tree'.*evaluator_type 'coco'"):
        CityscapesInstanceEvaluator("other")
