"""
Change the class list of a dataset, or join datasets whose lists differ.

Pure functions of Detectron2's dataset dicts and class names; they change no dict they were given.

A dict may hold ``labelled_classes``: the indices of the classes that were looked for in its image.
Without the key that is all of them. What stands in such an image and belongs to another class has
no annotation, so training must not take it for background: see
:mod:`d2ft.layers.partial_labels`.
"""

import difflib
from collections.abc import Mapping, Sequence

from d2ft.data.wrappers import Record, Records
from d2ft.errors import UserError
from d2ft.labels import fold_class_name

LABELLED_CLASSES = "labelled_classes"


def rename_classes(
    records: Records, classes: Sequence[str], renames: Mapping[str, str]
) -> tuple[Records, list[str]]:
    """
    Rename classes; those that get the same name, or that of another class, become one.

    Args:
        records: the images.
        classes: names in the order of ``category_id``.
        renames: old name -> new name.

    Returns:
        The images and the new classes, each at the place of its first.

    Raises:
        UserError: if an old name is not among ``classes``.
    """
    for old in renames:
        _require_class(old, classes, "renamed")
    renamed = [renames.get(name, name) for name in classes]
    new_classes = list(dict.fromkeys(renamed))
    rows = [new_classes.index(name) for name in renamed]
    return _renumber(records, rows, len(new_classes)), new_classes


def choose_classes(
    records: Records, classes: Sequence[str], chosen: Sequence[str]
) -> tuple[Records, list[str]]:
    """
    Keep the annotations of the chosen classes, numbered in the order of ``chosen``.

    Every image stays, also one that has no annotation left.

    Raises:
        UserError: if a name is not among ``classes``, comes twice, or none is chosen.
    """
    if not chosen:
        raise UserError("no class is chosen; a dataset has at least one")
    for name in chosen:
        _require_class(name, classes, "chosen")
        if list(chosen).count(name) > 1:
            raise UserError(f"class {name!r} is chosen twice")
    rows = [chosen.index(name) if name in chosen else None for name in classes]
    return _renumber(records, rows, len(chosen)), list(chosen)


def join(datasets: Sequence[tuple[Records, Sequence[str]]]) -> tuple[Records, list[str]]:
    """
    Put datasets one after the other; their classes meet by name.

    Args:
        datasets: images and class names of each.

    Returns:
        All images, and the classes in the order in which they first come. Where the lists differ,
        each image has ``labelled_classes``.

    Raises:
        UserError: if two classes differ in case, spaces, ``_`` or ``-`` only.
    """
    classes = list(dict.fromkeys(name for _, names in datasets for name in names))
    spellings: dict[str, str] = {}
    for name in classes:
        other = spellings.setdefault(fold_class_name(name), name)
        if other != name:
            raise UserError(
                f"the classes {other!r} and {name!r} of datasets that are joined differ in spelling "
                "only; rename one, so that they meet"
            )
    joined: Records = []
    for records, names in datasets:
        rows = [classes.index(name) for name in names]
        for record in _renumber(records, rows, len(classes)):
            if LABELLED_CLASSES not in record and len(names) < len(classes):
                record = {**record, LABELLED_CLASSES: sorted(rows)}
            joined.append(record)
    return joined, classes


def _renumber(records: Records, rows: Sequence[int | None], num_classes: int) -> Records:
    """
    Give class ``c`` the index ``rows[c]``, or drop it where that is None.

    A new class is labelled in an image only if all those were that it is made of.
    """
    return [_renumber_one(record, rows, num_classes) for record in records]


def _renumber_one(record: Record, rows: Sequence[int | None], num_classes: int) -> Record:
    record = dict(record)
    if "annotations" in record:
        record["annotations"] = [
            {**annotation, "category_id": rows[annotation["category_id"]]}
            for annotation in record["annotations"]
            if rows[annotation["category_id"]] is not None
        ]
    if LABELLED_CLASSES in record:
        labelled = set(record[LABELLED_CLASSES])
        present = {row for row in rows if row is not None}
        incomplete = {row for old, row in enumerate(rows) if old not in labelled}
        record[LABELLED_CLASSES] = sorted(present - incomplete)
        if len(record[LABELLED_CLASSES]) == num_classes:
            del record[LABELLED_CLASSES]
    return record


def _require_class(name: str, classes: Sequence[str], action: str) -> None:
    if name in classes:
        return
    near = difflib.get_close_matches(name, classes, n=1, cutoff=0.5)
    hint = f": did you mean {near[0]!r}?" if near else "."
    shown = ", ".join(classes[:20]) + (", ..." if len(classes) > 20 else "")
    raise UserError(f"class {name!r} cannot be {action}{hint} The classes are: {shown}")
