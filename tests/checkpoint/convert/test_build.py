import runpy
import sys

import pytest
import torch
import yaml
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model

from d2ft.checkpoint.checkpointer import FinetuneCheckpointer
from d2ft.checkpoint.class_names import known_classes
from d2ft.checkpoint.convert.build import (
    check_required_config,
    convert_checkpoint,
    format_yaml,
    required_config,
    required_config_mismatches,
)
from d2ft.checkpoint.describe import describe_run
from d2ft.checkpoint.weights import read_weights
from d2ft.config import get_cfg, load_cfg
from d2ft.errors import UserError
from d2ft.preflight.check_weights import check_weights
from tests.checkpoint.convert.test_mmdet import CAFFE_CONFIG_2X, as_mmdet, tiny_state_dict
from tests.conftest import PROJECT
from tests.factories import TINY_MODEL

CLASSES = tuple(f"class {i}" for i in range(80))
BASE = PROJECT / "configs/_base_/models/mask_rcnn_r50_fpn.yaml"


@pytest.fixture(scope="module")
def state_dict():
    return tiny_state_dict("Mask R-CNN")


@pytest.fixture
def mmdet_file(state_dict, tmp_path):
    """Write what MMDetection 2.x saves, under a name that says nothing."""
    path = tmp_path / "epoch_12.pth"
    meta = {"mmdet_version": "2.28.2", "CLASSES": CLASSES, "config": CAFFE_CONFIG_2X, "epoch": 12}
    optimizer = {"state": {}, "param_groups": [{"lr": 0.1}]}
    model = as_mmdet(state_dict, "Mask R-CNN")
    torch.save({"meta": meta, "state_dict": model, "optimizer": optimizer}, path)
    return path


def test_file_is_recognised_by_its_keys_and_describes_itself(mmdet_file, state_dict):
    checkpoint = read_weights(str(mmdet_file))
    assert checkpoint.keys() == {"model", "d2ft"}
    assert checkpoint["model"].keys() == state_dict.keys()
    assert known_classes(checkpoint, str(mmdet_file)) == CLASSES
    assert required_config(checkpoint)["MODEL.PIXEL_MEAN"] == [102.98, 115.95, 122.77]


def test_checkpointer_loads_it_whole(mmdet_file, state_dict):
    model = build_model(load_cfg(BASE, TINY_MODEL))
    FinetuneCheckpointer(model, every_tensor=True).load(str(mmdet_file))
    assert all(torch.equal(value, state_dict[key]) for key, value in model.state_dict().items())


def test_detectron2s_own_checkpoint_passes_unchanged(state_dict):
    checkpoint = {"model": state_dict, "iteration": 3}
    assert convert_checkpoint(checkpoint, "model_final.pth") is checkpoint
    assert required_config(checkpoint) == {}


def test_refusal_names_the_file():
    model = {"backbone.body.conv1.weight": torch.ones(1), "ema.weight": torch.ones(1)}
    with pytest.raises(UserError, match=r"^detector\.pth: the key 'ema\.weight' is not one of"):
        convert_checkpoint({"model": model}, "detector.pth")


def test_lists_and_tuples_and_close_numbers_agree():
    required = {
        "INPUT.FORMAT": "BGR",
        "MODEL.PIXEL_STD": (1, 1, 1.0000001),
        "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS": [10.0, 10.0, 5.0, 5.0],
    }
    assert required_config_mismatches(get_cfg(), required) == []


def test_mismatches_are_listed_with_both_values():
    required = {"INPUT.FORMAT": "RGB", "MODEL.PIXEL_STD": [1.0, 1.0], "VERSION": 2}
    assert required_config_mismatches(get_cfg(), required) == [
        ("INPUT.FORMAT", "BGR", "RGB"),
        ("MODEL.PIXEL_STD", [1.0, 1.0, 1.0], [1.0, 1.0]),
    ]


def test_refused_config_is_mended_by_the_lines_of_the_message(mmdet_file):
    checkpoint = read_weights(str(mmdet_file))
    cfg = load_cfg(BASE, ["INPUT.FORMAT", "RGB", "MODEL.RESNETS.STRIDE_IN_1X1", "False"])
    with pytest.raises(
        UserError, match=r"epoch_12\.pth was trained.*INPUT\.FORMAT is 'RGB'"
    ) as error:
        check_required_config(cfg, checkpoint, str(mmdet_file))
    lines = str(error.value).split("\n\n")[1]
    assert yaml.safe_load(lines)["MODEL"]["RESNETS"] == {"STRIDE_IN_1X1": True}
    mended = mmdet_file.with_suffix(".yaml")
    mended.write_text(f"_BASE_: '{BASE}'\n{lines}VERSION: 2\n")
    check_required_config(load_cfg(mended), checkpoint, str(mmdet_file))


def test_preflight_refuses_the_config_before_a_run(mmdet_file, tmp_path):
    options = ["MODEL.WEIGHTS", str(mmdet_file), "INPUT.FORMAT", "RGB", "OUTPUT_DIR", str(tmp_path)]
    cfg = load_cfg(BASE, [*TINY_MODEL, *options])
    with pytest.raises(UserError, match=r"(?s)Put into the YAML:\n\nINPUT:\n  FORMAT: \"BGR\"\n"):
        check_weights(cfg, CLASSES, eval_only=False, resume=False)


def test_yaml_nests_the_keys():
    values = {"INPUT.FORMAT": "RGB", "MODEL.A.B": [[1], [2.5]], "MODEL.A.C": False}
    assert format_yaml(values) == (
        'INPUT:\n  FORMAT: "RGB"\nMODEL:\n  A:\n    B: [[1], [2.5]]\n    C: False\n'
    )


def run_tool(monkeypatch, *words):
    tool = str(PROJECT / "tools/convert_weights.py")
    monkeypatch.setattr(sys, "argv", [tool, *map(str, words)])
    runpy.run_path(tool, run_name="__main__")


def test_tool_writes_weights_and_the_lines_they_need(mmdet_file, tmp_path, monkeypatch, capsys):
    target = tmp_path / "out/mask_rcnn.pth"
    run_tool(monkeypatch, mmdet_file, target)
    assert "MMDetection Mask R-CNN, 80 classes" in capsys.readouterr().out
    cfg = load_cfg(target.with_suffix(".yaml"))
    assert str(target) == cfg.MODEL.WEIGHTS
    converted = torch.load(target, weights_only=True)
    assert known_classes(converted, "") == CLASSES
    check_required_config(cfg, converted, str(target))
    model = build_model(load_cfg(BASE, TINY_MODEL))
    found = DetectionCheckpointer(model)._load_model(converted)
    assert not found.missing_keys
    assert not found.unexpected_keys


def test_tool_refuses_what_needs_no_conversion(state_dict, tmp_path, monkeypatch):
    torch.save({"model": state_dict}, tmp_path / "own.pth")
    with pytest.raises(SystemExit, match=r"error: .*own\.pth: .*needs no conversion"):
        run_tool(monkeypatch, tmp_path / "own.pth", tmp_path / "x.pth")


def test_tool_refuses_a_target_that_detectron2_would_not_read(mmdet_file, monkeypatch):
    with pytest.raises(SystemExit, match=r"mask_rcnn\.pkl: .* has to end in \.pth"):
        run_tool(monkeypatch, mmdet_file, "mask_rcnn.pkl")


def test_weights_that_d2ft_trained_refuse_other_pixels(tmp_path):
    cfg = load_cfg(BASE, TINY_MODEL)
    FinetuneCheckpointer(build_model(cfg), str(tmp_path), metadata=describe_run(cfg)).save("own")
    other = load_cfg(BASE, [*TINY_MODEL, "INPUT.FORMAT", "RGB"])
    with pytest.raises(UserError, match=r"own\.pth was trained.*INPUT\.FORMAT is 'RGB'"):
        FinetuneCheckpointer(build_model(other), cfg=other).load(str(tmp_path / "own.pth"))
    FinetuneCheckpointer(build_model(cfg), cfg=cfg).load(str(tmp_path / "own.pth"))
