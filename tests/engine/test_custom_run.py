"""The way of a user with data of their own, in YAML alone."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from detectron2.engine import default_argument_parser

from d2ft.config import load_cfg
from d2ft.data import register_builtin_datasets
from d2ft.engine import FinetuneTrainer, check_and_launch
from d2ft.errors import UserError
from tests.factories import PROJECT, SHORT_RUN, TINY_MODEL, write_coco

CONFIG = PROJECT / "configs" / "custom_ft.yaml"
_SHORT = [
    word
    for key, value in zip(SHORT_RUN[::2], SHORT_RUN[1::2], strict=True)
    if not key.startswith("DATASETS.")
    for word in (key, value)
]


@pytest.fixture
def options(coco_weights, tmp_path, monkeypatch):
    """Make the working directory one with ``data``; return overrides for a run of four steps."""
    monkeypatch.chdir(tmp_path)
    write_coco(tmp_path / "data")
    return [*TINY_MODEL, *_SHORT, "MODEL.WEIGHTS", str(coco_weights), "OUTPUT_DIR", "run"]


def _run(*arguments):
    result = subprocess.run(
        [sys.executable, "-W", "ignore", str(PROJECT / "tools/train_net.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(PROJECT), os.environ.get("PYTHONPATH", "")]),
            "OMP_NUM_THREADS": "1",
        },
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def _drop_masks():
    for path in (Path("data/train.json"), Path("data/val.json")):
        content = json.loads(path.read_text())
        for annotation in content["annotations"]:
            del annotation["segmentation"]
        path.write_text(json.dumps(content))


def test_the_trainer_of_python_follows_the_data(options):
    trainer = FinetuneTrainer(load_cfg(CONFIG, options))
    trainer.resume_or_load()
    results = trainer.train()
    assert set(results) == {"bbox", "segm"}
    kept = load_cfg("run/config.yaml")
    assert kept.MODEL.ROI_HEADS.NUM_CLASSES == 2
    assert (
        torch.load("run/model_final.pth")["model"]["roi_heads.mask_head.predictor.weight"].shape[0]
        == 2
    )


def test_boxes_alone_train_a_mask_rcnn_without_its_mask_head(options):
    _drop_masks()
    trainer = FinetuneTrainer(load_cfg(CONFIG, options))
    trainer.resume_or_load()
    assert set(trainer.train()) == {"bbox"}


def test_a_number_of_classes_of_the_users_own_is_compared_with_the_data(options):
    arguments = ["--config-file", str(CONFIG), *options, "MODEL.ROI_HEADS.NUM_CLASSES", "3"]
    args = default_argument_parser().parse_args(arguments)
    with pytest.raises(UserError, match=r"NUM_CLASSES is 3 \(command line\), but my_train has 2"):
        check_and_launch(args, register_builtin_datasets)
    assert not Path("run").exists()


@pytest.mark.slow
@pytest.mark.ci
def test_train_check_draw_and_evaluate_as_commands(options):
    trained = _run("--config-file", CONFIG, *options)
    assert trained.count("MODEL.ROI_HEADS.NUM_CLASSES is 2, not 80 (default), after my_train") == 1
    evaluated = json.loads(Path("run/results.json").read_text())
    Path("data/train.json").unlink()  # an evaluation does not need it
    arguments = ["--config-file", CONFIG, "--eval-only", *options]
    _run(*arguments, "MODEL.WEIGHTS", "run/model_final.pth")
    assert json.loads(Path("run/inference/results.json").read_text()) == evaluated


@pytest.mark.slow
def test_two_spawned_processes_with_workers_train_on_it(options):
    more = ["DATALOADER.NUM_WORKERS", "4", "--num-gpus", "2", "--dist-url", "auto"]
    _run("--config-file", CONFIG, *more[2:], *options, *more[:2])
    assert "segm" in json.loads(Path("run/results.json").read_text())


@pytest.mark.parametrize("tool", ["check_dataset", "visualize_data"])
def test_the_tools_for_looking_at_data_know_it(tool, options, monkeypatch):
    spec = importlib.util.spec_from_file_location(tool, PROJECT / "tools" / f"{tool}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    more = ["--mapped", "--num", "2", "--output-dir", "drawn"] if tool == "visualize_data" else []
    monkeypatch.setattr(sys, "argv", [tool, "my_train", "--config-file", str(CONFIG), *more])
    assert module.main() == 0
    if more:
        assert len(list(Path("drawn/my_train").glob("*.jpg"))) == 2
