"""
Read the files of one image of a dataset in Pascal VOC's format.

Every function raises :class:`~d2ft.errors.UserError` that names the file, and the object by its
number in it, counted from 1.
"""

import math
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from d2ft.errors import UserError

# Value of the pixels of SegmentationObject around the objects, which belong to none of them.
_VOID = 255


def read_xml(path: Path) -> ElementTree.Element:
    """Return the root of an annotation file."""
    try:
        return ElementTree.parse(path).getroot()
    except (ElementTree.ParseError, OSError, ValueError, LookupError) as error:
        raise UserError(f"{path} cannot be read as XML: {error}") from error


def image_size(tree: ElementTree.Element, xml: Path, image_file: Path) -> tuple[int, int]:
    """Return (width, height) in pixels; many tools write none, or zeros."""
    texts = [tree.findtext(f"size/{key}") for key in ("width", "height")]
    if all(text is None or text.strip() in ("", "0") for text in texts):
        try:
            with Image.open(image_file) as image:
                return image.size
        except (OSError, SyntaxError, ValueError) as error:
            raise UserError(
                f"{xml} has no size and the image {image_file} is broken: {error}"
            ) from error
    sizes = [_number(text, f"{xml}, size") for text in texts]
    if min(sizes) < 1 or any(value != int(value) for value in sizes):
        raise UserError(f"{xml} has a size of {texts[0]}x{texts[1]} pixels")
    return int(sizes[0]), int(sizes[1])


def object_box(element: ElementTree.Element, where: str) -> list[float] | None:
    """Return x0, y0, x1, y1 in pixels counted from 0, or None for a box without extent."""
    box = element.find("bndbox")
    if box is None:
        raise UserError(f"{where} has no bndbox")
    x0, y0, x1, y1 = (
        _number(box.findtext(key), f"{where}, {key}") for key in ("xmin", "ymin", "xmax", "ymax")
    )
    if x1 < x0 or y1 < y0:
        raise UserError(f"{where} has a box of negative size: {x0:g}, {y0:g} to {x1:g}, {y1:g}")
    if x1 == x0 or y1 == y0:
        return None
    return [x0 - 1, y0 - 1, x1, y1]


def _number(text: str | None, where: str) -> float:
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"{where}: a finite number is expected, got {text!r}")
    return value


def object_text(element: ElementTree.Element, key: str, where: str) -> str:
    """Return the text of a part, which has to have one, of an object."""
    text = (element.findtext(key) or "").strip()
    if not text:
        raise UserError(f"{where} has no {key}")
    return text


def object_flag(element: ElementTree.Element, key: str, where: str) -> int:
    """Return a part that is 0 or 1; 0 if the object does not have it."""
    text = (element.findtext(key) or "0").strip()
    if text not in ("0", "1"):
        raise UserError(f"{where}: {key} is 0 or 1, got {text!r}")
    return int(text)


def read_masks(
    path: Path, xml: Path, size: tuple[int, int], num_objects: int
) -> "np.ndarray[Any, np.dtype[np.uint8]]":
    """Return (H, W) with the number of the object in the XML, from 1; 0 and 255 are none."""
    try:
        with Image.open(path) as image:
            mode, masks = image.mode, np.asarray(image)
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"the mask file {path} is broken: {error}") from error
    if mode not in ("P", "L"):
        raise UserError(
            f"{path} is of mode {mode}; objects are told apart by the index of a palette"
        )
    if masks.shape != size:
        raise UserError(
            f"{path} has {masks.shape[1]}x{masks.shape[0]} pixels, but {xml} "
            f"says {size[1]}x{size[0]}"
        )
    highest = int(masks[masks != _VOID].max(initial=0))
    if highest > num_objects:
        raise UserError(f"{path} has an object {highest}, but {xml} has only {num_objects}")
    return masks
