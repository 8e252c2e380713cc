"""Runs whose schedule is in epochs and in phases."""

import json
from pathlib import Path

import pytest
import torch

from d2ft.config import load_cfg
from d2ft.engine import FinetuneTrainer
from d2ft.errors import UserError
from tests.factories import PROJECT


def _train(cfg, *, resume=False):
    trainer = FinetuneTrainer(cfg)
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return torch.load(Path(cfg.OUTPUT_DIR) / "model_final.pth", weights_only=True)["model"]


@pytest.fixture
def cfg(overrides):
    phases = "[{'EPOCHS': 1, 'FREEZE': ['*', '!box_predictor']}]"
    options = [*overrides, "SOLVER.CHECKPOINT_PERIOD", "1", "FINETUNE.PHASES", phases]
    return load_cfg(PROJECT / "configs/cityscapes_ft.yaml", options)


def test_a_phase_trains_what_it_leaves_and_the_rest_learns_after_it(cfg):
    final = _train(cfg)
    run = Path(cfg.OUTPUT_DIR)
    first, second = (
        torch.load(run / f"model_000000{i}.pth", weights_only=True)["model"] for i in (0, 1)
    )
    changed = {name for name in first if not torch.equal(first[name], second[name])}
    assert changed
    assert all("box_predictor" in name for name in changed), "an epoch is two iterations here"
    learned = {name for name in first if not torch.equal(second[name], final[name])}
    assert any("mask_head" in name for name in learned)
    assert any("fpn" in name for name in learned)


def test_a_resumed_run_goes_on_in_its_phase(cfg):
    whole = _train(cfg)
    run = Path(cfg.OUTPUT_DIR)
    for name in ("model_final.pth", "model_0000001.pth", "model_0000002.pth", "model_0000003.pth"):
        (run / name).unlink()
    (run / "last_checkpoint").write_text("model_0000000.pth")
    resumed = _train(cfg, resume=True)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_run_in_epochs_says_its_schedule_and_keeps_it(overrides):
    options = [*overrides, "SOLVER.EPOCHS", "1.5", "SOLVER.CHECKPOINT_EPOCHS", "1"]
    for key in ("SOLVER.MAX_ITER", "SOLVER.CHECKPOINT_PERIOD"):
        at = options.index(key)
        del options[at : at + 2]
    cfg = load_cfg(PROJECT / "configs/quickstart.yaml", options)
    trainer = FinetuneTrainer(_without_iterations(cfg))
    assert trainer.max_iter == 3
    trainer.resume_or_load(resume=False)
    trainer.train()
    run = Path(cfg.OUTPUT_DIR)
    told = json.loads((run / "preflight.json").read_text())["schedule"]
    assert told["samples of an epoch"] == 4
    assert told["iterations"] == 3
    saved = load_cfg(run / "config.yaml")
    assert (saved.SOLVER.EPOCHS, saved.SOLVER.MAX_ITER) == (0, 3)
    assert (run / "model_0000001.pth").is_file()


def _without_iterations(cfg):
    # The YAML of the quickstart counts in iterations.
    cfg = cfg.clone()
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.CHECKPOINT_PERIOD = 40000, 5000
    cfg.__dict__["__d2ft_origins__"] = {}
    return cfg


@pytest.mark.parametrize(
    "phases", ["[3]", "[{'EPOCHS': 1}]", "[{'ITERS': 0, 'FREEZE': []}]", "[{'ITERS': 1, 'FREEZE': 'rpn'}]"]
)  # fmt: skip
def test_a_phase_of_another_form_is_refused(overrides, phases):
    cfg = load_cfg(PROJECT / "configs/cityscapes_ft.yaml", [*overrides, "FINETUNE.PHASES", phases])
    with pytest.raises(UserError, match=r"FINETUNE.PHASES \(command line\) has"):
        FinetuneTrainer(cfg)
