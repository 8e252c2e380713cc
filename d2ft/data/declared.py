"""What a config declares about its data, and what its model settings follow from."""

import logging
from collections.abc import Iterable
from pathlib import PurePath
from typing import Any

import numpy as np
from detectron2.config import CfgNode

from d2ft.config import get_value, set_value, who_set
from d2ft.data.catalog import class_names, open_records
from d2ft.data.columns import BITMAP
from d2ft.data.custom import register_custom_datasets
from d2ft.data.derived import register_derived_datasets, with_sources
from d2ft.data.record_store import columns_of

logger = logging.getLogger(__name__)

# The key that holds the number of classes, by meta-architecture.
NUM_CLASSES_KEYS = {
    "GeneralizedRCNN": "MODEL.ROI_HEADS.NUM_CLASSES",
    "RetinaNet": "MODEL.RETINANET.NUM_CLASSES",
}

_ORIGIN = "the data of "


def register_declared_datasets(cfg: CfgNode, names: Iterable[str] | None = None) -> None:
    """
    Register what DATASETS.CUSTOM and DERIVED declare, in every process.

    Args:
        cfg: DATASETS is read.
        names: of the datasets in use; by default those of DATASETS.TRAIN and TEST. Of the declared
            sets these and their sources are registered.

    Raises:
        UserError: as :func:`register_custom_datasets` and :func:`register_derived_datasets`.
    """
    names = tuple((*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST) if names is None else names)
    register_custom_datasets(cfg, with_sources(cfg, names))
    register_derived_datasets(cfg, names)


def resolve_from_data(cfg: CfgNode, *, eval_only: bool = False) -> CfgNode:
    """
    Return a copy of ``cfg`` whose model fits the user's own data, if it is trained on such.

    The number of classes becomes that of the data, masks are switched off where no annotation has
    one, and INPUT.MASK_FORMAT follows from how masks are stored; each change is a line of the log.
    Replaced are defaults and what a file in a folder ``_base_`` says; what the user's own file, the
    command line or Python set is kept. Masks are never switched on: a model without a mask head was
    chosen, and its weights have none. Resolving again changes nothing.

    Args:
        cfg: its datasets are registered.
        eval_only: look at DATASETS.TEST in place of DATASETS.TRAIN.

    Raises:
        UserError: if a dataset cannot be loaded.
    """
    names = tuple(cfg.DATASETS.TEST if eval_only else cfg.DATASETS.TRAIN)
    if not any(name in cfg.DATASETS.CUSTOM for name in with_sources(cfg, names)):
        return cfg
    was_frozen = cfg.is_frozen()
    cfg = cfg.clone()
    cfg.defrost()
    key = NUM_CLASSES_KEYS.get(cfg.MODEL.META_ARCHITECTURE)
    if key is not None:
        classes = class_names(names[0])
        shown = f"{', '.join(classes[:10])}{', ...' if len(classes) > 10 else ''}"
        _follow(cfg, key, len(classes), names, f"its classes are {shown}")
    if cfg.MODEL.MASK_ON:
        # Crowd says nothing: COCO stores it as bitmaps among polygons, boxes alone may have it too.
        columns = [columns_of(open_records(name)) for name in names]
        kinds = np.concatenate([c.mask_kind[~c.is_crowd] for c in columns])
        if len(kinds) and not kinds.any():
            _follow(cfg, "MODEL.MASK_ON", False, names, "none of its annotations has a mask")
        elif len(kinds):
            bitmaps = int((kinds == BITMAP).sum())
            mask_format = "bitmask" if bitmaps else "polygon"
            reason = f"{bitmaps} of {len(kinds)} masks are bitmaps"
            _follow(cfg, "INPUT.MASK_FORMAT", mask_format, names, reason)
    if was_frozen:
        cfg.freeze()
    return cfg


def _follow(cfg: CfgNode, key: str, value: Any, names: tuple[str, ...], reason: str) -> None:
    origin, old = who_set(cfg, key), get_value(cfg, key)
    in_base = "_base_" in PurePath(origin.rpartition(":")[0]).parts
    if old == value or not (origin == "default" or in_base or origin.startswith(_ORIGIN)):
        return
    set_value(cfg, key, value, origin=_ORIGIN + ", ".join(names))
    logger.info(
        "%s is %s, not %s (%s), after %s: %s", key, value, old, origin, ", ".join(names), reason
    )
