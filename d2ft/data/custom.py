"""
Datasets of one's own, declared in YAML under DATASETS.CUSTOM by name.

    DATASETS:
      CUSTOM:
        my_train: {FORMAT: coco, JSON: data/train.json, IMAGES: data/images}

Paths are relative to the working directory.
"""

import difflib
import functools
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from d2ft.config import who_set
from d2ft.data.datasets.cityscapes import register_cityscapes_instances
from d2ft.data.datasets.coco import register_coco_instances
from d2ft.data.datasets.kitti import register_kitti_instances
from d2ft.data.datasets.pascal_voc import register_voc_instances
from d2ft.data.datasets.wider_face import register_wider_face_instances
from d2ft.errors import UserError


@dataclass(frozen=True)
class _Format:
    """How a format is registered; keys of an entry -> arguments of that function."""

    register: Callable[..., None]
    required: Mapping[str, str]
    optional: Mapping[str, str] = field(default_factory=dict)


_FORMATS = {
    "coco": _Format(register_coco_instances, {"JSON": "json_file", "IMAGES": "image_root"}),
    # Classes that are not given are those of the XML files, not VOC's own 20.
    "voc": _Format(
        functools.partial(register_voc_instances, thing_classes=None),
        {"ROOT": "root", "SPLIT": "split"},
        {"CLASSES": "thing_classes"},
    ),
    "cityscapes": _Format(
        register_cityscapes_instances, {"IMAGES": "image_dir", "LABELS": "gt_dir"}
    ),
    "kitti": _Format(
        register_kitti_instances,
        {"ROOT": "root"},
        {"SPLIT_FILE": "split_file", "CLASSES": "thing_classes"},
    ),
    "wider_face": _Format(
        register_wider_face_instances,
        {"IMAGES": "image_dir", "ANNOTATIONS": "annotations"},
        {"GROUND_TRUTH": "ground_truth_dir"},
    ),
}

_FOLDERS = ("GROUND_TRUTH", "IMAGES", "LABELS", "ROOT")
_FILES = ("ANNOTATIONS", "JSON", "SPLIT_FILE")


def register_custom_datasets(cfg: CfgNode, names: Iterable[str]) -> None:
    """
    Check DATASETS.CUSTOM whole, and register those of its sets that are among ``names``.

    No annotation is read before class names or the data are asked for.

    Args:
        cfg: DATASETS.CUSTOM is read.
        names: of datasets; others than those of CUSTOM are ignored.

    Raises:
        UserError: for an entry that is wrong, names a path that does not exist, or has the name of
            a dataset that is registered already.
    """
    entries = cfg.DATASETS.CUSTOM
    for name in entries:
        _check_entry(cfg, name)
    for name in dict.fromkeys(names):
        if name in entries:
            _register(cfg, name)


def _check_entry(cfg: CfgNode, name: str) -> None:
    if not isinstance(name, str) or not name or "." in name:
        raise UserError(
            f"DATASETS.CUSTOM holds the name {name!r}: a name is a string that is not empty, without "
            "dots, which separate keys"
        )
    key = f"DATASETS.CUSTOM.{name}"
    entry = cfg.DATASETS.CUSTOM[name]
    if not isinstance(entry, CfgNode):
        raise UserError(
            f"{key} ({who_set(cfg, key)}) is {entry!r}, not a group of keys such as "
            "{FORMAT: coco, JSON: data/train.json, IMAGES: data/images}"
        )
    if "FORMAT" not in entry:
        raise UserError(f"{key}{_place(cfg, key)} has no FORMAT; known are {', '.join(_FORMATS)}")
    if not isinstance(entry.FORMAT, str) or entry.FORMAT not in _FORMATS:
        hint = _hint(str(entry.FORMAT).lower(), _FORMATS)
        raise UserError(f"{key}.FORMAT ({who_set(cfg, f'{key}.FORMAT')}) is {entry.FORMAT!r}{hint}")
    known = _FORMATS[entry.FORMAT]
    keys = {"FORMAT": "", **known.required, **known.optional}
    for name_of_key, value in entry.items():
        if name_of_key not in keys:
            raise UserError(
                f"there is no key {key}.{name_of_key}{_place(cfg, f'{key}.{name_of_key}')} with FORMAT "
                f"{entry.FORMAT}{_hint(name_of_key.upper(), keys)}"
            )
        _check_value(cfg, f"{key}.{name_of_key}", name_of_key, value)
    missing = [k for k in known.required if k not in entry]
    if missing:
        raise UserError(
            f"{key}{_place(cfg, f'{key}.FORMAT')} lacks {' and '.join(missing)}: FORMAT {entry.FORMAT} "
            f"needs {', '.join(known.required)}"
        )


def _check_value(cfg: CfgNode, key: str, name: str, value: Any) -> None:
    if name == "CLASSES":
        meaning = "a list of class names"
        fits = type(value) in (list, tuple) and all(isinstance(v, str) for v in value) and value
    else:
        # A folder or split may be named by digits, which YAML reads as a number.
        meaning = "a path" if name in (*_FOLDERS, *_FILES) else "a name"
        fits = type(value) in (str, int) and value != ""
    if not fits:
        raise UserError(f"{key}{_place(cfg, key)} must be {meaning}, but is {value!r}")


def _register(cfg: CfgNode, name: str) -> None:
    key = f"DATASETS.CUSTOM.{name}"
    if name in DatasetCatalog and not MetadataCatalog.get(name).get("custom_format"):
        raise UserError(
            f"{key} has the name of a dataset that is registered already; choose another"
        )
    entry = cfg.DATASETS.CUSTOM[name]
    known = _FORMATS[entry.FORMAT]
    arguments: dict[str, Any] = {}
    for name_of_key, argument in {**known.required, **known.optional}.items():
        if name_of_key not in entry:
            continue
        value = entry[name_of_key]
        if name_of_key in (*_FOLDERS, *_FILES):
            arguments[argument] = _existing(cfg, f"{key}.{name_of_key}", name_of_key, value)
        else:
            arguments[argument] = list(value) if name_of_key == "CLASSES" else str(value)
    try:
        known.register(name, **arguments)
    except UserError as error:
        raise UserError(f"{key}: {error}") from error
    MetadataCatalog.get(name).set(custom_format=entry.FORMAT)


def _existing(cfg: CfgNode, key: str, name: str, value: str | int) -> Path:
    path = Path(str(value)).expanduser().absolute()
    is_folder = name in _FOLDERS
    if not (path.is_dir() if is_folder else path.is_file()):
        where = "" if os.path.isabs(str(value)) else f", which is {path}"
        raise UserError(
            f"{key} ({who_set(cfg, key)}): there is no {'folder' if is_folder else 'file'} "
            f"{value}{where}"
        )
    return path


def _place(cfg: CfgNode, key: str) -> str:
    """Return where a key was set, in brackets; a group of keys comes from no single line."""
    group = cfg.DATASETS.CUSTOM
    for part in key.removeprefix("DATASETS.CUSTOM.").split("."):
        group = group[part]
    return "" if isinstance(group, CfgNode) else f" ({who_set(cfg, key)})"


def _hint(wrong: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(wrong, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else f"; known are {', '.join(known)}"
