"""Check the datasets of a config before anything is built or written."""

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import numpy as np
from detectron2.config import CfgNode

from d2ft.config import get_value, who_set
from d2ft.data.catalog import class_names, open_records, require_registered
from d2ft.data.columns import BITMAP, NO_MASK, RecordColumns
from d2ft.data.declared import NUM_CLASSES_KEYS
from d2ft.data.record_store import StoredRecords
from d2ft.errors import UserError
from d2ft.evaluation import require_evaluator
from d2ft.preflight.inspect_dataset import inspect_columns, read_columns


def check_datasets(cfg: CfgNode, *, eval_only: bool) -> dict[str, dict[str, Any]]:
    """
    Load every dataset of the config, and compare their classes with each other and the model.

    Args:
        cfg: whose DATASETS.TRAIN (unless ``eval_only``) and DATASETS.TEST are checked.
        eval_only: training sets are neither loaded nor needed.

    Returns:
        name -> ``{"images", "instances", "classes", "findings"}``.

    Raises:
        UserError: if a set is unknown, cannot be loaded, is empty, has annotations that the model
            cannot learn from or an evaluator that is not known, or does not fit the other sets or
            NUM_CLASSES.
    """
    train = () if eval_only else tuple(cfg.DATASETS.TRAIN)
    test = tuple(cfg.DATASETS.TEST)
    if not eval_only and not train:
        raise UserError(
            f"DATASETS.TRAIN is empty ({who_set(cfg, 'DATASETS.TRAIN')}): there is nothing to "
            "train on"
        )
    if eval_only and not test:
        raise UserError(
            f"DATASETS.TEST is empty ({who_set(cfg, 'DATASETS.TEST')}): there is nothing to evaluate"
        )
    names = tuple(dict.fromkeys(train + test))
    for name in names:
        require_registered(name)
    records = {name: load_records(name) for name in names}
    columns = {name: read_columns(name, records[name]) for name in names}
    _check_class_names(names)
    _check_num_classes(cfg, names[0])
    for name in test:
        require_evaluator(name)
    for name in names:
        _check_annotations(cfg, name, records[name], columns[name], to_learn=name in train)
    return {
        name: {
            "images": len(records[name]),
            "instances": len(columns[name].boxes),
            "classes": list(class_names(name)),
            "findings": inspect_columns(cfg, name, columns[name], is_test=name in test),
        }
        for name in names
    }


def load_records(name: str) -> Sequence[dict[str, Any]]:
    """
    Return the dataset dicts of a dataset, not to be changed.

    Raises:
        UserError: if it is not registered, cannot be loaded, is no list or is empty.
    """
    require_registered(name)
    try:
        records = open_records(name)
    except OSError as error:
        raise UserError(f"dataset {name!r} cannot be loaded: {error}") from error
    if not isinstance(records, (list, StoredRecords)):
        raise UserError(
            f"dataset {name!r} gives a {type(records).__name__} instead of a list of dataset "
            "dicts, which a resumable order needs; register a loader that returns a list"
        )
    if not len(records):
        raise UserError(f"dataset {name!r} holds no image")
    return records


def _check_class_names(names: Sequence[str]) -> None:
    first = class_names(names[0])
    for name in names[1:]:
        other = class_names(name)
        for row, (ours, theirs) in enumerate(zip_longest(first, other)):
            if ours != theirs:
                raise UserError(
                    f"{names[0]} and {name} have different classes: they have {len(first)} and "
                    f"{len(other)}, and differ first at index {row}: {_quoted(ours)} and "
                    f"{_quoted(theirs)}"
                )


def _quoted(class_name: str | None) -> str:
    return "no class" if class_name is None else repr(class_name)


def _check_num_classes(cfg: CfgNode, name: str) -> None:
    key = NUM_CLASSES_KEYS.get(cfg.MODEL.META_ARCHITECTURE)
    if key is None:
        return
    number, classes = get_value(cfg, key), class_names(name)
    if number != len(classes):
        raise UserError(
            f"{key} is {number} ({who_set(cfg, key)}), but {name} has {len(classes)} classes "
            f"({', '.join(classes[:10])}{', ...' if len(classes) > 10 else ''}); "
            f"set {key} to {len(classes)}"
        )


def _check_annotations(
    cfg: CfgNode,
    name: str,
    records: Sequence[dict[str, Any]],
    columns: RecordColumns,
    *,
    to_learn: bool,
) -> None:
    num_classes = len(class_names(name))
    bad = (columns.categories < 0) | (columns.categories >= num_classes)
    if cfg.MODEL.MASK_ON:
        bad |= columns.mask_kind == NO_MASK
        if to_learn and cfg.INPUT.MASK_FORMAT == "polygon":
            bad |= (columns.mask_kind == BITMAP) & ~columns.is_crowd
    if bad.any():
        row = int(np.argmax(bad))
        image = int(columns.image_of[row])
        record = records[image]
        annotation = record["annotations"][row - int(np.searchsorted(columns.image_of, image))]
        raise UserError(
            f"dataset {name!r}: {record['file_name']} has an annotation "
            f"{_describe_problem(annotation, num_classes, int(columns.mask_kind[row]))}"
        )
    if (
        to_learn
        and cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
        and "annotations" in records[0]
        and columns.is_crowd.all()
    ):
        raise UserError(
            f"dataset {name!r}: none of its {len(records)} images has an instance to learn from"
        )


def _describe_problem(annotation: dict[str, Any], num_classes: int, mask_kind: int) -> str:
    category = annotation.get("category_id")
    if not isinstance(category, (int, np.integer)) or not 0 <= category < num_classes:
        return f"of category_id {category}, but its classes are numbered 0 to {num_classes - 1}"
    if mask_kind == NO_MASK:
        return "without a segmentation: add it, or set MODEL.MASK_ON to False for boxes alone"
    return "whose segmentation is a bitmap: set INPUT.MASK_FORMAT to bitmask"
