"""Check the datasets of a config before anything is built or written."""

import logging
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog

from d2ft.config import who_set
from d2ft.data.catalog import class_names, require_registered
from d2ft.errors import UserError

logger = logging.getLogger(__name__)

# The key that holds the number of classes, by meta-architecture. Others are not checked.
_NUM_CLASSES_KEYS = {
    "GeneralizedRCNN": "MODEL.ROI_HEADS.NUM_CLASSES",
    "RetinaNet": "MODEL.RETINANET.NUM_CLASSES",
}


def check_datasets(cfg: CfgNode, *, eval_only: bool) -> dict[str, dict[str, Any]]:
    """
    Load every dataset of the config, and compare their classes with each other and the model.

    Args:
        cfg: whose DATASETS.TRAIN (unless ``eval_only``) and DATASETS.TEST are checked.
        eval_only: training sets are neither loaded nor needed.

    Returns:
        name -> ``{"images", "instances", "classes"}``.

    Raises:
        UserError: if a set is unknown, cannot be loaded, is empty, has categories beyond its
            classes, or does not fit the other sets or NUM_CLASSES.
    """
    names = ([] if eval_only else list(cfg.DATASETS.TRAIN)) + list(cfg.DATASETS.TEST)
    if not eval_only and not cfg.DATASETS.TRAIN:
        raise UserError(
            "DATASETS.TRAIN is empty "
            f"({who_set(cfg, 'DATASETS.TRAIN')}): there is nothing to train on"
        )
    if eval_only and not cfg.DATASETS.TEST:
        raise UserError(
            f"DATASETS.TEST is empty ({who_set(cfg, 'DATASETS.TEST')}): there is nothing to evaluate"
        )
    for name in names:
        require_registered(name)
    _check_class_names(names)
    _check_num_classes(cfg, names[0])
    return {name: _summarize(name) for name in dict.fromkeys(names)}


def _check_class_names(names: list[str]) -> None:
    first = class_names(names[0])
    for name in names[1:]:
        other = class_names(name)
        if other == first:
            continue
        row = next(
            (i for i, pair in enumerate(zip(first, other, strict=False)) if pair[0] != pair[1]),
            min(len(first), len(other)),
        )
        raise UserError(
            f"{names[0]} and {name} have different classes: they have {len(first)} and "
            f"{len(other)}, and differ first at index {row}: "
            f"{_class_at(first, row)} and {_class_at(other, row)}"
        )


def _class_at(classes: tuple[str, ...], index: int) -> str:
    return repr(classes[index]) if index < len(classes) else "no class"


def _check_num_classes(cfg: CfgNode, name: str) -> None:
    key = _NUM_CLASSES_KEYS.get(cfg.MODEL.META_ARCHITECTURE)
    if key is None:
        return
    node = cfg
    for part in key.split("."):
        node = node[part]
    classes = class_names(name)
    if node != len(classes):
        raise UserError(
            f"{key} is {node} ({who_set(cfg, key)}), but {name} has {len(classes)} classes "
            f"({', '.join(classes[:10])}{', ...' if len(classes) > 10 else ''}); "
            f"set {key} to {len(classes)}"
        )


def _summarize(name: str) -> dict[str, Any]:
    try:
        records = DatasetCatalog.get(name)
    except OSError as error:
        raise UserError(f"dataset {name!r} cannot be loaded: {error}") from error
    classes = class_names(name)
    if not len(records):
        raise UserError(f"dataset {name!r} holds no image")
    instances = 0
    for record in records if isinstance(records, list) else ():
        for annotation in record.get("annotations", ()):
            instances += 1
            category = annotation["category_id"]
            if not 0 <= category < len(classes):
                raise UserError(
                    f"dataset {name!r}: {record['file_name']} has an annotation of category_id "
                    f"{category}, but its {len(classes)} classes are numbered 0 to "
                    f"{len(classes) - 1}"
                )
    return {"images": len(records), "instances": instances, "classes": list(classes)}
