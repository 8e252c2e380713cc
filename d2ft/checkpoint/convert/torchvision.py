"""
Convert torchvision's Mask R-CNN, Faster R-CNN and RetinaNet with a ResNet and FPN to Detectron2.

Compared on outputs (``tests/checkpoint/convert/test_torchvision.py``, torchvision 0.29): boxes,
scores and mask probabilities before they are pasted. Not the same in Detectron2, and not of the
weights: torchvision pastes masks by another rule, drops boxes thinner than 0.01 pixels, and its
RetinaNet keeps 300 detections (TEST.DETECTIONS_PER_IMAGE).

The source is https://github.com/pytorch/vision/tree/v0.20.0/torchvision/models/detection
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from d2ft.checkpoint.convert.key_table import (
    PYTORCH_STYLE,
    ConvertedCheckpoint,
    order_anchors_by_size,
    rename_keys,
    rename_layers,
    resnet_table,
)
from d2ft.errors import UserError
from d2ft.labels import COCO_CATEGORY_IDS, COCO_CLASSES

# The published weights have a row for each category id of COCO, 0 to 90.
_COCO_ROWS = 91

# FrozenBatchNorm2d of Detectron2. torchvision sets its own to 0 for the published weights:
# https://github.com/pytorch/vision/blob/v0.20.0/torchvision/models/detection/mask_rcnn.py#L509
_FROZEN_NORM_EPS = 1e-5

# Where torchvision nested layers later, files of both times are read: the optional parts.
_FASTER_RCNN = resnet_table("backbone.body.") | rename_layers(
    {rf"backbone\.fpn\.inner_blocks\.{i}(?:\.0)?": f"backbone.fpn_lateral{i + 2}" for i in range(4)}
    | {
        rf"backbone\.fpn\.layer_blocks\.{i}(?:\.0)?": f"backbone.fpn_output{i + 2}"
        for i in range(4)
    }
    | {
        r"rpn\.head\.conv(?:\.0\.0)?": "proposal_generator.rpn_head.conv",
        r"rpn\.head\.cls_logits": "proposal_generator.rpn_head.objectness_logits",
        r"rpn\.head\.bbox_pred": "proposal_generator.rpn_head.anchor_deltas",
        r"roi_heads\.box_head\.fc6": "roi_heads.box_head.fc1",
        r"roi_heads\.box_head\.fc7": "roi_heads.box_head.fc2",
        r"roi_heads\.box_predictor\.cls_score": "roi_heads.box_predictor.cls_score",
        r"roi_heads\.box_predictor\.bbox_pred": "roi_heads.box_predictor.bbox_pred",
    }
)
_MASK_RCNN = _FASTER_RCNN | rename_layers(
    {
        rf"roi_heads\.mask_head\.(?:mask_fcn{i + 1}|{i}\.0)": f"roi_heads.mask_head.mask_fcn{i + 1}"
        for i in range(4)
    }
    | {
        r"roi_heads\.mask_predictor\.conv5_mask": "roi_heads.mask_head.deconv",
        r"roi_heads\.mask_predictor\.mask_fcn_logits": "roi_heads.mask_head.predictor",
    }
)
_RETINANET = resnet_table("backbone.body.") | rename_layers(
    {rf"backbone\.fpn\.inner_blocks\.{i}(?:\.0)?": f"backbone.fpn_lateral{i + 3}" for i in range(3)}
    | {
        rf"backbone\.fpn\.layer_blocks\.{i}(?:\.0)?": f"backbone.fpn_output{i + 3}"
        for i in range(3)
    }
    | {
        rf"head\.{foreign}_head\.conv\.(?:{i}\.0|{2 * i})": f"head.{subnet}_subnet.{2 * i}"
        for foreign, subnet in (("classification", "cls"), ("regression", "bbox"))
        for i in range(4)
    }
    | {
        r"backbone\.fpn\.extra_blocks\.p6": "backbone.top_block.p6",
        r"backbone\.fpn\.extra_blocks\.p7": "backbone.top_block.p7",
        r"head\.classification_head\.cls_logits": "head.cls_score",
        r"head\.regression_head\.bbox_reg": "head.bbox_pred",
    }
)

# A norm layer behind the convolutions, or a convolution where v1 has a linear layer.
_V2_KEYS = (
    "backbone.fpn.inner_blocks.0.1.weight",
    "roi_heads.box_head.0.0.weight",
    "head.classification_head.conv.0.1.weight",
)

_REQUIRED: dict[str, Any] = PYTORCH_STYLE | {
    "MODEL.ANCHOR_GENERATOR.NAME": "TorchvisionAnchorGenerator",
    "MODEL.ANCHOR_GENERATOR.OFFSET": 0.0,
    "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": [[0.5, 1.0, 2.0]],
}
_REQUIRED_RCNN = _REQUIRED | {
    "MODEL.ANCHOR_GENERATOR.SIZES": [[32], [64], [128], [256], [512]],
    "MODEL.ROI_BOX_HEAD.POOLER_TYPE": "ROIAlign",
    "MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO": 2,
    "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS": [10.0, 10.0, 5.0, 5.0],
}
_REQUIRED_MASK_RCNN = _REQUIRED_RCNN | {
    "MODEL.ROI_MASK_HEAD.POOLER_TYPE": "ROIAlign",
    "MODEL.ROI_MASK_HEAD.POOLER_SAMPLING_RATIO": 2,
}
_REQUIRED_RETINANET = _REQUIRED | {
    "MODEL.BACKBONE.NAME": "build_torchvision_retinanet_fpn_backbone",
    # Three sizes for each level, cut to whole pixels: x, x * 2 ** (1 / 3), x * 2 ** (2 / 3).
    "MODEL.ANCHOR_GENERATOR.SIZES": [
        [32, 40, 50], [64, 80, 101], [128, 161, 203], [256, 322, 406], [512, 645, 812]
    ],
}  # fmt: skip


def is_torchvision(names: Iterable[str]) -> bool:
    """Whether the names of a state dict are those of a torchvision detection model."""
    return any(name.startswith("backbone.body.") for name in names)


def convert_torchvision(checkpoint: Mapping[str, Any]) -> ConvertedCheckpoint:
    """
    Give a torchvision detector Detectron2's names, class rows, anchor order and norm epsilon.

    torchvision counts the background as class 0. Its published weights have 91 rows, one for each
    category id of COCO; the ten ids without a class are dropped. They were trained to score
    nothing: what little the softmax gave them goes to the other classes.

    A file with frozen norm layers is taken for one trained with epsilon 0, as the published ones
    and what was fine-tuned from them. Of a model that began with an ImageNet backbone it is 1e-5,
    which its file does not tell; the difference is in channels of tiny variance only.

    Args:
        checkpoint: ``model`` is the state dict.

    Raises:
        UserError: if it is a v2 model, or has a key that the three architectures do not have.
    """
    model: Mapping[str, torch.Tensor] = checkpoint["model"]
    for name in _V2_KEYS:
        if name in model:
            raise UserError(
                f"the key {name!r} belongs to one of torchvision's v2 models, which have layers "
                "that Detectron2's heads lack. Use the weights of maskrcnn_resnet50_fpn, "
                "fasterrcnn_resnet50_fpn or retinanet_resnet50_fpn."
            )
    if "head.classification_head.cls_logits.weight" in model:
        name, table, required = "RetinaNet", _RETINANET, _REQUIRED_RETINANET
    elif any(key.startswith("roi_heads.mask_") for key in model):
        name, table, required = "Mask R-CNN", _MASK_RCNN, _REQUIRED_MASK_RCNN
    else:
        name, table, required = "Faster R-CNN", _FASTER_RCNN, _REQUIRED_RCNN
    framework = f"torchvision {name}"
    converted = rename_keys(model, table, framework)
    if not any(key.endswith("num_batches_tracked") for key in model):
        _fold_norm_eps(converted)
    if name == "RetinaNet":
        classes = _convert_retinanet_rows(converted)
    else:
        classes = _convert_roi_rows(converted)
    return ConvertedCheckpoint(framework, converted, classes, dict(required))


def _fold_norm_eps(model: dict[str, torch.Tensor]) -> None:
    """Make norm layers that divide by sqrt(variance + epsilon) do what was sqrt(variance)."""
    for name in [key for key in model if key.endswith(".norm.weight")]:
        variance = model[name.removesuffix("weight") + "running_var"]
        model[name] = model[name] * ((variance + _FROZEN_NORM_EPS) / variance).sqrt()


def _foreground(num_rows: int) -> tuple[list[int], tuple[str, ...] | None]:
    """Return the rows that have a class, in Detectron2's order, and the names if they are known."""
    if num_rows == _COCO_ROWS:
        return list(COCO_CATEGORY_IDS), COCO_CLASSES
    return list(range(1, num_rows)), None


def _convert_roi_rows(model: dict[str, torch.Tensor]) -> tuple[str, ...] | None:
    scores = "roi_heads.box_predictor.cls_score"
    rows, classes = _foreground(len(_get(model, f"{scores}.bias")))
    for kind in ("weight", "bias"):
        model[f"{scores}.{kind}"] = _get(model, f"{scores}.{kind}")[[*rows, 0]]
        boxes = f"roi_heads.box_predictor.bbox_pred.{kind}"
        model[boxes] = _get(model, boxes).unflatten(0, (-1, 4))[rows].flatten(0, 1)
        masks = f"roi_heads.mask_head.predictor.{kind}"
        if masks in model:
            model[masks] = model[masks][rows]
    return classes


def _convert_retinanet_rows(model: dict[str, torch.Tensor]) -> tuple[str, ...] | None:
    num_anchors = len(_get(model, "head.bbox_pred.bias")) // 4
    if num_anchors != 9:
        raise UserError(
            f"{num_anchors} anchors at a place, where torchvision's RetinaNet has 9: three sizes "
            "in three ratios. Other layouts are not converted."
        )
    rows, classes = _foreground(len(_get(model, "head.cls_score.bias")) // num_anchors)
    for kind in ("weight", "bias"):
        scores = _get(model, f"head.cls_score.{kind}").unflatten(0, (num_anchors, -1))
        scores = scores[:, rows].flatten(0, 1)
        model[f"head.cls_score.{kind}"] = order_anchors_by_size(scores, 3, 3)
        boxes = _get(model, f"head.bbox_pred.{kind}")
        model[f"head.bbox_pred.{kind}"] = order_anchors_by_size(boxes, 3, 3)
    return classes


def _get(model: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    if name not in model:
        raise UserError(f"has no {name!r} (in Detectron2's naming): the file is not whole")
    return model[name]
