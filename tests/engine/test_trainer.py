import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data import DatasetCatalog

from d2ft.config import load_cfg
from d2ft.data import register_builtin_datasets, register_instances
from d2ft.engine import FinetuneTrainer, resolve_cfg
from d2ft.errors import UserError
from d2ft.evaluation.offline import evaluate_predictions
from d2ft.evaluation.predictions import predictions_file, results_json
from d2ft.labels import CITYSCAPES_INSTANCE_CLASSES, COCO_CLASSES
from tests.factories import PROJECT, SHORT_RUN, TINY_MODEL


def _train(cfg, *, resume=False):
    trainer = FinetuneTrainer(cfg)
    trainer.resume_or_load(resume=resume)
    return trainer.train(), Path(cfg.OUTPUT_DIR)


@pytest.fixture(scope="module")
def trained(datasets, coco_weights, tmp_path_factory):
    """Train once for the tests that only look at a run or go on from it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETECTRON2_DATASETS", str(datasets))
        register_builtin_datasets()
        run = tmp_path_factory.mktemp("trained") / "run"
        options = [*TINY_MODEL, *SHORT_RUN, "MODEL.WEIGHTS", str(coco_weights)]
        cfg = load_cfg(PROJECT / "configs/cityscapes_ft.yaml", [*options, "OUTPUT_DIR", str(run)])
        results, _ = _train(cfg)
    return results, run


@pytest.fixture
def run(trained, short_cfg):
    """Return a copy of the trained run at the OUTPUT_DIR of ``short_cfg``."""
    shutil.copytree(trained[1], short_cfg.OUTPUT_DIR)
    return Path(short_cfg.OUTPUT_DIR)


def _weights(path):
    return torch.load(path, weights_only=True)["model"]


def _assert_equal_weights(first, second):
    first, second = _weights(first), _weights(second)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def _lines(run):
    """Return what metrics.json says of each iteration, without what depends on the machine."""
    ignored = {"time", "data_time", "eta_seconds", "rank_data_time"}
    text = (run / "metrics.json").read_text()
    lines = [json.loads(line, parse_constant=str) for line in text.splitlines()]
    return [{k: v for k, v in line.items() if k not in ignored} for line in lines]


def test_a_run_leaves_the_files_that_others_read(trained):
    results, run = trained
    assert set(results) == {"segm", "bbox", "segm_coco"}
    assert {"config.yaml", "metrics.json", "preflight.json", "load_report.json", "results.json",
            "last_checkpoint", "model_0000001.pth", "model_final.pth"} <= set(os.listdir(run))  # fmt: skip
    assert (run / "last_checkpoint").read_text() == "model_final.pth"
    written = json.loads((run / "results.json").read_text(), parse_constant=pytest.fail)
    assert written["segm"].keys() == results["segm"].keys()
    checked = json.loads((run / "preflight.json").read_text())
    assert checked["datasets"]["cityscapes_instance_train"]["images"] == 4
    report = json.loads((run / "load_report.json").read_text())
    assert report["counts"]["skipped"] == 6


def test_the_kept_predictions_have_the_numbers_of_the_run(trained, short_cfg):
    run = trained[1]
    cfg = load_cfg(run / "config.yaml")
    path = predictions_file(run, "cityscapes_instance_val")
    assert len(json.loads(path.read_text())) > 0
    results = evaluate_predictions(cfg, "cityscapes_instance_val", path)
    assert results_json(results) == (run / "results.json").read_text()


def test_each_of_several_test_sets_keeps_its_predictions(short_cfg, run):
    short_cfg.MODEL.WEIGHTS = str(run / "model_final.pth")
    short_cfg.DATASETS.TEST = ("cityscapes_instance_val", "cityscapes_instance_train")
    results = FinetuneTrainer.evaluate(short_cfg)
    for name in short_cfg.DATASETS.TEST:
        path = predictions_file(run / "inference", name)
        offline = results_json(evaluate_predictions(short_cfg, name, path))
        assert offline == results_json(results[name])


def test_the_written_config_trains_the_same_run_again(short_cfg, tmp_path):
    short_cfg.SEED = -1
    _, run = _train(short_cfg)
    again = load_cfg(run / "config.yaml", ["OUTPUT_DIR", str(tmp_path / "again")])
    assert again.SEED >= 0
    _, second = _train(again)
    _assert_equal_weights(run / "model_final.pth", second / "model_final.pth")
    assert _lines(run) == _lines(second)


def test_another_seed_trains_another_model(short_cfg, run, tmp_path):
    short_cfg.SEED, short_cfg.OUTPUT_DIR = 2, str(tmp_path / "other")
    _, other = _train(short_cfg)
    first, second = _weights(run / "model_final.pth"), _weights(other / "model_final.pth")
    assert any(not torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_ends_as_one_that_never_stopped(short_cfg, trained, tmp_path, workers):
    _, whole = trained
    short_cfg.OUTPUT_DIR = str(tmp_path / "stopped")
    short_cfg.SEED = -1  # the checkpoint knows its own
    short_cfg.DATALOADER.NUM_WORKERS = workers
    stopped = Path(short_cfg.OUTPUT_DIR)
    stopped.mkdir()
    (stopped / "model_0000001.pth").write_bytes((whole / "model_0000001.pth").read_bytes())
    (stopped / "last_checkpoint").write_text("model_0000001.pth")
    # The lines beyond the checkpoint go, and come again.
    (stopped / "metrics.json").write_bytes((whole / "metrics.json").read_bytes())
    _train(short_cfg, resume=True)
    _assert_equal_weights(whole / "model_final.pth", stopped / "model_final.pth")
    assert _lines(stopped) == _lines(whole)


def test_a_complete_run_has_nothing_left_to_train(short_cfg, run):
    before = {path.name: path.stat().st_mtime_ns for path in run.glob("*.pth")}
    results, _ = _train(short_cfg, resume=True)
    assert results is None
    assert {path.name: path.stat().st_mtime_ns for path in run.glob("*.pth")} == before


def test_evaluating_the_final_model_gives_the_numbers_of_the_training(short_cfg, trained, run):
    results, _ = trained
    config = (run / "config.yaml").read_text()
    short_cfg.MODEL.WEIGHTS = str(run / "model_final.pth")
    evaluated = FinetuneTrainer.evaluate(resolve_cfg(short_cfg))
    assert json.dumps(evaluated) == json.dumps(results)
    # Beside what the training wrote, not in its place.
    assert (run / "config.yaml").read_text() == config
    assert (run / "inference" / "results.json").is_file()


def test_evaluating_does_not_need_the_training_set(short_cfg, run):
    short_cfg.DATASETS.TRAIN = ("on_another_machine",)
    short_cfg.MODEL.WEIGHTS = str(run / "model_final.pth")
    assert "segm" in FinetuneTrainer.evaluate(resolve_cfg(short_cfg))


def test_evaluating_without_the_predictors_is_refused(short_cfg):
    with pytest.raises(UserError, match=r"6 tensors.*MODEL\.WEIGHTS <OUTPUT_DIR>/model_final.pth"):
        FinetuneTrainer.evaluate(resolve_cfg(short_cfg))


def test_plain_detectron2_loads_a_saved_model(short_cfg, run):
    model = FinetuneTrainer.build_model(short_cfg)
    DetectionCheckpointer(model).load(str(run / "model_final.pth"))
    saved = _weights(run / "model_final.pth")
    assert all(torch.equal(saved[name], tensor) for name, tensor in model.state_dict().items())


def test_a_saved_model_knows_its_classes(run):
    saved = torch.load(run / "model_final.pth", weights_only=True)
    assert saved["d2ft"]["thing_classes"] == list(CITYSCAPES_INSTANCE_CLASSES)


def test_log_lines_come_at_the_period_of_the_config(short_cfg):
    short_cfg.LOG_PERIOD = 2
    _, run = _train(short_cfg)
    assert [line["iteration"] for line in _lines(run) if "total_loss" in line] == [1, 3]


def test_a_wrong_number_of_classes_stops_before_anything_is_built(short_cfg):
    short_cfg.MODEL.ROI_HEADS.NUM_CLASSES = 80
    with pytest.raises(UserError, match="has 8 classes .*set MODEL.ROI_HEADS.NUM_CLASSES to 8"):
        FinetuneTrainer(short_cfg)
    assert not os.path.exists(short_cfg.OUTPUT_DIR)


def test_a_set_registered_in_python_trains(short_cfg):
    register_builtin_datasets()
    register_instances(
        "mine",
        lambda: DatasetCatalog.get("cityscapes_instance_train"),
        thing_classes=CITYSCAPES_INSTANCE_CLASSES,
    )
    short_cfg.DATASETS.TRAIN = short_cfg.DATASETS.TEST = ("mine",)
    results, _ = _train(short_cfg)
    assert set(results) == {"bbox", "segm"}


def test_without_a_gpu_a_config_that_does_not_ask_for_one_runs_on_the_cpu(short_cfg, monkeypatch):
    from d2ft.config import get_cfg

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_cfg(get_cfg()).MODEL.DEVICE == "cpu"
    short_cfg.MODEL.DEVICE = "cuda"
    with pytest.raises(UserError, match=r"MODEL.DEVICE 'cuda' .*finds no GPU here"):
        resolve_cfg(short_cfg)


def test_a_complete_run_whose_evaluation_was_lost_is_evaluated(short_cfg, trained, run):
    (run / "results.json").unlink()
    results, _ = _train(short_cfg, resume=True)
    assert json.dumps(results) == json.dumps(trained[0])
    assert (run / "results.json").is_file()


def test_a_checkpoint_beyond_max_iter_is_an_error(short_cfg, run):
    short_cfg.SOLVER.MAX_ITER = 2
    with pytest.raises(UserError, match=r"MAX_ITER is 2 .*has 4 iterations; raise it"):
        _train(short_cfg, resume=True)


def test_a_config_keeps_its_seed_when_a_run_is_resumed(short_cfg, run):
    short_cfg.SEED = -1
    _train(short_cfg, resume=True)
    assert load_cfg(run / "config.yaml").SEED == 1


def test_another_batch_than_that_of_the_checkpoint_is_said(short_cfg, run, caplog):
    (run / "last_checkpoint").write_text("model_0000001.pth")
    short_cfg.SOLVER.IMS_PER_BATCH = 1
    _train(short_cfg, resume=True)
    assert "was written with ims_per_batch 2, now it is 1" in caplog.text


def test_the_4k_config_starts_from_the_rows_of_coco_but_not_on_resume(overrides, run):
    cfg = load_cfg(PROJECT / "configs/cityscapes_ft_4k.yaml", overrides)
    cfg.FINETUNE.SOURCE_CLASSES = COCO_CLASSES
    trainer = FinetuneTrainer(cfg)
    trainer.resume_or_load(resume=False)

    name = "roi_heads.mask_head.predictor.bias"
    coco = pickle.loads(Path(cfg.MODEL.WEIGHTS).read_bytes())["model"][name]
    car = trainer.model.state_dict()[name][CITYSCAPES_INSTANCE_CLASSES.index("car")]
    assert car.item() == coco[COCO_CLASSES.index("car")]
    report = json.loads((run / "load_report.json").read_text())
    assert report["counts"]["remapped"] == 6
    assert [row["name"] for row in report["classes"] if row["source"] is None] == ["rider"]

    trainer.resume_or_load(resume=True)
    saved = _weights(run / "model_final.pth")
    assert all(torch.equal(saved[k], v) for k, v in trainer.model.state_dict().items())


def test_a_trainer_used_from_python_refuses_weights_that_need_another_config(
    run, overrides, tmp_path
):
    changes = ["MODEL.WEIGHTS", str(run / "model_final.pth"), "INPUT.FORMAT", "RGB"]
    changes += ["OUTPUT_DIR", str(tmp_path / "second")]
    cfg = load_cfg(PROJECT / "configs/cityscapes_ft.yaml", [*overrides, *changes])
    with pytest.raises(UserError, match=r"INPUT\.FORMAT is 'RGB'.*\n\nINPUT:\n  FORMAT: \"BGR\""):
        FinetuneTrainer(cfg).resume_or_load(resume=False)
