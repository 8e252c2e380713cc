"""The class names of a checkpoint's rows, and whether they are those of the training set."""

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

from d2ft.checkpoint import zoo
from d2ft.checkpoint.head_remap import find_sources
from d2ft.checkpoint.load_report import LoadReport, shorten
from d2ft.checkpoint.safe_load import METADATA_KEY
from d2ft.errors import UserError


def known_classes(
    checkpoint: Mapping[str, Any], source: str, source_classes: Sequence[str] = ()
) -> tuple[str, ...] | None:
    """
    Return the class names of a file's rows: its own, else the zoo's, else those given.

    Args:
        checkpoint: from :func:`~d2ft.checkpoint.weights.read_weights`.
        source: the file or URL as the user gave it.
        source_classes: what ``FINETUNE.SOURCE_CLASSES`` says.
    """
    description = checkpoint.get(METADATA_KEY)
    own = description.get("thing_classes") if isinstance(description, dict) else None
    if isinstance(own, list) and own and all(isinstance(name, str) for name in own):
        return tuple(own)
    return zoo.source_classes(source) or tuple(source_classes) or None


def check_class_names(
    report: LoadReport,
    file_classes: Sequence[str] | None,
    thing_classes: Sequence[str],
    *,
    class_map: Mapping[str, str] | None = None,
    every_tensor: bool = False,
) -> str:
    """
    Refuse to give the rows of one class to another when the shapes alone would allow it.

    Names are compared as :func:`~d2ft.checkpoint.head_remap.find_sources` does. Nothing is checked
    if the file's class rows do not load by position, or the training set's names are not known.

    Args:
        report: what the file gives to the model.
        file_classes: class names in the row order of the file; None if nobody knows.
        thing_classes: class names in the row order of the model.
        class_map: target -> source class, as in FINETUNE.CLASS_MAP.
        every_tensor: the file is a checkpoint to be evaluated or resumed, as it is.

    Returns:
        A warning, if rows met by position without their names being known; else "".

    Raises:
        UserError: if the names differ or come in another order.
    """
    if not report.matches_classes_by_position or not thing_classes:
        return ""
    if file_classes is None:
        return (
            f"{report.source} does not say its class names: its {len(thing_classes)} class rows "
            "were matched by position. Should its classes be others than those of the training "
            f"set ({shorten(thing_classes)}), FINETUNE.SOURCE_CLASSES says which."
        )
    found = find_sources(file_classes, thing_classes, class_map)
    remap = "" if every_tensor else "FINETUNE.HEAD_INIT remap gives each class the rows of its name"
    for row, (in_file, in_set) in enumerate(zip_longest(file_classes, thing_classes)):
        if in_file is None or in_set is None or row not in found[row]:
            raise UserError(
                f"{report.source} has class rows of the same shape as the model, but for other "
                f"classes: row {row}: {_quote(in_file)} in the file, {_quote(in_set)} in the "
                f"training set. {remap}{'. ' if remap else ''}If they are the same classes, give "
                "the training set the names and the order of the file, or correct "
                "FINETUNE.SOURCE_CLASSES, if the names of the file come from there."
            )
    return ""


def _quote(name: str | None) -> str:
    return "no class" if name is None else f'"{name}"'
