"""
Compare the detections that ``record_mmdet.py`` recorded with those of the converted models.

    python tests/checkpoint/convert/compare_mmdet.py output/mmdet

Prints a table of the largest differences and ends with 1 if one is beyond what is promised.
"""

import argparse
import lzma
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import Instances
from tabulate import tabulate

from d2ft.checkpoint.checkpointer import FinetuneCheckpointer
from d2ft.checkpoint.convert.build import check_required_config, format_yaml, required_config
from d2ft.checkpoint.weights import read_weights
from d2ft.config import load_cfg

PROJECT = Path(__file__).resolve().parents[3]
BASE = PROJECT / "configs/_base_/models/mask_rcnn_r50_fpn.yaml"

# Pixels, probability, intersection over union.
BOX_TOLERANCE, SCORE_TOLERANCE, MASK_IOU = 0.01, 1e-4, 0.999

# What the shapes of the recorded models follow.
NARROW = [
    "MODEL.RESNETS.STEM_OUT_CHANNELS", 4,
    "MODEL.RESNETS.RES2_OUT_CHANNELS", 8,
    "MODEL.RESNETS.WIDTH_PER_GROUP", 2,
    "MODEL.FPN.OUT_CHANNELS", 8,
    "MODEL.ROI_BOX_HEAD.FC_DIM", 16,
    "MODEL.ROI_MASK_HEAD.CONV_DIM", 8,
    "MODEL.ROI_HEADS.NUM_CLASSES", 4,
    "MODEL.RETINANET.NUM_CLASSES", 4,
]  # fmt: skip
ARCHITECTURES = {
    "mask_rcnn": [],
    "faster_rcnn": ["MODEL.MASK_ON", False],
    "cascade_mask_rcnn": ["MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True],
    "retinanet": [
        "MODEL.META_ARCHITECTURE", "RetinaNet",
        "MODEL.MASK_ON", False,
        "MODEL.RESNETS.OUT_FEATURES", "('res3', 'res4', 'res5')",
        "MODEL.FPN.IN_FEATURES", "('res3', 'res4', 'res5')",
    ],
}  # fmt: skip

# Of a Cascade: with Detectron2's own mean over the stages, against the masks of all three mask
# heads. Of a RetinaNet: with boxes that are clipped after the suppression of overlaps.
AS_IT_IS = ", as it is"


class Difference(NamedTuple):
    """
    The largest differences between recorded and found detections.

    Attributes:
        recorded, found, paired: numbers of detections; a pair is of one class and the nearest.
        box: pixels of the image before it was resized.
        score: probability.
        mask_iou: the smallest, of masks that are not empty; None without masks.
        mask_pixels: the largest number in which two masks differ; None without masks.
    """

    recorded: int
    found: int
    paired: int
    box: float
    score: float
    mask_iou: float | None
    mask_pixels: int | None

    @property
    def is_within_tolerance(self) -> bool:
        """Whether each detection has its partner, the same as far as is promised."""
        return (
            self.recorded == self.found == self.paired
            and self.box < BOX_TOLERANCE
            and self.score < SCORE_TOLERANCE
            # One pixel whose probability is 0.5 up to rounding is more than 0.001 of a small mask.
            and (self.mask_iou is None or self.mask_iou > MASK_IOU or self.mask_pixels == 1)
        )


def build_converted(weights: Path, name: str) -> tuple[CfgNode, torch.nn.Module]:
    """Return the Detectron2 model with the weights of an MMDetection file, and its config."""
    checkpoint = read_weights(str(weights))
    required = required_config(checkpoint)
    lines = weights.with_suffix(".yaml")
    lines.write_text(format_yaml(required | {"VERSION": 2}))
    config = weights.with_name("config.yaml")
    config.write_text(f"_BASE_: ['{BASE}', '{lines}']\n")
    architecture = name.rpartition("_")[0]
    is_narrow = len(checkpoint["model"]["backbone.bottom_up.stem.conv1.weight"]) < 64
    options = ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", str(weights)]
    cfg = load_cfg(config, [*options, *(NARROW if is_narrow else []), *ARCHITECTURES[architecture]])
    check_required_config(cfg, checkpoint, cfg.MODEL.WEIGHTS)
    model = build_model(cfg).eval()
    FinetuneCheckpointer(model, every_tensor=True).load(cfg.MODEL.WEIGHTS)
    return cfg, model


@torch.no_grad()
def detect(cfg: CfgNode, model: torch.nn.Module, record: Any) -> Instances:
    """Return what a model finds in the recorded image, in pixels of the image before resizing."""
    image = record["image"] if cfg.INPUT.FORMAT == "BGR" else record["image"][:, :, ::-1]
    height, width = record["original_size"].tolist()
    inputs = torch.from_numpy(image.transpose(2, 0, 1).copy())
    return model([{"image": inputs, "height": height, "width": width}])[0]["instances"]


def average_logits(model: torch.nn.Module) -> None:
    """
    Let a Cascade of Detectron2 score as MMDetection's: the softmax of the mean of the logits.

    https://github.com/open-mmlab/mmdetection/blob/v3.3.0/mmdet/models/roi_heads/cascade_roi_head.py
    """
    predictors = list(model.roi_heads.box_predictor)
    logits: list[torch.Tensor] = []

    # Detectron2 asks the stages in order, and divides the sum of their answers by their number.
    def predict_probs(predictions: Any, proposals: list[Instances]) -> tuple[torch.Tensor, ...]:
        logits.append(predictions[0])
        mean = torch.stack(logits).mean(0)
        is_last = len(logits) == len(predictors)
        if is_last:
            logits.clear()
        scores = len(predictors) * mean.softmax(-1) if is_last else torch.zeros_like(mean)
        return scores.split([len(proposal) for proposal in proposals])

    for predictor in predictors:
        predictor.predict_probs = predict_probs


def clip_before_nms(model: torch.nn.Module) -> None:
    """
    Let Detectron2's RetinaNet clip boxes to the image before it suppresses overlaps, not after.

    https://github.com/open-mmlab/mmdetection/blob/v3.3.0/mmdet/models/dense_heads/base_dense_head.py
    """
    decode = model._decode_multi_level_predictions

    def decode_and_clip(*args: Any) -> Instances:
        found = decode(*args)
        found.pred_boxes.clip(found.image_size)
        return found[found.pred_boxes.nonempty()]

    model._decode_multi_level_predictions = decode_and_clip


def measure(record: Any, found: Instances, masks_key: str = "masks") -> Difference:
    """Pair each recorded detection with the nearest found one of its class, and compare them."""
    boxes, labels = found.pred_boxes.tensor.numpy(), found.pred_classes.numpy()
    distance = np.abs(record["boxes"][:, None] - boxes[None]).max(2)
    distance[record["labels"][:, None] != labels[None]] = np.inf
    nearest = distance.argmin(1)
    reached = distance.min(1)
    is_pair = reached < 1  # pixel: else they are not the same detection
    partners = nearest[is_pair]
    scores = np.abs(record["scores"][is_pair] - found.scores.numpy()[partners])
    iou = pixels = None
    if found.has("pred_masks"):
        masks = found.pred_masks.numpy()
        own = np.unpackbits(record[masks_key], axis=-1, count=masks.shape[-1]).astype(bool)[is_pair]
        masks = masks[partners]
        union, overlap = (own | masks).sum((1, 2)), (own & masks).sum((1, 2))
        iou = float((overlap[union > 0] / union[union > 0]).min())
        pixels = int((union - overlap).max())
    return Difference(
        recorded=len(distance),
        found=len(found),
        paired=len(set(partners.tolist())),
        box=float(reached[is_pair].max()),
        score=float(scores.max()),
        mask_iou=iou,
        mask_pixels=pixels,
    )


def compare(folder: Path, name: str) -> dict[str, Difference]:
    """
    Compare the recorded detections of a model with those of its conversion.

    Returns:
        By what was compared. For a Cascade and a RetinaNet two: without what Detectron2 does
        otherwise, which shows that the weights arrived, and as it is.
    """
    with tempfile.TemporaryDirectory() as temporary, np.load(folder / f"{name}.npz") as record:
        weights = Path(temporary) / "epoch_1.pth"
        with lzma.open(folder / f"{name}.pth.xz") as file:
            weights.write_bytes(file.read())
        cfg, model = build_converted(weights, name)
        found = {name: measure(record, detect(cfg, model, record))}
        if name.startswith(("cascade", "retinanet")):
            found = {f"{name}{AS_IT_IS}": found[name]}
            is_cascade = name.startswith("cascade")
            (average_logits if is_cascade else clip_before_nms)(model)
            masks = "masks_of_last_head" if is_cascade else "masks"
            found[name] = measure(record, detect(cfg, model, record), masks)
        return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    records = sorted(args.folder.glob("*.npz"))
    if not records:
        sys.exit(f"{args.folder}: holds no records; record_mmdet.py beside this file makes them")
    rows: dict[str, Difference] = {}
    for path in records:
        rows |= compare(args.folder, path.stem)
    print(tabulate([(name, *row) for name, row in rows.items()], ("model", *Difference._fields)))
    with np.load(records[0]) as record:
        print(f"recorded with {record['versions']}; compared with torch {torch.__version__}")
    sys.exit(
        0
        if all(row.is_within_tolerance for name, row in rows.items() if AS_IT_IS not in name)
        else 1
    )


if __name__ == "__main__":
    main()
