"""Where objects stand: streets as labelled surfaces, and cluttered backgrounds without labels."""

import itertools
from typing import NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from d2ft.data.synthetic.drawing import Image8, Light, Outline, sample_colour, smooth_noise

Colour8 = tuple[int, int, int]


class View(NamedTuple):
    """
    The camera and the weather of a street.

    Attributes:
        image_size: (H, W) in pixels.
        horizon: row of the horizon.
        vanishing_x: column in which the road ends.
        camera_height: above the road, in metres.
        light: look of all colours.
        haze_colour: of what is far away.
        haze_strength: share of it at the horizon, in [0, 1].
    """

    image_size: tuple[int, int]
    horizon: float
    vanishing_x: float
    camera_height: float
    light: Light
    haze_colour: Colour8
    haze_strength: float

    @classmethod
    def sample(cls, rng: np.random.Generator, image_size: tuple[int, int]) -> "View":
        """Return a view for pictures of a size: greyer than noon, hazy, looking down a road."""
        H, W = image_size
        light = Light(
            saturation=rng.uniform(0.55, 0.75),
            value=rng.uniform(0.82, 0.98),
            hue=rng.uniform(-10, 10),
            shading=0.35,
        )
        grey = int(rng.integers(165, 205))
        return cls(
            image_size=image_size,
            horizon=H * rng.uniform(0.36, 0.45),
            vanishing_x=W * rng.uniform(0.35, 0.65),
            camera_height=2.6,
            light=light,
            haze_colour=(grey - 6, grey, grey + 8),
            haze_strength=rng.uniform(0.3, 0.5),
        )

    def haze(self, below: float) -> float:
        """Return the share of haze over what stands ``below`` pixels under the horizon."""
        return self.haze_strength * float(np.exp(-below / (0.12 * self.image_size[0])))

    def project(self, x: float, y: float, depth: float) -> tuple[int, int]:
        """
        Return the pixel of a point, kept inside the picture.

        Args:
            x: metres to the right of the middle of the road.
            y: metres above the road.
            depth: pixels per metre there; small is far.
        """
        H, W = self.image_size
        column = round(self.vanishing_x + x * depth)
        row = round(self.horizon + (self.camera_height - y) * depth)
        return min(max(column, 0), W - 1), min(max(row, 0), H - 1)


class Surface(NamedTuple):
    """
    A labelled part of the backdrop.

    Attributes:
        label: class name of Cityscapes.
        corners: (N, 2) pixels.
        colour: before haze.
        roughness: strength of its relief, in [0, 1].
        haze: share of haze, in [0, 1].
        details: polygons drawn into it without a label of their own, with their colours.
    """

    label: str
    corners: Outline
    colour: Colour8
    roughness: float
    haze: float
    details: tuple[tuple[Outline, Colour8], ...] = ()


def paint_surface(
    image: Image8, surface: Surface, view: View, relief: npt.NDArray[np.float32]
) -> None:
    """Paint a surface and its details into the picture; ``relief`` is (H, W) in [-1, 1]."""
    left, top, width, height = cv2.boundingRect(surface.corners)
    corner = np.array([left, top], dtype=np.int32)
    patch = image[top : top + height, left : left + width]
    mask = np.zeros(patch.shape[:2], dtype=np.uint8)
    cv2.fillPoly(mask, [surface.corners - corner], 255)
    painted = np.full(patch.shape, surface.colour, dtype=np.uint8)
    for corners, colour in surface.details:
        cv2.fillPoly(painted, [corners - corner], colour, lineType=cv2.LINE_AA)
    bumps = 1 + surface.roughness * relief[top : top + height, left : left + width, None]
    haze = np.asarray(view.haze_colour, dtype=np.float32) * surface.haze
    lit = np.clip(painted * bumps * (1 - surface.haze) + haze, 0, 255).astype(np.uint8)
    cv2.copyTo(lit, mask, patch)


def street_surfaces(rng: np.random.Generator, view: View) -> tuple[list[Surface], list[Surface]]:
    """Return the surfaces behind all road objects and those before them, in painting order."""
    surfaces = [_sky(rng, view), *_ground(rng, view)]
    for side in (-1, 1):
        surfaces += _facades(rng, view, side)
        surfaces += _trees(rng, view, side)
        surfaces += _poles(rng, view, side, count=int(rng.integers(4, 9)), nearest=0.16)
    front = []
    if rng.random() < 0.4:
        front = _poles(rng, view, int(rng.choice((-1, 1))), count=1, nearest=0.3)
    return surfaces, [*front, _bonnet(rng, view)]


def _corners(*points: tuple[int, int]) -> Outline:
    return np.array(points, dtype=np.int32)


def _vary(rng: np.random.Generator, colour: Colour8, spread: float, light: Light) -> Colour8:
    """Return the colour, brighter or darker by up to ``spread`` and as it looks in ``light``."""
    factor = light.value * rng.uniform(1 - spread, 1 + spread)
    red, green, blue = (min(round(value * factor), 255) for value in colour)
    return red, green, blue


def _sky(rng: np.random.Generator, view: View) -> Surface:
    H, W = view.image_size
    bottom = min(round(view.horizon) + 2, H - 1)
    colours = ((176, 196, 216), (198, 202, 206), (150, 182, 218))
    colour = colours[int(rng.integers(len(colours)))]
    corners = _corners((0, 0), (W - 1, 0), (W - 1, bottom), (0, bottom))
    return Surface("sky", corners, _vary(rng, colour, 0.06, view.light), 0.08, 0.1)


def _ground(rng: np.random.Generator, view: View) -> list[Surface]:
    """Return sidewalk (or grass) on both sides and the road with its markings between them."""
    H, W = view.image_size
    top, bottom = round(view.horizon), H - 1
    far, near = 1.0, (bottom - view.horizon) / view.camera_height
    half = rng.uniform(5.0, 7.0)
    middle = round(view.vanishing_x)
    surfaces = []
    for edge in (0, W - 1):
        label, colour, roughness = "sidewalk", (150, 142, 138), 0.10
        if rng.random() < 0.3:
            label, colour, roughness = "terrain", (118, 128, 84), 0.25
        corners = _corners((edge, top), (middle, top), (middle, bottom), (edge, bottom))
        colour = _vary(rng, colour, 0.12, view.light)
        surfaces.append(Surface(label, corners, colour, roughness, 0.08))
    # Far beyond the picture, so that the edges keep their direction until its border.
    left, right = (view.vanishing_x + side * half * near for side in (-1, 1))
    road = np.array(
        [[middle - half * far, top], [middle + half * far, top], [right, bottom], [left, bottom]]
    )
    markings = []
    for lane in (-half * 0.92, 0.0, half * 0.92):
        for start in np.geomspace(far * 2, near, 9):
            end = start * (1.35 if lane else 1.16)
            quad = [
                (view.vanishing_x + (lane + dx) * depth, view.horizon + view.camera_height * depth)
                for dx, depth in ((-0.1, start), (0.1, start), (0.1, end), (-0.1, end))
            ]
            markings.append((np.round(quad).astype(np.int32), (206, 206, 200)))
    asphalt = _vary(rng, (104, 104, 110), 0.15, view.light)
    clipped = _clip(road, view.image_size)
    return [*surfaces, Surface("road", clipped, asphalt, 0.12, 0.05, tuple(markings))]


def _clip(corners: npt.NDArray[np.float64], image_size: tuple[int, int]) -> Outline:
    """Return the part of a convex polygon that is inside the picture."""
    H, W = image_size
    frame = np.array([[0, 0], [W - 1, 0], [W - 1, H - 1], [0, H - 1]], dtype=np.float32)
    _, inside = cv2.intersectConvexConvex(corners.astype(np.float32), frame)
    return np.round(inside[:, 0]).astype(np.int32)


def _facades(rng: np.random.Generator, view: View, side: int) -> list[Surface]:
    """Return a row of buildings along one side, the farthest first, with windows."""
    setback = rng.uniform(9.0, 13.0)
    # Pixels per metre where a building begins: from far away to the border of the picture.
    border = view.image_size[1] if side > 0 else 0
    nearest = abs(border - view.vanishing_x) / setback
    depths = np.geomspace(nearest * 0.1, nearest * 1.02, int(rng.integers(5, 9)))
    surfaces = []
    palette = ((170, 130, 104), (186, 178, 160), (140, 138, 142), (152, 112, 94), (196, 188, 178))
    for far, near in itertools.pairwise(depths):
        if rng.random() < 0.12:
            continue
        storey, storeys = 3.2, int(rng.integers(2, 6))
        top = storey * storeys
        quad = _corners(
            view.project(side * setback, top, far), view.project(side * setback, top, near),
            view.project(side * setback, 0, near), view.project(side * setback, 0, far),
        )  # fmt: skip
        colour = _vary(rng, palette[int(rng.integers(len(palette)))], 0.12, view.light)
        pane = _vary(rng, (84, 92, 104), 0.25, view.light)
        windows = []
        for column in np.linspace(0.08, 0.86, int(rng.integers(3, 6))):
            # Between two depths equal steps along the wall are equal steps of 1 / depth.
            start, end = (1 / ((1 - t) / far + t / near) for t in (column, column + 0.1))
            for floor in range(storeys):
                sill, lintel = storey * floor + 1.0, storey * floor + 2.5
                windows.append(
                    (_corners(*(view.project(side * setback, y, z) for y, z in
                                ((lintel, start), (lintel, end), (sill, end), (sill, start)))), pane)
                )  # fmt: skip
        haze = view.haze_strength * float(np.exp(-near / (0.25 * nearest)))
        if cv2.contourArea(quad) > 4:
            surfaces.append(Surface("building", quad, colour, 0.08, haze, tuple(windows)))
    return surfaces


def _trees(rng: np.random.Generator, view: View, side: int) -> list[Surface]:
    H = view.image_size[0]
    surfaces = []
    for below in sorted(H * rng.uniform(0.05, 0.20, int(rng.integers(2, 6)))):
        scale = below / view.camera_height
        x = side * rng.uniform(8.0, 12.0)
        trunk = _corners(
            view.project(x - 0.2, 3, scale), view.project(x + 0.2, 3, scale),
            view.project(x + 0.2, 0, scale), view.project(x - 0.2, 0, scale),
        )  # fmt: skip
        radius, angles = rng.uniform(1.6, 2.6), np.linspace(0, 2 * np.pi, 15)[:-1]
        radii = radius * rng.uniform(0.75, 1.15, len(angles))
        crown = _corners(
            *(
                view.project(x + r * np.cos(a), 4.2 + 0.9 * r * np.sin(a), scale)
                for r, a in zip(radii, angles, strict=True)
            )
        )
        leaf = _vary(rng, (84, 108, 62), 0.25, view.light)
        bark = _vary(rng, (92, 76, 62), 0.15, view.light)
        for corners, colour, roughness in ((trunk, bark, 0.1), (crown, leaf, 0.45)):
            if cv2.contourArea(corners) > 4:
                surfaces.append(
                    Surface("vegetation", corners, colour, roughness, view.haze(below) * 0.7)
                )
    return surfaces


def _poles(
    rng: np.random.Generator, view: View, side: int, *, count: int, nearest: float
) -> list[Surface]:
    """Return poles, most with a sign or a light; ``nearest`` below the horizon, in H."""
    H = view.image_size[0]
    grey = _vary(rng, (112, 114, 116), 0.2, view.light)
    surfaces = []
    for below in sorted(H * rng.uniform(0.06, nearest, count)):
        scale, x = below / view.camera_height, side * rng.uniform(6.8, 9.0)
        width = max(0.07, 1 / scale)
        haze = view.haze(below) * 0.7
        parts = [("pole", x - width, x + width, 0.0, 4.6, grey)]
        kind = rng.random()
        if kind < 0.4:
            colour = sample_colour(rng, str(rng.choice(("blue", "yellow", "white"))), view.light)
            parts.append(("traffic sign", x - 0.4, x + 0.4, 3.4, 4.3, colour))
        elif kind < 0.7:
            parts.append(("traffic light", x - 0.25, x + 0.25, 3.2, 4.4, (52, 54, 52)))
        for label, x0, x1, y0, y1, colour in parts:
            corners = _corners(
                view.project(x0, y1, scale), view.project(x1, y1, scale),
                view.project(x1, y0, scale), view.project(x0, y0, scale),
            )  # fmt: skip
            if cv2.contourArea(corners) > 4:
                surfaces.append(Surface(label, corners, colour, 0.05, haze))
    return surfaces


def _bonnet(rng: np.random.Generator, view: View) -> Surface:
    """Return the front of the car that carries the camera, at the lower border."""
    H, W = view.image_size
    x = np.linspace(0, W - 1, 17)
    y = H * (0.96 + 0.03 * np.linspace(-1, 1, 17) ** 2)
    rim = np.round(np.stack([x, y], axis=1)).astype(np.int32)
    corners = np.concatenate([rim, _corners((W - 1, H - 1), (0, H - 1))])
    return Surface("ego vehicle", corners, _vary(rng, (62, 66, 74), 0.3, view.light), 0.05, 0.0)


def clutter(rng: np.random.Generator, image_size: tuple[int, int]) -> Image8:
    """Return an (H, W, 3) background without anything to find: gradient, relief, stray shapes."""
    H, W = image_size
    light = Light(saturation=rng.uniform(0.3, 0.9), value=rng.uniform(0.6, 1.05))
    names = ("grey", "silver", "tan", "cream", "wood", "green", "blue", "teal", "white", "brown")
    first, second = (
        np.array(sample_colour(rng, str(rng.choice(names)), light), dtype=np.float32)
        for _ in range(2)
    )
    angle = rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[0:H, 0:W].astype(np.float32)
    ramp = ((x / W - 0.5) * np.cos(angle) + (y / H - 0.5) * np.sin(angle) + 0.5)[..., None]
    if rng.random() < 0.5:
        # A floor under a wall, or land under a sky.
        ramp = (ramp > rng.uniform(0.35, 0.65)).astype(np.float32)
    image = np.clip(first + (second - first) * np.clip(ramp, 0, 1), 0, 255).astype(np.uint8)
    for _ in range(int(rng.integers(3, 12))):
        colour = sample_colour(rng, str(rng.choice(names)), light)
        corners = rng.uniform(-0.25, 0.25, (int(rng.integers(3, 7)), 2)) * rng.uniform(0.3, 1.6)
        corners = (corners + rng.uniform(0, 1, 2)) * (W, H)
        blob = image.copy()
        cv2.fillPoly(blob, [np.round(corners).astype(np.int32)], colour, lineType=cv2.LINE_AA)
        image = cv2.addWeighted(image, 0.5, blob, 0.5, 0)
    cells = int(rng.choice((6, 18, 40)))
    relief = smooth_noise(rng, image_size, cells) * rng.uniform(0.03, 0.2)
    return np.clip(image * (1 + relief[..., None]), 0, 255).astype(np.uint8)
