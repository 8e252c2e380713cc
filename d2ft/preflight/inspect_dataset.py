"""Inspect the datasets of a config: their annotations, and with leisure their files too."""

import textwrap
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import product
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from tabulate import tabulate

from d2ft.config import get_value
from d2ft.data.catalog import class_names
from d2ft.data.columns import RecordColumns
from d2ft.data.record_store import columns_of
from d2ft.errors import UserError
from d2ft.preflight.file_findings import (
    find_bad_files,
    find_copies,
    find_leaks,
    find_unreadable,
)
from d2ft.preflight.findings import (
    DatasetTable,
    Finding,
    compare_classes,
    find_bad_boxes,
    find_bad_classes,
    find_repeated_images,
    find_unfit_sizes,
    resized_lengths,
)
from d2ft.preflight.image_files import find_absent, group_by_content, look_at_images

Records = Sequence[dict[str, Any]]

LEVELS = ("error", "warning", "note")

# Where a meta-architecture keeps the IoU below which an anchor is background.
_IOU_KEYS = {
    "GeneralizedRCNN": "MODEL.RPN.IOU_THRESHOLDS",
    "RetinaNet": "MODEL.RETINANET.IOU_THRESHOLDS",
}


def inspect_columns(
    cfg: CfgNode, name: str, columns: RecordColumns, *, is_test: bool
) -> list[Finding]:
    """
    Find what is wrong in a dataset without opening an image: what a run can afford to look at.

    Args:
        cfg: its image and anchor sizes are compared with the instances.
        name: of the dataset, which is registered.
        columns: of its dataset dicts.
        is_test: whether it is evaluated.
    """
    table = _table(name, columns, is_test=is_test)
    absent = {path: find_absent(path) for path in dict.fromkeys(table.file_names)}
    return [
        *find_unreadable(name, {path: why for path, why in absent.items() if why}, len(absent)),
        *_inspect_table(cfg, table),
    ]


def inspect_datasets(
    cfg: CfgNode,
    load: Callable[[str], Records],
    train: Sequence[str],
    test: Sequence[str],
    *,
    decode: bool = False,
) -> dict[str, Any]:
    """
    Inspect datasets and their image files, and compare training with test sets.

    Args:
        cfg: its image and anchor sizes are compared with the instances.
        load: name -> dataset dicts; what is wrong with a whole set is a :class:`UserError`.
        train: names of sets to train on.
        test: names of sets to evaluate on.
        decode: decode each image instead of reading its header.

    Returns:
        ``{"datasets": {name: {"images", "instances", "crowd", "classes": {class: instances},
        "sides": quantiles of the instances' sides after resizing}}, "findings": [...]}``, worst
        findings first; can be written as JSON.
    """
    findings: list[Finding] = []
    tables: dict[str, DatasetTable] = {}
    for name in dict.fromkeys((*train, *test)):
        try:
            tables[name] = table_of_records(name, load(name), is_test=name in test)
        except UserError as error:
            fix = "the message says what would work"
            findings.append(Finding("error", "not-loadable", name, str(error), fix))
    paths = [path for table in tables.values() for path in table.file_names]
    files = look_at_images(paths, decode=decode)
    for table in tables.values():
        findings += find_bad_files(table, files)
        findings += _inspect_table(cfg, table)
    groups = group_by_content([path for path, file in files.items() if not file.problem])
    findings += find_copies(tables.values(), groups)
    pairs = product((n for n in train if n in tables), (n for n in test if n in tables))
    for first, second in pairs:
        if first != second:
            findings += compare_classes(tables[first], tables[second])
            findings += find_leaks(tables[first], tables[second], groups)
    findings.sort(key=lambda finding: LEVELS.index(finding.level))
    return {
        "datasets": {name: _summarise(cfg, table) for name, table in tables.items()},
        "findings": [asdict(finding) for finding in findings],
    }


def table_of_records(name: str, records: Records, *, is_test: bool) -> DatasetTable:
    """
    Return the annotations of dataset dicts as arrays.

    Raises:
        UserError: if a record lacks its file name, or an annotation a box of four numbers.
    """
    return _table(name, read_columns(name, records), is_test=is_test)


def read_columns(name: str, records: Records) -> RecordColumns:
    """
    Return the columns of a dataset.

    Raises:
        UserError: as :func:`d2ft.data.record_store.columns_of`, with the name of the dataset.
    """
    try:
        return columns_of(records)
    except UserError as error:
        raise UserError(f"dataset {name!r}: {error}") from error


def _table(name: str, columns: RecordColumns, *, is_test: bool) -> DatasetTable:
    return DatasetTable(
        name=name,
        classes=class_names(name),
        is_test=is_test,
        file_names=columns.file_names,
        image_ids=columns.image_ids,
        sizes=columns.sizes,
        boxes=columns.boxes,
        categories=columns.categories,
        image_of=columns.image_of,
        is_target=~(columns.is_crowd | columns.is_ignored),
    )


def format_report(report: dict[str, Any], width: int = 100) -> str:
    """
    Return what :func:`inspect_datasets` found as tables of text.

    Args:
        report: what it returned.
        width: of the texts in characters.
    """
    parts = []
    sets = report["datasets"]
    if sets:
        classes = dict.fromkeys(c for found in sets.values() for c in found["classes"])
        rows = [
            [class_name, *(found["classes"].get(class_name, "-") for found in sets.values())]
            for class_name in classes
        ]
        for label, key in (("images", "images"), ("instances", "instances"), ("crowd", "crowd")):
            rows.append([f"({label})", *(found[key] for found in sets.values())])
        for quantile in ("10%", "50%", "90%"):
            cells = (found["sides"].get(quantile, "-") for found in sets.values())
            rows.append([f"(side in pixels, {quantile})", *cells])
        parts.append(tabulate(rows, headers=["class", *sets], tablefmt="simple", floatfmt=".0f"))
    rows = [
        [
            f["level"],
            f["dataset"],
            f"{_wrap(f['message'], width)}\n{_wrap('-> ' + f['fix'], width)}",
        ]
        for f in report["findings"]
    ]
    if rows:
        parts.append(tabulate(rows, headers=["level", "dataset", "what and -> fix"]))
    counts = Counter(finding["level"] for finding in report["findings"])
    parts.append(", ".join(f"{counts[level]} {level}s" for level in LEVELS))
    return "\n\n".join(parts)


def _wrap(text: str, width: int) -> str:
    return textwrap.fill(text, width, break_long_words=False, break_on_hyphens=False)


def _inspect_table(cfg: CfgNode, table: DatasetTable) -> list[Finding]:
    lengths = resized_lengths(table, cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)
    found = [*find_bad_boxes(table), *find_bad_classes(table), *find_repeated_images(table)]
    key = _IOU_KEYS.get(cfg.MODEL.META_ARCHITECTURE)
    if key:
        anchors = [side for level in cfg.MODEL.ANCHOR_GENERATOR.SIZES for side in level]
        found += find_unfit_sizes(table.name, lengths, anchors, get_value(cfg, key)[0])
    return found


def _summarise(cfg: CfgNode, table: DatasetTable) -> dict[str, Any]:
    lengths = resized_lengths(table, cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)
    quantiles = (10, 50, 90)
    sides: Sequence[float] = np.percentile(lengths, quantiles).tolist() if len(lengths) else []
    return {
        "images": len(table.file_names),
        "instances": int(table.is_target.sum()),
        "crowd": int((~table.is_target).sum()),
        "classes": dict(zip(table.classes, table.counts().tolist(), strict=True)),
        "sides": {f"{q}%": side for q, side in zip(quantiles, sides, strict=False)},
    }


def refuse_errors(cfg: CfgNode, findings: Sequence[Finding]) -> None:
    """
    Stop a run whose datasets have findings of the level "error".

    Raises:
        UserError: with all of them. Files count only if DATALOADER.MAX_BAD_IMAGES allows none.
    """
    may_skip = cfg.DATALOADER.get("MAX_BAD_IMAGES", 0) > 0
    errors = [
        f"dataset {finding.dataset!r}: {finding.message}; {finding.fix}"
        for finding in findings
        if finding.level == "error" and not (may_skip and finding.code.startswith("file-"))
    ]
    if errors:
        raise UserError("\n  ".join(errors))
