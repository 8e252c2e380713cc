"""
Dataset dicts in a file that is mapped, not read: a large set opens at once, in every process.

The file holds each dict as JSON, one after the other, then the columns of all of them
(:mod:`d2ft.data.columns`), then a JSON table of contents, its length and a mark. A process that
maps it takes no memory of its own for what others have in theirs.
"""

import json
import mmap
import os
import struct
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import fields
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import IO, Any, overload

import numpy as np
from detectron2.structures import BoxMode

from d2ft.data.columns import Array, RecordColumns, build_columns, join_columns
from d2ft.errors import UserError

Record = dict[str, Any]

_MARK = b"d2ftrec1"
_TAIL = struct.Struct("<Q8s")  # length of the table of contents, mark
_ALIGNMENT = 8
_COLUMNS = tuple(field.name for field in fields(RecordColumns))
_BOX_MODES = {mode.value: mode for mode in BoxMode}  # JSON keeps the number of the IntEnum


def write_record_file(file: IO[bytes], records: Sequence[Record], about: dict[str, Any]) -> None:
    """
    Write a file for :class:`RecordFile`.

    Args:
        file: empty, to be written.
        records: dataset dicts that JSON can hold.
        about: kept with them; JSON-able.

    Raises:
        UserError: for records without file name, or annotations without a box.
    """
    position = 0
    ends = np.empty(len(records), dtype=np.int64)
    for index, record in enumerate(records):
        position += file.write(json.dumps(record).encode("ascii"))
        ends[index] = position
    sections = {}
    columns = build_columns(records)
    for name, values in (("ends", ends), *((name, getattr(columns, name)) for name in _COLUMNS)):
        position += file.write(bytes(-position % _ALIGNMENT))
        is_array = isinstance(values, np.ndarray)
        data = values.tobytes() if is_array else json.dumps(values).encode("ascii")
        sections[name] = [position, len(data), values.dtype.str if is_array else None]
        position += file.write(data)
    contents = json.dumps({"about": about, "sections": sections}).encode("ascii")
    file.write(contents + _TAIL.pack(len(contents), _MARK))


class RecordFile:
    """
    A file of dataset dicts, mapped. It may be given to worker processes of any kind.

    Attributes:
        about: as it was written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """
        Map the file.

        Raises:
            OSError: if it cannot be opened.
            ValueError: if it is not whole, or no such file.
        """
        self._path = Path(path)
        self._map(open(path, "rb"))  # noqa: SIM115, it stays open

    def _map(self, file: IO[bytes]) -> None:
        self._file = file
        weakref.finalize(self, file.close)
        size = os.fstat(file.fileno()).st_size
        if size < _TAIL.size:
            raise ValueError(f"it has {size} bytes")
        self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        length, mark = _TAIL.unpack(self._bytes[-_TAIL.size :])
        if mark != _MARK:
            raise ValueError("it is not whole, or of another version")
        contents = json.loads(self._bytes[-_TAIL.size - length : -_TAIL.size])
        self.about: dict[str, Any] = contents["about"]
        self._sections: dict[str, tuple[int, int, str | None]] = contents["sections"]
        self._ends = self._section("ends")

    def __getstate__(self) -> dict[str, Any]:
        # The open file, not its name, which another file may have by now.
        return {"path": self._path, "file": DupFd(self._file.fileno())}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._path = state["path"]
        self._map(os.fdopen(state["file"].detach(), "rb"))

    def __len__(self) -> int:
        return len(self._ends)

    def read(self, index: int) -> Record:
        """
        Return a new dict of the record at ``index``, from 0.

        Raises:
            UserError: if its bytes are damaged.
        """
        start = int(self._ends[index - 1]) if index else 0
        try:
            record: Record = json.loads(self._bytes[start : int(self._ends[index])])
            for annotation in record.get("annotations", ()):
                annotation["bbox_mode"] = _BOX_MODES[annotation["bbox_mode"]]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"the cache {self._path} is damaged at record {index} ({error!r}); remove it, and "
                "it is made again"
            ) from error
        return record

    def columns(self) -> RecordColumns:
        """Return the columns; arrays are those of the file, not to be written to."""
        return RecordColumns(**{name: self._section(name) for name in _COLUMNS})

    def _section(self, name: str) -> Any:
        start, length, dtype = self._sections[name]
        if dtype is None:
            return json.loads(self._bytes[start : start + length])
        values = np.frombuffer(self._bytes, np.uint8, length, start).view(dtype)
        width = {"sizes": 2, "boxes": 4}.get(name)
        return values.reshape(-1, width) if width else values


class StoredRecords(Sequence[Record]):
    """
    Some of the dataset dicts of one or more files, in order; each access gives a new dict.

    It is what training and checks use in place of a list of all dicts. The catalog gives lists,
    which may be changed.
    """

    def __init__(self, files: Sequence[RecordFile], keep: Array | None = None):
        """
        Join files.

        Args:
            files: at least one.
            keep: bool for each record of the files, which of them to have; None is all.
        """
        self._files = tuple(files)
        self._starts = np.cumsum([0, *map(len, self._files)])
        self._keep = keep
        self._rows = None if keep is None else np.flatnonzero(keep)

    @classmethod
    def join(cls, parts: Sequence["StoredRecords"]) -> "StoredRecords":
        """Return the records of the parts, one after the other; there is at least one."""
        files = [file for part in parts for file in part._files]
        if all(part._keep is None for part in parts):
            return cls(files)
        return cls(files, np.concatenate([part._kept() for part in parts]))

    @property
    def about(self) -> dict[str, Any]:
        """What was written with the records of the first file."""
        return self._files[0].about

    def where(self, keep: Array) -> "StoredRecords":
        """Return those records for which ``keep``, a bool for each, is true."""
        kept = self._kept().copy()
        kept[kept] = keep
        return StoredRecords(self._files, kept)

    def columns(self) -> RecordColumns:
        """Return the columns of the records; they are read anew, so keep them while in use."""
        joined = join_columns([file.columns() for file in self._files])
        return joined if self._keep is None else joined.where(self._keep)

    def _kept(self) -> Array:
        return np.ones(self._starts[-1], dtype=bool) if self._keep is None else self._keep

    def __len__(self) -> int:
        return int(self._starts[-1]) if self._rows is None else len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...

    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        number = range(len(self))[index]  # an IndexError, and negative ones from the end
        row = number if self._rows is None else int(self._rows[number])
        part = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self._files[part].read(row - int(self._starts[part]))

    def __iter__(self) -> Iterator[Record]:
        for index in range(len(self)):
            yield self[index]


def columns_of(records: Sequence[Record]) -> RecordColumns:
    """
    Return the columns of dataset dicts, from their file if they are in one.

    Raises:
        UserError: if a record lacks its file name, or an annotation a box of four numbers.
    """
    return records.columns() if isinstance(records, StoredRecords) else build_columns(records)
