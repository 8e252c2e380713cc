"""
Turn styles into pixels: sprites with an outline, and what surrounds them.

Shape shorthand in this module:

    H, W: height and width of an image; h, w: of a sprite
    images are uint8 RGB; coordinates are (x, y) in pixels, integers at pixel centres
"""

import colorsys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from d2ft.data.synthetic.styles import COLOURS, SHAPES, Style

Image8 = npt.NDArray[np.uint8]
Outline = npt.NDArray[np.int32]

# Fractional bits of the coordinates that cv2 takes.
_SHIFT = 4
# How much of a sprite covers its background where its shape has a hole.
_HOLE_ALPHA = 60


class Light(NamedTuple):
    """
    The look that all colours of a picture share: what makes one set another domain.

    Attributes:
        saturation: factor on the saturation of every colour.
        value: factor on the brightness of every colour.
        hue: degrees added to every hue.
        shading: how much darker an object is at its foot than at its top, in [0, 1].
    """

    saturation: float = 1.0
    value: float = 1.0
    hue: float = 0.0
    shading: float = 0.25


class Sprite(NamedTuple):
    """
    An object cut out, ready to be put into a picture.

    Attributes:
        rgb: (h, w, 3).
        alpha: (h, w), 0 where the background shows.
        silhouette: (h, w) bool; unlike ``alpha`` it has no holes.
    """

    rgb: Image8
    alpha: Image8
    silhouette: npt.NDArray[np.bool_]


class Placed(NamedTuple):
    """
    A sprite in a picture.

    Attributes:
        sprite: the cut out object.
        left, top: where its first pixel goes; may lie outside the picture.
        haze: share of the haze colour mixed in, in [0, 1].
    """

    sprite: Sprite
    left: int
    top: int
    haze: float = 0.0


# Each takes x and y (broadcastable, in heights of the object) and tells where the second colour is.
PATTERNS: dict[str, Callable[[npt.NDArray, npt.NDArray], npt.NDArray[np.bool_]]] = {
    "stripes": lambda x, y: (x % 0.12 < 0.05) & (y > -1),
    "bands": lambda x, y: (y % 0.16 < 0.06) & (x > -1),
    "diagonals": lambda x, y: (x + y) % 0.22 < 0.08,
    "checks": lambda x, y: (x % 0.28 < 0.14) ^ (y % 0.28 < 0.14),
    "speckle": lambda x, y: (x % 0.10 < 0.045) & (y % 0.10 < 0.045),
    "patches": lambda x, y: np.sin(13 * x + 4 * y) + np.sin(17 * y - 5 * x) > 0.55,
}


def sample_colour(rng: np.random.Generator, name: str, light: Light) -> tuple[int, int, int]:
    """Return an RGB colour out of the family ``name`` as it looks in ``light``."""
    colour = COLOURS[name]
    hue = (rng.uniform(*colour.hue) + light.hue) / 360 % 1
    saturation = min(rng.uniform(*colour.saturation) * light.saturation, 1)
    value = min(rng.uniform(*colour.value) * light.value, 1)
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def draw_sprite(
    rng: np.random.Generator,
    style: Style,
    height: float,
    light: Light,
    *,
    shape_name: str | None = None,
    mirrored: bool | None = None,
    tilt: float = 0.0,
) -> Sprite:
    """
    Draw one object of a style.

    Args:
        rng: source of the colours, the proportions and whatever is None below.
        style: what to draw.
        height: of the object before tilting, in pixels.
        light: look of the picture that it is meant for.
        shape_name: one of the style's shapes.
        mirrored: it looks to the left.
        tilt: degrees turned clockwise.
    """
    shape = SHAPES[shape_name or str(rng.choice(style.shapes))]
    if mirrored is None:
        mirrored = bool(rng.random() < 0.5)
    stretch = height * rng.uniform(0.92, 1.08) * (-1 if mirrored else 1)
    cos, sin = np.cos(np.radians(tilt)), np.sin(np.radians(tilt))
    # From heights to pixels, around the middle of the shape.
    matrix = np.array([[cos, -sin], [sin, cos]]) @ np.diag([stretch, height])
    middle = np.array([shape.width / 2, 0.5])
    placed = [(part.paint, (part.points - middle) @ matrix.T) for part in shape.parts]
    corners = np.concatenate([points for _, points in placed])
    low = corners.min(axis=0) - 1
    w, h = (int(n) + 2 for n in np.ceil(corners.max(axis=0) - low))

    colours = {"body": sample_colour(rng, str(rng.choice(style.body)), light)}
    colours["trim"] = sample_colour(rng, str(rng.choice(style.trim)), light)
    rgb = np.full((h, w, 3), colours["body"], dtype=np.uint8)
    alpha = np.zeros((h, w), dtype=np.uint8)
    solid = np.zeros((h, w), dtype=np.uint8)
    for paint, points in placed:
        corners = np.round((points - low) * (1 << _SHIFT)).astype(np.int32)
        _fill(solid, corners, 255)
        _fill(alpha, corners, _HOLE_ALPHA if paint == "hole" else 255)
        if paint == "hole":
            continue
        if paint not in colours:
            colours[paint] = sample_colour(rng, paint, light)
        _fill(rgb, corners, colours[paint])
        if paint == "body" and style.pattern != "plain":
            _lay_pattern(rgb, corners, style.pattern, colours["trim"], height)
    return Sprite(_shade(rng, rgb, light), alpha, solid >= 128)


def _fill(canvas: Image8, corners: npt.NDArray[np.int32], colour: int | tuple[int, ...]) -> None:
    cv2.fillPoly(canvas, [corners], colour, lineType=cv2.LINE_AA, shift=_SHIFT)


def _lay_pattern(
    rgb: Image8,
    corners: npt.NDArray[np.int32],
    pattern: str,
    colour: tuple[int, int, int],
    height: float,
) -> None:
    """Paint the second colour of a pattern into one part; ``height`` of the object in pixels."""
    inside = np.zeros(rgb.shape[:2], dtype=np.uint8)
    _fill(inside, corners, 255)
    y, x = np.ogrid[: rgb.shape[0], : rgb.shape[1]]
    rgb[PATTERNS[pattern](x / height, y / height) & (inside >= 128)] = colour


def _shade(rng: np.random.Generator, rgb: Image8, light: Light) -> Image8:
    """Light an object from above and give its surface a grain."""
    h, w = rgb.shape[:2]
    shade = np.linspace(1 + light.shading / 3, 1 - light.shading, h, dtype=np.float32)
    grain = rng.standard_normal((h, w), dtype=np.float32) * 0.03 + 1
    return cv2.convertScaleAbs(rgb * (shade[:, None] * grain)[..., None])


def window(placed: Placed, image_size: tuple[int, int]) -> tuple[slice, slice, slice, slice]:
    """Return rows and columns of the picture that a sprite covers, then those of the sprite."""
    h, w = placed.sprite.alpha.shape
    top, left = max(placed.top, 0), max(placed.left, 0)
    bottom, right = min(placed.top + h, image_size[0]), min(placed.left + w, image_size[1])
    # An object outside the picture gives empty slices.
    bottom, right = max(bottom, top), max(right, left)
    return (
        slice(top, bottom),
        slice(left, right),
        slice(top - placed.top, bottom - placed.top),
        slice(left - placed.left, right - placed.left),
    )


def paste(image: Image8, placed: Placed, haze_colour: tuple[int, int, int]) -> None:
    """Put a sprite into the picture, in place."""
    rows, columns, sprite_rows, sprite_columns = window(placed, image.shape[:2])
    rgb = placed.sprite.rgb[sprite_rows, sprite_columns].astype(np.float32)
    if placed.haze:
        rgb += (np.asarray(haze_colour, dtype=np.float32) - rgb) * placed.haze
    alpha = placed.sprite.alpha[sprite_rows, sprite_columns, None].astype(np.float32) / 255
    behind = image[rows, columns]
    image[rows, columns] = np.round(behind + (rgb - behind) * alpha).astype(np.uint8)


def outline(silhouettes: Sequence[Placed], image_size: tuple[int, int]) -> Outline | None:
    """
    Return the corners around the largest connected piece of what is inside the picture.

    Args:
        silhouettes: sprites that form one object or one group.
        image_size: (H, W).

    Returns:
        (N, 2) corners, all inside the picture, or None if nothing of any extent is there.
    """
    mask = np.zeros(image_size, dtype=np.uint8)
    for placed in silhouettes:
        rows, columns, sprite_rows, sprite_columns = window(placed, image_size)
        mask[rows, columns] |= placed.sprite.silhouette[sprite_rows, sprite_columns]
    if len(silhouettes) > 1:
        # A group is annotated as one region, with the gaps between its members.
        gap = max(3, min(image_size) // 40)
        mask = cv2.morphologyEx(mask, cv2.MORPH_CLOSE, np.ones((gap, gap), np.uint8))
    contours, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    if not contours:
        return None
    corners = cv2.approxPolyDP(max(contours, key=cv2.contourArea), 0.8, closed=True)[:, 0]
    return corners if len(corners) >= 3 else None


def fill_outline(canvas: Image.Image, corners: Outline, value: int) -> None:
    """Write ``value`` where Cityscapes' own tools put a polygon with these corners."""
    ImageDraw.Draw(canvas).polygon([(int(x), int(y)) for x, y in corners], fill=value)


def smooth_noise(
    rng: np.random.Generator, image_size: tuple[int, int], cells: int
) -> npt.NDArray[np.float32]:
    """Return (H, W) noise in [-1, 1] whose blobs are about H / ``cells`` pixels wide."""
    H, W = image_size
    grid = rng.uniform(-1, 1, (cells + 1, max(2, round(cells * W / H) + 1))).astype(np.float32)
    return cv2.resize(grid, (W, H), interpolation=cv2.INTER_LINEAR)


def take_photo(
    rng: np.random.Generator,
    image: Image8,
    *,
    blur: float,
    noise: float,
    gain: tuple[float, float, float],
    offset: float,
) -> Image8:
    """
    Return the picture as a camera would record it.

    Args:
        rng: source of the noise.
        image: (H, W, 3).
        blur: standard deviation of the lens, in pixels.
        noise: standard deviation of the sensor, in grey levels.
        gain: factor on red, green and blue.
        offset: grey levels added to all three.
    """
    photo = cv2.GaussianBlur(image, (0, 0), blur) if blur > 0 else image
    grain = rng.standard_normal(image.shape[:2], dtype=np.float32) * noise
    gains = np.array(gain, dtype=np.float32)
    recorded = photo * gains + (grain + np.float32(offset))[..., None]
    return np.clip(np.round(recorded), 0, 255).astype(np.uint8)
