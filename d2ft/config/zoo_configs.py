"""Configs of Detectron2's model zoo as bases: ``zoo://COCO-Detection/faster_rcnn_R_50_FPN_3x.yaml``."""

import difflib
import os
from pathlib import Path

import detectron2
from detectron2 import model_zoo

from d2ft.errors import UserError

PREFIX = "zoo://"


def zoo_root() -> Path | None:
    """Return the folder of the configs that the installed Detectron2 ships; None if it has none."""
    package = Path(detectron2.__file__).parent
    # An installed package holds them; in a clone of the repository they lie beside it.
    for folder in (package / "model_zoo" / "configs", package.parent / "configs"):
        if (folder / "COCO-InstanceSegmentation").is_dir():
            return folder
    return None


def zoo_config_file(name: str) -> str:
    """
    Return the path of a config of the zoo.

    Args:
        name: with ``zoo://``, as the zoo calls it.

    Raises:
        UserError: if Detectron2 ships no configs, or none of that name; with the nearest names.
    """
    root = zoo_root()
    if root is None:
        raise UserError(f"{name}: the installed Detectron2 ships no configs of its model zoo")
    relative = name.removeprefix(PREFIX)
    known = [path.relative_to(root).as_posix() for path in root.rglob("*.yaml")]
    if relative not in known:
        near = difflib.get_close_matches(relative, known, n=3, cutoff=0.4)
        hint = f"; did you mean {' or '.join(PREFIX + other for other in near)}?" if near else ""
        raise UserError(f"{name} is not in Detectron2's model zoo{hint}")
    return str(root / relative)


def zoo_name(path: str) -> str | None:
    """Return the ``zoo://`` name of a file, or None if it is not of the zoo."""
    root = zoo_root()
    if root is None or not Path(os.path.realpath(path)).is_relative_to(root.resolve()):
        return None
    return PREFIX + Path(os.path.realpath(path)).relative_to(root.resolve()).as_posix()


def zoo_weights(name: str) -> str | None:
    """Return the address of the weights that the zoo trained with a config, if it has published any."""
    try:
        return str(model_zoo.get_checkpoint_url(name.removeprefix(PREFIX)))
    except RuntimeError:  # what Detectron2 raises for the Base-*.yaml, which it never trained
        return None
