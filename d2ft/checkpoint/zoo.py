"""
What is known about weights from their address alone.

Only the address counts: a local copy may have been renamed, or trained further.
"""

from d2ft.labels import COCO_CLASSES

# Detectron2 resolves the first form to the second:
# https://github.com/facebookresearch/detectron2/blob/main/detectron2/utils/file_io.py
_DETECTRON2_PREFIXES = ("detectron2://", "https://dl.fbaipublicfiles.com/detectron2/")
_BACKBONE_PREFIXES = (
    *(f"{prefix}ImageNetPretrained/" for prefix in _DETECTRON2_PREFIXES),
    "catalog://ImageNetPretrained/",
    "https://dl.fbaipublicfiles.com/detectron/ImageNetPretrained/",
)

# The folders of https://github.com/facebookresearch/detectron2/blob/main/MODEL_ZOO.md whose
# models have one row per class of COCO, in the order of COCO's category ids.
_CLASSES_BY_FOLDER: dict[str, tuple[str, ...]] = {
    "COCO-Detection": COCO_CLASSES,
    "COCO-InstanceSegmentation": COCO_CLASSES,
    "COCO-Keypoints": ("person",),
}


def source_classes(url_or_path: str) -> tuple[str, ...] | None:
    """
    Return the class names of weights in Detectron2's zoo, in the order of their rows.

    Returns:
        None if the address is not of the zoo, or the weights there have no class rows of COCO.
    """
    for prefix in _DETECTRON2_PREFIXES:
        if url_or_path.startswith(prefix):
            folder = url_or_path[len(prefix) :].partition("/")[0]
            return _CLASSES_BY_FOLDER.get(folder)
    return None


def is_backbone_only(url_or_path: str) -> bool:
    """Whether the address is that of an ImageNet backbone, which has no detection heads."""
    return url_or_path.startswith(_BACKBONE_PREFIXES)
