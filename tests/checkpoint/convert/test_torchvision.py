"""
torchvision's detectors against their conversions: the same image, the same detections.

    python -m pytest -m slow -s tests/checkpoint/convert/test_torchvision.py

prints the largest differences.
"""

import pytest
import torch
from detectron2.layers import FrozenBatchNorm2d as FrozenBN
from detectron2.layers import paste_masks_in_image
from detectron2.modeling import build_model

from d2ft.checkpoint.convert.build import format_yaml
from d2ft.checkpoint.convert.torchvision import convert_torchvision, is_torchvision
from d2ft.config import load_cfg
from d2ft.errors import UserError
from d2ft.labels import COCO_CATEGORY_IDS, COCO_CLASSES
from tests.conftest import PROJECT

detection = pytest.importorskip("torchvision.models.detection")
FrozenBatchNorm2d = pytest.importorskip("torchvision.ops").FrozenBatchNorm2d

ARCHITECTURES = ["maskrcnn", "fasterrcnn", "retinanet"]
# P6 of the first has 3 rows where the stride would give 2.5; both need no padding.
IMAGE_SIZES = [(160, 224), (128, 256)]
UNUSED_IDS = [i for i in range(91) if i not in COCO_CATEGORY_IDS]

# What only the shapes of a model follow, on top of configs/_base_/models/mask_rcnn_r50_fpn.yaml.
ARCHITECTURE = {
    "maskrcnn": ["TEST.DETECTIONS_PER_IMAGE", 40],
    "fasterrcnn": ["MODEL.MASK_ON", False, "TEST.DETECTIONS_PER_IMAGE", 40],
    "retinanet": [
        "MODEL.META_ARCHITECTURE", "RetinaNet",
        "MODEL.RESNETS.OUT_FEATURES", "('res3', 'res4', 'res5')",
        "MODEL.FPN.IN_FEATURES", "('res3', 'res4', 'res5')",
        "TEST.DETECTIONS_PER_IMAGE", 300,
    ],
}  # fmt: skip
FEW_PROPOSALS = {"rpn_post_nms_top_n_test": 200, "box_detections_per_img": 40}


def build_torchvision(name):
    """Build a model whose random weights give detections of many classes, none of an unused id."""
    options = {} if name == "retinanet" else FEW_PROPOSALS
    builder = getattr(detection, f"{name}_resnet50_fpn")
    model = builder(weights=None, weights_backbone=None, num_classes=91, **options).eval()
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if key.endswith("running_mean"):
                tensor.normal_(0, 0.1)
            elif key.endswith("running_var"):
                tensor.uniform_(0.5, 1.5)
            elif key.endswith("bn3.weight"):
                tensor.fill_(0.2)  # keeps the sum of sixteen blocks in range
        if name == "retinanet":
            heads = model.head.classification_head.cls_logits, model.head.regression_head.bbox_reg
            spread_outputs(model, heads[0], -6, 1)
            # Small boxes beside the anchor's centre, so that none leaves the image: torchvision
            # clips before it suppresses overlaps, Detectron2 after it.
            mean, std = torch.tensor([[0.03, 0.03, -3, -3], [0.002, 0.002, 0.1, 0.1]]).repeat(1, 9)
            spread_outputs(model, heads[1], mean, std)
            heads[0].bias.view(9, 91)[:, UNUSED_IDS] = -1000
        else:
            spread_outputs(model, model.rpn.head.cls_logits, 0, 1)
            spread_outputs(model, model.rpn.head.bbox_pred, 0, 0.3)
            spread_outputs(model, model.roi_heads.box_predictor.cls_score, 0, 3)
            spread_outputs(model, model.roi_heads.box_predictor.bbox_pred, 0, 1)
            model.roi_heads.box_predictor.cls_score.bias[UNUSED_IDS[1:]] = -1000
        if name == "maskrcnn":
            spread_outputs(model, model.roi_heads.mask_predictor.mask_fcn_logits, 0, 2)
    return model


def spread_outputs(model, layer, mean, std):
    """Scale a layer so that each of its channels has this mean and deviation over an image."""
    outputs = []
    hook = layer.register_forward_hook(lambda layer, inputs, output: outputs.append(output))
    detect_torchvision(model, random_image(128, 256))
    hook.remove()
    rows = torch.cat([output.movedim(1, -1).flatten(0, -2) for output in outputs])
    scale = std / rows.std(0)
    layer.weight.mul_(scale.view(-1, *[1] * (layer.weight.dim() - 1)))
    layer.bias.copy_(mean + scale * (layer.bias - rows.mean(0)))


def random_image(height, width):
    """Return (3, H, W) of whole numbers in 0..255: blobs and noise."""
    blobs = torch.nn.functional.interpolate(torch.rand(1, 3, 4, 6), (height, width))[0]
    return (255 * (0.8 * blobs + 0.2 * torch.rand(3, height, width))).round()


def build_detectron2(name, converted, tmp_path):
    base = PROJECT / "configs/_base_/models/mask_rcnn_r50_fpn.yaml"
    (tmp_path / "required.yaml").write_text(format_yaml(converted.required | {"VERSION": 2}))
    (tmp_path / "config.yaml").write_text(f"_BASE_: ['{base}', required.yaml]\n")
    options = ["MODEL.DEVICE", "cpu", "MODEL.RPN.POST_NMS_TOPK_TEST", 200, *ARCHITECTURE[name]]
    model = build_model(load_cfg(tmp_path / "config.yaml", options)).eval()
    model.load_state_dict(converted.model)
    return model


@torch.no_grad()
def detect_torchvision(model, image):
    """Return the detections for a (3, H, W) RGB image of 0..255, masks as 28x28 probabilities."""
    height, width = image.shape[1:]
    model.transform.min_size, model.transform.max_size = (min(height, width),), max(height, width)
    images, _ = model.transform([image / 255])
    if not hasattr(model, "roi_heads"):
        return model([image / 255])[0]
    features = model.backbone(images.tensors)
    proposals, _ = model.rpn(images, features)
    return model.roi_heads(features, proposals, images.image_sizes)[0][0]


@torch.no_grad()
def detect_detectron2(model, image):
    inputs = [{"image": image, "height": image.shape[1], "width": image.shape[2]}]
    if hasattr(model, "roi_heads"):
        return model.inference(inputs, do_postprocess=False)[0]
    return model(inputs)[0]["instances"]


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_converted_model_gives_the_same_detections(name, tmp_path):
    source = build_torchvision(name)
    converted = convert_torchvision({"model": source.state_dict()})
    target = build_detectron2(name, converted, tmp_path)
    assert converted.classes == COCO_CLASSES
    for height, width in IMAGE_SIZES:
        image = random_image(height, width)
        expected, found = detect_torchvision(source, image), detect_detectron2(target, image)
        boxes = found.pred_boxes.tensor
        assert 20 <= len(expected["scores"]) == len(found)
        assert len(expected["labels"].unique()) > 10
        ids = torch.tensor(COCO_CATEGORY_IDS)[found.pred_classes]
        assert torch.equal(ids, expected["labels"])
        box = (boxes - expected["boxes"]).abs().max().item()
        score = (found.scores - expected["scores"]).abs().max().item()
        print(f"{name} {height}x{width}: {len(found)} detections, box {box:.1g}, score {score:.1g}")
        assert box < 0.01
        assert score < 1e-4
        if name == "maskrcnn":
            masks, others = (
                paste_masks_in_image(probabilities[:, 0], boxes, (height, width))
                for probabilities in (found.pred_masks, expected["masks"])
            )
            overlap, union = (masks & others).sum((1, 2)), (masks | others).sum((1, 2))
            assert (union > 0).sum() > 20
            print(f"  least mask IoU {(overlap[union > 0] / union[union > 0]).min().item():.6f}")
            assert (overlap >= 0.999 * union).all()


def published(**tensors):
    """Return the few layers that a conversion needs, of a model with COCO's 91 rows."""
    rows = torch.arange(91.0)
    predictor = "roi_heads.box_predictor"
    return {
        "backbone.body.conv1.weight": torch.ones(4, 3, 7, 7),
        f"{predictor}.cls_score.weight": rows[:, None],
        f"{predictor}.cls_score.bias": rows,
        f"{predictor}.bbox_pred.weight": torch.arange(364.0)[:, None],
        f"{predictor}.bbox_pred.bias": torch.arange(364.0),
        **tensors,
    }


def test_names_of_the_published_rows_are_those_of_torchvision():
    names = detection.MaskRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    assert tuple(names[i] for i in COCO_CATEGORY_IDS) == COCO_CLASSES


def test_rows_follow_the_category_ids_and_the_background_comes_last():
    converted = convert_torchvision({"model": published()})
    scores = converted.model["roi_heads.box_predictor.cls_score.bias"]
    boxes = converted.model["roi_heads.box_predictor.bbox_pred.bias"].view(-1, 4)
    assert scores.tolist() == [*COCO_CATEGORY_IDS, 0]
    assert boxes[:, 0].tolist() == [4 * i for i in COCO_CATEGORY_IDS]


def test_rows_of_a_model_of_ones_own_keep_their_order_and_have_no_names():
    model = {name: tensor[: len(tensor) * 4 // 91] for name, tensor in published().items()}
    model["backbone.body.conv1.weight"] = torch.ones(4, 3, 7, 7)
    converted = convert_torchvision({"model": model})
    assert converted.classes is None
    assert converted.model["roi_heads.box_predictor.cls_score.bias"].tolist() == [1, 2, 3, 0]


def test_retinanet_anchors_come_size_after_size():
    head = "head.classification_head.cls_logits", "head.regression_head.bbox_reg"
    ratio, size, row = torch.meshgrid(*map(torch.arange, (3, 3, 91)), indexing="ij")
    scores = (1000 * size + 100 * ratio + row).flatten().float()
    boxes = (1000 * size + 100 * ratio + row)[..., :4].flatten().float()
    model = {"backbone.body.conv1.weight": torch.ones(4, 3, 7, 7)}
    for name, rows in zip(head, (scores, boxes), strict=True):
        model |= {f"{name}.weight": rows[:, None], f"{name}.bias": rows}
    converted = convert_torchvision({"model": model}).model
    assert converted["head.cls_score.bias"].view(9, 80)[:, 0].tolist() == [
        1, 101, 201, 1001, 1101, 1201, 2001, 2101, 2201
    ]  # fmt: skip
    assert converted["head.bbox_pred.bias"][4:8].tolist() == [100, 101, 102, 103]


def test_frozen_norm_of_published_weights_computes_with_epsilon_zero():
    source, target = FrozenBatchNorm2d(4, eps=0.0), FrozenBN(4)
    for tensor in source.buffers():
        tensor.uniform_(0.5, 1.5)
    source.running_var.copy_(torch.tensor([1e-6, 1e-4, 1e-2, 1]))
    norm = {f"backbone.body.bn1.{name}": value for name, value in source.state_dict().items()}
    converted = convert_torchvision({"model": published(**norm)}).model
    prefix = "backbone.bottom_up.stem.conv1.norm."
    target.load_state_dict(
        {name.removeprefix(prefix): v for name, v in converted.items() if name.startswith(prefix)}
    )
    images = torch.rand(1, 4, 2, 2)
    torch.testing.assert_close(target(images), source(images))


def test_files_of_before_the_layers_were_nested_are_read_as_well():
    weight, bias = torch.rand(2, 2, 1, 1), torch.rand(2)
    old, new = (
        convert_torchvision(
            {"model": published(**{f"{layer}.weight": weight, f"{layer}.bias": bias})}
        )
        for layer in ("backbone.fpn.inner_blocks.2", "backbone.fpn.inner_blocks.2.0")
    )
    assert old.model["backbone.fpn_lateral4.weight"] is weight
    assert new.model["backbone.fpn_lateral4.weight"] is weight


def test_unknown_key_is_named():
    keypoints = {"roi_heads.keypoint_predictor.kps_score_lowres.bias": torch.ones(17)}
    with pytest.raises(UserError, match=r"key 'roi_heads\.keypoint.*' is not one of a torchvision"):
        convert_torchvision({"model": published(**keypoints)})


def test_v2_models_are_refused_with_what_can_be_used_instead():
    v2 = {"roi_heads.box_head.0.0.weight": torch.ones(1)}
    with pytest.raises(UserError, match=r"v2 models.*maskrcnn_resnet50_fpn"):
        convert_torchvision({"model": published(**v2)})


def test_truncated_model_is_refused():
    model = published()
    del model["roi_heads.box_predictor.bbox_pred.weight"]
    with pytest.raises(UserError, match=r"has no 'roi_heads.box_predictor.bbox_pred.weight'"):
        convert_torchvision({"model": model})


def test_only_detectors_of_torchvision_are_recognised():
    assert is_torchvision(published())
    assert not is_torchvision(["backbone.bottom_up.stem.conv1.weight", "conv1.weight"])
