"""Write a data set whole or not at all, once."""

import contextlib
import json
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from d2ft.errors import UserError

logger = logging.getLogger(__name__)

# Counted up when the same arguments no longer give the same files.
GENERATOR_VERSION = 1
_MANIFEST = "dataset.json"


@contextlib.contextmanager
def dataset_folder(
    root: str | os.PathLike[str], generator: str, **arguments: Any
) -> Iterator[Path | None]:
    """
    Give a folder to fill, which becomes ``root`` when the block ends.

    A manifest in it tells later calls what the folder holds. A run that is killed leaves a
    hidden folder beside ``root``, never a ``root`` that lacks files.

    Args:
        root: the data set's folder; its parents are made.
        generator: name of the set.
        arguments: all that determines the files; JSON-able.

    Yields:
        An empty folder, or None if ``root`` already holds this very set.

    Raises:
        UserError: if ``root`` holds anything else.
    """
    root = Path(root)
    manifest = {"generator": generator, "version": GENERATOR_VERSION, **arguments}
    if _holds(root, manifest):
        logger.info("%s is already in %s", generator, root)
        yield None
        return
    root.parent.mkdir(parents=True, exist_ok=True)
    # The folder that moves is made inside the temporary one, which only its owner may read.
    with tempfile.TemporaryDirectory(prefix=f".{root.name}.", dir=root.parent) as temporary:
        part = Path(temporary) / root.name
        part.mkdir()
        yield part
        (part / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        try:
            os.rename(part, root)
        except OSError:
            # Another process may have been first; its files are the same.
            if not _holds(root, manifest):
                raise
    logger.info("Wrote %s to %s", generator, root)


def _holds(root: Path, manifest: dict[str, Any]) -> bool:
    """Tell whether ``root`` holds the set; raise if it holds another one."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    wanted = json.dumps(manifest, sort_keys=True)
    try:
        found = json.dumps(json.loads((root / _MANIFEST).read_text("utf-8")), sort_keys=True)
    except (OSError, ValueError):
        found = f"files without a readable {_MANIFEST}"
    if found != wanted:
        raise UserError(
            f"{root} holds another data set. Found: {found}. Wanted: {wanted}. "
            "Choose another folder, or remove this one."
        )
    return True
