"""MMDetection's names, written by hand from a Detectron2 model, against the conversion."""

import re
from functools import cache

import pytest
import torch
from detectron2.modeling import build_model

from d2ft.checkpoint.convert.mmdet import convert_mmdet, is_mmdet
from d2ft.config import load_cfg
from d2ft.errors import UserError
from d2ft.labels import COCO_CLASSES
from tests.conftest import PROJECT
from tests.factories import TINY_MODEL

RETINANET = [
    "MODEL.META_ARCHITECTURE", "RetinaNet",
    "MODEL.BACKBONE.NAME", "build_mmdet_retinanet_fpn_backbone",
    "MODEL.RESNETS.OUT_FEATURES", "('res3', 'res4', 'res5')",
    "MODEL.FPN.IN_FEATURES", "('res3', 'res4', 'res5')",
    "MODEL.ANCHOR_GENERATOR.SIZES", "[[32, 40, 50], [64, 80, 101], [128, 161, 203], [256, 322, 406], [512, 645, 812]]",
]  # fmt: skip
CASCADE = [
    "MODEL.ROI_HEADS.NAME", "CascadeROIHeads",
    "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", "True",
]  # fmt: skip
ARCHITECTURES = {
    "Mask R-CNN": [],
    "Faster R-CNN": ["MODEL.MASK_ON", "False", "MODEL.RESNETS.DEPTH", "101"],
    "Cascade Mask R-CNN": CASCADE,
    "Cascade R-CNN": [*CASCADE, "MODEL.MASK_ON", "False"],
    "RetinaNet": RETINANET,
}
BASE = PROJECT / "configs/_base_/models/mask_rcnn_r50_fpn.yaml"

# Detectron2's name -> MMDetection's, in the order in which they are tried.
INVERSE_NAMES = [
    (r"backbone\.bottom_up\.stem\.conv1\.norm", "backbone.bn1"),
    (r"backbone\.bottom_up\.stem\.conv1", "backbone.conv1"),
    (r"backbone\.bottom_up\.res2", "backbone.layer1"),
    (r"backbone\.bottom_up\.res3", "backbone.layer2"),
    (r"backbone\.bottom_up\.res4", "backbone.layer3"),
    (r"backbone\.bottom_up\.res5", "backbone.layer4"),
    (r"conv([123])\.norm", r"bn\1"),
    (r"shortcut\.norm", "downsample.1"),
    (r"shortcut", "downsample.0"),
    (r"backbone\.top_block\.p6", "neck.fpn_convs.3.conv"),
    (r"backbone\.top_block\.p7", "neck.fpn_convs.4.conv"),
    (r"proposal_generator\.rpn_head\.conv", "rpn_head.rpn_conv"),
    (r"proposal_generator\.rpn_head\.objectness_logits", "rpn_head.rpn_cls"),
    (r"proposal_generator\.rpn_head\.anchor_deltas", "rpn_head.rpn_reg"),
    (r"roi_heads\.mask_head\.deconv", "roi_head.mask_head.upsample"),
    (r"roi_heads\.mask_head\.predictor", "roi_head.mask_head.conv_logits"),
    (r"roi_heads\.box_head((?:\.\d)?)\.fc1", r"roi_head.bbox_head\1.shared_fcs.0"),
    (r"roi_heads\.box_head((?:\.\d)?)\.fc2", r"roi_head.bbox_head\1.shared_fcs.1"),
    (r"roi_heads\.box_predictor((?:\.\d)?)\.cls_score", r"roi_head.bbox_head\1.fc_cls"),
    (r"roi_heads\.box_predictor((?:\.\d)?)\.bbox_pred", r"roi_head.bbox_head\1.fc_reg"),
    (r"^head\.cls_score", "bbox_head.retina_cls"),
    (r"^head\.bbox_pred", "bbox_head.retina_reg"),
]
for i in range(4):
    INVERSE_NAMES += [
        (rf"^head\.cls_subnet\.{2 * i}", f"bbox_head.cls_convs.{i}.conv"),
        (rf"^head\.bbox_subnet\.{2 * i}", f"bbox_head.reg_convs.{i}.conv"),
        (rf"roi_heads\.mask_head\.mask_fcn{i + 1}", f"roi_head.mask_head.convs.{i}.conv"),
    ]


@cache
def tiny_state_dict(name):
    cfg = load_cfg(BASE, [*TINY_MODEL, *ARCHITECTURES[name]])
    model = build_model(cfg).state_dict()
    for tensor in model.values():
        tensor.uniform_(0.5, 1.5)
    return model


def as_mmdet(state_dict, name):
    """Return the tensors under MMDetection's names, with RetinaNet's anchors in its order."""
    first_level = 3 if name == "RetinaNet" else 2
    model = {}
    for key, tensor in state_dict.items():
        if key.startswith("head.") and ("cls_score" in key or "bbox_pred" in key):
            by_anchor = list(tensor.chunk(9))
            # Theirs is (ratio, size), Detectron2's (size, ratio).
            tensor = torch.cat(
                [by_anchor[3 * size + ratio] for ratio in range(3) for size in range(3)]
            )
        for pattern, replacement in INVERSE_NAMES:
            key = re.sub(pattern, replacement, key)
        for kind, neck in (("lateral", "lateral_convs"), ("output", "fpn_convs")):
            for level in range(2, 6):
                old = f"backbone.fpn_{kind}{level}."
                key = key.replace(old, f"neck.{neck}.{level - first_level}.conv.")
        if name == "Cascade Mask R-CNN" and ".mask_head." in key:
            for stage in (0, 1):
                model[key.replace("mask_head.", f"mask_head.{stage}.")] = torch.zeros_like(tensor)
            key = key.replace("mask_head.", "mask_head.2.")
        model[key] = tensor
        if key.endswith("running_var"):
            model[key.replace("running_var", "num_batches_tracked")] = torch.tensor(7)
    return model


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_tensor_arrives_in_the_detectron2_model_with_its_values(name):
    expected = tiny_state_dict(name)
    converted = convert_mmdet({"model": as_mmdet(expected, name)})
    assert converted.framework == f"MMDetection {name}"
    assert converted.model.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(converted.model[key], tensor), key


@pytest.mark.parametrize("name", ["Mask R-CNN", "Cascade R-CNN", "RetinaNet"])
def test_required_keys_are_keys_of_the_config_and_the_model_takes_them(name):
    required = convert_mmdet({"model": as_mmdet(tiny_state_dict(name), name)}).required
    options = [word for key, value in required.items() for word in (key, value)]
    cfg = load_cfg(BASE, [*TINY_MODEL, *ARCHITECTURES[name], *options, "MODEL.DEVICE", "meta"])
    with torch.device("meta"):
        build_model(cfg)


def small_model(**tensors):
    """Return the few layers that a conversion needs, of a model with two classes."""
    return {
        "backbone.bn1.running_mean": torch.rand(4),
        "backbone.bn1.running_var": torch.rand(4),
        "neck.lateral_convs.0.conv.bias": torch.rand(4),
        "roi_head.bbox_head.fc_cls.bias": torch.rand(3),
        **tensors,
    }


CAFFE_CONFIG_2X = """
model = dict(type='MaskRCNN', backbone=dict(type='ResNet', depth=50, style='caffe', norm_eval=True))
img_norm_cfg = dict(mean=[102.98, 115.95, 122.77], std=[1.0, 1.0, 1.0], to_rgb=False)
train_pipeline = [dict(type='Normalize', **img_norm_cfg)]
"""
PYTORCH_CONFIG_3X = """
model = dict(
    type='MaskRCNN',
    data_preprocessor=dict(mean=[123.675, 116.28, 103.53], std=[58, 57, 57], bgr_to_rgb=True),
    backbone=dict(type='ResNet', depth=50, style='pytorch'))
"""


def style_of(model, meta=None):
    converted = convert_mmdet({"model": model, "meta": meta})
    return list(converted.required.values())[:4], converted.notes


def test_style_is_read_from_the_config_in_the_file():
    caffe = ["BGR", [102.98, 115.95, 122.77], [1.0, 1.0, 1.0], True]
    pytorch = ["RGB", [123.675, 116.28, 103.53], [58.0, 57.0, 57.0], False]
    assert style_of(small_model(), {"config": CAFFE_CONFIG_2X}) == (caffe, ())
    assert style_of(small_model(), {"cfg": PYTORCH_CONFIG_3X}) == (pytorch, ())


@pytest.mark.parametrize("meta", [None, {}, {"config": "model = dict("}, {"config": "a = f(1)"}])
def test_style_without_a_config_is_told_by_the_first_norm_layer(meta):
    folded = {"backbone.bn1.running_mean": torch.zeros(4)}
    for model, order, stride_in_1x1 in (
        (small_model(**folded), "BGR", True),
        (small_model(), "RGB", False),
    ):
        style, notes = style_of(model, meta)
        assert (style[0], style[3]) == (order, stride_in_1x1)
        assert "does not hold the config" in notes[-1]


def test_a_config_in_the_file_is_not_run():
    style, notes = style_of(small_model(), {"config": "x = dict(mean=exit(1), std=2, to_rgb=True)"})
    assert style[0] == "RGB"
    assert notes


@pytest.mark.parametrize(
    "meta",
    [
        {"CLASSES": ("car", "dog")},
        {"dataset_meta": {"classes": ("car", "dog")}},
        {"dataset_meta": {"CLASSES": ["car", "dog"]}},
    ],
)
def test_class_names_come_from_the_file(meta):
    assert convert_mmdet({"model": small_model(), "meta": meta}).classes == ("car", "dog")


def test_class_names_of_another_number_than_the_rows_are_not_believed():
    meta = {"CLASSES": COCO_CLASSES}
    assert convert_mmdet({"model": small_model(), "meta": meta}).classes is None


def test_cascade_says_what_detectron2_does_otherwise():
    name = "Cascade Mask R-CNN"
    notes = convert_mmdet({"model": as_mmdet(tiny_state_dict(name), name)}).notes
    assert "averages logits" in notes[0]
    assert "only the last one" in notes[1]


def test_unknown_key_is_named():
    dcn = {"backbone.layer2.0.conv2.conv_offset.weight": torch.ones(1)}
    with pytest.raises(
        UserError, match=r"'backbone\.layer2\.0\.conv2\.conv_offset\.weight' is not"
    ):
        convert_mmdet({"model": small_model(**dcn)})


def test_version_1_is_refused_with_the_way_to_upgrade():
    with pytest.raises(UserError, match=r"1\.2\.0, whose background is class 0.*upgrade_model"):
        convert_mmdet({"model": small_model(), "meta": {"mmdet_version": "1.2.0"}})
    with pytest.raises(UserError, match=r"MMDetection 1\.x"):
        convert_mmdet({"model": {"bbox_head.fc_cls.weight": torch.ones(1)}})


def test_retinanet_of_another_anchor_layout_is_refused():
    model = {"backbone.conv1.weight": torch.ones(1), "bbox_head.retina_reg.bias": torch.ones(4)}
    with pytest.raises(UserError, match=r"1 anchors at a place.*has 9"):
        convert_mmdet({"model": model})


def test_only_detectors_of_mmdetection_are_recognised():
    assert is_mmdet(small_model())
    assert not is_mmdet(["backbone.bottom_up.stem.conv1.weight", "roi_heads.box_head.fc1.weight"])
    assert not is_mmdet(["backbone.layer1.0.conv1.weight", "decode_head.conv_seg.weight"])
