"""
The vocabulary in which the objects of the embedded sets are drawn.

A shape is authored in its own height: y runs down from 0 (top) to 1 (the ground), x from 0 to
``Shape.width``. Wheels stay round because both axes are in the same unit. Objects look to the
right; renderers mirror them.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Points = npt.NDArray[np.float64]

_DISC_ANGLES = np.linspace(0.0, 2.0 * np.pi, 20, endpoint=False)


class Part(NamedTuple):
    """
    One filled polygon of a shape; later parts cover earlier ones.

    Attributes:
        paint: ``"body"`` or ``"trim"`` (the colours of the object's style), ``"hole"`` (counts
            as the object but shows what is behind, as between spokes) or a colour of
            :data:`~d2ft.data.synthetic.styles.COLOURS`.
        points: (N, 2) corners as (x, y).
    """

    paint: str
    points: Points


class Shape(NamedTuple):
    """
    A silhouette: the union of its parts.

    Attributes:
        width: extent in x, in heights.
        parts: in painting order.
    """

    width: float
    parts: tuple[Part, ...]


def shape(width: float, *parts: Part) -> Shape:
    """Return the parts as a shape ``width`` heights wide."""
    return Shape(width, parts)


def poly(paint: str, *coordinates: float) -> Part:
    """Return a polygon through ``x0, y0, x1, y1, ...``."""
    return Part(paint, np.asarray(coordinates, dtype=np.float64).reshape(-1, 2))


def box(paint: str, x0: float, y0: float, x1: float, y1: float) -> Part:
    """Return an upright rectangle."""
    return poly(paint, x0, y0, x1, y0, x1, y1, x0, y1)


def disc(paint: str, x: float, y: float, rx: float, ry: float | None = None) -> Part:
    """Return an ellipse around (x, y); a circle without ``ry``."""
    ry = rx if ry is None else ry
    ring = np.stack([x + rx * np.cos(_DISC_ANGLES), y + ry * np.sin(_DISC_ANGLES)], axis=1)
    return Part(paint, ring)


def bar(paint: str, x0: float, y0: float, x1: float, y1: float, thickness: float) -> Part:
    """Return a straight bar between two points."""
    along = np.array([x1 - x0, y1 - y0]) / np.hypot(x1 - x0, y1 - y0)
    across = np.array([-along[1], along[0]]) * thickness / 2
    start, end = np.array([x0, y0]), np.array([x1, y1])
    return Part(paint, np.stack([start - across, end - across, end + across, start + across]))


def wheel(x: float, radius: float, y: float | None = None) -> tuple[Part, Part]:
    """Return tyre and hub of a wheel that stands on the ground, or around ``y``."""
    y = 1.0 - radius if y is None else y
    return disc("black", x, y, radius), disc("silver", x, y, radius * 0.45)


def spoked_wheel(x: float, radius: float) -> tuple[Part, ...]:
    """Return a bicycle wheel on the ground: a thin tyre that one can look through."""
    y = 1.0 - radius
    rim = radius * 0.8
    return (
        disc("black", x, y, radius),
        disc("hole", x, y, rim),
        *(
            bar("silver", x - rim * c, y - rim * s, x + rim * c, y + rim * s, radius * 0.07)
            for c, s in ((1.0, 0.0), (0.5, 0.866), (-0.5, 0.866))
        ),
        disc("grey", x, y, radius * 0.16),
    )
