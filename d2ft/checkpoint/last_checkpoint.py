"""Find the checkpoint that a run goes on from, past one that is damaged."""

import logging
import os
from pathlib import Path

from d2ft.checkpoint.safe_load import load_checkpoint_file
from d2ft.errors import UserError

logger = logging.getLogger(__name__)


def find_last_checkpoint(save_dir: str) -> str:
    """
    Return the checkpoint that ``--resume`` goes on from, or "" if there is none yet.

    Args:
        save_dir: a run's OUTPUT_DIR.

    Raises:
        UserError: if ``last_checkpoint`` names a file that is not there.
    """
    tag = os.path.join(save_dir, "last_checkpoint")
    if not os.path.isfile(tag):
        return ""
    with open(tag, encoding="utf-8") as file:
        name = file.read().strip()
    path = os.path.join(save_dir, name)
    if not os.path.isfile(path):
        raise UserError(
            f"{tag} names {name!r}, which is not there. Write the name of another checkpoint of "
            "that folder into it, or start without --resume."
        )
    return path


def find_whole_checkpoint(save_dir: str) -> str:
    """
    Return what ``--resume`` goes on from: the last checkpoint that can be read whole, or "".

    A damaged one is reported as an error and passed over for the one before it.

    Args:
        save_dir: a run's OUTPUT_DIR.

    Raises:
        UserError: as :func:`find_last_checkpoint`; also if no checkpoint can be read.
    """
    last = find_last_checkpoint(save_dir)
    if not last:
        return ""
    numbered = sorted(map(str, Path(save_dir).glob("model_" + "[0-9]" * 7 + ".pth")), reverse=True)
    if os.path.basename(last) != "model_final.pth":
        numbered = [path for path in numbered if path < last]
    problems = []
    for path in (last, *numbered):
        try:
            load_checkpoint_file(path)
        except UserError as error:
            problems.append(str(error))
            continue
        if problems:
            logger.error(
                "The last checkpoint cannot be read: %s. The run goes on from the one before, %s.",
                " ".join(problems),
                path,
            )
        return path
    raise UserError(
        "no checkpoint can be resumed: " + " ".join(problems) + " Start without --resume."
    )
