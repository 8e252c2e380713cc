"""
Convert MMDetection's two-stage detectors and RetinaNet with a ResNet and FPN to Detectron2.

For Mask R-CNN, Faster R-CNN, Cascade (Mask) R-CNN and RetinaNet of MMDetection 2.x and 3.x, whose
names and class order are the same: background last, as in Detectron2.

Compared on outputs with MMDetection 3.5 (``tests/checkpoint/convert/compare_mmdet.py``; the figures
are in ``tools/README.md``). Not the same in Detectron2, and not of the weights:

* A Cascade: MMDetection averages the logits of the three stages, Detectron2 their probabilities;
  and it averages the masks of three mask heads, of which Detectron2 has the last one.
* RetinaNet: MMDetection clips boxes to the image before it suppresses overlaps, Detectron2 after.
* MMDetection bounds how far a box may shrink in one step, by 62.5 times; Detectron2 does not.

Sources:
    https://github.com/open-mmlab/mmdetection/tree/v3.3.0/configs/_base_/models
    https://github.com/open-mmlab/mmdetection/blob/v3.3.0/mmdet/models/roi_heads/cascade_roi_head.py
    https://github.com/open-mmlab/mmdetection/blob/v3.3.0/mmdet/models/task_modules/prior_generators/anchor_generator.py
"""

import ast
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from d2ft.checkpoint.convert.key_table import (
    CAFFE_STYLE,
    PYTORCH_STYLE,
    ConvertedCheckpoint,
    order_anchors_by_size,
    rename_keys,
    rename_layers,
    resnet_table,
)
from d2ft.errors import UserError

_NUM_STAGES = 3  # of a Cascade

_RPN_AND_FPN = {
    rf"neck\.lateral_convs\.{i}\.conv": f"backbone.fpn_lateral{i + 2}" for i in range(4)
} | {
    **{rf"neck\.fpn_convs\.{i}\.conv": f"backbone.fpn_output{i + 2}" for i in range(4)},
    r"rpn_head\.rpn_conv": "proposal_generator.rpn_head.conv",
    r"rpn_head\.rpn_cls": "proposal_generator.rpn_head.objectness_logits",
    r"rpn_head\.rpn_reg": "proposal_generator.rpn_head.anchor_deltas",
}


def _box_head(foreign_stage: str = "", stage: str = "") -> dict[str, str]:
    head = rf"roi_head\.bbox_head{foreign_stage}"
    return {
        rf"{head}\.shared_fcs\.0": f"roi_heads.box_head{stage}.fc1",
        rf"{head}\.shared_fcs\.1": f"roi_heads.box_head{stage}.fc2",
        rf"{head}\.fc_cls": f"roi_heads.box_predictor{stage}.cls_score",
        rf"{head}\.fc_reg": f"roi_heads.box_predictor{stage}.bbox_pred",
    }


def _mask_head(foreign_stage: str = "") -> dict[str, str]:
    head = rf"roi_head\.mask_head{foreign_stage}"
    return {
        **{rf"{head}\.convs\.{i}\.conv": f"roi_heads.mask_head.mask_fcn{i + 1}" for i in range(4)},
        rf"{head}\.upsample": "roi_heads.mask_head.deconv",
        rf"{head}\.conv_logits": "roi_heads.mask_head.predictor",
    }


_RESNET = resnet_table("backbone.")
_RCNN = _RESNET | rename_layers(_RPN_AND_FPN | _box_head() | _mask_head())
_CASCADE = (
    _RESNET
    | rename_layers(_RPN_AND_FPN | _mask_head(rf"\.{_NUM_STAGES - 1}"))
    | {rf"roi_head\.mask_head\.[0-{_NUM_STAGES - 2}]\..*": None}
)
for _stage in range(_NUM_STAGES):
    _CASCADE |= rename_layers(_box_head(rf"\.{_stage}", f".{_stage}"))
_RETINANET = _RESNET | rename_layers(
    {
        **{rf"neck\.lateral_convs\.{i}\.conv": f"backbone.fpn_lateral{i + 3}" for i in range(3)},
        **{rf"neck\.fpn_convs\.{i}\.conv": f"backbone.fpn_output{i + 3}" for i in range(3)},
        r"neck\.fpn_convs\.3\.conv": "backbone.top_block.p6",
        r"neck\.fpn_convs\.4\.conv": "backbone.top_block.p7",
        **{rf"bbox_head\.cls_convs\.{i}\.conv": f"head.cls_subnet.{2 * i}" for i in range(4)},
        **{rf"bbox_head\.reg_convs\.{i}\.conv": f"head.bbox_subnet.{2 * i}" for i in range(4)},
        r"bbox_head\.retina_cls": "head.cls_score",
        r"bbox_head\.retina_reg": "head.bbox_pred",
    }
)

_REQUIRED: dict[str, Any] = {
    "MODEL.ANCHOR_GENERATOR.NAME": "DefaultAnchorGenerator",
    "MODEL.ANCHOR_GENERATOR.OFFSET": 0.0,
    "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": [[0.5, 1.0, 2.0]],
}
_REQUIRED_RCNN = _REQUIRED | {
    "MODEL.ANCHOR_GENERATOR.SIZES": [[32], [64], [128], [256], [512]],
    "MODEL.ROI_BOX_HEAD.POOLER_TYPE": "ROIAlignV2",
    "MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO": 0,
    # MMDetection multiplies by target_stds, Detectron2 divides by the weights.
    "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS": [10.0, 10.0, 5.0, 5.0],
}
_REQUIRED_MASK = {
    "MODEL.ROI_MASK_HEAD.POOLER_TYPE": "ROIAlignV2",
    "MODEL.ROI_MASK_HEAD.POOLER_SAMPLING_RATIO": 0,
}
_REQUIRED_CASCADE = _REQUIRED_RCNN | {
    "MODEL.ROI_HEADS.NAME": "CascadeROIHeads",
    # 1 / 0.033 and 1 / 0.067 where Detectron2 has 30 and 15.
    "MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS": [
        [10.0, 10.0, 5.0, 5.0],
        [20.0, 20.0, 10.0, 10.0],
        [30.303030, 30.303030, 14.925373, 14.925373],
    ],
}
_REQUIRED_RETINANET = _REQUIRED | {
    "MODEL.BACKBONE.NAME": "build_mmdet_retinanet_fpn_backbone",
    "MODEL.ANCHOR_GENERATOR.SIZES": [
        [round(4 * stride * 2 ** (octave / 3), 4) for octave in range(3)]
        for stride in (8, 16, 32, 64, 128)
    ],
}

_NO_CONFIG = (
    "The file does not hold the config that it was trained with: channel order, mean and standard "
    "deviation are those of MMDetection's own configs with a backbone of this style."
)
_CASCADE_SCORES = (
    "A Cascade averages logits over its stages in MMDetection, probabilities in Detectron2: the "
    "scores differ a little."
)
_CASCADE_MASKS = (
    "Of the three mask heads of the Cascade only the last one is taken: Detectron2 has one."
)


def is_mmdet(names: Iterable[str]) -> bool:
    """Whether the names of a state dict are those of an MMDetection model with a backbone."""
    names = list(names)
    heads = ("neck.", "rpn_head.", "roi_head.", "bbox_head.")
    return any(name.startswith(heads) for name in names) and any(
        name.startswith("backbone.") for name in names
    )


def convert_mmdet(checkpoint: Mapping[str, Any]) -> ConvertedCheckpoint:
    """
    Give an MMDetection detector Detectron2's names and anchor order.

    Caffe and pytorch style have the same names. Which one it is, and how images are normalised, is
    read from the config that MMDetection keeps in ``meta``; without one it is told by the first
    norm layer, which in caffe style only scales and shifts.

    Args:
        checkpoint: ``model`` is the state dict; ``meta``, if there, is MMDetection's.

    Raises:
        UserError: if it is of MMDetection 1.x, whose background comes first, or has a key or an
            anchor layout that the architectures above do not have.
    """
    model: Mapping[str, torch.Tensor] = checkpoint["model"]
    found = checkpoint.get("meta")
    meta: dict[str, Any] = found if isinstance(found, dict) else {}
    _refuse_version_1(model, meta)
    name, table, required, notes = _architecture(model)
    framework = f"MMDetection {name}"
    converted = rename_keys(model, table, framework)
    style, is_from_config = _read_style(model, meta)
    num_classes = _order_rows(converted)
    return ConvertedCheckpoint(
        framework,
        converted,
        _class_names(meta, num_classes),
        style | required,
        notes if is_from_config else (*notes, _NO_CONFIG),
    )


def _refuse_version_1(model: Mapping[str, torch.Tensor], meta: Mapping[str, Any]) -> None:
    version = str(meta.get("mmdet_version", ""))
    if version.startswith(("0.", "1.")) or any(
        name.startswith(("bbox_head.shared_fcs.", "bbox_head.fc_cls.")) for name in model
    ):
        raise UserError(
            f"is of MMDetection {version or '1.x'}, whose background is class 0. Upgrade it with "
            "tools/model_converters/upgrade_model_version.py of MMDetection 2.x first."
        )


def _architecture(
    model: Mapping[str, torch.Tensor],
) -> tuple[str, dict[str, str | None], dict[str, Any], tuple[str, ...]]:
    has_masks = any(name.startswith("roi_head.mask_head.") for name in model)
    if any(name.startswith("roi_head.bbox_head.0.") for name in model):
        masks = _REQUIRED_MASK if has_masks else {}
        notes = (_CASCADE_SCORES, _CASCADE_MASKS) if has_masks else (_CASCADE_SCORES,)
        name = "Cascade Mask R-CNN" if has_masks else "Cascade R-CNN"
        return name, _CASCADE, _REQUIRED_CASCADE | masks, notes
    if any(name.startswith("bbox_head.") for name in model):
        return "RetinaNet", _RETINANET, _REQUIRED_RETINANET, ()
    if has_masks:
        return "Mask R-CNN", _RCNN, _REQUIRED_RCNN | _REQUIRED_MASK, ()
    return "Faster R-CNN", _RCNN, _REQUIRED_RCNN, ()


def _order_rows(model: dict[str, torch.Tensor]) -> int:
    """Bring RetinaNet's anchors, if there are any, into Detectron2's order; return K."""
    if "head.bbox_pred.bias" not in model:
        scores = [name for name in model if name.endswith("cls_score.bias")]
        return len(model[scores[0]]) - 1 if scores else 0
    num_anchors = len(model["head.bbox_pred.bias"]) // 4
    if num_anchors != 9:
        raise UserError(
            f"{num_anchors} anchors at a place, where MMDetection's RetinaNet has 9: three sizes "
            "in three ratios. Other layouts are not converted."
        )
    for name in model:
        if name.startswith(("head.cls_score.", "head.bbox_pred.")):
            model[name] = order_anchors_by_size(model[name], 3, 3)
    return len(model.get("head.cls_score.bias", ())) // num_anchors


def _class_names(meta: Mapping[str, Any], num_classes: int) -> tuple[str, ...] | None:
    dataset = meta.get("dataset_meta")  # 3.x; 2.x has the names at the top
    names = None
    for place in (dataset if isinstance(dataset, dict) else {}, meta):
        names = names or place.get("classes") or place.get("CLASSES")
    if isinstance(names, (list, tuple)) and len(names) == num_classes:
        return tuple(str(name) for name in names)
    return None


def _read_style(
    model: Mapping[str, torch.Tensor], meta: Mapping[str, Any]
) -> tuple[dict[str, Any], bool]:
    """Return what images and backbone have to be like, and whether the file's config says so."""
    # What every config of a style says, for files that do not carry theirs.
    style = CAFFE_STYLE if _only_scales(model) else PYTORCH_STYLE
    # "cfg" in 3.x
    text = meta.get("config") or meta.get("cfg")
    settings = list(_dict_calls(text)) if isinstance(text, str) else []
    for setting in settings:
        is_rgb = setting.get("to_rgb", setting.get("bgr_to_rgb"))
        if isinstance(is_rgb, bool) and {"mean", "std"} <= setting.keys():
            break
    else:
        return dict(style), False
    backbones = [setting["style"] for setting in settings if "style" in setting]
    is_caffe = backbones[0] == "caffe" if backbones else style is CAFFE_STYLE
    return {
        "INPUT.FORMAT": "RGB" if is_rgb else "BGR",
        "MODEL.PIXEL_MEAN": [float(value) for value in setting["mean"]],
        "MODEL.PIXEL_STD": [float(value) for value in setting["std"]],
        "MODEL.RESNETS.STRIDE_IN_1X1": is_caffe,
    }, True


def _only_scales(model: Mapping[str, torch.Tensor]) -> bool:
    # The statistics of the caffe backbones were folded into scale and shift before MMDetection.
    mean = model.get("backbone.bn1.running_mean")
    return mean is not None and not bool(mean.any())


def _dict_calls(text: str) -> Iterator[dict[str, Any]]:
    """Yield the literal keywords of every ``dict(...)`` in a config, which is Python, unexecuted."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):
        return  # as good as no config, which the notes then say
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id == "dict"
        ):
            literals = {}
            for keyword in node.keywords:
                try:
                    literals[keyword.arg or ""] = ast.literal_eval(keyword.value)
                except (ValueError, TypeError):
                    continue
            yield literals
