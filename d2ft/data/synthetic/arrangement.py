"""What stands in a picture, from the farthest to the nearest, and how much of it can be seen."""

import zlib
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from d2ft.data.synthetic.drawing import Light, Placed, draw_sprite, window
from d2ft.data.synthetic.styles import ROAD_STYLES, STREET_STYLES


class Thing(NamedTuple):
    """
    One annotation to be.

    Attributes:
        label: class name.
        members: the sprites that form it: one for an object, several for a group.
    """

    label: str
    members: tuple[Placed, ...]

    @property
    def is_group(self) -> bool:
        """Several objects under one annotation."""
        return len(self.members) > 1

    @property
    def num_pixels(self) -> int:
        """Pixels of the whole thing, wherever they lie; members that overlap count twice."""
        return sum(int(placed.sprite.silhouette.sum()) for placed in self.members)


class Saddle(NamedTuple):
    """
    Where a rider sits.

    Attributes:
        ratio: height of the rider in heights of the vehicle.
        left, top: first pixel of the rider on a vehicle that looks to the right, in its heights.
    """

    ratio: float
    left: float
    top: float


SADDLES = {"bicycle": Saddle(1.55, 0.27, -0.81), "motorcycle": Saddle(1.35, 0.26, -0.52)}


def image_rng(seed: int, split: str, index: int) -> np.random.Generator:
    """Return the source of everything random in one picture; ``split`` names the set as well."""
    return np.random.Generator(np.random.PCG64([seed, zlib.crc32(split.encode()), index]))


def mounted(
    rng: np.random.Generator,
    vehicle: str,
    rider_label: str,
    centre: float,
    ground: float,
    height: float,
    light: Light,
    *,
    haze: float = 0.0,
) -> list[Thing]:
    """
    Return a bicycle or motorcycle and the rider on it, in painting order.

    Args:
        rng: source of colours and direction.
        vehicle: key of :data:`SADDLES`.
        rider_label: class name of the rider in the dataset at hand.
        centre: column of the middle of the vehicle.
        ground: row of its foot.
        height: of the vehicle, in pixels.
        light: look of the picture.
        haze: share of haze over both.
    """
    saddle = SADDLES[vehicle]
    mirrored = bool(rng.random() < 0.5)
    below = draw_sprite(rng, ROAD_STYLES[vehicle], height, light, mirrored=mirrored)
    above = draw_sprite(
        rng, STREET_STYLES["rider"], height * saddle.ratio, light, mirrored=mirrored
    )
    width = below.alpha.shape[1]
    left, top = round(centre - width / 2), round(ground - height)
    offset = saddle.left * height
    if mirrored:
        offset = width - offset - above.alpha.shape[1]
    seat = (round(left + offset), round(top + saddle.top * height))
    return [
        Thing(vehicle, (Placed(below, left, top, haze),)),
        Thing(rider_label, (Placed(above, *seat, haze),)),
    ]


def group(
    rng: np.random.Generator,
    member: str,
    label: str,
    centre: float,
    ground: float,
    height: float,
    light: Light,
    *,
    haze: float = 0.0,
) -> Thing:
    """
    Return 4 to 6 overlapping road objects side by side as one thing.

    Args:
        rng: source of number, colours and distances.
        member: key of ``ROAD_STYLES``.
        label: name of the group in the dataset at hand.
        centre: column of the middle of the group.
        ground: row of its foot.
        height: of a member, in pixels.
        light: look of the picture.
        haze: share of haze over all.
    """
    style = ROAD_STYLES[member]
    shape_name = str(rng.choice(style.shapes))
    sprites = [
        draw_sprite(rng, style, height * rng.uniform(0.9, 1.1), light, shape_name=shape_name)
        for _ in range(int(rng.integers(4, 7)))
    ]
    step = sprites[0].alpha.shape[1] * rng.uniform(0.55, 0.8)
    start = centre - step * len(sprites) / 2
    return Thing(
        label,
        tuple(
            Placed(
                sprite,
                round(start + step * i),
                round(ground - sprite.alpha.shape[0] - rng.uniform(0, 0.1) * height),
                haze,
            )
            for i, sprite in enumerate(sprites)
        ),
    )


class Stage:
    """
    Lets things into a picture from the nearest to the farthest, as long as they can be seen.

    What is farther never covers what is nearer, so one look at each newcomer is enough.

    Args:
        image_size: (H, W).
        least_share: to be seen of the pixels that a thing has, in [0, 1]; the rest may be
            covered or outside the picture.
        least_pixels: to be seen of a thing.
    """

    def __init__(
        self, image_size: tuple[int, int], *, least_share: float, least_pixels: int
    ) -> None:
        self._image_size = image_size
        self._least_share = least_share
        self._least_pixels = least_pixels
        self._taken = np.zeros(image_size, dtype=np.bool_)
        self._parties: list[list[Thing]] = []

    @property
    def things(self) -> list[Thing]:
        """Return what was let in, in painting order."""
        return [thing for party in reversed(self._parties) for thing in party]

    def admit(self, party: list[Thing]) -> bool:
        """Let in all of ``party``, given in painting order, if each of them can be seen."""
        taken = self._taken.copy()
        for thing in reversed(party):
            seen = 0
            for placed in thing.members:
                rows, columns, sprite_rows, sprite_columns = window(placed, self._image_size)
                silhouette = placed.sprite.silhouette[sprite_rows, sprite_columns]
                seen += int((silhouette & ~taken[rows, columns]).sum())
                taken[rows, columns] |= silhouette
            if seen < max(self._least_pixels, self._least_share * thing.num_pixels):
                return False
        self._taken = taken
        self._parties.append(party)
        return True


def visible_ids(things: list[Thing], image_size: tuple[int, int]) -> npt.NDArray[np.int32]:
    """Return (H, W) ids of things in painting order: 0 for none, 1 for the first."""
    ids = np.zeros(image_size, dtype=np.int32)
    for number, thing in enumerate(things, start=1):
        for placed in thing.members:
            rows, columns, sprite_rows, sprite_columns = window(placed, image_size)
            ids[rows, columns][placed.sprite.silhouette[sprite_rows, sprite_columns]] = number
    return ids
