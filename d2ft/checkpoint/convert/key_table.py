"""
What the converters share: renaming by table, ResNet's names, and what a conversion gives.

Shape shorthand in this room:

    K: number of classes, without background
    A: anchors at one place of a feature map
    R: rows for each anchor (K for scores, 4 for boxes)
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from d2ft.errors import UserError

# Regular expression of whole foreign names -> template of the name in Detectron2; None drops a
# tensor that Detectron2 has no use for.
KeyTable = Mapping[str, str | None]

# What images and backbone are in the two traditions of ImageNet ResNets: that of Caffe, Detectron
# and MSRA, and that of torchvision.
CAFFE_STYLE: dict[str, Any] = {
    "INPUT.FORMAT": "BGR",
    "MODEL.PIXEL_MEAN": [103.53, 116.28, 123.675],
    "MODEL.PIXEL_STD": [1.0, 1.0, 1.0],
    "MODEL.RESNETS.STRIDE_IN_1X1": True,
}
PYTORCH_STYLE: dict[str, Any] = {
    "INPUT.FORMAT": "RGB",
    # torchvision's values for pixels of 0 to 1, times 255.
    "MODEL.PIXEL_MEAN": [123.675, 116.28, 103.53],
    "MODEL.PIXEL_STD": [58.395, 57.12, 57.375],
    "MODEL.RESNETS.STRIDE_IN_1X1": False,
}

_NORM = "(weight|bias|running_mean|running_var)"
_BOTTOM_UP = "backbone.bottom_up"


@dataclass(frozen=True)
class ConvertedCheckpoint:
    """
    A checkpoint of another framework under Detectron2's names.

    Attributes:
        framework: name and architecture, for messages.
        model: name -> tensor, as in the state dict of a Detectron2 model.
        classes: names in the row order of ``model``; None if the file does not say them.
        required: dotted config key -> value, all that the weights need and shapes do not tell.
            Plain values: str, bool, int, float and lists of these.
        notes: in which ways the Detectron2 model will not be quite the same; a sentence each.
    """

    framework: str
    model: dict[str, torch.Tensor]
    classes: tuple[str, ...] | None
    required: dict[str, Any]
    notes: tuple[str, ...] = ()


def resnet_table(prefix: str) -> dict[str, str | None]:
    """
    Return the table of a ResNet as torchvision names it, of any depth, with bottleneck blocks.

    Args:
        prefix: what stands before ``conv1``, with the dot at its end.
    """
    start = re.escape(prefix)
    table: dict[str, str | None] = {
        rf"{start}conv1\.weight": f"{_BOTTOM_UP}.stem.conv1.weight",
        rf"{start}bn1\.{_NORM}": rf"{_BOTTOM_UP}.stem.conv1.norm.\1",
        rf"{start}.*num_batches_tracked": None,
    }
    for stage in range(1, 5):
        layer, res = rf"{start}layer{stage}\.(\d+)", rf"{_BOTTOM_UP}.res{stage + 1}.\1"
        table |= {
            rf"{layer}\.conv([123])\.weight": rf"{res}.conv\2.weight",
            rf"{layer}\.bn([123])\.{_NORM}": rf"{res}.conv\2.norm.\3",
            rf"{layer}\.downsample\.0\.weight": rf"{res}.shortcut.weight",
            rf"{layer}\.downsample\.1\.{_NORM}": rf"{res}.shortcut.norm.\2",
        }
    return table


def rename_layers(layers: Mapping[str, str]) -> dict[str, str | None]:
    """
    Return the table of layers that have a weight and a bias.

    Args:
        layers: regular expression of a foreign layer, without groups -> its name in Detectron2.
    """
    return {
        rf"{foreign}\.(weight|bias)": rf"{detectron2}.\1" for foreign, detectron2 in layers.items()
    }


def rename_keys(
    model: Mapping[str, torch.Tensor], table: KeyTable, framework: str
) -> dict[str, torch.Tensor]:
    """
    Return the tensors under Detectron2's names; none is copied.

    Raises:
        UserError: if a name is not in the table, or two have the same name in Detectron2.
    """
    patterns = [(re.compile(foreign), template) for foreign, template in table.items()]
    renamed: dict[str, torch.Tensor] = {}
    for name, tensor in model.items():
        matches = ((pattern.fullmatch(name), template) for pattern, template in patterns)
        match, template = next((pair for pair in matches if pair[0]), (None, None))
        if match is None:
            raise UserError(
                f"the key {name!r} is not one of a {framework}. Only that architecture, with a "
                "ResNet of bottleneck blocks and an FPN without norm layers, can be converted."
            )
        if template is None:
            continue
        target = match.expand(template)
        if target in renamed:
            raise UserError(f"the key {name!r} is there twice: two keys mean {target!r}")
        renamed[target] = tensor
    return renamed


def order_anchors_by_size(rows: torch.Tensor, num_sizes: int, num_ratios: int) -> torch.Tensor:
    """
    Bring anchors from ratio after ratio into Detectron2's order, size after size.

    Args:
        rows: (A*R, ...) weight or bias of a layer with R rows for each anchor; A is
            ``num_ratios * num_sizes``.
        num_sizes: of anchors at one place.
        num_ratios: of anchors at one place.

    Returns:
        A tensor of the shape of ``rows``.
    """
    by_ratio = rows.unflatten(0, (num_ratios, num_sizes, -1))
    return by_ratio.transpose(0, 1).flatten(0, 2).contiguous()
