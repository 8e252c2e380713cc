"""
What a checkpoint says of itself, and what its tensors tell where it says nothing.

The description that d2ft saves makes a file usable without the config and the datasets that it
came from. Files of other programs are recognised by the names of their tensors, never by the name
of the file.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode

import d2ft
from d2ft.checkpoint.safe_load import METADATA_KEY, load_checkpoint_file
from d2ft.checkpoint.torch_file import LEGACY_MAGIC, ZIP_MAGIC
from d2ft.files import sha256
from d2ft.host import bridge_detectron2


def describe_run(cfg: CfgNode) -> dict[str, Any]:
    """
    Return what the checkpoints of a run say of it, beside their class names.

    Returns:
        Plain data: ``pixel_format``, ``pixel_mean``, ``pixel_std``; ``config``, the YAML text of
        what the model and its input need; ``train_datasets``, ``test_datasets``; and the versions
        ``d2ft`` and ``detectron2``.
    """
    model = cfg.MODEL.clone()
    # Where the weights came from and which device ran them says nothing about the next run.
    del model["WEIGHTS"], model["DEVICE"]
    needed = CfgNode({
        "VERSION": cfg.VERSION,
        "MODEL": model,
        "INPUT": cfg.INPUT.clone(),
        "TEST": {"DETECTIONS_PER_IMAGE": cfg.TEST.DETECTIONS_PER_IMAGE},
    })  # fmt: skip
    return {
        "pixel_format": cfg.INPUT.FORMAT,
        "pixel_mean": list(cfg.MODEL.PIXEL_MEAN),
        "pixel_std": list(cfg.MODEL.PIXEL_STD),
        "config": needed.dump(),
        "train_datasets": list(cfg.DATASETS.TRAIN),
        "test_datasets": list(cfg.DATASETS.TEST),
        "d2ft": d2ft.__version__,
        "detectron2": bridge_detectron2().distribution,
    }


@dataclass(frozen=True)
class _Framework:
    """
    The names by which a program calls the parts of a detector; regular expressions.

    Attributes:
        marker: of some tensor that no other program has.
        block: of a convolution in the third of four stages, with the number of its block.
        classes: of the class scores of two-stage detectors, one row a class and the background.
        dense_classes, dense_boxes: of RetinaNet, a row for each anchor and class, or coordinate.
    """

    name: str
    marker: str
    block: str
    fpn: str
    rpn: str
    classes: str
    mask: str
    dense_classes: str
    dense_boxes: str


_NEVER = r"(?!)"
_FRAMEWORKS = (
    _Framework(
        "Detectron2",
        marker=r"backbone\.(bottom_up\.)?(stem|res\d)\.|proposal_generator\.",
        block=r"backbone\.(?:bottom_up\.)?res4\.(\d+)\.(conv\d)\.weight",
        fpn=r"backbone\.fpn_",
        rpn=r"proposal_generator\.",
        classes=r"roi_heads\.box_predictor(\.\d)?\.cls_score\.weight",
        mask=r"roi_heads\.mask_head\.",
        dense_classes=r"head\.cls_score\.weight",
        dense_boxes=r"head\.bbox_pred\.weight",
    ),
    _Framework(
        "torchvision detection",
        marker=r"backbone\.body\.",
        block=r"backbone\.body\.layer3\.(\d+)\.(conv\d)\.weight",
        fpn=r"backbone\.fpn\.",
        rpn=r"rpn\.head\.",
        classes=r"roi_heads\.box_predictor()\.cls_score\.weight",
        mask=r"roi_heads\.mask_head\.",
        dense_classes=r"head\.classification_head\.cls_logits\.weight",
        dense_boxes=r"head\.regression_head\.bbox_reg\.weight",
    ),
    _Framework(
        "MMDetection",
        marker=r"(backbone\.layer\d|neck|rpn_head|roi_head|bbox_head)\.",
        block=r"backbone\.layer3\.(\d+)\.(conv\d)\.weight",
        fpn=r"neck\.",
        rpn=r"rpn_head\.",
        classes=r"roi_head\.bbox_head(\.\d)?\.fc_cls\.weight",
        mask=r"roi_head\.mask_head\.",
        dense_classes=r"bbox_head\.retina_cls\.weight",
        dense_boxes=r"bbox_head\.retina_reg\.weight",
    ),
    _Framework(
        "Caffe2 (Detectron, MSRA)",
        marker=r"res\d_\d+_branch|conv1_w$",
        block=r"res4_(\d+)_(branch2[abc])_w",
        fpn=r"fpn_",
        rpn=r"conv_rpn_|rpn_",
        classes=r"cls_score()_w",
        mask=r"mask_fcn_logits_w",
        dense_classes=r"retnet_cls_pred_fpn3_w",
        dense_boxes=r"retnet_bbox_pred_fpn3_w",
    ),
    _Framework(
        "torchvision or timm backbone",
        marker=r"layer[1-4]\.\d+\.conv1\.weight",
        block=r"layer3\.(\d+)\.(conv\d)\.weight",
        fpn=_NEVER,
        rpn=_NEVER,
        classes=_NEVER,
        mask=_NEVER,
        dense_classes=_NEVER,
        dense_boxes=_NEVER,
    ),
)  # fmt: skip

# (convolutions of a block, blocks of the third stage) -> depth, table 1 of
# https://arxiv.org/abs/1512.03385
_RESNET_DEPTHS = {(2, 2): 18, (2, 6): 34, (3, 6): 50, (3, 23): 101, (3, 36): 152}


def guess_model(shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """
    Guess from names and shapes which model the tensors are of.

    Args:
        shapes: shapes of the tensors by name.

    Returns:
        ``framework``, ``architecture`` and ``classes`` (count without background); None for what
        the names do not tell.
    """

    def shape_of(pattern: str) -> Sequence[int] | None:
        return next((shape for name, shape in shapes.items() if re.fullmatch(pattern, name)), None)

    for program in _FRAMEWORKS:
        if any(re.match(program.marker, name) for name in shapes):
            break
    else:
        return {"framework": None, "architecture": None, "classes": None}

    def has(pattern: str) -> bool:
        return any(re.match(pattern, name) for name in shapes)

    scores = shape_of(program.classes)
    dense_scores, dense_boxes = shape_of(program.dense_classes), shape_of(program.dense_boxes)
    classes, head = None, "backbone"
    if scores:
        stages = {found[1] for name in shapes if (found := re.fullmatch(program.classes, name))}
        kind = "Mask R-CNN" if has(program.mask) else "Faster R-CNN"
        kind = kind if has(program.rpn) else kind.replace("Faster", "Fast")
        head = f"Cascade {kind}" if len(stages) > 1 else kind
        classes = scores[0] - 1
    elif dense_scores and dense_boxes:
        head, classes = "RetinaNet", dense_scores[0] * 4 // dense_boxes[0]
    elif has(program.rpn):
        head = "RPN"
    backbone = _guess_resnet(program.block, shapes)
    parts = [head, backbone, "FPN" if has(program.fpn) else ""]
    return {
        "framework": program.name,
        "architecture": " ".join(filter(None, parts)),
        "classes": classes,
    }


def _guess_resnet(block: str, shapes: Mapping[str, Sequence[int]]) -> str:
    found = [match for name in shapes if (match := re.fullmatch(block, name))]
    size = len({match[2] for match in found}), len({match[1] for match in found})
    depth = _RESNET_DEPTHS.get(size)
    return f"ResNet-{depth}" if depth else ""


def describe_checkpoint(path: str | Path) -> dict[str, Any]:
    """
    Tell what is in a checkpoint file of any format that d2ft reads.

    Returns:
        ``file``, ``bytes``, ``sha256``, ``format``; ``framework``, ``architecture``, ``classes``
        as :func:`guess_model`; ``tensors``, ``parameters`` (numbers), ``dtypes``; ``entries``, the
        other keys of the file; ``class_names`` or None; and under ``d2ft`` the description that d2ft saves, or None.

    Raises:
        UserError: if the file cannot be read safely.
    """
    path = Path(path)
    checkpoint = load_checkpoint_file(path)
    tensors: Mapping[str, torch.Tensor] = checkpoint["model"]
    own = checkpoint.get(METADATA_KEY)
    guess = guess_model({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    return {
        "file": str(path),
        "bytes": path.stat().st_size,
        "sha256": sha256(path),
        "format": _file_format(path),
        **guess,
        "tensors": len(tensors),
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "dtypes": sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values()}),
        "entries": sorted(str(key) for key in checkpoint if key not in ("model", METADATA_KEY)),
        "class_names": _class_names(checkpoint),
        METADATA_KEY: own if isinstance(own, dict) else None,
    }


def _file_format(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(32)
    if start.startswith(ZIP_MAGIC):
        return "PyTorch"
    if LEGACY_MAGIC in start:
        return "PyTorch, before 1.6"
    return "safetensors" if start[8:9] == b"{" else "pickle of arrays"


def _class_names(checkpoint: Mapping[str, Any]) -> list[str] | None:
    """Return the class names that a file carries: ours, or MMDetection 3's or 2's."""
    own, meta = checkpoint.get(METADATA_KEY), checkpoint.get("meta")
    meta = meta if isinstance(meta, dict) else {}
    dataset = meta.get("dataset_meta")
    candidates = [
        own.get("thing_classes") if isinstance(own, dict) else None,
        *(dataset.get(key) for key in ("classes", "CLASSES") if isinstance(dataset, dict)),
        meta.get("CLASSES"),
    ]
    for names in candidates:
        if isinstance(names, (list, tuple)) and names and all(isinstance(n, str) for n in names):
            return list(names)
    return None


def format_description(description: Mapping[str, Any]) -> str:
    """Return the text that ``tools/inspect_checkpoint.py`` prints."""
    own = description[METADATA_KEY] or {}
    names = description["class_names"]
    lines = [
        f"{description['file']}: {description['bytes'] / 1e6:.1f} MB, {description['format']}",
        f"  SHA-256       {description['sha256']}",
        f"  framework     {description['framework'] or 'unknown'}{', saved by d2ft' if own else ''}",
        f"  architecture  {description['architecture'] or 'unknown'}",
        f"  classes       {description['classes'] if description['classes'] is not None else 'unknown'}",
        f"  class names   {', '.join(names) if names else 'not in the file'}",
        f"  tensors       {description['tensors']} with {description['parameters']} numbers, "
        f"{', '.join(description['dtypes'])}",
        f"  also holds    {', '.join(description['entries']) or 'nothing'}",
    ]
    if not own:
        return "\n".join(lines)
    source = own.get("source") or {}
    lines += [
        f"  pixels        {own.get('pixel_format')}, mean {own.get('pixel_mean')}, "
        f"std {own.get('pixel_std')}",
        f"  trained on    {', '.join(own.get('train_datasets', ())) or 'unknown'}",
        f"  started from  {source.get('weights') or 'scratch'}",
        f"  its SHA-256   {source.get('sha256') or 'unknown'}",
        f"  written by    d2ft {own.get('d2ft')}, detectron2: {own.get('detectron2')}",
    ]
    return "\n".join(lines)
