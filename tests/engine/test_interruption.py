"""Runs that are stopped by a signal, a kill, a damaged file or a full disk, and go on."""

import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from d2ft.engine import FinetuneTrainer
from d2ft.engine.interrupt import RunInterrupted
from d2ft.engine.resume import cut_metrics
from d2ft.engine.run_folder import check_output_dir, run_lock
from d2ft.errors import UserError
from tests.engine.kill_and_resume import kill_and_resume
from tests.engine.runs import (
    Runs,
    assert_same_run,
    iterations_in,
    metrics_of,
    output_of,
    wait_for,
    weights_of,
)
from tests.factories import PROJECT


def _train(cfg, *, resume=False):
    trainer = FinetuneTrainer(cfg)
    trainer.resume_or_load(resume=resume)
    return trainer.train()


@pytest.fixture
def whole(short_cfg, tmp_path):
    """Train once without interruption; OUTPUT_DIR is then that of another run."""
    short_cfg.OUTPUT_DIR = str(tmp_path / "whole")
    short_cfg.TEST.EVAL_PERIOD = 2
    _train(short_cfg)
    short_cfg.OUTPUT_DIR = str(tmp_path / "run")
    return tmp_path / "whole"


def _signal_in(trainer, place, signum):
    """Let the process send itself a signal at a place of the run."""
    if place == "step":
        inner = trainer._trainer.run_step

        def run_step():
            inner()
            if trainer.iter == 0:
                signal.raise_signal(signum)

        trainer._trainer.run_step = run_step
        return
    test = type(trainer).test

    def interrupted(cfg, model, evaluators=None):
        if trainer.iter == (1 if place == "evaluation" else 4):
            signal.raise_signal(signum)
        return test(cfg, model, evaluators)

    trainer.test = interrupted


@pytest.mark.parametrize(
    ("place", "signum", "code", "last"),
    [
        ("step", signal.SIGTERM, 75, "model_0000000.pth"),
        ("step", signal.SIGINT, 130, "model_0000000.pth"),
        ("evaluation", signal.SIGUSR1, 75, "model_0000001.pth"),
        ("last evaluation", signal.SIGTERM, 75, "model_final.pth"),
    ],
)
def test_a_signal_saves_the_step_and_the_run_goes_on_the_same(
    short_cfg, whole, place, signum, code, last
):
    trainer = FinetuneTrainer(short_cfg)
    trainer.resume_or_load(resume=False)
    _signal_in(trainer, place, signum)
    before = signal.getsignal(signum)
    with pytest.raises(RunInterrupted) as stop:
        trainer.train()
    assert stop.value.code == code
    assert signal.getsignal(signum) is before
    assert (Path(short_cfg.OUTPUT_DIR) / "last_checkpoint").read_text() == last
    _train(short_cfg, resume=True)
    assert_same_run(whole, short_cfg.OUTPUT_DIR)


def test_a_truncated_last_checkpoint_is_passed_over_loudly(short_cfg, whole, caplog):
    shutil.copytree(whole, short_cfg.OUTPUT_DIR)
    run = Path(short_cfg.OUTPUT_DIR)
    for name in ("model_final.pth", "model_0000003.pth"):
        (run / name).write_bytes((run / name).read_bytes()[:-5000])
    _train(short_cfg, resume=True)
    assert_same_run(whole, run)
    (error,) = {r.getMessage() for r in caplog.records if r.levelname == "ERROR"}
    assert "model_final.pth" in error
    assert error.endswith(f"The run goes on from the one before, {run / 'model_0000001.pth'}.")


def test_a_run_without_a_checkpoint_that_can_be_read_is_refused(short_cfg, whole):
    for path in whole.glob("model_*.pth"):
        path.write_bytes(path.read_bytes()[:1000])
    short_cfg.OUTPUT_DIR = str(whole)
    with pytest.raises(UserError, match=r"no checkpoint can be resumed: .*Start without --resume"):
        _train(short_cfg, resume=True)


def test_a_disk_that_is_full_loses_nothing_that_was_saved(short_cfg):
    """A limit on the size of a file stands for the disk: the write fails in the same place."""
    short_cfg.SOLVER.CHECKPOINT_PERIOD = 1
    trainer = FinetuneTrainer(short_cfg)
    trainer.resume_or_load(resume=False)
    run = Path(short_cfg.OUTPUT_DIR)
    save = trainer.checkpointer.save
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def save_first_only(name, **extra):
        if name == "model_0000001":
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        save(name, **extra)

    trainer.checkpointer.save = save_first_only
    try:
        with pytest.raises(
            UserError, match=r"cannot save .*0000001\.pth \(.*File too large.*last .*0000000\.pth"
        ):
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (run / "last_checkpoint").read_text() == "model_0000000.pth"
    assert not list(run.glob(".*.tmp"))
    _train(short_cfg, resume=True)
    assert [line["iteration"] for line in metrics_of(run)] == [0, 1, 2, 3, 4]


def test_a_second_run_in_a_folder_is_refused_by_name(tmp_path):
    code = (
        "import sys; from d2ft.engine.run_folder import run_lock\nwith run_lock(sys.argv[1]): pass"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, str(tmp_path)]

    def other():
        return subprocess.run(command, capture_output=True, text=True, cwd=PROJECT, check=False)

    with run_lock(str(tmp_path)), run_lock(str(tmp_path)):
        assert "another run is in OUTPUT_DIR" in other().stderr
    assert other().returncode == 0


def test_a_new_run_does_not_write_over_another(short_cfg, whole):
    short_cfg.OUTPUT_DIR = str(whole)
    with pytest.raises(
        UserError, match=r"holds a run already, up to model_final\.pth\. Give --res"
    ):
        _train(short_cfg)
    check_output_dir(str(whole), resume=True)


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="nothing can be written to .*file; choose another folder"):
        check_output_dir(str(tmp_path / "file" / "run"), resume=False)


def test_training_data_that_has_changed_is_refused(short_cfg, whole):
    short_cfg.OUTPUT_DIR = str(whole)
    short_cfg.DATASETS.TRAIN = ("cityscapes_instance_val",)
    with pytest.raises(
        UserError, match=r"has changed since the checkpoint .*: 4 images then, 2 now"
    ):
        _train(short_cfg, resume=True)


def test_metrics_are_cut_at_the_first_line_beyond_and_at_one_that_is_not_whole(tmp_path):
    path = tmp_path / "metrics.json"
    path.write_text('{"iteration": 3}\n{"iteration": 2, "a": 1}\n{"iteration": 5}\n{"itera')
    cut_metrics(path, 9)
    assert iterations_in(tmp_path) == 3
    cut_metrics(path, 3)
    assert path.read_text() == '{"iteration": 3}\n{"iteration": 2, "a": 1}\n'


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("processes", [1, 2])
def test_sigterm_to_the_command_saves_and_exits_with_75(
    datasets, coco_weights, tmp_path, processes
):
    options = ["SOLVER.MAX_ITER", "200", "SOLVER.CHECKPOINT_PERIOD", "200"]
    runs = Runs(datasets, coco_weights, *options, num_processes=processes)
    run = tmp_path / "run"
    process = runs.start(run)
    assert wait_for(process, lambda: iterations_in(run) >= 3), output_of(run)
    process.send_signal(signal.SIGTERM)
    at = iterations_in(run)
    assert process.wait() == 75, output_of(run)
    last = (run / "last_checkpoint").read_text()
    assert weights_of(run, last)
    assert at <= int(last[6:13]) + 1 < 200
    assert "Traceback" not in output_of(run)


@pytest.mark.slow
@pytest.mark.ci
def test_a_run_killed_three_times_ends_as_one_that_never_stopped(tmp_path):
    kill_and_resume(
        tmp_path, kills=3, workers=2, processes=1, portraits=True, seed=1
    )  # 20 kills: see the script
