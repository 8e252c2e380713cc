"""
Record what MMDetection's own models detect, for ``compare_mmdet.py`` and the tests.

    python tests/checkpoint/convert/record_mmdet.py output/mmdet
    python tests/checkpoint/convert/record_mmdet.py --narrow tests/checkpoint/convert/data/mmdet

The second command made what the tests read. Runs in an environment with MMDetection 3.x and
PyTorch, without Detectron2 and d2ft. The releases that run with current PyTorch are onedl-mmengine,
onedl-mmcv and onedl-mmdetection; mmcv is built from its sdist, with c++17 replaced by c++20 in its
setup.py:

    pip install "setuptools<81" torch==2.14.1 torchvision==0.29.1 onedl-mmengine==0.10.12
    pip download --no-deps --no-binary :all: --no-build-isolation onedl-mmcv==2.3.6
    MMCV_WITH_OPS=1 pip install --no-build-isolation ./onedl_mmcv-2.3.6
    pip install --no-build-isolation onedl-mmdetection==3.5.1

Of each model there will be ``NAME.pth.xz``, the checkpoint as MMEngine saves it after an epoch, and
``NAME.npz`` with the image, the detections and the versions. The weights are random from a seed,
scaled so that each model finds many objects of many classes.
"""

import argparse
import io
import lzma
import sys
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import torch

try:
    # Asked for by one augmentation of MMDetection 3.5, and not installable beside NumPy 2.
    sys.modules |= {
        f"imgaug{name}": MagicMock()
        for name in (
            "",
            ".augmenters",
            ".augmentables",
            ".augmentables.lines",
            ".augmentables.segmaps",
        )
    }
    import mmcv
    import mmdet
    import mmengine
    from mmdet.registry import MODELS
    from mmdet.structures import DetDataSample
    from mmdet.utils import register_all_modules
    from mmengine.config import Config
    from mmengine.logging import HistoryBuffer
except ImportError as error:
    sys.exit(f"skipped: MMDetection is not installed here ({error}); see the head of this file")

# By whether the model is narrow. Neither size is a multiple of 32, so images are padded.
IMAGE_SIZES = {False: (300, 420), True: (88, 136)}
CLASSES = {False: 80, True: 4}
CAFFE = {
    "data_preprocessor": {"mean": [103.53, 116.28, 123.675], "std": [1.0, 1.0, 1.0], "bgr_to_rgb": False},
    "style": "caffe",
}  # fmt: skip
PYTORCH = {
    "data_preprocessor": {"mean": [123.675, 116.28, 103.53], "std": [58.395, 57.12, 57.375], "bgr_to_rgb": True},
    "style": "pytorch",
}  # fmt: skip


def two_stage(style: dict[str, Any], *, masks: bool, narrow: bool) -> dict[str, Any]:
    """Return the model of configs/_base_/models/mask_rcnn_r50_fpn.py and faster_rcnn_r50_fpn.py."""
    channels = 8 if narrow else 256
    model = base(style, narrow) | {
        "type": "MaskRCNN" if masks else "FasterRCNN",
        "rpn_head": {
            "type": "RPNHead",
            "in_channels": channels,
            "feat_channels": channels,
            "anchor_generator": {
                "type": "AnchorGenerator",
                "scales": [8],
                "ratios": [0.5, 1.0, 2.0],
                "strides": [4, 8, 16, 32, 64],
            },
            "bbox_coder": {"type": "DeltaXYWHBBoxCoder", "target_stds": [1.0, 1.0, 1.0, 1.0]},
        },
        "roi_head": {
            "type": "StandardRoIHead",
            "bbox_roi_extractor": roi_extractor(7, channels),
            "bbox_head": bbox_head([0.1, 0.1, 0.2, 0.2], agnostic=False, narrow=narrow),
        },
        "test_cfg": {
            "rpn": {
                "nms_pre": 1000,
                "max_per_img": 1000,
                "nms": {"type": "nms", "iou_threshold": 0.7},
                "min_bbox_size": 0,
            },
            "rcnn": {
                "score_thr": 0.05,
                "nms": {"type": "nms", "iou_threshold": 0.5},
                "max_per_img": 100,
            },
        },
    }
    if masks:
        model["roi_head"] |= {
            "mask_roi_extractor": roi_extractor(14, channels),
            "mask_head": {
                "type": "FCNMaskHead",
                "num_convs": 4,
                "in_channels": channels,
                "conv_out_channels": channels,
                "num_classes": CLASSES[narrow],
            },
        }
        model["test_cfg"]["rcnn"]["mask_thr_binary"] = 0.5
    return model


def cascade(style: dict[str, Any], *, masks: bool, narrow: bool) -> dict[str, Any]:
    """Return the model of configs/_base_/models/cascade_mask_rcnn_r50_fpn.py, or without masks."""
    model = two_stage(style, masks=masks, narrow=narrow)
    head = model["roi_head"]
    model["type"], head["type"] = "CascadeRCNN", "CascadeRoIHead"
    head |= {"num_stages": 3, "stage_loss_weights": [1, 0.5, 0.25]}
    head["bbox_head"] = [
        bbox_head(stds, agnostic=True, narrow=narrow)
        for stds in ([0.1, 0.1, 0.2, 0.2], [0.05, 0.05, 0.1, 0.1], [0.033, 0.033, 0.067, 0.067])
    ]
    return model


def retinanet(style: dict[str, Any], *, narrow: bool) -> dict[str, Any]:
    """Return the model of configs/_base_/models/retinanet_r50_fpn.py."""
    channels = 8 if narrow else 256
    model = base(style, narrow) | {
        "type": "RetinaNet",
        "bbox_head": {
            "type": "RetinaHead",
            "num_classes": CLASSES[narrow],
            "in_channels": channels,
            "stacked_convs": 4,
            "feat_channels": channels,
            "anchor_generator": {
                "type": "AnchorGenerator",
                "octave_base_scale": 4,
                "scales_per_octave": 3,
                "ratios": [0.5, 1.0, 2.0],
                "strides": [8, 16, 32, 64, 128],
            },
            "bbox_coder": {"type": "DeltaXYWHBBoxCoder", "target_stds": [1.0, 1.0, 1.0, 1.0]},
        },
        "test_cfg": {
            "nms_pre": 1000,
            "min_bbox_size": 0,
            "score_thr": 0.05,
            "nms": {"type": "nms", "iou_threshold": 0.5},
            "max_per_img": 100,
        },
    }
    model["neck"] |= {"start_level": 1, "add_extra_convs": "on_input"}
    return model


def base(style: dict[str, Any], narrow: bool) -> dict[str, Any]:
    """Return images, backbone and neck."""
    width = 2 if narrow else 64
    return {
        "data_preprocessor": {
            "type": "DetDataPreprocessor",
            "pad_mask": True,
            "pad_size_divisor": 32,
            **style["data_preprocessor"],
        },
        "backbone": {
            "type": "ResNet",
            "depth": 50,
            "stem_channels": 2 * width if narrow else width,
            "base_channels": width,
            "frozen_stages": 1,
            "norm_eval": True,
            "style": style["style"],
        },
        "train_cfg": None,
        "neck": {
            "type": "FPN",
            "in_channels": [4 * width * 2**i for i in range(4)],
            "out_channels": 8 if narrow else 256,
            "num_outs": 5,
        },
    }


def roi_extractor(size: int, channels: int) -> dict[str, Any]:
    """Return the RoIAlign over the four finest levels."""
    return {
        "type": "SingleRoIExtractor",
        "roi_layer": {"type": "RoIAlign", "output_size": size, "sampling_ratio": 0},
        "out_channels": channels,
        "featmap_strides": [4, 8, 16, 32],
    }


def bbox_head(stds: list[float], *, agnostic: bool, narrow: bool) -> dict[str, Any]:
    """Return a box head of two shared linear layers."""
    return {
        "type": "Shared2FCBBoxHead",
        "in_channels": 8 if narrow else 256,
        "fc_out_channels": 16 if narrow else 1024,
        "roi_feat_size": 7,
        "num_classes": CLASSES[narrow],
        "reg_class_agnostic": agnostic,
        "bbox_coder": {"type": "DeltaXYWHBBoxCoder", "target_stds": stds},
    }


def build_models(narrow: bool) -> dict[str, dict[str, Any]]:
    """Return every recorded model's config by name."""
    models = {
        "mask_rcnn_caffe": two_stage(CAFFE, masks=True, narrow=narrow),
        "mask_rcnn_pytorch": two_stage(PYTORCH, masks=True, narrow=narrow),
        "cascade_mask_rcnn_pytorch": cascade(PYTORCH, masks=True, narrow=narrow),
        "retinanet_pytorch": retinanet(PYTORCH, narrow=narrow),
    }
    if not narrow:
        models["faster_rcnn_caffe"] = two_stage(CAFFE, masks=False, narrow=narrow)
        models["retinanet_caffe"] = retinanet(CAFFE, narrow=narrow)
    return models


@torch.no_grad()
def randomise(model: torch.nn.Module, image: np.ndarray, *, is_caffe: bool) -> None:
    """Give a model weights with which it finds objects of every class, from the current seed."""
    for key, tensor in model.state_dict().items():
        if key.endswith("running_mean") and not is_caffe:
            tensor.normal_(0, 0.1)
        elif key.endswith("running_var"):
            tensor.uniform_(0.5, 1.5)
        elif key.endswith("bn3.weight"):
            tensor.fill_(0.2)  # keeps the sum of sixteen blocks in range
        elif key.endswith("bias") and ".bn" not in key:
            tensor.normal_(0, 0.01)
    if hasattr(model, "roi_head"):
        spread_outputs(model, image, model.rpn_head.rpn_cls, 0, 1)
        spread_outputs(model, image, model.rpn_head.rpn_reg, 0, 0.3)
        heads = model.roi_head.bbox_head
        for head in heads if isinstance(heads, torch.nn.ModuleList) else [heads]:
            spread_outputs(model, image, head.fc_cls, 0, 3)
            spread_outputs(model, image, head.fc_reg, 0, 1)
        if model.with_mask:
            heads = model.roi_head.mask_head
            for head in heads if isinstance(heads, torch.nn.ModuleList) else [heads]:
                spread_outputs(model, image, head.conv_logits, 0, 2)
    else:
        spread_outputs(model, image, model.bbox_head.retina_cls, -4, 1)
        # Boxes of about a quarter of their anchor, some of which reach over the border.
        mean, std = torch.tensor([[0.03, 0.03, -1.5, -1.5], [0.1, 0.1, 0.2, 0.2]]).repeat(1, 9)
        spread_outputs(model, image, model.bbox_head.retina_reg, mean, std)
    # A file of values that a few bits tell is small once compressed.
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(tensor.bfloat16().float())


def spread_outputs(
    model: torch.nn.Module, image: np.ndarray, layer: Any, mean: Any, std: Any
) -> None:
    """Scale a layer so that each of its channels has this mean and deviation over an image."""
    outputs: list[torch.Tensor] = []
    hook = layer.register_forward_hook(lambda layer, inputs, output: outputs.append(output))
    detect(model, image)
    hook.remove()
    rows = torch.cat([output.movedim(1, -1).flatten(0, -2) for output in outputs])
    scale = std / rows.std(0)
    layer.weight.mul_(scale.view(-1, *[1] * (layer.weight.dim() - 1)))
    layer.bias.copy_(mean + scale * (layer.bias - rows.mean(0)))


@torch.no_grad()
def detect(model: torch.nn.Module, image: np.ndarray) -> dict[str, np.ndarray]:
    """Return the detections in a (H, W, 3) BGR image that is a resized one of 1.25 the size."""
    height, width = image.shape[:2]
    full_height, full_width = original_size(image)
    sample = DetDataSample(
        metainfo={
            "img_shape": (height, width),
            "ori_shape": (full_height, full_width),
            "scale_factor": (width / full_width, height / full_height),
        }
    )
    inputs = torch.from_numpy(image.transpose(2, 0, 1).copy())
    found = model.test_step({"inputs": [inputs], "data_samples": [sample]})[0].pred_instances
    detections = {
        "boxes": found.bboxes.numpy(),
        "scores": found.scores.numpy(),
        "labels": found.labels.numpy(),
    }
    if "masks" in found:
        detections["masks"] = np.packbits(np.asarray(found.masks.cpu(), dtype=bool), axis=-1)
    return detections


def original_size(image: np.ndarray) -> tuple[int, int]:
    """Return (height, width) of the image before it was resized."""
    return image.shape[0] * 5 // 4, image.shape[1] * 5 // 4


def random_image(height: int, width: int) -> np.ndarray:
    """Return (H, W, 3) of 0..255: blobs and noise."""
    blobs = torch.nn.functional.interpolate(torch.rand(1, 3, 4, 6), (height, width))[0]
    image = 255 * (0.8 * blobs + 0.2 * torch.rand(3, height, width))
    return image.round().byte().numpy().transpose(1, 2, 0).copy()


def checkpoint_bytes(model: torch.nn.Module, config: dict[str, Any], classes: int) -> bytes:
    """Return what MMEngine's CheckpointHook writes after an epoch."""
    history = HistoryBuffer()
    history.update(np.float64(1.5), 1)
    content = {
        "meta": {
            "epoch": 1,
            "cfg": Config({"model": config}).pretty_text,
            "mmengine_version": mmengine.__version__,
            "dataset_meta": {"classes": tuple(f"class {i}" for i in range(classes))},
        },
        "state_dict": model.state_dict(),
        "message_hub": {"log_scalars": {"train/loss": history}, "runtime_info": {"epoch": 1}},
    }
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--narrow", action="store_true", help="a thirty-second of the width")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    register_all_modules()
    versions = {
        "mmdet": mmdet.__version__,
        "mmcv": mmcv.__version__,
        "mmengine": mmengine.__version__,
        "torch": torch.__version__,
    }
    for name, config in build_models(args.narrow).items():
        torch.manual_seed(0)
        image = random_image(*IMAGE_SIZES[args.narrow])
        model = MODELS.build(Config({"model": config}).model).eval()
        randomise(model, image, is_caffe=name.endswith("caffe"))
        detections = detect(model, image)
        checkpoint = checkpoint_bytes(model, config, CLASSES[args.narrow])
        if name.startswith("cascade"):
            # Detectron2 has only the last of three mask heads: what it alone would give.
            heads = model.roi_head.mask_head
            for head in heads[:-1]:
                head.load_state_dict(heads[-1].state_dict())
            detections["masks_of_last_head"] = detect(model, image)["masks"]
        with lzma.open(
            args.folder / f"{name}.pth.xz", "wb", preset=6 if args.narrow else 0
        ) as file:
            file.write(checkpoint)
        np.savez_compressed(
            args.folder / f"{name}.npz",
            image=image,
            original_size=original_size(image),
            versions=" ".join(f"{key} {value}" for key, value in versions.items()),
            **detections,
        )
        labels, scores = detections["labels"], detections["scores"]
        print(
            f"{name}: {len(labels)} detections of {len(set(labels.tolist()))} classes, "
            f"scores {scores.min():.3f} to {scores.max():.3f}"
        )


if __name__ == "__main__":
    main()
