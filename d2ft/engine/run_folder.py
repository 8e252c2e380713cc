"""The folder of a run: one run at a time, and none that writes over another."""

import errno
import fcntl
import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode

from d2ft.data.derived import describe_derived
from d2ft.errors import UserError
from d2ft.files import atomic_write

logger = logging.getLogger(__name__)

LOCK_FILE = "run.lock"
COMPLETE_FILE = "complete.json"

_held: set[Path] = set()


@contextmanager
def run_lock(output_dir: str) -> Iterator[None]:
    """
    Keep other processes from running in ``output_dir`` during the block; the folder is made.

    The lock is the kernel's and ends with this process, however it ends; a process that it forks
    does not inherit it. Blocks of one process may be nested. What a killed run left half written
    is removed.

    Raises:
        UserError: if another process runs there, or nothing can be written there.
    """
    folder = Path(output_dir).resolve()
    if folder in _held:
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK_FILE).open("a+", encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"OUTPUT_DIR {output_dir} cannot be written to ({error.strerror}); choose another folder"
        ) from error
    with file:
        try:
            # Not flock, which loader workers would inherit and keep for seconds after a kill.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise UserError(
                f"another run is in OUTPUT_DIR {output_dir}: {holder}; wait for its end, stop it, or "
                "choose another OUTPUT_DIR"
            ) from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        for leftover in folder.glob(".*.tmp"):
            logger.info("Removing %s, which a killed run did not finish", leftover)
            leftover.unlink()
        _held.add(folder)
        try:
            yield
        finally:
            _held.remove(folder)


def check_output_dir(output_dir: str, *, resume: bool) -> None:
    """
    Check, without writing anything, that a run may begin in ``output_dir``.

    Args:
        output_dir: it need not exist.
        resume: as ``--resume``.

    Raises:
        UserError: if the folder cannot be written to, or holds checkpoints of a run that this one
            does not go on with.
    """
    folder = Path(output_dir).resolve()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(
            f"OUTPUT_DIR {output_dir}: nothing can be written to {existing}; choose another folder"
        )
    tag = folder / "last_checkpoint"
    if not resume and tag.is_file():
        raise UserError(
            f"OUTPUT_DIR {output_dir} holds a run already, up to {tag.read_text().strip()}. Give "
            "--resume to go on with it, choose another OUTPUT_DIR, or remove the folder"
        )


def write_description(cfg: CfgNode, seed: int, preflight: dict[str, Any]) -> None:
    """
    Keep the resolved config, which trains the same run again, and what was checked.

    Args:
        cfg: the resolved config.
        seed: that the run has, which a checkpoint may have set.
        preflight: for ``preflight.json``.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.SEED = seed
    output_dir = Path(cfg.OUTPUT_DIR)
    with atomic_write(output_dir / "config.yaml") as file:
        file.write(cfg.dump())
    with atomic_write(output_dir / "preflight.json") as file:
        json.dump(preflight, file, indent=2)
    derived = describe_derived(cfg)
    if derived:
        with atomic_write(output_dir / "derived_datasets.json") as file:
            json.dump(derived, file, indent=2)


def mark_complete(output_dir: str, iterations: int) -> None:
    """Note that a run of so many iterations has ended, its last evaluation and metrics too."""
    with atomic_write(Path(output_dir) / COMPLETE_FILE) as file:
        json.dump({"iterations": iterations}, file)


def is_complete(output_dir: str | Path, iterations: int) -> bool:
    """Tell whether a run of so many iterations was marked as complete."""
    path = Path(output_dir) / COMPLETE_FILE
    return path.is_file() and json.loads(path.read_text())["iterations"] == iterations
