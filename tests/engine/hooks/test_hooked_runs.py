"""Short runs with everything on: moving average, validation loss, best model, early stop."""

import json
from pathlib import Path

import pytest
import torch

from d2ft.config import load_cfg
from d2ft.engine import FinetuneTrainer
from d2ft.engine.hooks.validation_loss import build_validation_loader, mean_losses
from d2ft.errors import UserError
from tests.engine.runs import metrics_of
from tests.factories import PROJECT

EVERYTHING = [
    "TEST.EVAL_PERIOD", "1",
    "TEST.VALIDATION_LOSS", "True",
    "FINETUNE.EMA.ENABLED", "True",
    "FINETUNE.BEST.METRIC", "val/total_loss",
    "FINETUNE.BEST.MODE", "min",
]  # fmt: skip


def _train(overrides, *more, resume=False):
    cfg = load_cfg(PROJECT / "configs/cityscapes_ft.yaml", [*overrides, *more])
    trainer = FinetuneTrainer(cfg)
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return trainer, Path(cfg.OUTPUT_DIR)


def _load(path):
    return torch.load(path, weights_only=True)


def _equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_hooks_that_watch_leave_the_weights_as_they_are(overrides, tmp_path):
    _, plain = _train(overrides)
    _, watched = _train(overrides, "OUTPUT_DIR", str(tmp_path / "watched"), *EVERYTHING)
    final = _load(watched / "model_final.pth")
    assert _equal(_load(plain / "model_final.pth")["model"], final["model"])
    assert (watched / "last_checkpoint").read_text() == "model_final.pth"
    average = final["trainer"]["hooks"]["EMAHook"]["average"]
    averaged = _load(watched / "model_ema.pth")
    assert averaged.keys() == {"model", "iteration", "d2ft"}  # nobody resumes from it
    saved = averaged["model"]
    assert all(torch.equal(saved[name], value) for name, value in average.items())
    compared = json.loads((watched / "comparison.json").read_text())
    assert compared.keys() == {"best", "last", "ema", "ema at best"}
    assert {path.split("/")[0] for path in compared["best"]} == {"segm", "bbox", "segm_coco", "val"}
    lines = [json.loads(line) for line in (watched / "metrics.json").read_text().splitlines()]
    losses = {
        line["iteration"]: line["val/total_loss"] for line in lines if "val/total_loss" in line
    }
    assert compared["best"]["val/total_loss"] == min(losses.values())
    best = _load(watched / "model_best.pth")
    assert best["iteration"] == min(losses, key=losses.get)


def test_a_stopped_run_ends_as_a_complete_one_and_resume_says_so(overrides, caplog):
    stop = ["FINETUNE.EARLY_STOPPING.PATIENCE", "1", "FINETUNE.EARLY_STOPPING.MIN_GAIN", "1000"]
    trainer, run = _train(overrides, *EVERYTHING, *stop)
    assert trainer.iter == 2, "the first evaluation is the measure, the second gains too little"
    assert (run / "last_checkpoint").read_text() == "model_final.pth"
    assert _load(run / "model_final.pth")["iteration"] == 1
    assert (run / "results.json").is_file()
    before = (run / "model_final.pth").stat().st_mtime_ns
    _train(overrides, *EVERYTHING, *stop, resume=True)
    assert (run / "model_final.pth").stat().st_mtime_ns == before


def test_a_run_killed_at_its_very_end_saves_the_same_average(overrides):
    stop = ["FINETUNE.EARLY_STOPPING.PATIENCE", "1", "FINETUNE.EARLY_STOPPING.MIN_GAIN", "1000"]
    options = [*EVERYTHING, *stop, "LOG_PERIOD", "1"]
    _, run = _train(overrides, *options)
    whole, lines = _load(run / "model_ema.pth"), metrics_of(run)
    assert "segm/AP" in lines[1], "the evaluation that ended the run is in the metrics"
    for name in ("model_ema.pth", "complete.json", "results.json"):
        (run / name).unlink()
    _train(overrides, *options, resume=True)
    again = _load(run / "model_ema.pth")
    assert _equal(again.pop("model"), whole.pop("model"))
    assert again == whole
    assert metrics_of(run) == lines


def test_a_resumed_run_has_the_same_average_and_best(overrides):
    options = [*EVERYTHING, "SOLVER.CHECKPOINT_PERIOD", "1"]
    _, run = _train(overrides, *options)
    whole = _load(run / "model_final.pth")["trainer"]["hooks"]
    (run / "last_checkpoint").write_text("model_0000001.pth")
    _train(overrides, *options, resume=True)
    again = _load(run / "model_final.pth")["trainer"]["hooks"]
    assert _equal(whole["EMAHook"]["average"], again["EMAHook"]["average"])
    assert whole["EMAHook"]["updates"] == again["EMAHook"]["updates"] == 4
    # As text, in which the NaN of a class without instances equals itself.
    assert repr(again["BestCheckpointer"]) == repr(whole["BestCheckpointer"])


def test_a_metric_that_no_evaluation_gives_is_an_error_with_those_it_gives(overrides):
    with pytest.raises(UserError, match=r"BEST.METRIC is 'segm/mAP'.*bbox/AP, .*segm/AP"):
        _train(overrides, "FINETUNE.BEST.METRIC", "segm/mAP", "SOLVER.MAX_ITER", "1")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["FINETUNE.EARLY_STOPPING.PATIENCE", "2"], "is empty, but FINETUNE.EARLY_STOPPING"),
        (["FINETUNE.BEST.METRIC", "ema/segm/AP"], "needs FINETUNE.EMA.ENABLED True"),
        (["FINETUNE.BEST.METRIC", "val/total_loss"], "needs TEST.VALIDATION_LOSS True"),
        (["SOLVER.ACCUMULATE", "3"], "the 2 images of a process cannot be split"),
        (["SOLVER.AMP.ENABLED", "True"], "set SOLVER.AMP.DTYPE bfloat16"),
    ],
)
def test_settings_that_need_others_are_refused(overrides, options, message):
    with pytest.raises(UserError, match=message):
        _train(overrides, *options)


def test_the_validation_loss_changes_nothing_and_repeats(overrides):
    cfg = load_cfg(PROJECT / "configs/cityscapes_ft.yaml", overrides)
    trainer = FinetuneTrainer(cfg)
    trainer.model.eval()
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    state = torch.get_rng_state()
    first, second = (
        mean_losses(trainer.model, lambda: build_validation_loader(cfg, "cityscapes_instance_val"))
        for _ in range(2)
    )
    assert first == second
    assert first["total_loss"] > 0
    assert torch.equal(state, torch.get_rng_state())
    assert _equal(before, trainer.model.state_dict())
    assert not trainer.model.training


def test_bfloat16_trains_on_the_cpu(overrides):
    options = ["SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.DTYPE", "bfloat16"]
    _, run = _train(overrides, *options, "SOLVER.MAX_ITER", "2")
    assert all(v.isfinite().all() for v in _load(run / "model_final.pth")["model"].values())


def test_without_a_compiler_the_run_goes_on_and_says_so(overrides, monkeypatch, caplog):
    def broken(*args, **kwargs):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch, "compile", broken)
    _train(overrides, "MODEL.COMPILE", "True", "SOLVER.MAX_ITER", "1")
    assert "MODEL.COMPILE has no effect" in caplog.text
    assert "no compiler here" in caplog.text
