"""Whole models: which row each class gets, and that a permuted model detects the same objects."""

import json
from typing import NamedTuple

import pytest
import torch

from d2ft.checkpoint.checkpointer import FinetuneCheckpointer
from d2ft.checkpoint.head_remap import HeadInit
from d2ft.config import load_cfg
from d2ft.labels import CITYSCAPES_INSTANCE_CLASSES, COCO_CLASSES
from tests.factories import PROJECT, TINY_MODEL, seeded_model

REMAP = HeadInit(remap=True)
PERMUTATION = torch.randperm(80, generator=torch.Generator().manual_seed(5)).tolist()
PERMUTED_CLASSES = tuple(COCO_CLASSES[row] for row in PERMUTATION)

# Enough detections for a comparison: any score will do.
ALL_SCORES = [
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0",
    "MODEL.RETINANET.SCORE_THRESH_TEST", "0.0",
    "TEST.DETECTIONS_PER_IMAGE", "60",
]  # fmt: skip
ARCHITECTURES = {
    "mask": [],
    "cascade": [
        "MODEL.ROI_HEADS.NAME", "CascadeROIHeads",
        "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", "True",
    ],
    "sigmoid": ["MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE", "True"],
    "retinanet": [
        "MODEL.META_ARCHITECTURE", "RetinaNet",
        "MODEL.MASK_ON", "False",
        "MODEL.BACKBONE.NAME", "build_retinanet_resnet_fpn_backbone",
        "MODEL.RESNETS.OUT_FEATURES", "['res3', 'res4', 'res5']",
        "MODEL.FPN.IN_FEATURES", "['res3', 'res4', 'res5']",
        "MODEL.ANCHOR_GENERATOR.SIZES", "[[32, 40], [64, 80], [128, 160], [256, 320], [512, 640]]",
        "MODEL.RETINANET.NUM_CONVS", "1",
    ],
}  # fmt: skip
PREDICTORS = {
    "mask": ["roi_heads.box_predictor.cls_score", "roi_heads.box_predictor.bbox_pred",
             "roi_heads.mask_head.predictor"],
    "cascade": [*(f"roi_heads.box_predictor.{stage}.cls_score" for stage in range(3)),
                "roi_heads.mask_head.predictor"],
    "retinanet": ["head.cls_score"],
}  # fmt: skip
PREDICTORS["sigmoid"] = PREDICTORS["mask"]
# Row r of class k is row_of(r, k, K) of the layer.
ROWS_PER_CLASS = {"bbox_pred": 4, "head.cls_score": 6}  # 2 sizes * 3 shapes of anchors


def row_of(layer, r, k, num_classes):
    if layer == "head.cls_score":
        return r * num_classes + k
    return ROWS_PER_CLASS.get(layer.rpartition(".")[2], 1) * k + r


class Source(NamedTuple):
    kind: str
    model: torch.nn.Module
    path: str


def build(kind, num_classes, seed):
    options = [*TINY_MODEL, *ALL_SCORES, *ARCHITECTURES[kind]]
    counts = [
        "MODEL.ROI_HEADS.NUM_CLASSES",
        num_classes,
        "MODEL.RETINANET.NUM_CLASSES",
        num_classes,
    ]
    model = seeded_model(load_cfg(PROJECT / "configs/cityscapes_ft.yaml", [*options, *counts]))
    torch.manual_seed(seed)
    with torch.no_grad():
        for layer in PREDICTORS[kind]:
            module = model.get_submodule(layer)
            # Logits of a few units: scores differ, so that detections have an order.
            boxes = layer.endswith("bbox_pred")
            module.weight.normal_(std=0.002 if boxes else 0.02)
            module.bias.normal_(std=0.02 if boxes else 0.1)
    return model.eval()


@pytest.fixture(scope="module", params=ARCHITECTURES)
def source(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    model = build(request.param, 80, seed=1)
    FinetuneCheckpointer(model, str(folder), thing_classes=COCO_CLASSES).save("coco")
    return Source(request.param, model, str(folder / "coco.pth"))


def load(source, classes, head_init, report_dir=""):
    model = build(source.kind, len(classes), seed=2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    FinetuneCheckpointer(
        model, thing_classes=classes, head_init=head_init, report_dir=str(report_dir)
    ).load(source.path)
    return before, model


@pytest.mark.parametrize("unmatched", ["fresh", "matched"])
def test_each_row_is_its_source_row_or_has_the_promised_start(source, unmatched, tmp_path):
    before, model = load(
        source, CITYSCAPES_INSTANCE_CLASSES, HeadInit(remap=True, unmatched=unmatched), tmp_path
    )

    trained, after = source.model.state_dict(), model.state_dict()
    names = {f"{layer}.{kind}" for layer in PREDICTORS[source.kind] for kind in ("weight", "bias")}
    for name, value in after.items():
        if name not in names:
            assert torch.equal(value, trained[name]), name
    for name in names:
        layer = name.rpartition(".")[0]
        per_class = ROWS_PER_CLASS.get(layer, ROWS_PER_CLASS.get(layer.rpartition(".")[2], 1))
        own = []
        for k, class_name in enumerate(CITYSCAPES_INSTANCE_CLASSES):
            for r in range(per_class):
                row = row_of(layer, r, k, 8)
                if class_name == "rider":
                    own.append(row)
                    continue
                theirs = row_of(layer, r, COCO_CLASSES.index(class_name), 80)
                assert torch.equal(after[name][row], trained[name][theirs]), (name, class_name, r)
        background = layer.endswith("cls_score") and layer != "head.cls_score"
        assert after[name].shape[0] == 8 * per_class + background
        if background:
            assert torch.equal(after[name][-1], trained[name][-1])
        if unmatched == "fresh":
            assert torch.equal(after[name][own], before[name][own])
        else:
            assert not torch.equal(after[name][own], before[name][own])
            if after[name][own].numel() > 50:
                rows = trained[name][:-1] if background else trained[name]
                assert after[name][own].std().item() == pytest.approx(rows.std().item(), rel=0.25)

    report = json.loads((tmp_path / "load_report.json").read_text())
    assert {tensor["name"] for tensor in report["remapped"]} == names
    assert (report["skipped"], report["missing"]) == ([], [])
    assert report["classes"][:2] == [
        {"name": "person", "source": "person", "source_row": 0, "start": "copied"},
        {"name": "rider", "source": None, "source_row": None, "start": unmatched},
    ]


def detect(model):
    generator = torch.Generator().manual_seed(7)
    image = torch.randint(0, 256, (3, 64, 128), generator=generator, dtype=torch.uint8)
    with torch.no_grad():
        return model([{"image": image, "height": 64, "width": 128}])[0]["instances"]


def test_model_of_permuted_classes_detects_the_same_with_permuted_labels(source):
    _, model = load(source, PERMUTED_CLASSES, REMAP)

    theirs, ours = detect(source.model), detect(model)
    assert len(theirs) == 60
    assert theirs.pred_classes.unique().numel() >= 5
    labels = [PERMUTED_CLASSES[label] for label in ours.pred_classes]
    assert labels == [COCO_CLASSES[label] for label in theirs.pred_classes]
    torch.testing.assert_close(ours.scores, theirs.scores, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(
        ours.pred_boxes.tensor, theirs.pred_boxes.tensor, atol=1e-4, rtol=1e-5
    )
    if source.kind != "retinanet":
        assert (ours.pred_masks == theirs.pred_masks).float().mean().item() > 0.9999


def test_two_models_whose_every_row_is_copied_are_equal(source):
    classes = tuple(name for name in CITYSCAPES_INSTANCE_CLASSES if name != "rider")
    _, first = load(source, classes, REMAP)
    torch.manual_seed(99)
    second = build(source.kind, len(classes), seed=100)
    FinetuneCheckpointer(second, thing_classes=classes, head_init=REMAP).load(source.path)

    expected = first.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in second.state_dict().items())
