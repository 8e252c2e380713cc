"""Epochs to iterations, and the learning rate of every iteration."""

import math

import pytest
import torch

from d2ft.config import get_cfg, load_cfg_text, who_set
from d2ft.errors import UserError
from d2ft.solver import build_lr_scheduler, describe_schedule, resolve_schedule
from d2ft.solver.schedule import (
    iterations_per_epoch,
    scale_iterations,
    steps_to_iterations,
    to_iterations,
)

# images, repeats, batch over all processes, epochs, drop after -> iterations, step
TABLE = [
    (2965, 8, 8, 8, 7, 23720, 20755),  # MMDetection's Cityscapes
    (2965, 1, 8, 64, 56, 23744, 20776),  # the same images, but each pass ends with a part of 8
    (2975, 1, 1, 1, 0.5, 2975, 1488),
    (10, 1, 4, 2, 1, 6, 3),
    (10, 3, 4, 1, 0.5, 8, 4),
    (1, 1, 16, 3, 2, 3, 2),
    (64, 1, 2, 7.5, 5, 240, 160),
]


def rates(cfg):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=cfg.SOLVER.BASE_LR)
    scheduler = build_lr_scheduler(cfg, optimizer)
    seen = []
    for _ in range(cfg.SOLVER.MAX_ITER):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


@pytest.mark.parametrize(("images", "repeats", "batch", "epochs", "step", "its", "drop"), TABLE)
def test_an_epoch_is_one_pass_with_its_last_part_of_a_batch(
    images, repeats, batch, epochs, step, its, drop
):
    per_epoch = iterations_per_epoch(images * repeats, batch)
    assert to_iterations(epochs, per_epoch) == its
    assert steps_to_iterations((step,), per_epoch) == (drop,)


@pytest.mark.parametrize("processes", [1, 2, 4, 8])
def test_the_number_of_processes_does_not_change_an_epoch(processes):
    # The batch is that over all processes: each of them sees batch / processes images a step.
    assert iterations_per_epoch(100, 8) == math.ceil(100 / (processes * (8 // processes)))


@pytest.mark.parametrize(("samples", "batch"), [(0, 1), (1, 0), (-3, 2)])
def test_a_pass_over_nothing_is_refused(samples, batch):
    with pytest.raises(ValueError, match=f"{samples} samples and a batch of {batch}"):
        iterations_per_epoch(samples, batch)


def test_the_rate_of_every_iteration_is_that_of_mmdetection():
    cfg = load_cfg_text(
        "SOLVER: {IMS_PER_BATCH: 8, EPOCHS: 8, STEPS_EPOCHS: [7], BASE_LR: 0.01, "
        "WARMUP_ITERS: 500, WARMUP_FACTOR: 0.001}",
        "mine.yaml",
    )
    cfg = resolve_schedule(cfg, 2965)  # an eighth of the tutorial's length

    def mmdetection(iteration):
        # mmcv 1.x, LrUpdaterHook.get_warmup_lr with warmup="linear", then the step policy:
        # https://github.com/open-mmlab/mmcv/blob/v1.7.1/mmcv/runner/hooks/lr_updater.py
        regular = 0.01 * 0.1 ** (iteration // 371 >= 7)
        if iteration >= 500:
            return regular
        return regular * (1 - (1 - iteration / 500) * (1 - 0.001))

    assert cfg.SOLVER.MAX_ITER == 8 * 371
    # The sums are formed in another order.
    assert rates(cfg) == pytest.approx([mmdetection(i) for i in range(8 * 371)], rel=1e-12)


def test_a_line_falls_from_the_rate_to_its_end():
    cfg = load_cfg_text(
        "SOLVER: {LR_SCHEDULER_NAME: WarmupLinearLR, MAX_ITER: 100, WARMUP_ITERS: 0, "
        "BASE_LR: 0.5, BASE_LR_END: 0.1}",
        "mine.yaml",
    )
    expected = [0.5 + (0.1 - 0.5) * i / 100 for i in range(100)]
    assert rates(cfg) == pytest.approx(expected, rel=1e-12)


def test_a_flat_rate_falls_on_a_cosine_after_its_share_of_the_run():
    cfg = load_cfg_text(
        "SOLVER: {LR_SCHEDULER_NAME: WarmupFlatCosineLR, MAX_ITER: 100, WARMUP_ITERS: 10, "
        "BASE_LR: 0.5, FLAT_RATIO: 0.6, WARMUP_FACTOR: 0.1}",
        "mine.yaml",
    )

    def reference(i):
        if i < 10:
            return 0.5 * (0.1 + 0.9 * i / 10)
        return 0.5 if i < 60 else 0.25 * (1 + math.cos(math.pi * (i - 60) / 40))

    expected = [reference(i) for i in range(100)]
    assert rates(cfg) == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_epochs_decide_and_the_saved_config_gives_the_same_run():
    cfg = load_cfg_text(
        "SOLVER: {IMS_PER_BATCH: 8, EPOCHS: 8, STEPS_EPOCHS: [7], CHECKPOINT_EPOCHS: 1}\n"
        "TEST: {EVAL_EPOCHS: 2}",
        "mine.yaml",
    )
    resolved = resolve_schedule(cfg, 23720)
    assert resolved.SOLVER.MAX_ITER == 23720
    assert resolved.SOLVER.STEPS == (20755,)
    assert resolved.SOLVER.CHECKPOINT_PERIOD == 2965
    assert resolved.TEST.EVAL_PERIOD == 5930
    assert resolved.SOLVER.EPOCHS == 0
    assert who_set(resolved, "SOLVER.MAX_ITER") == "SOLVER.EPOCHS of mine.yaml:1"
    saved = load_cfg_text(resolved.dump(), "config.yaml")
    assert resolve_schedule(saved, 23720) == resolved
    assert resolve_schedule(saved, 7) == resolved, "another set size changes nothing any more"


@pytest.mark.parametrize(
    ("text", "opts", "message"),
    [
        (
            "SOLVER: {EPOCHS: 8, MAX_ITER: 100}",
            [],
            r"SOLVER.EPOCHS \(a.yaml:1\) and SOLVER.MAX_ITER \(a.yaml:1\) both say when; keep one: "
            r"SOLVER.EPOCHS 0",
        ),
        ("SOLVER: {EPOCHS: 8}", ["SOLVER.MAX_ITER", "9"], r"SOLVER.MAX_ITER \(command line\)"),
        ("SOLVER: {STEPS_EPOCHS: [2], STEPS: [9]}", [], r"SOLVER.STEPS_EPOCHS \(\) leaves it"),
        ("SOLVER: {EPOCHS: 4, STEPS_EPOCHS: [4]}", [], "drop the rate before its end"),
        ("SOLVER: {EPOCHS: 4, STEPS_EPOCHS: [3, 2]}", [], "above the one before it"),
    ],
)
def test_a_schedule_that_contradicts_itself_is_refused(text, opts, message):
    with pytest.raises(UserError, match=message):
        resolve_schedule(load_cfg_text(text, "a.yaml", opts), 100)


def test_another_batch_than_the_reference_scales_rate_and_iterations():
    cfg = load_cfg_text(
        "SOLVER: {REFERENCE_BATCH: 8, IMS_PER_BATCH: 2, BASE_LR: 0.01, MAX_ITER: 1000, "
        "STEPS: [750], WARMUP_ITERS: 100, CHECKPOINT_PERIOD: 500}\nTEST: {EVAL_PERIOD: 250}",
        "mine.yaml",
    )
    resolved = resolve_schedule(cfg, 100)
    assert resolved.SOLVER.BASE_LR == 0.0025
    assert resolved.SOLVER.MAX_ITER == 4000
    assert resolved.SOLVER.STEPS == (3000,)
    assert resolved.SOLVER.WARMUP_ITERS == 400
    assert resolved.SOLVER.CHECKPOINT_PERIOD == 2000
    assert resolved.TEST.EVAL_PERIOD == 1000
    assert resolve_schedule(resolved, 100) == resolved


def test_epochs_are_not_scaled_a_second_time():
    cfg = load_cfg_text(
        "SOLVER: {REFERENCE_BATCH: 8, IMS_PER_BATCH: 2, EPOCHS: 3, BASE_LR: 0.01}", "mine.yaml"
    )
    assert resolve_schedule(cfg, 100).SOLVER.MAX_ITER == 150
    assert scale_iterations(100, 2, 8) == 400


def test_a_rate_that_is_high_for_the_batch_is_told(caplog):
    cfg = load_cfg_text("SOLVER: {IMS_PER_BATCH: 1, BASE_LR: 0.02}", "mine.yaml")
    with caplog.at_level("WARNING", logger="d2ft"):
        resolve_schedule(cfg, 10)
    assert "BASE_LR 0.02 (mine.yaml:1) is high for IMS_PER_BATCH 1" in caplog.text


def test_the_rate_of_the_tutorial_is_not_told(caplog):
    cfg = load_cfg_text("SOLVER: {IMS_PER_BATCH: 8, BASE_LR: 0.01}", "mine.yaml")
    with caplog.at_level("WARNING", logger="d2ft"):
        resolve_schedule(cfg, 10)
    assert not caplog.text


def test_the_schedule_is_described_in_numbers():
    cfg = get_cfg()
    cfg.SOLVER.IMS_PER_BATCH = 8
    cfg.SOLVER.EPOCHS, cfg.SOLVER.STEPS_EPOCHS = 8.0, (7,)
    cfg.SOLVER.BASE_LR, cfg.SOLVER.WARMUP_ITERS = 0.01, 500
    cfg.TEST.EVAL_PERIOD = 2965
    told = describe_schedule(resolve_schedule(cfg, 23720), num_images=2965, num_samples=23720)
    assert told["images"] == 2965
    assert told["iterations of an epoch"] == 2965
    assert told["epochs"] == 8
    assert told["iterations"] == 23720
    assert told["evaluations"] == 8
    assert told["learning rate"] == "1e-05 at 0, 0.01 at 500, 0.001 at 20755, 0.001 at 23719"
