import json
import pickle
import runpy
import sys

import pytest
import torch
import torchvision
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
from safetensors.torch import save_file
from torch import nn

import d2ft
from d2ft.checkpoint.checkpointer import FinetuneCheckpointer
from d2ft.checkpoint.describe import describe_checkpoint, describe_run, guess_model
from d2ft.config import get_cfg, load_cfg, load_cfg_text
from d2ft.errors import UserError
from d2ft.files import sha256
from tests.factories import PROJECT, write_mmengine_file, zoo_config_file

CLASSES = ("car", "bus")


def save(folder, cfg, name="model_final"):
    model = nn.Linear(2, 3)
    start = folder / "start.pkl"
    start.write_bytes(
        pickle.dumps({"model": {k: v.numpy() for k, v in model.state_dict().items()}})
    )
    checkpointer = FinetuneCheckpointer(
        model,
        str(folder),
        thing_classes=CLASSES,
        metadata=describe_run(cfg),
        report_dir=str(folder),
    )
    checkpointer.resume_or_load(str(start), resume=True)
    checkpointer.save(name)
    return folder / f"{name}.pth"


@pytest.fixture
def cfg():
    options = ["MODEL.ROI_HEADS.NUM_CLASSES", "2", "INPUT.FORMAT", "RGB", "MODEL.WEIGHTS", "a.pkl"]
    return load_cfg(PROJECT / "configs/cityscapes_ft.yaml", options)


def test_saved_file_describes_the_run(tmp_path, cfg):
    own = describe_checkpoint(save(tmp_path, cfg))["d2ft"]

    assert own["thing_classes"] == ["car", "bus"]
    assert own["pixel_format"] == "RGB"
    assert own["pixel_mean"] == list(cfg.MODEL.PIXEL_MEAN)
    assert own["pixel_std"] == list(cfg.MODEL.PIXEL_STD)
    assert own["train_datasets"] == ["cityscapes_instance_train_x8"]
    assert own["d2ft"] == d2ft.__version__
    assert own["detectron2"]
    source = tmp_path / "start.pkl"
    assert own["source"] == {"weights": str(source), "sha256": sha256(source)}


def test_saved_config_gives_back_the_model_without_weights_and_device(tmp_path, cfg):
    cfg.MODEL.DEVICE = "cuda:1"
    own = describe_checkpoint(save(tmp_path, cfg))["d2ft"]

    again = load_cfg_text(own["config"], "model_final.pth")

    assert again.INPUT == cfg.INPUT
    default = get_cfg()
    cfg.MODEL.WEIGHTS, cfg.MODEL.DEVICE = default.MODEL.WEIGHTS, default.MODEL.DEVICE
    assert again.MODEL == cfg.MODEL


def test_resumed_run_keeps_the_source_that_it_once_started_from(tmp_path, cfg):
    first = describe_checkpoint(save(tmp_path, cfg))["d2ft"]["source"]
    second = save(tmp_path, cfg, "model_0000009")

    assert describe_checkpoint(second)["d2ft"]["source"] == first


def test_described_file_still_loads_with_weights_only_and_in_plain_detectron2(tmp_path, cfg):
    path = save(tmp_path, cfg)
    torch.load(path, weights_only=True)
    model = nn.Linear(2, 3)

    DetectionCheckpointer(model).load(str(path))

    assert torch.equal(model.weight, torch.load(path, weights_only=True)["model"]["weight"])


def shapes_of(build):
    with torch.device("meta"):
        model = build()
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def zoo_shapes(config):
    cfg = get_cfg()
    cfg.merge_from_file(str(zoo_config_file(config)), allow_unsafe=True)
    cfg.MODEL.DEVICE = "meta"
    return shapes_of(lambda: build_model(cfg))


@pytest.mark.parametrize(
    ("config", "architecture"),
    [
        ("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml", "Mask R-CNN ResNet-50 FPN"),
        ("COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml", "Faster R-CNN ResNet-101 FPN"),
        ("Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml", "Cascade Mask R-CNN ResNet-50 FPN"),
        ("COCO-Detection/retinanet_R_50_FPN_1x.yaml", "RetinaNet ResNet-50 FPN"),
        ("COCO-Detection/faster_rcnn_R_50_C4_1x.yaml", "Faster R-CNN ResNet-50"),
    ],
)
def test_models_of_detectron2_are_recognised(config, architecture):
    assert guess_model(zoo_shapes(config)) == {
        "framework": "Detectron2", "architecture": architecture, "classes": 80
    }  # fmt: skip


@pytest.mark.parametrize(
    ("builder", "architecture", "classes"),
    [
        ("maskrcnn_resnet50_fpn", "Mask R-CNN ResNet-50 FPN", 90),
        ("fasterrcnn_resnet50_fpn_v2", "Faster R-CNN ResNet-50 FPN", 90),
        ("retinanet_resnet50_fpn", "RetinaNet ResNet-50 FPN", 91),
    ],
)
def test_models_of_torchvision_are_recognised(builder, architecture, classes):
    build = getattr(torchvision.models.detection, builder)
    assert guess_model(shapes_of(lambda: build(weights=None, weights_backbone=None))) == {
        "framework": "torchvision detection", "architecture": architecture, "classes": classes
    }  # fmt: skip


def test_backbone_of_torchvision_is_recognised():
    assert guess_model(shapes_of(torchvision.models.resnet18)) == {
        "framework": "torchvision or timm backbone",
        "architecture": "backbone ResNet-18",
        "classes": None,
    }


def blocks(pattern, convolutions, count):
    return {
        pattern.format(block=block, conv=conv): (1,)
        for block in range(count)
        for conv in convolutions
    }


def test_names_of_mmdetection_and_caffe2_are_recognised():
    mmdet = {
        **blocks("backbone.layer3.{block}.conv{conv}.weight", "123", 6),
        "neck.lateral_convs.0.conv.weight": (256, 256, 1, 1),
        "rpn_head.rpn_conv.weight": (256, 256, 3, 3),
        "roi_head.bbox_head.0.fc_cls.weight": (81, 1024),
        "roi_head.bbox_head.1.fc_cls.weight": (81, 1024),
        "roi_head.mask_head.0.conv_logits.weight": (80, 256, 1, 1),
    }
    assert guess_model(mmdet) == {
        "framework": "MMDetection",
        "architecture": "Cascade Mask R-CNN ResNet-50 FPN",
        "classes": 80,
    }
    caffe2 = {
        **blocks("res4_{block}_branch2{conv}_w", "abc", 23),
        "conv_rpn_fpn2_w": (256, 256, 3, 3),
        "fpn_res2_2_sum_lateral_w": (256, 256, 1, 1),
        "cls_score_w": (81, 1024),
    }
    assert guess_model(caffe2)["architecture"] == "Faster R-CNN ResNet-101 FPN"


def test_tensors_of_an_unknown_program_are_counted_all_the_same(tmp_path):
    save_file({"encoder.0.w": torch.ones(2, 3, dtype=torch.float16)}, tmp_path / "x.bin")

    found = describe_checkpoint(tmp_path / "x.bin")

    assert (found["framework"], found["architecture"], found["classes"]) == (None, None, None)
    assert (found["format"], found["tensors"], found["parameters"]) == ("safetensors", 1, 6)
    assert found["dtypes"] == ["float16"]


def test_class_names_in_files_of_mmdetection_are_shown(tmp_path):
    found = describe_checkpoint(write_mmengine_file(tmp_path / "epoch_1.pth"))

    assert found["framework"] == "MMDetection"
    assert found["class_names"] == ["car", "bus"]
    assert found["entries"] == ["message_hub", "meta"]


def run_tool(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["inspect_checkpoint.py", *map(str, arguments)])
    runpy.run_path(str(PROJECT / "tools/inspect_checkpoint.py"), run_name="__main__")


def test_tool_prints_the_description(tmp_path, cfg, monkeypatch, capsys):
    path = save(tmp_path, cfg)

    run_tool(monkeypatch, path)
    shown = capsys.readouterr().out
    assert "class names   car, bus\n" in shown
    assert "pixels        RGB, mean [" in shown
    assert f"its SHA-256   {sha256(tmp_path / 'start.pkl')}\n" in shown

    run_tool(monkeypatch, path, "--json")
    assert json.loads(capsys.readouterr().out)["sha256"] == sha256(path)

    run_tool(monkeypatch, path, "--config")
    (tmp_path / "again.yaml").write_text(capsys.readouterr().out)
    assert load_cfg(tmp_path / "again.yaml").INPUT.FORMAT == "RGB"


def test_config_of_a_file_that_has_none_is_refused(tmp_path, monkeypatch):
    path = write_mmengine_file(tmp_path / "epoch_1.pth")
    with pytest.raises(SystemExit, match=r"error: .*epoch_1\.pth holds no config"):
        run_tool(monkeypatch, path, "--config")


def test_config_text_names_its_origin_and_reads_no_other_file(tmp_path):
    with pytest.raises(UserError, match=r"model\.pth:1: there is no config key _BASE_"):
        load_cfg_text("_BASE_: /etc/hostname\n", "model.pth")
    with pytest.raises(UserError, match=r"model\.pth:1: .*tag .*python/object.* is refused"):
        load_cfg_text("A: !!python/object/apply:os.getcwd []\n", "model.pth")
