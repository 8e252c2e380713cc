"""
Read files of :func:`torch.save`, after a look at what they would take.

``torch.load(weights_only=True)`` runs no code, but believes the sizes that a file states. So the
directory of the archive and the element counts are compared with the size of the file before it
is called.
"""

import io
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any, NoReturn

import torch

from d2ft.checkpoint.safe_pickle import AbsurdSizeError, Inert, StorageScan
from d2ft.errors import UserError

ZIP_MAGIC = b"PK\x03\x04"
# Before torch 1.6 a file was a row of pickles, the first of which is this number:
# https://github.com/pytorch/pytorch/blob/v2.0.0/torch/serialization.py#L31
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C.to_bytes(10, "little")

_FOREIGN_GLOBAL = re.compile(r"GLOBAL (\S+)")

# MMEngine keeps the history of the losses beside the weights, as objects of this class. Their
# state is NumPy arrays and references to the methods that summarise them.
# https://github.com/open-mmlab/mmengine/blob/main/mmengine/logging/history_buffer.py
_HISTORY_BUFFER = "mmengine.logging.history_buffer.HistoryBuffer"
_PARTS_OF_HISTORY = (
    "builtins.getattr",
    "numpy.ndarray",
    "numpy.dtype",
    *(
        f"numpy.{core}.multiarray.{name}"
        for core in ("core", "_core")
        for name in ("_reconstruct", "scalar")
    ),
)


def is_torch_file(start: bytes) -> bool:
    """Tell by the first bytes of a file whether :func:`torch.save` wrote it."""
    return start.startswith(ZIP_MAGIC) or LEGACY_MAGIC in start[:32]


def read_torch_file(path: Path) -> Any:
    """
    Return the content of a file of :func:`torch.save`, zip or legacy, with tensors on the CPU.

    The training history in MMEngine's files is replaced by :class:`Inert` objects.

    Raises:
        UserError: if the file is damaged, asks for code to be run, or states sizes that it does
            not have.
    """
    _check_sizes(path)
    try:
        return _load(path, ())
    except pickle.UnpicklingError as error:
        if _foreign_global(error) != _HISTORY_BUFFER:
            _refuse(path, error)
    try:
        return _load(path, (_HISTORY_BUFFER, *_PARTS_OF_HISTORY))
    except pickle.UnpicklingError as error:
        _refuse(path, error)


def refuse_global(path: Path, name: str, cause: Exception) -> NoReturn:
    """Raise the error for a file that asks for a global beyond data."""
    raise UserError(
        f"{path}: asks for {name!r}, which is not part of tensors or arrays. Nothing in the file "
        "was run. If you trust its origin, load it with the program that wrote it and save only "
        "the state dict: torch.save({'model': model.state_dict()}, 'weights.pth')."
    ) from cause


def _load(path: Path, inert: tuple[str, ...]) -> Any:
    stand_ins: list[Any] = [(Inert, name) for name in inert]
    try:
        with torch.serialization.safe_globals(stand_ins):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise
    except Exception as error:
        # PyTorch reports a damaged file by whatever its reader trips over.
        raise _damaged(path, error) from error


def _foreign_global(error: Exception) -> str | None:
    found = _FOREIGN_GLOBAL.search(str(error))
    return found[1] if found else None


def _refuse(path: Path, error: Exception) -> NoReturn:
    name = _foreign_global(error)
    if name:
        refuse_global(path, name, error)
    reason = str(error).rpartition("WeightsUnpickler error: ")[2].strip().split("\n", 1)[0]
    raise UserError(f"{path}: cannot be read as tensors only ({reason}).") from error


def _damaged(path: Path, error: Exception) -> UserError:
    reason = re.split(r"\.? *\n|\. ", str(error))[0] or type(error).__name__
    return UserError(
        f"{path}: PyTorch cannot read the file ({reason}); most likely it is truncated or "
        "damaged. Copy or download it again."
    )


def _check_sizes(path: Path) -> None:
    """Refuse a file whose tensors would need more memory than it has bytes."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            if file.read(4) == ZIP_MAGIC:
                _check_archive(path, size)
            else:
                file.seek(0)
                _check_legacy(file, size)
    except UserError:
        raise
    except AbsurdSizeError as error:
        raise UserError(
            f"{path}: states a {error}, which is more than the file of {size} bytes holds for it. "
            "Nothing was loaded: the file is truncated or damaged, or made to fill the memory."
        ) from error
    except Exception as error:
        # A damaged pickle or archive fails with any type of exception.
        raise _damaged(path, error) from error


def _check_archive(path: Path, size: int) -> None:
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        if len(entries) < len(archive.infolist()):
            raise zipfile.BadZipFile("an entry of the archive comes twice")
        compressed = [e for e in entries.values() if e.compress_type != zipfile.ZIP_STORED]
        claimed = sum(entry.file_size for entry in entries.values())
        if compressed or claimed > size:
            raise UserError(
                f"{path}: a zip archive of {size} bytes that unpacks to {claimed}. PyTorch stores "
                "its files uncompressed, so this one was not written by torch.save; nothing was "
                "unpacked."
            )
        pickles = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise zipfile.BadZipFile("the archive holds no data.pkl, which torch.save writes")
        folder = pickles[0].removesuffix("data.pkl")

        def available(key: str) -> int:
            entry = entries.get(f"{folder}data/{key}")
            if entry is None:
                raise zipfile.BadZipFile(f"the archive holds no data/{key[:40]}")
            return entry.file_size

        StorageScan(io.BytesIO(archive.read(pickles[0])), available).load()


def _check_legacy(file: io.BufferedReader, size: int) -> None:
    # The magic number, the version of the format and the byte order come before the content.
    for _ in range(4):
        scan = StorageScan(file, lambda key: size)
        scan.load()
    total = sum(scan.claimed.values())
    if total > size:
        raise AbsurdSizeError(f"total of {total} bytes")
