"""
RetinaNet's feature pyramid as other frameworks build it.

Detectron2 computes P6 from C5 and P7 from P6 after a ReLU. torchvision's ``retinanet_resnet50_fpn``
begins with P5, and MMDetection leaves the ReLU out; their weights are right for their own way only.
"""

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone.fpn import (
    FPN,
    LastLevelP6P7,
    build_retinanet_resnet_fpn_backbone,
)


class LinearP6P7(LastLevelP6P7):
    """Same as :class:`LastLevelP6P7`, but without a ReLU between P6 and P7."""

    def forward(self, c5: torch.Tensor) -> list[torch.Tensor]:
        """Return P6 and P7 of C5, each half the size of the one before, rounded up."""
        p6 = self.p6(c5)
        return [p6, self.p7(p6)]


@BACKBONE_REGISTRY.register()
def build_torchvision_retinanet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """
    Same as ``build_retinanet_resnet_fpn_backbone``, but P6 is computed from P5.

    https://github.com/pytorch/vision/blob/v0.20.0/torchvision/models/detection/retinanet.py#L818
    """
    backbone = build_retinanet_resnet_fpn_backbone(cfg, input_shape)
    channels = cfg.MODEL.FPN.OUT_CHANNELS
    backbone.top_block = LastLevelP6P7(channels, channels, in_feature="p5")
    return backbone


@BACKBONE_REGISTRY.register()
def build_mmdet_retinanet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """
    Same as ``build_retinanet_resnet_fpn_backbone``, but without a ReLU between P6 and P7.

    https://github.com/open-mmlab/mmdetection/blob/v3.3.0/mmdet/models/necks/fpn.py
    (``relu_before_extra_convs``, which is False in the RetinaNet configs)
    """
    backbone = build_retinanet_resnet_fpn_backbone(cfg, input_shape)
    channels = backbone.bottom_up.output_shape()["res5"].channels
    backbone.top_block = LinearP6P7(channels, cfg.MODEL.FPN.OUT_CHANNELS)
    return backbone
