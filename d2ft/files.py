"""Write files whole or not at all, and tell whether files have changed."""

import contextlib
import hashlib
import os
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str], mode: str = "w") -> Iterator[IO[Any]]:
    """
    Open a temporary file beside ``path`` that takes its place when the block ends.

    A reader sees the old content or the new one, never a part: the file is flushed and synced
    before :func:`os.replace`. If the block raises, ``path`` keeps what it had and the temporary
    file is removed.

    Args:
        path: the file to write; its folder must exist.
        mode: ``"w"`` (UTF-8) or ``"wb"``.
    """
    path = Path(path)
    # Not by mkstemp, whose files are for their owner alone.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        encoding = None if "b" in mode else "utf-8"
        with open(temporary, mode.replace("w", "x"), encoding=encoding) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sha256(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of the file's content as 64 hexadecimal digits."""
    return file_digest(path, "sha256")


def file_digest(path: str | os.PathLike[str], algorithm: str) -> str:
    """Return a hash of the file's content in hexadecimal digits, by an algorithm of hashlib."""
    digest = hashlib.new(algorithm)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fingerprint(paths: Iterable[str | os.PathLike[str]]) -> str:
    """
    Return a hash that changes when any of the files is replaced, edited, added or removed.

    It is made of each file's path, size and modification time in nanoseconds, not of its
    content: thousands of images are checked in the time of a directory listing.

    Raises:
        FileNotFoundError: if one of the paths does not exist.
    """
    digest = hashlib.sha256()
    for path in paths:
        status = os.stat(path)
        digest.update(f"{os.fspath(path)}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()
