"""
Keep parsed datasets on disk, so that each is parsed once and not once per process and run.

A cache file is JSON with the fingerprint of the files it was made of. It holds Detectron2's
dataset dicts and nothing else, and can be deleted at any time.
"""

import gc
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from detectron2.structures import BoxMode
from filelock import FileLock

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


def cached_records(
    key: str,
    files: Iterable[str | os.PathLike[str]],
    build: Callable[[], Records],
    *,
    version: int,
) -> Records:
    """
    Return what ``build()`` returns, from the cache if none of the files has changed since.

    Of several processes on a node that ask for the same key one builds while the others wait for
    it. An unreadable or stale cache file is rebuilt.

    Args:
        key: identifies the dataset, e.g. the loader's name and its folders.
        files: every file that ``build`` reads; paths, sizes and times make the fingerprint.
        build: parses the files into dataset dicts that JSON can hold.
        version: of the parser; raise it when its result changes.

    Returns:
        Dataset dicts; ``bbox_mode`` of annotations is :class:`BoxMode`, as Detectron2 has it.
    """
    folder = cache_dir() / "datasets"
    folder.mkdir(exist_ok=True)
    path = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:20]}.json"
    stamp = f"{version}:{fingerprint(files)}"
    loaded = _LOADED.get()
    if loaded is not None and loaded.get(key, ("",))[0] == stamp:
        return list(loaded[key][1])
    records = _read(path, key, stamp)
    if records is None:
        records = _build(path, key, stamp, build)
    records = _restore_box_modes(records)
    if loaded is not None:
        loaded[key] = stamp, list(records)
    return records


def _build(path: Path, key: str, stamp: str, build: Callable[[], Records]) -> Records:
    with FileLock(f"{path}.lock"):
        records = _read(path, key, stamp)  # another process may have built it meanwhile
        if records is None:
            records = build()
            with atomic_write(path) as file:
                # One call into the C encoder: json.dump would iterate in Python.
                file.write(json.dumps({"key": key, "fingerprint": stamp, "records": records}))
            logger.info("Parsed %s once; kept in %s", key, path)
    return records


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


@_collector_paused()
def _read(path: Path, key: str, stamp: str) -> Records | None:
    try:
        content = json.loads(path.read_bytes())
        if content["key"] != key:
            raise KeyError(f"it belongs to {content['key']}")
        found, records = content["fingerprint"], content["records"]
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
    return list(records)


def _restore_box_modes(records: Records) -> Records:
    # JSON keeps the IntEnum as a number. Its members from a table take a fifth of the time.
    modes = {mode.value: mode for mode in BoxMode}
    for record in records:
        for annotation in record.get("annotations", ()):
            annotation["bbox_mode"] = modes[annotation["bbox_mode"]]
    return records
