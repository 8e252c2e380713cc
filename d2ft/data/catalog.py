"""
Register datasets: the only writer to Detectron2's DatasetCatalog and MetadataCatalog.

Both catalogs live as long as the process. Detectron2 asserts when a name is registered twice and
creates an empty entry for a mistyped name; the functions here may be called again and refuse
what they do not know. A spawned process starts with empty catalogs, so a script registers at
import or at the head of its main function, in every process.
"""

import difflib
from collections.abc import Callable, Sequence
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog

from d2ft.data.record_store import StoredRecords
from d2ft.errors import UserError

DatasetDicts = list[dict[str, Any]]
_Loader = Callable[[], DatasetDicts]
_OpenIndex = Callable[[], StoredRecords]

# What this module registered, so that it replaces its own entries and nobody else's: name -> loader
# and what opens the same records without reading them, if there is such a function.
_OWN: dict[str, tuple[_Loader, _OpenIndex | None]] = {}

# Sets that Detectron2 registers on import but that d2ft loads itself, because Detectron2's main
# cannot load them outside Meta: https://github.com/facebookresearch/detectron2/issues/5436
_DETECTRON2_NAMES = {
    "cityscapes_fine_instance_seg_train": "cityscapes_instance_train",
    "cityscapes_fine_instance_seg_val": "cityscapes_instance_val",
}


def register_instances(
    name: str,
    loader: _Loader,
    *,
    open_index: _OpenIndex | None = None,
    thing_classes: Sequence[str] | None,
    evaluator_type: str = "coco",
    **metadata: Any,
) -> None:
    """
    Make a dataset known to Detectron2 under ``name``; calling it again replaces the entry.

    Args:
        name: a name that Detectron2 does not own; it goes into DATASETS.TRAIN or DATASETS.TEST.
        loader: returns Detectron2's standard dataset dicts, the same on every call. It runs when
            the data is needed, not here.
        open_index: opens the same dicts without reading them, for sets of any size.
        thing_classes: class names; ``category_id`` is the index into them. None if ``loader``
            finds them in the files and calls :func:`add_metadata`.
        evaluator_type: key of ``EVALUATOR_REGISTRY``; "coco" is box and mask AP.
        metadata: further entries for MetadataCatalog, as the evaluator needs them.

    Raises:
        UserError: if ``name`` or a class name is not a string, a class comes twice or there is
            none, or the name belongs to Detectron2 or to another package.
    """
    if not isinstance(name, str) or not name:
        raise UserError(f"a dataset name is a string that is not empty, got {name!r}")
    if thing_classes is not None:
        metadata["thing_classes"] = _checked_classes(name, thing_classes)
    if name in DatasetCatalog and name not in _OWN:
        raise UserError(
            f"the dataset name {name!r} is already registered by Detectron2 or another package; "
            "choose a name of your own"
        )
    unregister(name)
    DatasetCatalog.register(name, loader)
    MetadataCatalog.get(name).set(evaluator_type=evaluator_type, **metadata)
    _OWN[name] = loader, open_index


def add_metadata(name: str, *, thing_classes: Sequence[str], **metadata: Any) -> None:
    """
    Write down what a loader learns about its dataset when it reads the files.

    Args:
        name: a dataset that :func:`register_instances` registered.
        thing_classes: class names; ``category_id`` is the index into them.
        metadata: further entries for MetadataCatalog.

    Raises:
        UserError: if a class comes twice or there is none.
    """
    classes = _checked_classes(name, thing_classes)
    MetadataCatalog.get(name).set(thing_classes=classes, **metadata)


def _checked_classes(name: str, thing_classes: Sequence[str]) -> list[str]:
    if isinstance(thing_classes, str) or not all(isinstance(c, str) for c in thing_classes):
        raise UserError(f"{name}: thing_classes is a list of class names, got {thing_classes!r}")
    if not thing_classes:
        raise UserError(f"{name}: thing_classes is empty; a dataset has at least one class")
    repeated = sorted({c for c in thing_classes if list(thing_classes).count(c) > 1})
    if repeated:
        raise UserError(f"{name}: thing_classes holds {', '.join(map(repr, repeated))} twice")
    return list(thing_classes)


def unregister(name: str) -> None:
    """Remove a dataset that :func:`register_instances` registered; unknown names are ignored."""
    if name in _OWN:
        del _OWN[name]
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def open_records(name: str) -> Sequence[dict[str, Any]]:
    """
    Return the dataset dicts of a dataset, not to be changed: its index, else a list.

    Raises:
        KeyError: if it is not registered.
    """
    stored = open_index(name)
    return DatasetCatalog.get(name) if stored is None else stored


def open_index(name: str) -> StoredRecords | None:
    """
    Return the index of a dataset, which reads each dict when it is asked for; None without one.

    Raises:
        KeyError: if the dataset is not registered.
    """
    loader, opener = _OWN.get(name, (None, None))
    # Somebody may have put another loader in the place of ours.
    return opener() if opener is not None and DatasetCatalog[name] is loader else None


def require_registered(name: str) -> None:
    """
    Check that a dataset can be loaded by ``name``.

    Raises:
        UserError: with our name for a set that Detectron2 cannot load, or the nearest known ones.
    """
    if name in _DETECTRON2_NAMES:
        raise UserError(
            f"dataset {name!r} is Detectron2's own loader of Cityscapes, which its main branch "
            f"cannot run; use {_DETECTRON2_NAMES[name]!r}"
        )
    if name in DatasetCatalog:
        return
    known = [other for other in DatasetCatalog if other not in _DETECTRON2_NAMES]
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    raise UserError(
        f"dataset {name!r} is not registered.{hint} Registered with d2ft are: "
        f"{', '.join(sorted(_OWN)) or 'none'}. In every process, sets of your own have to be "
        "registered with d2ft.data.register_instances, and the built-in ones with "
        "d2ft.data.register_builtin_datasets"
    )


def class_names(name: str) -> tuple[str, ...]:
    """
    Return the classes of a registered dataset in the order of ``category_id``.

    Raises:
        UserError: if the dataset is unknown or was registered without ``thing_classes``.
    """
    require_registered(name)
    names = MetadataCatalog.get(name).get("thing_classes")
    if names is None:
        # COCO-like loaders write the class names when the annotations are first read.
        open_records(name)
        names = MetadataCatalog.get(name).get("thing_classes")
    if names is None:
        raise UserError(
            f"dataset {name!r} has no class names: set MetadataCatalog.get({name!r}).thing_classes "
            "or register it with d2ft.data.register_instances"
        )
    return tuple(names)
