"""
Read checkpoint files without running anything that is in them.

A pickle is a program. PyTorch's files go through ``torch.load(weights_only=True)``; the plain
pickles of the Detectron2, Detectron1 and ImageNet zoos go through an unpickler that can build
numeric arrays and plain containers and nothing else. Neither falls back to the unrestricted one.
Files of safetensors hold no program. No format may ask for more memory than the file has bytes.
The kind of a file is told by its content: names such as ``model_final.pkl`` promise nothing.
"""

import mmap
import re
import reprlib
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from d2ft.checkpoint.safe_pickle import ArrayUnpickler, ForeignGlobalError
from d2ft.checkpoint.torch_file import is_torch_file, read_torch_file, refuse_global
from d2ft.errors import UserError

# Where a file of ours describes itself, beside "model"; Detectron2 passes unknown entries through.
METADATA_KEY = "d2ft"

# Protocol 2 and later announce themselves; Python 2 wrote 0 and 1, which begin with an opcode:
# a mark, an empty container, or a global with its module and name on a line each.
_PICKLE_START = re.compile(rb"\x80|[(\]}]|c[\w.]+\n[\w.]+\n")


def load_checkpoint_file(path: str | Path) -> dict[str, Any]:
    """
    Read a checkpoint from a local file in any of the formats that Detectron2 reads.

    Known are files of :func:`torch.save` (zip and legacy) with a ``model`` entry, a bare state
    dict, MMDetection's ``state_dict`` or pycls' ``model_state``; safetensors; and pickles of NumPy
    arrays: Detectron2's zoo, and Caffe2's
    (Detectron1, ImageNet backbones), whose names Detectron2 matches by its heuristics.

    Returns:
        ``model``: name -> tensor on the CPU, without a ``module.`` that data parallel wrappers
        put before every name; and whatever else the file holds. ``matching_heuristics`` and
        ``__author__`` as :class:`detectron2.checkpoint.DetectionCheckpointer` sets them.

    Raises:
        UserError: if the file is missing, empty, damaged, not a checkpoint, asks for code to be
            run, or holds a weight that is not a number. The message names the file.
    """
    path = Path(path)
    content, is_torch_file = _read_content(path)
    if not isinstance(content, dict):
        raise UserError(
            f"{path}: holds a {type(content).__name__} where a checkpoint holds a dictionary of "
            "tensors by name."
        )
    checkpoint = _as_checkpoint(content, is_torch_file)
    _make_tensors(path, checkpoint["model"])
    _check_tensors(path, checkpoint["model"])
    if all(name.startswith("module.") for name in checkpoint["model"]):
        consume_prefix_in_state_dict_if_present(checkpoint["model"], "module.")
    return checkpoint


def _read_content(path: Path) -> tuple[Any, bool]:
    if path.is_dir():
        raise UserError(f"{path}: is a folder; a checkpoint is a file, such as model_final.pth.")
    if not path.is_file():
        raise UserError(f"{path}: there is no such file.")
    with path.open("rb") as file:
        start = file.read(512)
    if not start:
        raise UserError(f"{path}: the file is empty. Copy or download it again.")
    if is_torch_file(start):
        return read_torch_file(path), True
    if _is_safetensors(start, path.stat().st_size):
        return _read_safetensors(path), True
    if _PICKLE_START.match(start):
        return _read_pickle(path), False
    raise UserError(f"{path}: {_describe_foreign_start(start)}, not a checkpoint.")


def _describe_foreign_start(start: bytes) -> str:
    try:
        # The last character may be cut in two; its bytes say nothing about the rest.
        text = start[:-3].decode("utf-8").strip() if len(start) > 3 else start.decode("utf-8")
    except UnicodeDecodeError:
        return "is in no format that is known here"
    first_line = text.split("\n", 1)[0][:60]
    if text.startswith("<"):
        return f"is a web page ({first_line!r}), perhaps the error page of a failed download"
    return f"is a text file ({first_line!r})"


def _read_pickle(path: Path) -> Any:
    try:
        # A mapped file hands out no more than it has, whatever length the pickle states.
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return ArrayUnpickler(data, encoding="latin1").load()
    except ForeignGlobalError as error:
        refuse_global(path, str(error), error)
    except EOFError as error:
        raise UserError(
            f"{path}: the file is truncated or damaged. Copy or download it again."
        ) from error
    except Exception as error:
        # A damaged pickle calls its opcodes with anything: every exception type is possible.
        raise UserError(
            f"{path}: cannot be read as a pickle of arrays ({type(error).__name__}: {error}); most "
            "likely it is truncated or damaged. Copy or download it again."
        ) from error


def _is_safetensors(start: bytes, size: int) -> bool:
    # Eight bytes with the length of a JSON object, the object, then the numbers:
    # https://github.com/huggingface/safetensors#format
    return start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= size - 8


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise UserError(
            f"{path}: is a safetensors file, and the package that reads it is not installed: "
            "pip install safetensors"
        ) from error
    try:
        return load_file(path)
    except Exception as error:
        # Of the package, and of what it calls with the types and shapes in a damaged file.
        raise UserError(
            f"{path}: cannot be read as safetensors ({error}); most likely it is truncated or "
            "damaged. Copy or download it again."
        ) from error


def _as_checkpoint(content: dict[str, Any], is_torch_file: bool) -> dict[str, Any]:
    if "model" in content and isinstance(content["model"], dict):
        return content
    if isinstance(content.get("state_dict"), dict):  # MMDetection, Lightning
        return {"model": content["state_dict"]} | {
            key: value for key, value in content.items() if key not in ("model", "state_dict")
        }
    if isinstance(content.get("model_state"), dict):
        # The rules for the foreign formats are those of Detectron2's DetectionCheckpointer:
        # https://github.com/facebookresearch/detectron2/blob/main/detectron2/checkpoint/detection_checkpoint.py
        return {
            "model": {
                name: value
                for name, value in content["model_state"].items()
                if not name.endswith("num_batches_tracked")
            },
            "__author__": "pycls",
            "matching_heuristics": True,
        }
    if is_torch_file:
        return {"model": content}
    blobs = content.get("blobs")
    blobs = blobs if isinstance(blobs, dict) else content
    return {
        "model": {k: v for k, v in blobs.items() if not str(k).endswith("_momentum")},
        "__author__": "Caffe2",
        "matching_heuristics": True,
    }


def _make_tensors(path: Path, model: MutableMapping[str, Any]) -> None:
    """Turn the arrays in ``model`` into tensors, in place so that its ``_metadata`` stays."""
    arrays = (torch.Tensor, np.ndarray)
    if not any(isinstance(model[name], arrays) for name in model):
        keys = ", ".join(reprlib.repr(name) for name in list(model)[:5]) or "none"
        raise UserError(f"{path}: holds no tensors by name. Its keys: {keys}.")
    for name in list(model):
        value = model[name]
        if not isinstance(name, str) or not isinstance(value, arrays):
            raise UserError(
                f"{path}: {name!r:.80} is a {type(value).__name__} where a model holds a tensor by "
                "name."
            )
        if isinstance(value, np.ndarray):
            try:
                # torch takes neither the other byte order nor memory it may not write.
                native = np.require(value, value.dtype.newbyteorder("="), ("C", "W"))
                model[name] = value = torch.from_numpy(native)
            except TypeError as error:
                raise UserError(
                    f"{path}: {name!r} has the number type {value.dtype}, which PyTorch lacks."
                ) from error


def _check_tensors(path: Path, model: Mapping[str, torch.Tensor]) -> None:
    size = path.stat().st_size
    for name, value in model.items():
        # Floats of 8 bits and less are codes with a scale elsewhere, and torch cannot test them.
        is_coded = value.is_quantized or (value.is_floating_point() and value.element_size() < 2)
        if value.layout != torch.strided or value.device.type != "cpu" or is_coded:
            raise UserError(
                f"{path}: {name!r} is not a plain tensor ({value.layout}, {value.dtype}, device "
                f"{value.device}); save the model's state dict with dense tensors."
            )
        # A few numbers may stand for a tensor of any size, repeated by a stride of 0.
        if value.numel() * value.element_size() > size:
            raise UserError(
                f"{path}: {name!r} claims the shape {tuple(value.shape)}, which needs more memory "
                f"than the file of {size} bytes holds. The file is damaged, or made to fill the "
                "memory."
            )
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise UserError(
                f"{path}: {name!r} holds NaN or infinite values. The training that wrote the file "
                "had diverged, or the file is damaged; use an earlier checkpoint."
            )
