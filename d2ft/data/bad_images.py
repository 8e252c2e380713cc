"""Leave bad training images out, as many as the config allows, and keep a list of them."""

import json
import logging
import os
from pathlib import Path

from detectron2.config import CfgNode

from d2ft.errors import UserError

logger = logging.getLogger(__name__)

BAD_IMAGES_FILE = "bad_images.jsonl"


class BadImageError(UserError):
    """An image file that cannot be read, or is not of the annotated size."""


class BadImages:
    """
    The list of the bad images of a run, shared by all its processes and loader workers.

    It is a file in which each line is ``{"file_name", "problem"}``; a resumed run adds to it.

    Args:
        path: the file.
        limit: how many different images may be bad.
    """

    def __init__(self, path: str | os.PathLike[str], limit: int) -> None:
        self.path = Path(path)
        self.limit = limit

    @classmethod
    def of(cls, cfg: CfgNode) -> "BadImages | None":
        """Return the list of a config's OUTPUT_DIR, or None if no image may be bad."""
        limit = cfg.DATALOADER.MAX_BAD_IMAGES
        return cls(Path(cfg.OUTPUT_DIR) / BAD_IMAGES_FILE, limit) if limit else None

    def add(self, file_name: str, problem: str) -> None:
        """
        Put an image on the list, unless it is there.

        Raises:
            UserError: if the list is longer than the limit then.
        """
        if file_name in self.problems():
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # One short line appended by one write: processes do not mix theirs.
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"file_name": file_name, "problem": problem}) + "\n")
        problems = self.problems()
        if len(problems) > self.limit:
            raise UserError(
                f"{len(problems)} images are bad, but DATALOADER.MAX_BAD_IMAGES is {self.limit}:\n  "
                + "\n  ".join(problems.values())
            )
        logger.warning("Left out, another image takes its place: %s", problem)

    def problems(self) -> dict[str, str]:
        """Return file name -> problem, in the order in which they were found."""
        if not self.path.is_file():
            return {}
        lines = self.path.read_text(encoding="utf-8").splitlines()
        return {entry["file_name"]: entry["problem"] for entry in map(json.loads, lines)}

    def log_all(self) -> None:
        """Write all of them to the log."""
        problems = self.problems()
        if problems:
            logger.warning(
                "Left out of training for being bad (%s), %d in all:\n  %s",
                self.path,
                len(problems),
                "\n  ".join(problems.values()),
            )
