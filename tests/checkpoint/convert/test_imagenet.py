"""ImageNet backbones as MODEL.WEIGHTS: the same features, and a config that fits them."""

import pickle

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model

from d2ft.checkpoint.checkpointer import FinetuneCheckpointer
from d2ft.checkpoint.convert.build import (
    check_required_config,
    format_yaml,
    required_config,
)
from d2ft.checkpoint.convert.imagenet import is_torchvision_backbone, msra_required_config
from d2ft.checkpoint.weights import read_weights
from d2ft.config import load_cfg
from d2ft.errors import UserError
from tests.conftest import PROJECT

models = pytest.importorskip("torchvision.models")

BASE = PROJECT / "configs/_base_/models/mask_rcnn_r50_fpn.yaml"


@pytest.fixture
def backbone():
    """Return a ResNet-50 whose norm layers do not pass for the identity."""
    model = models.resnet50(weights=None).eval()
    for name, tensor in model.state_dict().items():
        if name.endswith("running_mean"):
            tensor.normal_(0, 0.1)
        elif name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5)
        elif name.endswith("bn3.weight"):
            tensor.fill_(0.2)
    return model


@torch.no_grad()
def features_of_torchvision(model, image):
    """Return the output of each stage for (3, H, W) RGB pixels of 0..255."""
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    x = model.maxpool(model.relu(model.bn1(model.conv1(((image / 255 - mean) / std)[None]))))
    features = []
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        x = stage(x)
        features.append(x)
    return features


def test_torchvision_backbone_gives_the_same_features(backbone, tmp_path, caplog):
    weights = tmp_path / "resnet50-11ad3fa6.pth"
    torch.save(backbone.state_dict(), weights)
    required = required_config(read_weights(str(weights)))
    (tmp_path / "required.yaml").write_text(format_yaml(required | {"VERSION": 2}))
    (tmp_path / "config.yaml").write_text(f"_BASE_: ['{BASE}', required.yaml]\n")
    cfg = load_cfg(tmp_path / "config.yaml", ["MODEL.DEVICE", "cpu"])
    model = build_model(cfg).eval()
    with caplog.at_level("INFO"):
        FinetuneCheckpointer(model).load(str(weights))
    assert "backbone only: heads start fresh" in caplog.text
    assert "not used by the model" not in caplog.text
    image = torch.randint(256, (3, 64, 96)).float()
    with torch.no_grad():
        images = model.preprocess_image([{"image": image}])
        found = model.backbone.bottom_up(images.tensor)
    for name, expected in zip(
        ("res2", "res3", "res4", "res5"), features_of_torchvision(backbone, image), strict=True
    ):
        # The mean is subtracted from other units, and frozen norm layers multiply in another order.
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-5)


def test_torchvision_backbone_in_a_caffe_config_is_refused(backbone, tmp_path):
    torch.save(backbone.state_dict(), tmp_path / "resnet50.pth")
    checkpoint = read_weights(str(tmp_path / "resnet50.pth"))
    with pytest.raises(UserError, match=r"INPUT\.FORMAT is 'BGR'.*STRIDE_IN_1X1 is True"):
        check_required_config(load_cfg(BASE), checkpoint, "resnet50.pth")


def test_only_bare_backbones_of_torchvision_are_recognised():
    stem = ["conv1.weight", "bn1.weight"]
    assert is_torchvision_backbone([*stem, "layer1.0.conv1.weight"])
    assert not is_torchvision_backbone([*stem, "backbone.layer1.0.conv1.weight"])


def msra_arrays(groups=1, norm="bn"):
    """Return two of the many arrays of a Caffe2 file."""
    return {
        "conv1_w": np.ones((8, 3, 7, 7), np.float32),
        "res2_0_branch2b_w": np.ones((4, 4 // groups, 3, 3), np.float32),
        f"res2_0_branch2a_{norm}_s": np.ones(4, np.float32),
    }


def test_msra_backbone_in_a_pytorch_config_is_refused(tmp_path):
    weights = tmp_path / "R-50.pkl"
    weights.write_bytes(pickle.dumps(msra_arrays()))
    checkpoint = read_weights(str(weights))
    assert checkpoint["matching_heuristics"]
    check_required_config(load_cfg(BASE), checkpoint, "R-50.pkl")
    cfg = load_cfg(BASE, ["MODEL.RESNETS.STRIDE_IN_1X1", "False"])
    with pytest.raises(UserError, match=r"(?s)RESNETS:\n    STRIDE_IN_1X1: True"):
        check_required_config(cfg, checkpoint, "R-50.pkl")


@pytest.mark.parametrize("options", [{"groups": 2}, {"norm": "gn"}])
def test_resnext_and_group_norm_of_caffe2_are_not_taken_for_msra(options):
    assert msra_required_config(msra_arrays(**options)) == {}
