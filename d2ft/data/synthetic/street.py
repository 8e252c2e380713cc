"""
Street scenes: a picture and the polygons that label it, as Cityscapes has them.

A flat road is seen from ``CAMERA_HEIGHT`` metres above it, so that what stands at row y of the
picture has (y - horizon) / CAMERA_HEIGHT pixels per metre. H, W: height and width in pixels.
"""

from typing import NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from d2ft.data.synthetic.arrangement import Stage, Thing, group, mounted
from d2ft.data.synthetic.backdrop import View, paint_surface, street_surfaces
from d2ft.data.synthetic.drawing import (
    Image8,
    Placed,
    draw_sprite,
    outline,
    paste,
    smooth_noise,
    take_photo,
)
from d2ft.data.synthetic.styles import ROAD_STYLES, STREET_STYLES


class LabelledPolygon(NamedTuple):
    """
    One entry of ``polygons.json``.

    Attributes:
        label: class name; ``<class>group`` for a group of instances.
        polygon: corners (x, y) in pixels, inside the picture.
    """

    label: str
    polygon: tuple[tuple[int, int], ...]


class StreetScene(NamedTuple):
    """
    A labelled picture.

    Attributes:
        image: (H, W, 3) uint8, RGB.
        objects: background and instances in painting order: later ones cover earlier ones.
    """

    image: Image8
    objects: tuple[LabelledPolygon, ...]


class Traffic(NamedTuple):
    """
    How a kind of object takes part in a street.

    Attributes:
        weight: share among all kinds, before normalising.
        metres: height.
        reach: largest distance from the middle of the road, in metres.
    """

    weight: float
    metres: float
    reach: float


# A mounted kind is a vehicle with a rider on it, a group several objects under one label.
TRAFFIC: dict[str, Traffic] = {
    "person": Traffic(0.20, 1.75, 14.0),
    "car": Traffic(0.24, 1.50, 9.0),
    "truck": Traffic(0.11, 2.90, 7.0),
    "bus": Traffic(0.11, 3.00, 6.0),
    "train": Traffic(0.10, 3.00, 6.0),
    "motorcycle": Traffic(0.05, 1.20, 9.0),
    "bicycle": Traffic(0.06, 1.10, 10.0),
    "mounted bicycle": Traffic(0.07, 1.10, 9.0),
    "mounted motorcycle": Traffic(0.06, 1.20, 8.0),
    "persongroup": Traffic(0.03, 1.70, 13.0),
    "cargroup": Traffic(0.03, 1.50, 10.0),
    "bicyclegroup": Traffic(0.01, 1.05, 10.0),
    "caravan": Traffic(0.015, 2.40, 6.0),
    "trailer": Traffic(0.015, 1.90, 6.0),
}

# How far below the horizon objects stand, and how tall they may be, in heights of the picture.
_NEAREST, _FARTHEST, _TALLEST = 0.48, 0.12, 0.33
# The larger, the more of the objects are far away, as on a plane.
_CROWDING = 1.4
# So many kinds and places are tried at a distance before it stays empty.
_ATTEMPTS = 12
# Of a road object this much must be seen: less is a riddle, not an example.
_LEAST_SHARE = 0.3
_LEAST_PIXELS = 60


def make_street_scene(
    rng: np.random.Generator,
    image_size: tuple[int, int],
    num_objects: int | tuple[int, int] | None = None,
) -> StreetScene:
    """
    Draw a street.

    Args:
        rng: source of everything random.
        image_size: (H, W) in pixels, at least (64, 64).
        num_objects: road objects with an annotation, or their least and largest number; by
            default 5 to 14. Riders count, groups count once. Fewer if the street is full.
    """
    view = View.sample(rng, image_size)
    low, high = num_objects if isinstance(num_objects, tuple) else (num_objects, num_objects)
    wanted = int(rng.integers(5 if low is None else low, (14 if high is None else high) + 1))
    surfaces, front = street_surfaces(rng, view)
    things = _traffic(rng, view, wanted)

    relief = smooth_noise(rng, image_size, 48) * 0.5 + smooth_noise(rng, image_size, 12) * 0.5
    image = np.zeros((*image_size, 3), dtype=np.uint8)
    objects = []
    for surface in surfaces:
        paint_surface(image, surface, view, relief)
        objects.append(_labelled(surface.label, surface.corners))
    for thing in things:
        for placed in thing.members:
            if thing.label != "rider":
                _cast_shadow(image, placed)
            paste(image, placed, view.haze_colour)
        corners = outline(thing.members, image_size)
        if corners is not None:
            objects.append(_labelled(thing.label, corners))
    for surface in front:
        paint_surface(image, surface, view, relief)
        objects.append(_labelled(surface.label, surface.corners))
    return StreetScene(_photograph(rng, image), tuple(objects))


def _traffic(rng: np.random.Generator, view: View, wanted: int) -> list[Thing]:
    """Return up to ``wanted`` things in painting order, none of them hidden."""
    kinds = list(TRAFFIC)
    weights = np.array([TRAFFIC[kind].weight for kind in kinds])
    weights /= weights.sum()
    H = view.image_size[0]
    # A fuller street reaches farther and is wider.
    width = max(1.0, wanted / 10) ** 0.5
    farthest = _FARTHEST / width
    # More than wanted: some will find no room.
    nearness = rng.random(wanted * 3 // 2) ** _CROWDING
    distances = farthest * (_NEAREST / farthest) ** nearness
    stage = Stage(view.image_size, least_share=_LEAST_SHARE, least_pixels=_LEAST_PIXELS)
    for below in H * np.sort(distances)[::-1]:
        for _ in range(_ATTEMPTS):
            kind = str(rng.choice(kinds, p=weights))
            height = TRAFFIC[kind].metres / view.camera_height * below
            fits = height <= H * _TALLEST and len(stage.things) + _num_things(kind) <= wanted
            if fits and stage.admit(_enter(rng, view, kind, below, width)):
                break
    return stage.things


def _num_things(kind: str) -> int:
    return 2 if kind.startswith("mounted ") else 1


def _enter(
    rng: np.random.Generator, view: View, kind: str, below: float, width: float
) -> list[Thing]:
    """
    Put an object of a kind of :data:`TRAFFIC` into the street.

    Args:
        rng: source of everything random.
        view: camera and light.
        kind: what enters.
        below: distance of its foot from the horizon, in pixels.
        width: factor on how far from the middle it may stand.
    """
    scale = below / view.camera_height
    reach = TRAFFIC[kind].reach * width
    W = view.image_size[1]
    left, right = -view.vanishing_x / scale, (W - view.vanishing_x) / scale
    centre = view.vanishing_x + scale * rng.uniform(max(-reach, left), min(reach, right))
    ground = view.horizon + below
    height = scale * TRAFFIC[kind].metres * rng.uniform(0.9, 1.1)
    haze = view.haze(below)
    if kind.startswith("mounted "):
        vehicle = kind.removeprefix("mounted ")
        return mounted(rng, vehicle, "rider", centre, ground, height, view.light, haze=haze)
    if kind.endswith("group"):
        member = kind.removesuffix("group")
        return [group(rng, member, kind, centre, ground, height, view.light, haze=haze)]
    style = ROAD_STYLES.get(kind) or STREET_STYLES[kind]
    sprite = draw_sprite(rng, style, height, view.light, tilt=rng.uniform(-2, 2))
    h, w = sprite.alpha.shape
    return [Thing(kind, (Placed(sprite, round(centre - w / 2), round(ground - h), haze),))]


def _cast_shadow(image: Image8, placed: Placed) -> None:
    """Darken the road under an object, in place."""
    h, w = placed.sprite.alpha.shape
    thickness = max(2, round(0.06 * h))
    top = max(placed.top + h - 2 * thickness, 0)
    left, right = max(placed.left, 0), max(placed.left + w, 0)
    strip = image[top : max(placed.top + h + thickness, 0), left:right]
    if strip.size == 0:
        return
    darkness = np.zeros(strip.shape[:2], dtype=np.uint8)
    middle = (placed.left + w // 2 - left, placed.top + h - thickness // 2 - top)
    cv2.ellipse(darkness, middle, (w // 2, thickness), 0, 0, 360, 128, -1, cv2.LINE_AA)
    lit = 1 - darkness[..., None].astype(np.float32) / 255
    strip[:] = np.round(strip * lit).astype(np.uint8)


def _photograph(rng: np.random.Generator, image: Image8) -> Image8:
    """Record a street as a camera behind a windscreen does: soft, noisy, with a colour cast."""
    exposure = rng.uniform(0.80, 0.95)
    cast = np.array([0.96, 1.02, 0.99]) + rng.uniform(-0.03, 0.03, 3)
    red, green, blue = exposure * cast
    return take_photo(
        rng,
        image,
        blur=rng.uniform(0.45, 0.75) * (image.shape[0] / 256) ** 0.5,
        noise=rng.uniform(4, 7),
        gain=(red, green, blue),
        offset=rng.uniform(4, 14),
    )


def _labelled(label: str, corners: npt.NDArray[np.int32]) -> LabelledPolygon:
    return LabelledPolygon(label, tuple((int(x), int(y)) for x, y in corners))
