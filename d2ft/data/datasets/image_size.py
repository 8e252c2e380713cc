"""The size of an image, read from its header for formats whose annotations do not give it."""

from pathlib import Path

from PIL import Image

from d2ft.errors import UserError


def read_image_size(path: Path) -> tuple[int, int]:
    """
    Return (width, height) in pixels without decoding the image.

    Raises:
        UserError: if the file is missing, empty or no image.
    """
    try:
        with Image.open(path) as image:
            return image.size
    except FileNotFoundError as error:
        raise UserError(f"the image {path} does not exist") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"the image {path} is broken: {error}") from error
