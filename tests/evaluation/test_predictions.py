import json

import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.structures import Boxes, Instances

from d2ft.data import register_instances
from d2ft.errors import UserError
from d2ft.evaluation.prediction_file import PredictionFile
from d2ft.evaluation.predictions import (
    PredictionWriter,
    category_ids,
    instances_to_results,
    predictions_file,
    results_json,
)

SIZE = (30, 40)
RECORDS = [{"image_id": name, "height": 30, "width": 40} for name in ("a", "ü", 7)]


@pytest.fixture
def dataset():
    register_instances("three", lambda: RECORDS, thing_classes=["cat", "dog"])
    return "three"


def random_instances(number, seed=0, masks=True):
    """Return predictions with digits that only survive where none is dropped."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(number, 4, generator=generator)
    corners[:, 2:] = corners[:, :2] + corners[:, 2:] * 40
    corners[::2, :2] *= 1e-6
    instances = Instances(SIZE)
    instances.pred_boxes = Boxes(corners)
    instances.scores = torch.rand(number, generator=generator)
    instances.pred_classes = torch.randint(2, (number,), generator=generator)
    if masks:
        instances.pred_masks = torch.rand(number, *SIZE, generator=generator) < 0.5
    return instances


def write(path, dataset, instances_of):
    writer = PredictionWriter(dataset, path)
    writer.reset()
    for record in RECORDS:
        if record["image_id"] in instances_of:
            writer.process([record], [{"instances": instances_of[record["image_id"]]}])
    assert writer.evaluate() == {}
    return path


def assert_same(read, instances):
    assert torch.equal(read.pred_boxes.tensor, instances.pred_boxes.tensor)
    assert torch.equal(read.scores, instances.scores)
    assert read.scores.dtype == torch.float32
    assert torch.equal(read.pred_classes, instances.pred_classes)
    if instances.has("pred_masks"):
        assert [m.tolist() for m in read.pred_masks] == instances.pred_masks.tolist()


@pytest.mark.parametrize("masks", [True, False])
def test_what_is_written_is_read_as_the_same_tensors(tmp_path, dataset, masks):
    made = {r["image_id"]: random_instances(9, i, masks) for i, r in enumerate(RECORDS)}
    path = write(tmp_path / "new folder" / "p.json", dataset, made)
    assert len(json.loads(path.read_text(encoding="utf-8"))) == 27
    assert [file.name for file in path.parent.iterdir()] == ["p.json"]
    with PredictionFile(path, dataset) as predictions:
        assert len(predictions) == 27
        assert predictions.has_masks is masks
        for record in RECORDS:
            assert_same(predictions.read(record), made[record["image_id"]])


def test_an_image_without_predictions_reads_as_empty(tmp_path, dataset):
    empty = random_instances(0)
    path = write(tmp_path / "p.json", dataset, {"a": empty, 7: random_instances(2)})
    with PredictionFile(path, dataset) as predictions:
        assert [len(predictions.read(record)) for record in RECORDS] == [0, 0, 2]
    path = write(tmp_path / "p.json", dataset, {})
    assert json.loads(path.read_text()) == []
    with PredictionFile(path, dataset) as predictions:
        assert_same(predictions.read(RECORDS[0]), empty)


def test_a_file_in_any_order_and_spacing_is_read(tmp_path, dataset, monkeypatch):
    # Smaller than a prediction, so that each one crosses a border between chunks.
    monkeypatch.setattr("d2ft.evaluation.prediction_file._CHUNK_BYTES", 50)
    made = {r["image_id"]: random_instances(3, i) for i, r in enumerate(RECORDS)}
    results = [
        r for image, found in made.items() for r in instances_to_results(found, image, [0, 1])
    ]
    mixed = [results[i] for i in (0, 3, 6, 1, 4, 7, 2, 5, 8)]
    path = tmp_path / "p.json"
    for options in ({"indent": 1}, {"ensure_ascii": False}):
        path.write_text(json.dumps(mixed, **options), encoding="utf-8")
        with PredictionFile(path, dataset) as predictions:
            for record in RECORDS:
                assert_same(predictions.read(record), made[record["image_id"]])


def test_categories_are_those_of_the_annotation_file(tmp_path, dataset):
    assert category_ids(dataset) == [0, 1]
    MetadataCatalog.get(dataset).thing_dataset_id_to_contiguous_id = {18: 1, 17: 0}
    made = random_instances(6)
    path = write(tmp_path / "p.json", dataset, {"a": made})
    assert {r["category_id"] for r in json.loads(path.read_text())} == {17, 18}
    with PredictionFile(path, dataset) as predictions:
        assert_same(predictions.read(RECORDS[0]), made)


def test_scores_with_more_digits_than_a_model_gives_keep_them(tmp_path, dataset):
    scores = [0.1, 0.10000000000000002]
    entries = [
        {"image_id": "a", "category_id": 0, "bbox": [0, 0, 5, 5], "score": s} for s in scores
    ]
    path = tmp_path / "p.json"
    path.write_text(json.dumps(entries))
    with PredictionFile(path, dataset) as predictions:
        assert predictions.read(RECORDS[0]).scores.tolist() == scores


def test_a_missing_box_is_made_from_the_mask(tmp_path, dataset):
    made = random_instances(1)
    made.pred_masks[:] = False
    made.pred_masks[0, 5:10, 20:31] = True
    (entry,) = instances_to_results(made, "a", [0, 1])
    del entry["bbox"]
    path = tmp_path / "p.json"
    path.write_text(json.dumps([entry]))
    with PredictionFile(path, dataset) as predictions:
        assert predictions.read(RECORDS[0]).pred_boxes.tensor.tolist() == [[20, 5, 31, 10]]


GOOD = {"image_id": "a", "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}
MASK = {"segmentation": {"size": [30, 40], "counts": "PU1"}}


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ([{**GOOD, "image_id": "b"}], "prediction 1 is for the image 'b'.*'three' does not have"),
        ([GOOD, {**GOOD, "image_id": "7"}], "prediction 2 is for the image '7'.*ids are like 'a'"),
        ([{**GOOD, "image_id": 7.0}], "is for the image 7.0"),
        ([{**GOOD, "image_id": [1]}], r"is for the image \[1\]"),
        ([GOOD, 5], "prediction 2 is not a JSON object with an image_id: 5"),
        ([{"score": 1}], "prediction 1 is not a JSON object with an image_id"),
        ([{**GOOD, "category_id": 2}], r"category_id 2; those of 'three' are 0 \(cat\), 1 \(dog\)"),
        ([{**GOOD, "category_id": True}], "category_id True"),
        ([{**GOOD, "score": float("nan")}], "prediction 1, for the image 'a', has the score nan"),
        ([{**GOOD, "score": "0.5"}], "has the score '0.5'"),
        ([{**GOOD, "bbox": [1, 2, float("inf"), 4]}], r"has the bbox \[1, 2, inf, 4\]"),
        ([{**GOOD, "bbox": [1, 2, -3, 4]}], "sizes from 0 on"),
        ([{**GOOD, "bbox": [1, 2, 3]}], "expected .x, y, width, height"),
        ([{**GOOD, "bbox": 3}], "has the bbox 3"),
        ([{k: v for k, v in GOOD.items() if k != "bbox"}], "has neither bbox nor segmentation"),
        ([{k: v for k, v in GOOD.items() if k != "score"}], "has no score"),
        ([GOOD, {**GOOD, **MASK}], "prediction 2 has a mask, unlike the first"),
        ([{**GOOD, **MASK}, GOOD], "prediction 2 has no mask, unlike the first"),
        (
            [{**GOOD, "segmentation": {"size": [40, 30], "counts": "PU1"}}],
            r"has a mask that has the size \[40, 30\], and its image \[30, 40\]",
        ),
        ([{**GOOD, "segmentation": [[0, 0, 4, 0, 4, 4]]}], "a mask that is no run-length code"),
    ],
)
def test_a_prediction_that_cannot_be_evaluated_is_refused(tmp_path, dataset, entries, reason):
    path = tmp_path / "p.json"
    path.write_text(json.dumps(entries))
    with pytest.raises(UserError, match=reason), PredictionFile(path, dataset) as predictions:
        for record in RECORDS:
            predictions.read(record)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "is no file of predictions: it begins with ''"),
        ('{"images": []}', 'is no file of predictions: it begins with \'{"images"'),
        ('[{"image_id": "a"', "damaged or cut off: no JSON from byte 1 on"),
        (f"[{json.dumps(GOOD)}", "damaged or cut off"),
        (f"[{json.dumps(GOOD)} oh", "damaged or cut off"),
    ],
)
def test_a_file_that_is_no_whole_list_is_refused(tmp_path, dataset, text, reason):
    path = tmp_path / "p.json"
    path.write_text(text)
    with pytest.raises(UserError, match=reason):
        PredictionFile(path, dataset)
    with pytest.raises(UserError, match="does not exist"):
        PredictionFile(tmp_path / "other.json", dataset)


def test_a_prediction_that_comes_twice_counts_twice(tmp_path, dataset):
    path = tmp_path / "p.json"
    path.write_text(json.dumps([{**GOOD, "id": 1}, {**GOOD, "id": 1}]))
    with PredictionFile(path, dataset) as predictions:
        assert len(predictions.read(RECORDS[0])) == 2


@pytest.mark.slow
def test_a_million_boxes_in_one_image_are_read(tmp_path, dataset):
    path = tmp_path / "p.json"
    path.write_text("[" + ",".join([json.dumps(GOOD)] * 1_000_000) + "]")
    with PredictionFile(path, dataset) as predictions:
        assert len(predictions.read(RECORDS[0])) == 1_000_000


@pytest.mark.parametrize("part", ["scores", "boxes"])
def test_a_model_that_predicts_no_numbers_is_refused_and_leaves_no_file(tmp_path, dataset, part):
    made = random_instances(3)
    (made.scores if part == "scores" else made.pred_boxes.tensor[:, 2])[1] = float("nan")
    with pytest.raises(UserError, match="1 of 3 predictions for the image 'a' have a box or a sc"):
        write(tmp_path / "p.json", dataset, {"a": made})
    assert not list(tmp_path.iterdir())


def test_a_new_evaluation_takes_the_file_of_the_one_before_away(tmp_path, dataset):
    path = write(tmp_path / "p.json", dataset, {"a": random_instances(1)})
    writer = PredictionWriter(dataset, path)
    writer.reset()
    assert not path.exists()
    writer.evaluate()
    assert path.exists()


def test_results_keep_every_digit_and_say_null_for_what_could_not_be_computed():
    results = {"bbox": {"AP": 100 / 3, "AP-x": float("nan")}}
    assert json.loads(results_json(results)) == {"bbox": {"AP": 100 / 3, "AP-x": None}}


def test_the_file_is_named_after_the_dataset(tmp_path):
    assert predictions_file("output/x", "my_set").as_posix() == "output/x/predictions/my_set.json"


def test_scores_and_boxes_are_written_with_all_digits():
    made = random_instances(1, masks=False)
    (entry,) = instances_to_results(made, "a", [0, 1])
    assert np.float32(entry["score"]) == made.scores.numpy()[0]
    assert np.float32(entry["bbox"][0] + entry["bbox"][2]) == made.pred_boxes.tensor.numpy()[0, 2]
