"""
Keep parsed datasets on disk, so that each is parsed once and not once per process and run.

A cache file has the fingerprint of the files it was made of. It holds Detectron2's dataset dicts
and what its loader found out about them, nothing else, and can be deleted at any time.
"""

import functools
import gc
import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from filelock import FileLock

from d2ft.data.record_store import RecordFile, StoredRecords, write_record_file
from d2ft.errors import UserError
from d2ft.files import atomic_write, fingerprint

logger = logging.getLogger(__name__)

Records = list[dict[str, Any]]

# What was read inside of `loaded_once`: key -> fingerprint and records. None outside.
_LOADED: ContextVar[dict[str, tuple[str, Records]] | None] = ContextVar("loaded", default=None)


def cache_dir() -> Path:
    """
    Return the folder of d2ft's caches: ``$D2FT_CACHE``, else ``~/.cache/d2ft``; create it.

    Raises:
        UserError: if it cannot be created or written.
    """
    folder = Path(os.environ.get("D2FT_CACHE") or "~/.cache/d2ft").expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(f"no permission to write in {folder}")
    except OSError as error:
        raise UserError(
            f"the cache folder {folder} cannot be used ({error}); set the environment variable "
            "D2FT_CACHE to a folder that can be written"
        ) from error
    return folder


@contextmanager
def loaded_once() -> Iterator[None]:
    """
    Inside of the block, read each dataset from the cache once, unless its files change.

    Those who ask again get the same dicts, so nobody may change them. They are let go at the end
    of the outermost block, or by :func:`forget_loaded`: a run needs its annotations several times
    while it starts, and the memory afterwards.
    """
    before = _LOADED.get()
    token = _LOADED.set({} if before is None else before)
    try:
        yield
    finally:
        _LOADED.reset(token)


def forget_loaded() -> None:
    """Let go of what :func:`loaded_once` keeps; the rest of its block reads again."""
    _LOADED.set(None)


@functools.cache
def warn_once(own_logger: logging.Logger, message: str, *args: object) -> None:
    """Log a warning; a run that loads a dataset several times shows it once."""
    own_logger.warning(message, *args)


def cached_records(
    key: str,
    files: Iterable[str | os.PathLike[str]],
    build: Callable[[], Records],
    *,
    version: int,
) -> Records:
    """
    Return what ``build()`` returns, from the cache if none of the files has changed since.

    Args:
        key: identifies the dataset, e.g. the loader's name and its folders.
        files: every file that ``build`` reads; paths, sizes and times make the fingerprint.
        build: parses the files into dataset dicts that JSON can hold.
        version: of the parser; raise it when its result changes.
    """
    return list_once(open_cached(key, files, lambda: (build(), {}), version=version))


def open_cached(
    key: str,
    files: Iterable[str | os.PathLike[str]],
    build: Callable[[], tuple[Records, dict[str, Any]]],
    *,
    version: int,
) -> StoredRecords:
    """
    Same as :func:`cached_records`, but the dicts are read when they are asked for.

    Of several processes on a node that ask for the same key one builds while the others wait for
    it. An unreadable or stale cache file is rebuilt.

    Args:
        key: as there.
        files: as there.
        build: returns the dicts, and what else is to be kept: "facts" of ``about`` of the result.
        version: as there.
    """
    folder = cache_dir() / "datasets"
    folder.mkdir(exist_ok=True)
    path = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:20]}.records"
    stamp = f"{version}:{fingerprint(files)}"
    stored = _read(path, key, stamp)
    return _build(path, key, stamp, build) if stored is None else stored


def list_once(stored: StoredRecords) -> Records:
    """Return the dicts of what :func:`open_cached` opened as a list; see :func:`loaded_once`."""
    loaded = _LOADED.get()
    key, stamp = stored.about["key"], stored.about["fingerprint"]
    if loaded is not None and loaded.get(key, ("",))[0] == stamp:
        return list(loaded[key][1])
    with _collector_paused():
        records = list(stored)
    if loaded is not None:
        loaded[key] = stamp, list(records)
    return records


def _build(
    path: Path, key: str, stamp: str, build: Callable[[], tuple[Records, dict[str, Any]]]
) -> StoredRecords:
    with FileLock(f"{path}.lock"):
        stored = _read(path, key, stamp)  # another process may have built it meanwhile
        if stored is None:
            records, facts = build()
            with atomic_write(path, "wb") as file:
                about = {"key": key, "fingerprint": stamp, "facts": facts}
                write_record_file(file, records, about)
            logger.info("Parsed %s once; kept in %s", key, path)
            stored = StoredRecords([RecordFile(path)])
    return stored


@contextmanager
def _collector_paused() -> Iterator[None]:
    # While objects are made that all stay, the search for garbage finds none and takes twice as
    # long as the parser. It also looks at all other objects, so a large file takes over-long.
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _read(path: Path, key: str, stamp: str) -> StoredRecords | None:
    try:
        file = RecordFile(path)
        if file.about["key"] != key:
            raise KeyError(f"it belongs to {file.about['key']}")
        found = file.about["fingerprint"]
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(
            f"the cache {path} cannot be read ({error}); remove it, or set the environment "
            "variable D2FT_CACHE to a folder of your own"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        logger.warning("The cache %s cannot be read (%s): parsing the dataset again", path, error)
        return None
    if found != stamp:
        logger.info("The files of %s have changed: parsing them again", key)
        return None
    return StoredRecords([file])
