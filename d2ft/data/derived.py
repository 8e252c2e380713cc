"""
Datasets made of others, declared in YAML under DATASETS.DERIVED by name.

    DATASETS:
      DERIVED:
        my_train: {FROM: [voc2007_trainval, my_set], CLASSES: [cat, dog], REPEAT: 8}

An entry is worked off in this order, whatever the order of its lines: FROM, SPLIT, RENAME,
CLASSES, MIN_IMAGE_SIZE, MIN_BOX_SIZE, DROP_CROWD, DROP_EMPTY, FRACTION, SHOTS, BALANCE, REPEAT.
The split comes first, so that both parts belong together however they are shaped afterwards.
"""

import difflib
import functools
import logging
from collections.abc import Iterable, Iterator
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from d2ft.config import who_set
from d2ft.data import wrappers
from d2ft.data.catalog import class_names, register_instances, require_registered
from d2ft.data.class_lists import choose_classes, join, rename_classes
from d2ft.data.wrappers import Records
from d2ft.errors import UserError

logger = logging.getLogger(__name__)

_SPLITS = ("train", "val")
_CHANCE = ("SPLIT", "FRACTION", "SHOTS")
_REPEATING = ("BALANCE", "REPEAT")

# key -> what its value is, for messages, and the types that YAML gives for it.
_KEYS: dict[str, tuple[str, tuple[type, ...]]] = {
    "FROM": ("a list of dataset names", (list, tuple)),
    "SPLIT": ("train or val", (str,)),
    "VAL_FRACTION": ("a number between 0 and 1", (float,)),
    "RENAME": ("a mapping of old to new class names", (CfgNode,)),
    "CLASSES": ("a list of class names", (list, tuple)),
    "MIN_IMAGE_SIZE": ("a number of pixels", (int,)),
    "MIN_BOX_SIZE": ("a number of pixels", (int, float)),
    "DROP_CROWD": ("True or False", (bool,)),
    "DROP_EMPTY": ("True or False", (bool,)),
    "FRACTION": ("a number above 0 and at most 1", (int, float)),
    "SHOTS": ("a whole number", (int,)),
    "BALANCE": ("a number above 0 and at most 1", (int, float)),
    "REPEAT": ("a whole number", (int,)),
    "SEED": ("a whole number", (int,)),
}


def with_sources(cfg: CfgNode, names: Iterable[str]) -> tuple[str, ...]:
    """
    Return ``names``, and of derived sets all that they are made of, each once.

    Raises:
        UserError: for an entry of DATASETS.DERIVED that is wrong.
    """
    for name in cfg.DATASETS.DERIVED:
        _check_entry(cfg, name)
    found: dict[str, None] = {}
    waiting = list(names)
    while waiting:
        name = waiting.pop(0)
        if name not in found:
            found[name] = None
            waiting.extend(cfg.DATASETS.DERIVED[name].FROM if name in cfg.DATASETS.DERIVED else ())
    return tuple(found)


def register_derived_datasets(cfg: CfgNode, names: Iterable[str] | None = None) -> None:
    """
    Check DATASETS.DERIVED and register those sets that are asked for.

    Their sources have to be registered before, in every process. A derived set is evaluated
    COCO-style whatever its sources are: official evaluations read the whole set from its files.

    Args:
        cfg: DATASETS is read.
        names: of the datasets in use; by default those of DATASETS.TRAIN and TEST.

    Raises:
        UserError: for an entry that is wrong, names an unknown source or class, or leads back to
            itself, or for a test set that would show images more than once.
    """
    entries = cfg.DATASETS.DERIVED
    for name in entries:
        _check_entry(cfg, name)
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST) if names is None else names:
        _register(cfg, name, chain=())
    for name in cfg.DATASETS.TEST:
        repeating = [key for key in _REPEATING if name in entries and key in entries[name]]
        if repeating:
            raise UserError(
                f"DATASETS.TEST ({who_set(cfg, 'DATASETS.TEST')}) holds {name!r}, which shows "
                f"images more than once by {' and '.join(repeating)}: evaluate it without"
            )
        if is_partially_labelled(name):
            logger.warning(
                "%s joins sets of different classes: what is found in an image of a class that its "
                "set never labelled counts as a false positive",
                name,
            )


def is_partially_labelled(name: str) -> bool:
    """Tell whether a dataset has images in which some of its classes were not labelled."""
    return name in DatasetCatalog and bool(MetadataCatalog.get(name).get("partially_labelled"))


def describe_derived(cfg: CfgNode) -> dict[str, dict[str, Any]]:
    """
    Return what chance decided in the derived sets of a config, JSON-able.

    Args:
        cfg: its derived sets are registered.

    Returns:
        name -> ``{"settings", "images", "instances"}`` of every set in use whose entry, or a
        source's entry, has SPLIT, FRACTION or SHOTS; "images" are file names.
    """
    described = {}
    for name in dict.fromkeys((*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)):
        settings = {entry: _plain(cfg.DATASETS.DERIVED[entry]) for entry in _derivation(cfg, name)}
        if any(key in entry for entry in settings.values() for key in _CHANCE):
            records = DatasetCatalog.get(name)
            described[name] = {
                "settings": settings,
                "images": list(dict.fromkeys(record["file_name"] for record in records)),
                "instances": sum(
                    wrappers.is_instance(a) for r in records for a in r.get("annotations", ())
                ),
            }
    return described


def derive(
    datasets: list[tuple[Records, tuple[str, ...]]], settings: dict[str, Any]
) -> tuple[Records, list[str]]:
    """
    Make one dataset of others, as an entry of DATASETS.DERIVED does.

    Args:
        datasets: images and class names of each source.
        settings: key -> value as in YAML, without FROM.

    Returns:
        Images and class names.

    Raises:
        UserError: for a value out of its range or an unknown class.
    """
    records, classes = join(datasets)
    seed = settings.get("SEED", 0)
    if "SPLIT" in settings:
        parts = wrappers.split(records, settings["VAL_FRACTION"], seed)
        records = parts[_SPLITS.index(settings["SPLIT"])]
    if "RENAME" in settings:
        records, classes = rename_classes(records, classes, settings["RENAME"])
    if "CLASSES" in settings:
        records, classes = choose_classes(records, classes, settings["CLASSES"])
    for key, function in (
        ("MIN_IMAGE_SIZE", wrappers.drop_small_images),
        ("MIN_BOX_SIZE", wrappers.drop_small_boxes),
    ):
        if key in settings:
            records = function(records, settings[key])
    if settings.get("DROP_CROWD"):
        records = wrappers.drop_crowd(records)
    if settings.get("DROP_EMPTY"):
        records = wrappers.drop_empty(records)
    for key, choose in (("FRACTION", wrappers.choose_share), ("SHOTS", wrappers.choose_shots)):
        if key in settings and records:
            records = choose(records, settings[key], seed)
    if "BALANCE" in settings:
        records = wrappers.balance(records, settings["BALANCE"])
    if "REPEAT" in settings:
        records = wrappers.repeat(records, settings["REPEAT"])
    return records, classes


def _check_entry(cfg: CfgNode, name: str) -> None:
    key = f"DATASETS.DERIVED.{name}"
    entry = cfg.DATASETS.DERIVED[name]
    if not isinstance(entry, CfgNode):
        raise UserError(
            f"{key} ({who_set(cfg, key)}) is {entry!r}, not a group of keys such as "
            "{FROM: [name], REPEAT: 2}"
        )
    for name_of_key, value in entry.items():
        where = f"{key}.{name_of_key}"
        if name_of_key not in _KEYS:
            near = difflib.get_close_matches(name_of_key.upper(), _KEYS, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UserError(
                f"there is no key {where}{hint or '; known are '}{'' if near else ', '.join(_KEYS)}"
            )
        meaning, types = _KEYS[name_of_key]
        fits = type(value) in types and (name_of_key != "SPLIT" or value in _SPLITS)
        if type(value) in (list, tuple):
            fits = fits and all(isinstance(v, str) for v in value)
        if not fits:
            # A group has no single line that it comes from.
            origin = "" if isinstance(value, CfgNode) else f" ({who_set(cfg, where)})"
            raise UserError(f"{where}{origin} must be {meaning}, but is {value!r}")
    if not entry.get("FROM"):
        raise UserError(f"{key} names no source: set {key}.FROM to a list of dataset names")
    if ("SPLIT" in entry) != ("VAL_FRACTION" in entry):
        raise UserError(f"{key} needs both SPLIT (train or val) and VAL_FRACTION, or neither")


def _register(cfg: CfgNode, name: str, chain: tuple[str, ...]) -> None:
    entry = cfg.DATASETS.DERIVED.get(name)
    if entry is None:
        return
    if name in chain:
        circle = " -> ".join((*chain, name))
        raise UserError(f"DATASETS.DERIVED leads back to where it began: {circle}")
    if name in DatasetCatalog and not MetadataCatalog.get(name).get("derived_from"):
        raise UserError(
            f"DATASETS.DERIVED.{name} has the name of a dataset that is registered already; choose "
            "another"
        )
    for source in entry.FROM:
        _register(cfg, source, (*chain, name))
        require_registered(source)
    sources, settings = tuple(entry.FROM), _plain(entry)
    lists = [class_names(source) for source in sources]
    try:
        # Class names follow from class names: no annotation is read before the data is used.
        _, classes = derive([([], names) for names in lists], _without_split(settings))
    except UserError as error:
        raise UserError(f"DATASETS.DERIVED.{name}: {error}") from error
    partial = any(set(names) != set(lists[0]) for names in lists)
    register_instances(
        name,
        functools.partial(_load, name, sources, settings),
        thing_classes=classes,
        derived_from=sources,
        partially_labelled=partial or any(map(is_partially_labelled, sources)),
    )


def _without_split(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key != "SPLIT"}


def _load(name: str, sources: tuple[str, ...], settings: dict[str, Any]) -> Records:
    try:
        datasets = [(DatasetCatalog.get(source), class_names(source)) for source in sources]
        records, _ = derive(datasets, settings)
    except UserError as error:
        raise UserError(f"DATASETS.DERIVED.{name}: {error}") from error
    if not records:
        raise UserError(f"DATASETS.DERIVED.{name} leaves no image of {', '.join(sources)}")
    total = sum(len(source) for source, _ in datasets)
    logger.info("%s has %d images, made of %d in %s", name, len(records), total, ", ".join(sources))
    return records


def _plain(entry: CfgNode) -> dict[str, Any]:
    """Return an entry as plain values, which pickle and JSON keep."""
    return {key: dict(v) if isinstance(v, CfgNode) else v for key, v in entry.items()}


def _derivation(cfg: CfgNode, name: str) -> Iterator[str]:
    if name in cfg.DATASETS.DERIVED:
        yield name
        for source in cfg.DATASETS.DERIVED[name].FROM:
            yield from _derivation(cfg, source)
