import pickle

import pytest
import torch
from detectron2.modeling import META_ARCH_REGISTRY

from d2ft.config import load_cfg
from d2ft.errors import UserError
from d2ft.labels import CITYSCAPES_INSTANCE_CLASSES, COCO_CLASSES
from d2ft.preflight.check_weights import check_weights
from tests.factories import PROJECT, TINY_MODEL, write_coco_weights


@pytest.fixture(scope="module")
def coco_weights(tmp_path_factory):
    return write_coco_weights(tmp_path_factory.mktemp("weights") / "coco.pkl")


@pytest.fixture
def cfg(coco_weights, tmp_path):
    options = [*TINY_MODEL, "MODEL.WEIGHTS", str(coco_weights), "OUTPUT_DIR", str(tmp_path)]
    return load_cfg(PROJECT / "configs/cityscapes_ft.yaml", options)


def _check(cfg, *, eval_only=False, resume=False):
    return check_weights(cfg, CITYSCAPES_INSTANCE_CLASSES, eval_only=eval_only, resume=resume)


def test_coco_weights_fit_but_for_the_six_predictors(cfg):
    assert _check(cfg) == {
        "source": cfg.MODEL.WEIGHTS, "loaded": 301, "remapped": 0, "skipped": 6, "missing": 0
    }  # fmt: skip


def test_evaluation_refuses_weights_without_the_predictors(cfg):
    with pytest.raises(UserError, match=r"model_final\.pth"):
        _check(cfg, eval_only=True)


def test_evaluation_without_weights_is_refused(cfg):
    cfg.MODEL.WEIGHTS = ""
    assert _check(cfg)["loaded"] == 0
    with pytest.raises(UserError, match="nothing to evaluate: set MODEL.WEIGHTS .*model_final.pth"):
        _check(cfg, eval_only=True)


def test_another_backbone_is_refused(cfg):
    cfg.MODEL.RESNETS.DEPTH = 101
    with pytest.raises(UserError, match=r"backbone\.bottom_up\.res4"):
        _check(cfg)


def test_resuming_looks_at_the_last_checkpoint(cfg, tmp_path, coco_weights):
    cfg.MODEL.WEIGHTS = "is/not/needed.pkl"
    tensors = {
        k: torch.from_numpy(v) for k, v in pickle.loads(coco_weights.read_bytes())["model"].items()
    }
    torch.save({"model": tensors}, tmp_path / "model_0000001.pth")
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    with pytest.raises(UserError, match="no trained values for 6 tensors"):
        _check(cfg, resume=True)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 80
    assert _check(cfg, resume=True)["loaded"] == 307


def test_a_model_that_computes_while_it_is_built_is_compared_later(cfg, caplog):
    class Computing(torch.nn.Module):
        def __init__(self, cfg):
            super().__init__()
            self.steps = int(torch.linspace(0, 1, 3).sum())

    META_ARCH_REGISTRY._do_register("Computing", Computing)
    try:
        cfg.MODEL.META_ARCHITECTURE = "Computing"
        assert _check(cfg) == {"source": cfg.MODEL.WEIGHTS}
    finally:
        del META_ARCH_REGISTRY._obj_map["Computing"]
    assert "compared with the model only when it is loaded" in caplog.text


def test_a_model_that_cannot_be_built_is_refused(cfg):
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.WEIGHTS = "GeneralisedRCNN", ""
    with pytest.raises(UserError, match="cannot be built: .*GeneralisedRCNN"):
        _check(cfg)


def test_a_last_checkpoint_that_is_gone_is_named(cfg, tmp_path):
    (tmp_path / "last_checkpoint").write_text("model_0000009.pth")
    with pytest.raises(UserError, match="last_checkpoint names 'model_0000009.pth', which is not"):
        _check(cfg, resume=True)


def test_remap_gives_the_six_predictors_their_rows(cfg):
    cfg.FINETUNE.HEAD_INIT = "remap"
    cfg.FINETUNE.SOURCE_CLASSES = COCO_CLASSES
    checked = _check(cfg)
    assert (checked["loaded"], checked["remapped"], checked["skipped"]) == (301, 6, 0)
    with pytest.raises(UserError, match="no trained values for 6 tensors"):
        _check(cfg, eval_only=True)


def test_remap_refuses_names_that_do_not_fit_as_loading_does(cfg):
    cfg.FINETUNE.HEAD_INIT = "remap"
    cfg.FINETUNE.SOURCE_CLASSES = ("person", "car")
    with pytest.raises(UserError, match=r"known to have 2 classes .*is \(81, 32\)"):
        _check(cfg)
    cfg.FINETUNE.SOURCE_CLASSES = COCO_CLASSES
    cfg.FINETUNE.CLASS_MAP.rider = "persn"
    with pytest.raises(UserError, match=r'"rider" to "persn", .* did you mean "person"\?'):
        _check(cfg)
