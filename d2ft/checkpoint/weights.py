"""
Weights by their address: fetch them, read them, and tell what they would give to a model.

Nothing here needs a model that exists: its names and shapes are enough, so that a file can be
refused before anything starts.
"""

import http.client
import os
import re
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any
from urllib.parse import parse_qs, urlparse

import torch
from detectron2.checkpoint.c2_model_loading import align_and_update_state_dicts
from detectron2.utils.file_io import PathManager

from d2ft.checkpoint import zoo
from d2ft.checkpoint.download import download_weights, resolve_url
from d2ft.checkpoint.load_report import (
    LoadReport,
    Shape,
    compare_shapes,
    is_final_predictor,
    shorten,
)
from d2ft.checkpoint.safe_load import load_checkpoint_file
from d2ft.errors import UserError

# Where a file of ours describes itself, beside "model"; Detectron2 passes unknown entries through.
METADATA_KEY = "d2ft"


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
    Mark the checkpoint as the query at the end of its address asks; returns the same object.

    Raises:
        UserError: if it is not ``?matching_heuristics=True``, the only one that Detectron2 knows.
    """
    queries = parse_qs(urlparse(source).query)
    if queries.pop("matching_heuristics", ["False"]) == ["True"]:
        checkpoint["matching_heuristics"] = True
    if queries:
        raise UserError(
            f"MODEL.WEIGHTS {source}: unknown query {', '.join(queries)}; the only one is "
            "?matching_heuristics=True."
        )
    return checkpoint


def build_load_report(
    model_shapes: Mapping[str, Shape],
    checkpoint: Mapping[str, Any],
    source: str,
    *,
    sha256: str = "",
) -> LoadReport:
    """
    Tell what a checkpoint would give to a model, without touching either.

    Args:
        model_shapes: shapes by name of the model's state dict; the model may be on the meta device.
        checkpoint: from :func:`read_weights`.
        source: the file or URL as the user gave it.
        sha256: of the file, if it is to be in the report.

    Raises:
        UserError: if the names of a foreign file cannot be matched.
    """
    tensors = match_names(model_shapes, checkpoint, source)
    return compare_shapes(
        model_shapes,
        {name: tuple(value.shape) for name, value in tensors.items()},
        source=source,
        sha256=sha256,
        backbone_only=zoo.is_backbone_only(source),
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


def known_classes(
    checkpoint: Mapping[str, Any], source: str, source_classes: Sequence[str] = ()
) -> tuple[str, ...] | None:
    """
    Return the class names of a file's rows: its own, else the zoo's, else those given.

    Args:
        checkpoint: from :func:`read_weights`.
        source: the file or URL as the user gave it.
        source_classes: what ``FINETUNE.SOURCE_CLASSES`` says.
    """
    description = checkpoint.get(METADATA_KEY)
    own = description.get("thing_classes") if isinstance(description, dict) else None
    if isinstance(own, list) and own and all(isinstance(name, str) for name in own):
        return tuple(own)
    return zoo.source_classes(source) or tuple(source_classes) or None


def check_class_names(
    report: LoadReport, file_classes: Sequence[str] | None, thing_classes: Sequence[str]
) -> str:
    """
    Refuse to give the rows of one class to another when the shapes alone would allow it.

    Names are compared in lower case, with ``_``, ``-`` and space as one. Nothing is checked if
    the file's class rows are not loaded, or the training set's names are not known.

    Args:
        report: what the file gives to the model.
        file_classes: class names in the row order of the file; None if nobody knows.
        thing_classes: class names in the row order of the model.

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
    for row, (in_file, in_set) in enumerate(zip_longest(file_classes, thing_classes)):
        if in_file is None or in_set is None or _fold(in_file) != _fold(in_set):
            raise UserError(
                f"{report.source} has class rows of the same shape as the model, but for other "
                f"classes: row {row}: {_quote(in_file)} in the file, {_quote(in_set)} in the "
                "training set. If they are the same classes, give the training set the names and "
                "the order of the file (or correct FINETUNE.SOURCE_CLASSES, if the names of the "
                "file come from there). If they are not, remove the final predictors from the "
                "file, so that they start fresh: "
                f"{shorten([name for name in report.loaded if is_final_predictor(name)])}."
            )
    return ""


def _fold(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name.strip().lower())


def _quote(name: str | None) -> str:
    return "no class" if name is None else f'"{name}"'
