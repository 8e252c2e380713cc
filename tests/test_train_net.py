"""``tools/train_net.py`` as users run it: what works, and what each mistake is answered with."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from detectron2.engine import default_argument_parser

from d2ft.data import register_builtin_datasets
from d2ft.engine import check_and_launch
from d2ft.errors import UserError
from tests.factories import (
    PROJECT,
    SHORT_RUN,
    TINY_MODEL,
    write_cityscapes,
    write_coco_weights,
)

CONFIG = PROJECT / "configs" / "cityscapes_ft.yaml"
SCRIPT = PROJECT / "tools" / "train_net.py"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    root = write_cityscapes(tmp_path_factory.mktemp("datasets"))
    write_coco_weights(root / "coco.pkl")
    return root


@pytest.fixture
def root(written, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(written))
    return written


def _overrides(root, output, *more):
    weights = ["MODEL.WEIGHTS", str(root / "coco.pkl"), "OUTPUT_DIR", str(output)]
    return [*TINY_MODEL, *SHORT_RUN, *weights, *map(str, more)]


def _refuse(arguments, match):
    """Run the checks in this process, where a refusal is an exception."""
    args = default_argument_parser().parse_args(list(map(str, arguments)))
    with pytest.raises(UserError, match=match):
        check_and_launch(args, register_builtin_datasets)


def _run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-W", "ignore", str(SCRIPT), *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(PROJECT), os.environ.get("PYTHONPATH", "")]), **environment},
        check=False,
    )  # fmt: skip


def test_a_mistake_is_one_line_an_exit_code_and_nothing_on_the_disk(root, tmp_path):
    output = tmp_path / "run"
    result = _run("--config-file", CONFIG, *_overrides(root, output, "SOLVER.BASELR", 1))
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1] == (
        "error: command line: there is no config key SOLVER.BASELR; did you mean SOLVER.BASE_LR?"
    )
    assert "Traceback" not in result.stderr
    assert not output.exists()


def test_evaluating_the_coco_weights_is_refused(root, tmp_path):
    arguments = ["--config-file", CONFIG, "--eval-only", *_overrides(root, tmp_path / "run")]
    _refuse(arguments, r"no trained values for 6 tensors.*MODEL.WEIGHTS <OUTPUT_DIR>/model_final")
    assert not (tmp_path / "run").exists()


def test_a_missing_dataset_folder_is_named(root, tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "nowhere"))
    _refuse(
        ["--config-file", CONFIG, *_overrides(root, tmp_path / "run")],
        r"nowhere/cityscapes/leftImg8bit/train does not exist",
    )
    assert not (tmp_path / "run").exists()


class _Payload:
    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("missing", r"MODEL.WEIGHTS .*weights.pkl does not exist"),
        ("truncated", r"weights.pkl.*(truncated|cut)"),
        ("foreign code", r"weights.pkl.*(posix|os|nt)\.system"),
    ],
)
def test_weights_that_cannot_be_trusted_are_refused(root, tmp_path, monkeypatch, damage, message):
    monkeypatch.chdir(tmp_path)
    weights = tmp_path / "weights.pkl"
    if damage == "truncated":
        weights.write_bytes((root / "coco.pkl").read_bytes()[:100_000])
    elif damage == "foreign code":
        weights.write_bytes(pickle.dumps({"model": {"a": _Payload()}}))
    more = ["MODEL.WEIGHTS", weights]
    _refuse(["--config-file", CONFIG, *_overrides(root, tmp_path / "run", *more)], message)
    assert not (tmp_path / "executed").exists()
    assert not (tmp_path / "run").exists()


def test_the_number_of_coco_classes_left_in_is_refused(root, tmp_path):
    more = ["MODEL.ROI_HEADS.NUM_CLASSES", 80]
    _refuse(
        ["--config-file", CONFIG, *_overrides(root, tmp_path / "run", *more)],
        r"MODEL.ROI_HEADS.NUM_CLASSES is 80 \(command line\), but cityscapes_instance_train has 8",
    )


def test_a_dataset_name_without_its_comma_is_refused(root, tmp_path):
    more = ["DATASETS.TRAIN", '("my_set")']
    _refuse(
        ["--config-file", CONFIG, *_overrides(root, tmp_path / "run", *more)],
        r'DATASETS.TRAIN.*\("my_set",\)',
    )


def test_bases_that_lead_in_a_circle_are_refused(root, tmp_path):
    for name, base in (("a", "b"), ("b", "a")):
        (tmp_path / f"{name}.yaml").write_text(f"_BASE_: {base}.yaml\nVERSION: 2\n")
    _refuse(["--config-file", tmp_path / "a.yaml"], r"a.yaml -> .*b.yaml -> .*a.yaml")


def test_a_broken_png_is_refused(root, tmp_path, monkeypatch):
    shutil.copytree(root / "cityscapes", tmp_path / "cityscapes")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    image = next((tmp_path / "cityscapes" / "leftImg8bit" / "train").glob("*/*.png"))
    image.write_bytes(image.read_bytes()[:-500])
    _refuse(
        ["--config-file", CONFIG, *_overrides(root, tmp_path / "run")],
        f"the image .*{image.name} is broken",
    )
    assert not (tmp_path / "run").exists()


def test_zero_gpus_are_one_process(root, tmp_path):
    _refuse(
        ["--config-file", CONFIG, "--num-gpus", 0, *_overrides(root, tmp_path, "LOG_PERIOD", 0)],
        "LOG_PERIOD .* must be a whole number of at least 1",
    )


def test_any_number_of_processes_may_share_an_evaluation(root, tmp_path):
    arguments = ["--config-file", CONFIG, "--eval-only", "--num-gpus", 3]
    _refuse([*arguments, *_overrides(root, tmp_path)], "no trained values for 6 tensors")


def test_two_processes_train_and_evaluate_as_one_does(root, tmp_path):
    run = tmp_path / "run"
    options = _overrides(root, run)
    trained = _run(
        "--config-file", CONFIG, "--num-gpus", 2, "--dist-url", "auto", *options, OMP_NUM_THREADS="1"
    )  # fmt: skip
    assert trained.returncode == 0, trained.stdout + trained.stderr
    by_two = json.loads((run / "results.json").read_text())
    more = ["MODEL.WEIGHTS", run / "model_final.pth"]
    alone = _run("--config-file", CONFIG, "--eval-only", *_overrides(root, run, *more))
    assert alone.returncode == 0, alone.stdout + alone.stderr
    assert json.loads((run / "inference" / "results.json").read_text()) == by_two


def test_the_whole_way_of_the_readme(root, tmp_path, monkeypatch):
    """Train, evaluate with the training's config, resume; each as a command of its own."""
    monkeypatch.chdir(tmp_path)
    run = Path("run")
    config = ["--config-file", CONFIG]
    options = _overrides(root, run)
    for arguments, expected in (
        ([*config, *options], "the 6 final predictors were re-initialised for 8 classes: expected"),
        (["--config-file", run / "config.yaml", "--eval-only", "--resume"], "Task: segm"),
        ([*config, "--resume", *options], "is complete: 4 of 4 iterations"),
    ):
        result = _run(*arguments)
        assert result.returncode == 0, result.stdout + result.stderr
        assert expected in result.stdout
