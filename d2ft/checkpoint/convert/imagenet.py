"""
ImageNet backbones: torchvision's are converted, the ones of Caffe2 only say what they need.

Detectron2 itself matches the names of Caffe2's files (``R-50.pkl`` of MSRA and whole Detectron1
models), but not what their ResNets take for an image.

Sources:
    https://github.com/pytorch/vision/blob/v0.20.0/torchvision/models/resnet.py
    https://github.com/facebookresearch/detectron2/blob/main/detectron2/config/defaults.py
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from d2ft.checkpoint.convert.key_table import (
    CAFFE_STYLE,
    PYTORCH_STYLE,
    ConvertedCheckpoint,
    rename_keys,
    resnet_table,
)

_TORCHVISION = resnet_table("") | {r"fc\.(weight|bias)": None}


def is_torchvision_backbone(names: Iterable[str]) -> bool:
    """Whether the names of a state dict are those of a bare ResNet of torchvision."""
    return {"conv1.weight", "bn1.weight", "layer1.0.conv1.weight"} <= set(names)


def convert_torchvision_backbone(checkpoint: Mapping[str, Any]) -> ConvertedCheckpoint:
    """
    Give an ImageNet ResNet of torchvision the names of a Detectron2 model with an FPN.

    ResNeXt and wide ResNets have the same names. The classifier is left out.

    Args:
        checkpoint: ``model`` is the state dict.

    Raises:
        UserError: if it has a key that these do not have.
    """
    name = "torchvision ResNet"
    model = rename_keys(checkpoint["model"], _TORCHVISION, name)
    return ConvertedCheckpoint(name, model, None, dict(PYTORCH_STYLE))


def msra_required_config(model: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """
    Return what a Caffe2 file with a ResNet of MSRA needs from the config; empty for other files.

    Group norm and ResNeXt files (of FAIR) have other names or shapes, and other needs. The mean is
    not among the needs: Detectron's 102.98, 115.95, 122.77 and Detectron2's differ by half a level.
    """
    second = model.get("res2_0_branch2b_w")
    is_plain = second is not None and second.shape[0] == second.shape[1]
    if not is_plain or "res2_0_branch2a_bn_s" not in model:
        return {}
    return {key: value for key, value in CAFFE_STYLE.items() if key != "MODEL.PIXEL_MEAN"}
