"""Runs whose loss is not finite."""

import json
from pathlib import Path

import pytest
import torch

from d2ft.engine import FinetuneTrainer
from d2ft.errors import UserError
from tests.engine.runs import weights_of


def _trainer(cfg, bad_iterations):
    """Return a trainer of a model whose mask loss is NaN in some iterations."""
    trainer = FinetuneTrainer(cfg)
    trainer.resume_or_load(resume=False)
    head = trainer.model.roi_heads.mask_head
    compute = head.forward

    def forward(*arguments):
        losses = compute(*arguments)
        if trainer.iter in bad_iterations:
            return {name: loss * float("nan") for name, loss in losses.items()}
        return losses

    head.forward = forward
    return trainer


def test_a_loss_that_is_not_finite_ends_the_run_with_images_and_checkpoint(short_cfg):
    with pytest.raises(UserError, match=r"(?s)loss at iteration 3 is not finite: .*loss_mask nan, "
                       r".* on .*_leftImg8bit\.png, .*_leftImg8bit\.png\. The last good checkpoint is "
                       r".*model_0000001\.pth\..*SOLVER\.MAX_SKIPPED_STEPS N \(now 0\)"):  # fmt: skip
        _trainer(short_cfg, {3}).train()


def test_a_step_that_is_left_out_changes_nothing(short_cfg):
    short_cfg.SOLVER.MAX_SKIPPED_STEPS = 2
    short_cfg.SOLVER.CHECKPOINT_PERIOD = 1
    _trainer(short_cfg, {1, 2}).train()
    run = Path(short_cfg.OUTPUT_DIR)
    first, third, final = (
        weights_of(run, f"{name}.pth") for name in ("model_0000000", "model_0000002", "model_final")
    )
    assert all(torch.equal(first[name], third[name]) for name in first)
    assert not all(torch.equal(first[name], final[name]) for name in first)
    state = torch.load(run / "model_final.pth", weights_only=True)["trainer"]
    assert state["hooks"]["FiniteLosses"] == {"skipped": 2}
    assert "NaN" not in json.dumps(state["hooks"]["ResumeInStep"]["scalars"]["total_loss"])


def test_one_more_than_may_be_left_out_ends_the_run(short_cfg):
    short_cfg.SOLVER.MAX_SKIPPED_STEPS = 1
    with pytest.raises(UserError, match="iteration 2 is not finite"):
        _trainer(short_cfg, {0, 2}).train()


def test_a_model_whose_loss_is_one_tensor_is_watched_too(short_cfg):
    short_cfg.SOLVER.MAX_SKIPPED_STEPS = 1
    short_cfg.SOLVER.MAX_ITER = 2
    short_cfg.SOLVER.CHECKPOINT_PERIOD = 1
    short_cfg.DATASETS.TEST = ()
    trainer = _trainer(short_cfg, {1})
    compute = trainer.model.forward
    trainer.model.forward = lambda batch: sum(compute(batch).values())
    trainer.train()
    run = Path(short_cfg.OUTPUT_DIR)
    before, after = (weights_of(run, f"{name}.pth") for name in ("model_0000000", "model_final"))
    assert all(torch.equal(before[name], after[name]) for name in before)
