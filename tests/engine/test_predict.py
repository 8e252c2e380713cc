import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.engine import DefaultPredictor
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO

from d2ft.config import load_cfg, load_cfg_text
from d2ft.data import register_builtin_datasets
from d2ft.engine import FinetuneTrainer
from d2ft.engine.predict import CheckpointPredictor, find_images, predict_images
from d2ft.errors import UserError
from d2ft.labels import CITYSCAPES_INSTANCE_CLASSES
from tests.factories import PROJECT, SHORT_RUN, TINY_MODEL, seeded_model

LOW = 0.05  # the scores of a model without training


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Write a checkpoint as a training run does."""
    folder = tmp_path_factory.mktemp("predict")
    register_builtin_datasets()
    options = [*TINY_MODEL, *SHORT_RUN, "TEST.DETECTIONS_PER_IMAGE", "20"]
    options += ["OUTPUT_DIR", str(folder)]
    cfg = load_cfg(PROJECT / "configs/cityscapes_ft.yaml", options)
    checkpointer = FinetuneTrainer.build_checkpointer(cfg, seeded_model(cfg), cfg.DATASETS.TRAIN[0])
    checkpointer.save("model_final")
    return folder / "model_final.pth"


@pytest.fixture
def images(tmp_path):
    source = np.random.default_rng(0)
    folder = tmp_path / "images"
    (folder / "more").mkdir(parents=True)
    for name, size in (("1.png", (48, 80)), ("2.jpg", (64, 64)), ("more/3.bmp", (40, 60))):
        Image.fromarray(source.integers(0, 255, (*size, 3), dtype=np.uint8)).save(folder / name)
    (folder / "notes.txt").write_text("not an image")
    return folder


@pytest.fixture
def predictor(weights):
    return CheckpointPredictor(str(weights), threshold=LOW)


def run_tool(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["predict.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(PROJECT / "tools/predict.py"), run_name="__main__")
    return stop.value.code


@pytest.mark.parametrize("fast", [False, True])
def test_detections_equal_those_of_detectron2s_default_predictor(weights, images, fast):
    predictor = CheckpointPredictor(str(weights), threshold=LOW, opts=["MODEL.FAST_CPU", fast])
    text = torch.load(weights, weights_only=True)["d2ft"]["config"]
    options = ["MODEL.WEIGHTS", str(weights), "MODEL.DEVICE", "cpu"]
    cfg = load_cfg_text(text, "test", [*options, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", LOW])
    image = np.asarray(Image.open(images / "1.png"))[:, :, ::-1]

    expected = DefaultPredictor(cfg)(image)["instances"]
    found = predictor(image)["instances"]

    assert len(found) == len(expected) > 10
    for field in ("pred_classes", "pred_masks"):
        assert torch.equal(found.get(field), expected.get(field))
    # The fast RoIAlign sums in another order.
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if fast else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(found.scores, expected.scores, **tolerance)
    torch.testing.assert_close(found.pred_boxes.tensor, expected.pred_boxes.tensor, **tolerance)


def test_class_names_come_from_the_checkpoint(predictor):
    assert predictor.thing_classes == CITYSCAPES_INSTANCE_CLASSES
    assert predictor.metadata.thing_classes == list(CITYSCAPES_INSTANCE_CLASSES)


def test_folders_patterns_and_files_are_found_once_and_in_order(images):
    def names(*arguments):
        return [str(path.relative_to(images)) for path in find_images(arguments)]

    assert names(str(images)) == ["1.png", "2.jpg"]
    deep = find_images([str(images)], recursive=True)
    assert [path.name for path in deep] == ["1.png", "2.jpg", "3.bmp"]
    assert names(f"{images}/**/*.[bj]*p*") == ["2.jpg", "more/3.bmp"]
    assert names(f"{images}/2.jpg", str(images)) == ["2.jpg", "1.png"]


@pytest.mark.parametrize("argument", ["gone.jpg", "*.gif", "empty"])
def test_argument_without_an_image_is_refused(argument, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    with pytest.raises(UserError, match=argument.replace("*", r"\*")):
        find_images([argument])


def test_results_are_coco_results(predictor, images, tmp_path):
    paths = [images / "1.png", images / "2.jpg"]
    steps = list(predict_images(predictor, paths, json_file=tmp_path / "new/found.json"))

    assert steps == [(path, "") for path in paths]
    found = json.loads((tmp_path / "new/found.json").read_text())
    assert {row["image_id"] for row in found} == {1, 2}
    assert {row["file_name"] for row in found} == {str(path) for path in paths}
    assert all(row["score"] > LOW and row["category_id"] in range(8) for row in found)
    assert rle.decode(found[0]["segmentation"]).shape == (48, 80)
    truth = COCO()
    truth.dataset = {
        "info": {},
        "images": [{"id": 1}, {"id": 2}],
        "categories": [{"id": i} for i in range(8)],
    }
    truth.createIndex()
    assert len(truth.loadRes(found).anns) == len(found)


def test_tool_draws_every_image_under_its_own_name(weights, images, tmp_path, monkeypatch, capsys):
    drawn = tmp_path / "drawn"
    code = run_tool(
        monkeypatch, "--weights", weights, "--threshold", LOW, "--output", drawn,
        images, images / "more",
    )  # fmt: skip

    assert code == 0
    files = sorted(str(p.relative_to(drawn)) for p in drawn.rglob("*") if p.is_file())
    assert files == ["1.png", "2.jpg", "more/3.bmp.png"]
    before, after = (np.asarray(Image.open(f / "1.png").convert("RGB")) for f in (images, drawn))
    assert before.shape == after.shape
    assert (before != after).any()
    assert "3 of 3 images predicted" in capsys.readouterr().out


def test_unreadable_image_is_named_and_skipped_and_the_exit_code_says_so(
    weights, images, tmp_path, monkeypatch, capsys
):
    (images / "broken.png").write_bytes((images / "1.png").read_bytes()[:500])
    (images / "page.jpg").write_text("<html>")
    target = tmp_path / "found.json"

    code = run_tool(monkeypatch, "--weights", weights, "--json", target, "--threshold", LOW, images)

    assert code == 3
    shown = capsys.readouterr()
    assert f"skipped {images / 'broken.png'}: " in shown.err
    assert f"skipped {images / 'page.jpg'}: " in shown.err
    assert "2 of 4 images predicted" in shown.out
    assert {Path(row["file_name"]).name for row in json.loads(target.read_text())} == {
        "1.png",
        "2.jpg",
    }


def test_images_are_never_replaced(predictor, images):
    with pytest.raises(UserError, match=r"1\.png would replace an image.*another folder"):
        list(predict_images(predictor, [images / "1.png"], output=images))


def test_file_without_a_config_needs_one(weights, tmp_path):
    path = tmp_path / "bare.pth"
    torch.save({"model": torch.load(weights, weights_only=True)["model"]}, path)
    with pytest.raises(UserError, match=r"bare\.pth does not hold the config.*--config-file"):
        CheckpointPredictor(str(path))

    config = tmp_path / "model.yaml"
    config.write_text(torch.load(weights, weights_only=True)["d2ft"]["config"])
    assert CheckpointPredictor(str(path), str(config)).thing_classes == ()


def test_file_that_does_not_fill_the_model_is_refused(weights):
    with pytest.raises(UserError, match="no trained values for"):
        CheckpointPredictor(str(weights), opts=["MODEL.ROI_HEADS.NUM_CLASSES", "3"])


def test_hostile_file_is_refused_in_one_line(images, tmp_path, monkeypatch):
    path = tmp_path / "hostile.pkl"
    path.write_bytes(b"cos\nmkdir\n(S'the_pickle_was_run'\ntR.")
    monkeypatch.chdir(tmp_path)

    code = run_tool(monkeypatch, "--weights", path, "--json", tmp_path / "x.json", images)

    assert "error: " in code
    assert "Nothing in the file was run" in code
    assert not Path("the_pickle_was_run").exists()


def test_threshold_outside_of_scores_is_refused(weights):
    with pytest.raises(UserError, match=r"threshold is 50\.0; a score is between 0 and 1"):
        CheckpointPredictor(str(weights), threshold=50.0)
