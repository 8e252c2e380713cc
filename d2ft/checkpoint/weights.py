"""
Weights by their address: fetch them, read them, and tell what they would give to a model.

Nothing here needs a model that exists: its names and shapes are enough, so that a file can be
refused before anything starts.
"""

import http.client
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any
from urllib.parse import parse_qs, urlparse

import torch
from detectron2.checkpoint.c2_model_loading import align_and_update_state_dicts
from detectron2.config import CfgNode
from detectron2.utils.file_io import PathManager

from d2ft.checkpoint import zoo
from d2ft.checkpoint.convert.build import convert_checkpoint
from d2ft.checkpoint.download import download_weights, resolve_url
from d2ft.checkpoint.head_remap import (
    ClassStart,
    HeadInit,
    RowLayout,
    find_class_rows,
    find_misfit,
    find_sources,
    match_classes,
)
from d2ft.checkpoint.load_report import (
    BOTTOM_UP,
    LoadReport,
    Shape,
    compare_shapes,
    is_final_predictor,
    shorten,
)
from d2ft.checkpoint.safe_load import load_checkpoint_file
from d2ft.errors import UserError
from d2ft.labels import COCO_CLASSES


def fetch_weights(url_or_path: str) -> str:
    """
    Return the local path of weights, downloaded if need be.

    Args:
        url_or_path: a value of MODEL.WEIGHTS: a path, or any URL that Detectron2 resolves.

    Raises:
        UserError: if there is no such file, or the download fails.
    """
    address = urlparse(url_or_path)._replace(query="").geturl()
    if not _is_url(address):
        if not os.path.isfile(address):
            kind = "is a folder" if os.path.isdir(address) else "does not exist"
            raise UserError(
                f"MODEL.WEIGHTS {address} {kind}. Give the path of a checkpoint file (relative to "
                f"{os.getcwd()}) or a URL."
            )
        return address
    if address.startswith(("http://", "https://", "detectron2://", "catalog://")):
        try:
            return str(download_weights(resolve_url(address)))
        except UserError as error:
            raise UserError(f"MODEL.WEIGHTS {address}: {error}") from error
    try:
        local = PathManager.get_local_path(address)
    # A name that the model catalog does not have is a KeyError or a RuntimeError there.
    except (OSError, http.client.HTTPException, KeyError, RuntimeError) as error:
        raise UserError(
            f"MODEL.WEIGHTS {address} cannot be downloaded ({error}). Download it on a machine with "
            "access and set MODEL.WEIGHTS to the path of the local file."
        ) from error
    if not os.path.isfile(local):
        raise UserError(
            f"MODEL.WEIGHTS {address}: no downloader is known for {urlparse(address).scheme}://. "
            "Use https://, detectron2:// or a local file."
        )
    return str(local)


def _is_url(address: str) -> bool:
    return re.match(r"\w+://", address) is not None


def read_weights(url_or_path: str) -> dict[str, Any]:
    """
    Read weights as :class:`FinetuneCheckpointer` does, for checks that have no model.

    Returns:
        As :func:`~d2ft.checkpoint.safe_load.load_checkpoint_file`.

    Raises:
        UserError: as :func:`fetch_weights` and
            :func:`~d2ft.checkpoint.safe_load.load_checkpoint_file`.
    """
    return apply_query(load_checkpoint_file(fetch_weights(url_or_path)), url_or_path)


def apply_query(checkpoint: dict[str, Any], source: str) -> dict[str, Any]:
    """
    Convert another framework's checkpoint, and mark it as the query of its address asks.

    Returns:
        As :func:`~d2ft.checkpoint.convert.build.convert_checkpoint`.

    Raises:
        UserError: as there; also if the query is not ``?matching_heuristics=True``, the only one that Detectron2 knows.
    """
    checkpoint = convert_checkpoint(checkpoint, source)
    queries = parse_qs(urlparse(source).query)
    if queries.pop("matching_heuristics", ["False"]) == ["True"]:
        checkpoint["matching_heuristics"] = True
    if queries:
        raise UserError(
            f"MODEL.WEIGHTS {source}: unknown query {', '.join(queries)}; the only one is "
            "?matching_heuristics=True."
        )
    return checkpoint


def build_head_init(cfg: CfgNode) -> HeadInit:
    """Return what the keys under FINETUNE say of class rows."""
    return HeadInit(
        remap=cfg.FINETUNE.HEAD_INIT == "remap",
        class_map={target: str(source) for target, source in cfg.FINETUNE.CLASS_MAP.items()},
        unmatched=cfg.FINETUNE.UNMATCHED,
        seed=cfg.SEED,
    )


def build_load_report(
    model_shapes: Mapping[str, Shape],
    checkpoint: Mapping[str, Any],
    source: str,
    *,
    thing_classes: Sequence[str] = (),
    file_classes: Sequence[str] | None = None,
    head_init: HeadInit = HeadInit(),  # noqa: B008, it is immutable
    sha256: str = "",
) -> LoadReport:
    """
    Tell what a checkpoint would give to a model, without touching either.

    Args:
        model_shapes: shapes by name of the model's state dict; the model may be on the meta device.
        checkpoint: from :func:`read_weights`.
        source: the file or URL as the user gave it.
        thing_classes: class names in the row order of the model; empty if unknown.
        file_classes: class names in the row order of the file, from :func:`known_classes`.
        head_init: what becomes of the file's class rows.
        sha256: of the file, if it is to be in the report.

    Raises:
        UserError: if the names of a foreign file cannot be matched, or class rows are to be
            carried over and their names do not tell where to.
    """
    tensors = match_names(model_shapes, checkpoint, source)
    file_shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    classes: list[ClassStart] = []
    class_rows: dict[str, RowLayout] = {}
    if head_init.remap and file_classes and thing_classes:
        _check_row_counts(file_shapes, file_classes, f"{source} is known to have")
        _check_row_counts(model_shapes, thing_classes, "the training set has")
        class_rows = find_class_rows(
            file_shapes, model_shapes, len(file_classes), len(thing_classes)
        )
        if class_rows:
            rows = match_classes(file_classes, thing_classes, head_init.class_map)
            classes = [
                ClassStart(name, None, None, head_init.unmatched)
                if row is None
                else ClassStart(name, file_classes[row], row, "copied")
                for name, row in zip(thing_classes, rows, strict=True)
            ]
    report = compare_shapes(
        model_shapes,
        file_shapes,
        source=source,
        sha256=sha256,
        backbone_only=zoo.is_backbone_only(source)
        or all(name.startswith(BOTTOM_UP) for name in file_shapes),
        class_rows=class_rows,
        classes=classes,
    )
    return replace(report, notes=_class_notes(report, file_classes, thing_classes, head_init))


def _check_row_counts(shapes: Mapping[str, Shape], classes: Sequence[str], who: str) -> None:
    misfit = find_misfit(shapes, len(classes))
    if misfit:
        raise UserError(
            f"{who} {len(classes)} classes ({shorten(classes)}), but the shape of {misfit} there "
            f"is {shapes[misfit]}, which is not that of {len(classes)} classes. Correct "
            "FINETUNE.SOURCE_CLASSES, if the names come from there, or the number of classes "
            "under MODEL."
        )


def _class_notes(
    report: LoadReport,
    file_classes: Sequence[str] | None,
    thing_classes: Sequence[str],
    head_init: HeadInit,
) -> tuple[str, ...]:
    """Say what would keep the class rows of a file that were left out."""
    skipped = [tensor for tensor in report.skipped if is_final_predictor(tensor.name)]
    if not skipped or not thing_classes:
        return ()
    if not file_classes:
        return (
            "The class names of the file are not known: FINETUNE.SOURCE_CLASSES can give them, in "
            "the order of its rows; FINETUNE.HEAD_INIT remap then keeps the rows of the classes "
            "that the training set has as well.",
        )
    if head_init.remap:
        return (
            "FINETUNE.HEAD_INIT remap could not keep the rows of "
            f"{shorten([tensor.name for tensor in skipped])}: the layers of file and model differ "
            "in more than the number of classes.",
        )
    file = {tensor.name: tensor.file_shape for tensor in skipped}
    model = {tensor.name: tensor.model_shape for tensor in skipped}
    kept = sum(map(bool, find_sources(file_classes, thing_classes, head_init.class_map)))
    if not kept or not find_class_rows(file, model, len(file_classes), len(thing_classes)):
        return ()
    rows = "COCO rows" if tuple(file_classes) == COCO_CLASSES else "rows in the file"
    return (
        f"{kept} of {len(thing_classes)} classes have {rows}: FINETUNE.HEAD_INIT remap keeps them.",
    )


def match_names(
    model_shapes: Mapping[str, Shape], checkpoint: Mapping[str, Any], source: str
) -> dict[str, torch.Tensor]:
    """
    Return the tensors of a checkpoint under the model's names.

    Foreign files go through Detectron2's heuristics; a tensor that fits none keeps its name.

    Args:
        model_shapes: shapes by name of the model's state dict.
        checkpoint: from :func:`read_weights`; not changed.
        source: the file or URL as the user gave it.

    Raises:
        UserError: if a name fits several of the model's.
    """
    if not checkpoint.get("matching_heuristics", False):
        return checkpoint["model"]
    # The heuristics ask the model for shapes only.
    model = {name: torch.empty(shape, device="meta") for name, shape in model_shapes.items()}
    try:
        return align_and_update_state_dicts(
            model, checkpoint["model"], c2_conversion=checkpoint.get("__author__") == "Caffe2"
        )
    except ValueError as error:
        raise UserError(f"{source}: its names cannot be matched to the model's: {error}") from error
