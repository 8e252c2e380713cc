"""Recognise another framework's checkpoint by its keys, and check the config against its needs."""

import json
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from detectron2.config import CfgNode

from d2ft.checkpoint.convert.imagenet import (
    convert_torchvision_backbone,
    is_torchvision_backbone,
    msra_required_config,
)
from d2ft.checkpoint.convert.key_table import ConvertedCheckpoint
from d2ft.checkpoint.convert.mmdet import convert_mmdet, is_mmdet
from d2ft.checkpoint.convert.torchvision import convert_torchvision, is_torchvision
from d2ft.checkpoint.safe_load import METADATA_KEY
from d2ft.config.defaults import get_value
from d2ft.errors import UserError

# Registers what the converted weights' config lines name.
from d2ft.layers import retinanet_fpn, torchvision_anchors  # noqa: F401

logger = logging.getLogger(__name__)


class _Converter(NamedTuple):
    recognises: Callable[[Iterable[str]], bool]
    convert: Callable[[Mapping[str, Any]], ConvertedCheckpoint]


# torchvision comes first: its names are the more special ones.
_CONVERTERS = (
    _Converter(is_torchvision, convert_torchvision),
    _Converter(is_mmdet, convert_mmdet),
    _Converter(is_torchvision_backbone, convert_torchvision_backbone),
)

# Where the metadata of a converted checkpoint keeps what the weights need from the config.
_REQUIRED_KEY = "required_config"

# What d2ft's own checkpoints say of their pixels (describe_run) -> the config key.
_PIXEL_KEYS = {
    "pixel_format": "INPUT.FORMAT",
    "pixel_mean": "MODEL.PIXEL_MEAN",
    "pixel_std": "MODEL.PIXEL_STD",
}


class ConfigMismatch(NamedTuple):
    """A config key that the weights need another value of."""

    key: str
    value: Any
    required: Any


def convert_checkpoint(checkpoint: dict[str, Any], source: str) -> dict[str, Any]:
    """
    Bring a checkpoint of a known other framework into Detectron2's form.

    Args:
        checkpoint: from :func:`~d2ft.checkpoint.safe_load.load_checkpoint_file`.
        source: the file or URL as the user gave it.

    Returns:
        ``checkpoint`` itself if its keys are not those of another framework; a Caffe2 file, whose
        names Detectron2 matches, with a description of what it needs. Otherwise a new one
        of the ``model`` and a description as our own files have it, with the class names and what
        :func:`check_required_config` compares. Nothing else of the file is kept.

    Raises:
        UserError: if the framework is known but not this architecture; the first key that is not
            understood is named.
    """
    known = (entry for entry in _CONVERTERS if entry.recognises(checkpoint["model"]))
    converter = next(known, None)
    if converter is None:
        required = msra_required_config(checkpoint["model"])
        return {**checkpoint, METADATA_KEY: {_REQUIRED_KEY: required}} if required else checkpoint
    try:
        converted = converter.convert(checkpoint)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    logger.info("%s: converted from %s", source, converted.framework)
    for note in converted.notes:
        logger.warning("%s: %s", source, note)
    description: dict[str, Any] = {
        "converted_from": converted.framework,
        _REQUIRED_KEY: converted.required,
    }
    if converted.classes is not None:
        description["thing_classes"] = list(converted.classes)
    return {"model": converted.model, METADATA_KEY: description}


def required_config(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """
    Return dotted config key -> value that weights need, as far as they say it.

    Converted weights say it all, those that d2ft trained what their pixels were.
    """
    description = checkpoint.get(METADATA_KEY)
    if not isinstance(description, dict):
        return {}
    required = description.get(_REQUIRED_KEY)
    if isinstance(required, dict):
        return required
    return {key: description[own] for own, key in _PIXEL_KEYS.items() if own in description}


def required_config_mismatches(cfg: CfgNode, required: Mapping[str, Any]) -> list[ConfigMismatch]:
    """
    Return the keys of which the weights need another value, in the order of ``required``.

    Lists and tuples are the same, and numbers that agree to six digits.
    """
    found = [ConfigMismatch(key, get_value(cfg, key), value) for key, value in required.items()]
    return [entry for entry in found if not _agree(entry.value, entry.required)]


def check_required_config(cfg: CfgNode, checkpoint: Mapping[str, Any], source: str) -> None:
    """
    Refuse a config with which converted weights would compute something else.

    Args:
        cfg: the config of the run.
        checkpoint: as :func:`convert_checkpoint` returned it, or as such a file was read.
        source: the file or URL as the user gave it.

    Raises:
        UserError: with the lines to put into the YAML.
    """
    mismatches = required_config_mismatches(cfg, required_config(checkpoint))
    if mismatches:
        differences = "; ".join(f"{entry.key} is {entry.value!r}" for entry in mismatches)
        lines = format_yaml({entry.key: entry.required for entry in mismatches})
        raise UserError(
            f"{source} was trained with other settings than those of the config: {differences}. "
            f"With these it computes something else. Put into the YAML:\n\n{lines}"
        )


def format_yaml(values: Mapping[str, Any]) -> str:
    """Return dotted keys and plain values as the lines of a YAML config."""
    tree: dict[str, Any] = {}
    for key, value in values.items():
        *parents, leaf = key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return "".join(f"{line}\n" for line in _yaml_lines(tree))


def _yaml_lines(tree: Mapping[str, Any]) -> Iterable[str]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield f"{key}:"
            yield from (f"  {line}" for line in _yaml_lines(value))
        else:
            # JSON is YAML; Detectron2's configs write True and False with capitals.
            yield f"{key}: {value if isinstance(value, bool) else json.dumps(value)}"


def _agree(value: Any, required: Any) -> bool:
    if isinstance(required, (list, tuple)):
        return (
            isinstance(value, (list, tuple))
            and len(value) == len(required)
            and all(map(_agree, value, required))
        )
    if isinstance(required, (int, float)) and not isinstance(required, bool):
        return isinstance(value, (int, float)) and math.isclose(value, required, rel_tol=1e-6)
    return bool(value == required)
