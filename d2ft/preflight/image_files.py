"""Look at image files as the training mapper will read them: there, whole, and of which kind."""

import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from detectron2.data.detection_utils import read_image
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from d2ft.files import sha256

_ORIENTATION = 0x0112  # the EXIF tag
_TURNED = (5, 6, 7, 8)  # its values that exchange width and height
_16_BIT = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")
# What Pillow raises for a file that is no whole image: a broken PNG is a SyntaxError to it.
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


@dataclass(frozen=True)
class ImageFile:
    """
    What is in a file.

    Attributes:
        problem: why it cannot be read, else "".
        height: in pixels as training sees the image, turned as its EXIF orientation says.
        width: likewise.
        mode: of Pillow, such as "RGB", "L", "P" or "CMYK".
        turned: whether the EXIF orientation exchanges width and height.
    """

    problem: str = ""
    height: int = 0
    width: int = 0
    mode: str = ""
    turned: bool = False

    @property
    def is_16_bit(self) -> bool:
        """Whether values above 255 would be cut off."""
        return self.mode in _16_BIT


def find_absent(path: str) -> str:
    """Return why there is nothing to read at ``path``, or ""; the file is not opened."""
    try:
        size = os.stat(path).st_size
    except FileNotFoundError:
        if os.path.islink(path):
            return f"is a link to {os.readlink(path)}, which does not exist"
        return "does not exist"
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        return str(error)
    if os.path.isdir(path):
        return "is a folder"
    return "" if size else "has 0 bytes"


def look_at_image(path: str, *, decode: bool) -> ImageFile:
    """
    Read the header of an image, or with ``decode`` all of it as the training mapper does.

    Args:
        path: the file.
        decode: find broken pixel data as well.
    """
    if absent := find_absent(path):
        return ImageFile(absent)
    try:
        with Image.open(path) as image:
            (width, height), mode = image.size, image.mode
            turned = image.getexif().get(_ORIENTATION) in _TURNED
        if decode:
            read_image(path, "BGR")
    except UnidentifiedImageError:
        return ImageFile("is no image that Pillow can read")
    except UNREADABLE as error:
        return ImageFile(str(error).replace(f": {path!r}", "") or type(error).__name__)
    if turned:
        width, height = height, width
    return ImageFile("", height, width, mode, turned)


def look_at_images(paths: Iterable[str], *, decode: bool) -> dict[str, ImageFile]:
    """Look at each file once, several at a time, with a progress bar."""
    unique = list(dict.fromkeys(paths))
    # Reading and decoding release the GIL.
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        found = pool.map(lambda path: look_at_image(path, decode=decode), unique)
        what = "Decoding images" if decode else "Reading image headers"
        shown = tqdm(found, total=len(unique), desc=what, unit="image", disable=None)
        return dict(zip(unique, shown, strict=True))


def group_by_content(paths: Sequence[str]) -> list[list[str]]:
    """
    Return the groups of two and more files with the same bytes, by their SHA-256.

    Only files of equal size are read. Paths that lead to the same file are one file's paths, and
    so in one group.

    Args:
        paths: of files that exist.
    """
    by_size: dict[int, list[str]] = defaultdict(list)
    for path in dict.fromkeys(paths):
        by_size[Path(path).stat().st_size].append(path)
    candidates = [path for group in by_size.values() if len(group) > 1 for path in group]
    by_hash: dict[str, list[str]] = defaultdict(list)
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        for path, digest in zip(candidates, pool.map(sha256, candidates), strict=True):
            by_hash[digest].append(path)
    return [group for group in by_hash.values() if len(group) > 1]
