"""
Read image files to the pixels that Detectron2 reads, in less time.

A PNG of three 8-bit channels that says nothing else about its pixels is decoded by imagecodecs,
where it is installed (BSD licence), or by OpenCV; PNG is lossless, so they give what Pillow
gives. All other files, and those that these decoders refuse, are Pillow's, read as in Detectron2.
"""

import io
import struct
from typing import Any

import cv2
import numpy as np
from detectron2.data.detection_utils import _apply_exif_orientation, convert_PIL_to_numpy
from detectron2.utils.file_io import PathManager
from PIL import Image

from d2ft.data.bad_images import BadImageError

try:
    import imagecodecs
except ImportError:
    imagecodecs = None

Array = np.ndarray[Any, np.dtype[Any]]


# What Pillow raises for a file that is no image or breaks off.
READ_ERRORS = (OSError, SyntaxError, Image.DecompressionBombError)

# Pillow's modes of more than 8 bits a channel: https://pillow.readthedocs.io/en/stable/handbook/
# concepts.html#modes. Converting them to RGB cuts every value above 255 off.
_DEEP_MODES = ("I", "F")

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"

# Chunks beside which a PNG's pixels are plain: https://www.w3.org/TR/png-3/#11Chunks
_PLAIN_CHUNKS = frozenset(
    b"IHDR IDAT IEND gAMA cHRM sRGB iCCP sBIT bKGD pHYs tIME tEXt".split()  # not eXIf, tRNS
)

# What a text is called that may hold an orientation, by which an image is turned.
_ORIENTED_TEXTS = (b"exif", b"xmp")

# Of IHDR: 8 bits a channel, RGB, deflate, adaptive filters, not interlaced.
_PLAIN_RGB = (8, 2, 0, 0, 0)


def read_image(file_name: str, image_format: str) -> Array:
    """
    Same as ``detectron2.data.detection_utils.read_image``, but fast for common PNG files.

    Args:
        file_name: a path, or what Detectron2's PathManager resolves.
        image_format: INPUT.FORMAT.

    Returns:
        (H, W, C), contiguous; uint8 except for the format YUV-BT.601.

    Raises:
        OSError: or another of :data:`READ_ERRORS` if it is no image.
        BadImageError: if it has more than 8 bits in a single channel.
    """
    with PathManager.open(file_name, "rb") as file:
        data = file.read()
    if image_format in ("RGB", "BGR") and is_plain_png(data):
        pixels = _decode_png(data, image_format)
        if pixels is not None:
            return pixels
    with Image.open(io.BytesIO(data)) as image:
        if image.mode.startswith(_DEEP_MODES):
            raise BadImageError(
                f"{file_name} has more than 8 bits a pixel (Pillow's mode {image.mode}), which "
                f"reading as {image_format} would cut off at 255: scale it to 8 bits"
            )
        turned = _apply_exif_orientation(image)
        return np.ascontiguousarray(convert_PIL_to_numpy(turned, image_format))


def _decode_png(data: bytes, image_format: str) -> Array | None:
    """Return the pixels of a plain PNG, None if it is broken."""
    if imagecodecs is None:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        swap = image_format == "RGB"
    else:
        try:
            pixels = imagecodecs.png_decode(data)
        except imagecodecs.PngError:
            return None
        swap = image_format == "BGR"
    return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB) if swap and pixels is not None else pixels


def is_plain_png(data: bytes) -> bool:
    """Tell whether a file is a whole PNG of 8-bit RGB without anything that changes its pixels."""
    if not data.startswith(_PNG_SIGNATURE):
        return False
    place, kind = len(_PNG_SIGNATURE), b""
    while kind != b"IEND":
        if place + 12 > len(data):
            return False
        length, kind = struct.unpack_from(">I4s", data, place)
        if kind not in _PLAIN_CHUNKS:
            return False
        if kind == b"IHDR":
            width, height, *layout = struct.unpack_from(">II5B", data, place + 8)
            # Pillow warns of larger images, and refuses those of twice the size.
            if tuple(layout) != _PLAIN_RGB or width * height > (Image.MAX_IMAGE_PIXELS or 0):
                return False
        elif kind == b"tEXt":
            keyword = data[place + 8 : place + 8 + length].partition(b"\0")[0].lower()
            if any(word in keyword for word in _ORIENTED_TEXTS):
                return False
        place += length + 12
    return place <= len(data)
