"""
Keep decoded images in one file that all processes of a machine map into their memory.

The file holds the pixels as they are, one image after the other, and beside it JSON says where
each begins. Both can be deleted at any time between runs.
"""

import hashlib
import json
import logging
import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from tqdm import tqdm

from d2ft.data.bad_images import BadImageError
from d2ft.data.cache import cache_dir
from d2ft.data.read_image import READ_ERRORS, read_image
from d2ft.errors import UserError
from d2ft.files import atomic_write, fingerprint

logger = logging.getLogger(__name__)

Array = np.ndarray[Any, np.dtype[Any]]

_VERSION = 1
_CHANNELS = 3
_IMAGES_IN_MEMORY = 16  # while the cache is written


class ImageCache:
    """
    Decoded images by their file names.

    Args:
        path: the file of pixels.
        places: file name -> (first byte, height, width).
    """

    def __init__(self, path: Path, places: dict[str, tuple[int, int, int]]) -> None:
        self.path = path
        self._places = places
        self._pixels: Array | None = None

    def __len__(self) -> int:
        return len(self._places)

    def __getstate__(self) -> dict[str, Any]:
        # A mapping would be pickled with all that it maps; the other process makes its own.
        return {**self.__dict__, "_pixels": None}

    def read(self, file_name: str) -> Array | None:
        """Return the (H, W, 3) uint8 pixels, not to be written to; None if they are not here."""
        place = self._places.get(file_name)
        if place is None:
            return None
        if self._pixels is None:
            self._pixels = np.memmap(self.path, np.uint8, mode="r").view(np.ndarray)
        start, height, width = place
        end = start + height * width * _CHANNELS
        return self._pixels[start:end].reshape(height, width, _CHANNELS)


def build_image_cache(
    records: Sequence[dict[str, Any]], image_format: str, limit_gb: float
) -> ImageCache:
    """
    Return the cache of the images of dataset dicts, after decoding them if that was never done.

    It lies in the folder of d2ft's caches. Of several processes on a machine that ask for it one
    decodes while the others wait. It is made anew when a file has changed. What cannot be read,
    or is not of the size in its dict, is left out: the mapper meets it and says so.

    Args:
        records: with ``file_name``, ``height`` and ``width``.
        image_format: INPUT.FORMAT.
        limit_gb: how large it may be, in 10^9 bytes.

    Raises:
        UserError: if it would be larger, the format is not of three 8-bit channels, or the disk
            is full.
    """
    if image_format not in ("RGB", "BGR"):
        raise UserError(
            f"DATALOADER.IMAGE_CACHE_GB needs INPUT.FORMAT RGB or BGR, not {image_format}"
        )
    sizes = {r["file_name"]: (r["height"], r["width"]) for r in records}
    files = sorted(name for name in sizes if os.path.isfile(name))
    gigabytes = sum(_num_bytes(sizes[name]) for name in files) / 1e9
    if gigabytes > limit_gb:
        raise UserError(
            f"the {len(files)} training images take {gigabytes:.2f} GB decoded, and "
            f"DATALOADER.IMAGE_CACHE_GB is {limit_gb}: set it to {math.ceil(gigabytes)}, or to 0 "
            f"for no cache. It lies in {cache_dir()}; $D2FT_CACHE is another folder"
        )
    folder = cache_dir() / "images"
    folder.mkdir(exist_ok=True)
    key = _digest(image_format, *files)
    # A changed dataset has another file, so that a run which reads the old one is not disturbed.
    path = folder / f"{key}-{_digest(str(_VERSION), fingerprint(files), str(sizes))}.raw"
    with FileLock(folder / f"{key}.lock"):
        if not path.with_suffix(".json").is_file():
            for old in (*folder.glob(f"{key}-*"), *folder.glob(f".{key}-*")):
                old.unlink()
            _write(path, files, sizes, image_format)
        places = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    cached = {name: tuple(place) for name, place in zip(files, places, strict=True) if place}
    logger.info(
        "%d of %d training images come decoded from %s (%.2f GB)",
        len(cached),
        len(sizes),
        path,
        gigabytes,
    )
    return ImageCache(path, cached)


def _write(
    path: Path, files: Sequence[str], sizes: dict[str, tuple[int, int]], image_format: str
) -> None:
    places: list[tuple[int, int, int] | None] = []
    start = 0
    try:
        with atomic_write(path, "wb") as file:
            for name, pixels in _decode(files, image_format):
                if pixels is None or pixels.shape != (*sizes[name], _CHANNELS):
                    places.append(None)
                    continue
                file.write(pixels)
                places.append((start, *sizes[name]))
                start += pixels.size
        with atomic_write(path.with_suffix(".json")) as file:
            file.write(json.dumps(places))
    except OSError as error:
        raise UserError(
            f"the decoded images cannot be kept in {path.parent} ({error}): set the environment "
            "variable D2FT_CACHE to a folder with room, or DATALOADER.IMAGE_CACHE_GB to 0"
        ) from error


def _decode(files: Sequence[str], image_format: str) -> Iterator[tuple[str, Array | None]]:
    def decode(name: str) -> Array | None:
        try:
            return read_image(name, image_format)
        except (*READ_ERRORS, BadImageError):
            return None

    # Decoding releases the GIL, so threads are enough.
    with (
        ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool,
        tqdm(
            total=len(files), desc="Decoding images into the cache", unit="image", disable=None
        ) as progress,
    ):
        for start in range(0, len(files), _IMAGES_IN_MEMORY):
            batch = files[start : start + _IMAGES_IN_MEMORY]
            for name, pixels in zip(batch, pool.map(decode, batch), strict=True):
                yield name, pixels
                progress.update()


def _num_bytes(size: tuple[int, int]) -> int:
    return size[0] * size[1] * _CHANNELS


def _digest(*words: str) -> str:
    return hashlib.sha256("\0".join(words).encode()).hexdigest()[:20]
