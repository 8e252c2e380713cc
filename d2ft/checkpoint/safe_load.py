"""
Read checkpoint files without running anything that is in them.

A pickle is a program. PyTorch's files go through ``torch.load(weights_only=True)``; the plain
pickles of the Detectron2, Detectron1 and ImageNet zoos go through an unpickler that can build
numeric arrays and plain containers and nothing else. Neither falls back to the unrestricted one.
The kind of a file is told by its content: names such as ``model_final.pkl`` promise nothing.
"""

import pickle
import re
from collections import OrderedDict
from collections.abc import Callable, MutableMapping
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import numpy as np
import torch
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from d2ft.errors import UserError

# Where a file of ours describes itself, beside "model"; Detectron2 passes unknown entries through.
METADATA_KEY = "d2ft"

_ZIP_MAGIC = b"PK\x03\x04"
# Before torch 1.6 a file was a row of pickles, the first of which is this number:
# https://github.com/pytorch/pytorch/blob/v2.0.0/torch/serialization.py#L31
_LEGACY_TORCH_MAGIC = 0x1950A86A20F9469CFC6C.to_bytes(10, "little")
# Protocol 2 and later announce themselves; Python 2 wrote 0 and 1, which begin with an opcode:
# a mark, an empty container, or a global with its module and name on a line each.
_PICKLE_START = re.compile(rb"\x80|[(\]}]|c[\w.]+\n[\w.]+\n")
_FOREIGN_GLOBAL = re.compile(r"GLOBAL (\S+)")
_NUMERIC_DTYPE = re.compile(r"[<>=|]?[biufc]\d+|[?bBhHiIlLqQefdFD]")


def load_checkpoint_file(path: str | Path) -> dict[str, Any]:
    """
    Read a checkpoint from a local file in any of the formats that Detectron2 reads.

    Known are files of :func:`torch.save` (zip and legacy) with a ``model`` entry, a bare state
    dict, MMDetection's ``state_dict`` or pycls' ``model_state``, and pickles of NumPy arrays: Detectron2's zoo, and Caffe2's
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
    if start.startswith(_ZIP_MAGIC) or _LEGACY_TORCH_MAGIC in start:
        return _read_torch_file(path), True
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


def _read_torch_file(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        foreign = _FOREIGN_GLOBAL.search(str(error))
        if foreign:
            _refuse_global(path, foreign[1], error)
        reason = str(error).rpartition("WeightsUnpickler error: ")[2].strip().split("\n", 1)[0]
        raise UserError(f"{path}: cannot be read as tensors only ({reason}).") from error
    except Exception as error:
        # PyTorch reports a damaged file by whatever its reader trips over.
        reason = re.split(r"\.? *\n|\. ", str(error))[0] or type(error).__name__
        raise UserError(
            f"{path}: PyTorch cannot read the file ({reason}); most likely it is truncated or "
            "damaged. Copy or download it again."
        ) from error


def _read_pickle(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            return _ArrayUnpickler(file, encoding="latin1").load()
    except _ForeignGlobalError as error:
        _refuse_global(path, str(error), error)
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


def _refuse_global(path: Path, name: str, cause: Exception) -> NoReturn:
    raise UserError(
        f"{path}: asks for {name!r}, which is not part of tensors or arrays. Nothing in the file "
        "was run. If you trust its origin, load it with the program that wrote it and save only "
        "the state dict: torch.save({'model': model.state_dict()}, 'weights.pth')."
    ) from cause


class _ForeignGlobalError(pickle.UnpicklingError):
    """The pickle asks for a global that is not admitted; its argument is the name."""


def _encode_latin1(text: str, encoding: str) -> bytes:
    # Protocol 2 has no bytes; Python 3 writes them as a call of this. Other codecs are not data.
    if encoding not in {"latin1", "latin-1"}:
        raise pickle.UnpicklingError(f"text encoded as {encoding!r}")
    return text.encode("latin1")


def _numeric_dtype(name: str, align: bool = False, copy: bool = True) -> np.dtype[Any]:
    # Arrays of objects or of structures are not weights, and NumPy trusts what fills them.
    if not isinstance(name, str) or not _NUMERIC_DTYPE.fullmatch(name):
        raise pickle.UnpicklingError(f"an array of {name!r}, which is not a number type")
    # The pickle sets the byte order afterwards: never on the dtype that all of NumPy shares.
    return np.dtype(name, copy=True)


_RECONSTRUCT_ARRAY = np.zeros(1).__reduce__()[0]
_RECONSTRUCT_SCALAR = np.float32(0).__reduce__()[0]
_ARRAY_FROM_BUFFER = np.zeros(1).__reduce_ex__(5)[0]
_UNRESTRICTED_BUILD: Callable[[Any], None] = pickle._Unpickler.dispatch[pickle.BUILD[0]]
_ADMITTED_GLOBALS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("_codecs", "encode"): _encode_latin1,
    ("numpy", "dtype"): _numeric_dtype,
    ("numpy", "ndarray"): np.ndarray,
} | {
    (f"numpy.{core}.{module}", name): builder
    for core in ("core", "_core")  # NumPy 2 renamed it
    for module, name, builder in (
        ("multiarray", "_reconstruct", _RECONSTRUCT_ARRAY),
        ("multiarray", "scalar", _RECONSTRUCT_SCALAR),
        ("numeric", "_frombuffer", _ARRAY_FROM_BUFFER),
    )
}


class _ArrayUnpickler(pickle._Unpickler):
    """
    Same as :class:`pickle.Unpickler`, but builds numeric arrays and plain containers only.

    It is the implementation in Python, not the one in C: that one reserves memory for any memo
    index a damaged file may name, and a few thousand opcodes per file need no speed.
    """

    stack: list[Any]
    read: Callable[[int], bytes]
    append: Callable[[Any], None]
    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {**pickle._Unpickler.dispatch}

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ADMITTED_GLOBALS[module, name]
        except KeyError:
            raise _ForeignGlobalError(f"{module}.{name}") from None

    def _build(self) -> None:
        target, state = self.stack[-2:]
        if isinstance(target, OrderedDict):
            self.stack.pop()  # attributes could hide its methods, and hold no weights
            return
        if isinstance(target, np.dtype):
            _, byte_order, *rest = state
            if byte_order not in {"<", ">", "|", "="} or rest != [None, None, None, -1, -1, 0]:
                raise pickle.UnpicklingError(f"a number type with the state {state!r}")
        elif not isinstance(target, np.ndarray):
            raise pickle.UnpicklingError(f"a state for a {type(target).__name__}")
        _UNRESTRICTED_BUILD(self)

    def _bytearray(self) -> None:
        # The base class reserves the memory before it looks whether the file has as much.
        self.append(bytearray(self.read(int.from_bytes(self.read(8), "little"))))

    dispatch[pickle.BUILD[0]] = _build
    dispatch[pickle.BYTEARRAY8[0]] = _bytearray


def _as_checkpoint(content: dict[str, Any], is_torch_file: bool) -> dict[str, Any]:
    if "model" in content and isinstance(content["model"], dict):
        return content
    if isinstance(content.get("state_dict"), dict):
        # MMDetection; "meta" tells its config and class names.
        return {"model": content["state_dict"], "meta": content.get("meta")}
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
    blobs = content.get("blobs", content)
    return {
        "model": {k: v for k, v in blobs.items() if not str(k).endswith("_momentum")},
        "__author__": "Caffe2",
        "matching_heuristics": True,
    }


def _make_tensors(path: Path, model: MutableMapping[str, Any]) -> None:
    """Turn the arrays in ``model`` into tensors, in place so that its ``_metadata`` stays."""
    arrays = (torch.Tensor, np.ndarray)
    if not any(isinstance(model[name], arrays) for name in model):
        keys = ", ".join(repr(name) for name in list(model)[:5]) or "none"
        raise UserError(f"{path}: holds no tensors by name. Its keys: {keys}.")
    for name in list(model):
        value = model[name]
        if not isinstance(name, str) or not isinstance(value, arrays):
            raise UserError(
                f"{path}: {name!r} is a {type(value).__name__} where a model holds a tensor by "
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
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise UserError(
                f"{path}: {name!r} holds NaN or infinite values. The training that wrote the file "
                "had diverged, or the file is damaged; use an earlier checkpoint."
            )
    if all(name.startswith("module.") for name in model):
        consume_prefix_in_state_dict_if_present(model, "module.")  # type: ignore[arg-type]
