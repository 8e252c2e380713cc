"""
A mask of an instance as the window around its pixels.

An instance covers a small part of its frame: what is done to the window alone costs little. All
coordinates are pixels of the frame, whose (0, 0) is the upper left one.

Shape shorthand in this module:

    H, W: height and width of the frame
    h, w: height and width of the window
"""

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

Array = np.ndarray[Any, np.dtype[Any]]


def mask_window(mask: Array) -> tuple[slice, slice] | None:
    """Return the rows and columns (H, W) around all pixels of a bool mask, None without any."""
    rows = np.flatnonzero(mask.any(axis=1))
    if not rows.size:
        return None
    height = slice(rows[0], rows[-1] + 1)
    columns = np.flatnonzero(mask[height].any(axis=0))
    return height, slice(columns[0], columns[-1] + 1)


@dataclass(frozen=True)
class MaskWindow:
    """
    The pixels of a mask in the window around them; all others of its frame are False.

    Attributes:
        pixels: (h, w) bool, not to be written to; (0, 0) for an empty mask.
        x0: column of the frame where the window begins; 0 for an empty mask.
        y0: row of the frame where the window begins; 0 for an empty mask.
        image_size: (H, W).
    """

    pixels: Array
    x0: int
    y0: int
    image_size: tuple[int, int]

    @classmethod
    def of_mask(cls, mask: Array) -> "MaskWindow":
        """Return the window of a (H, W) mask of any dtype."""
        return cls(mask.astype(bool, copy=False), 0, 0, mask.shape[:2])._tight()

    @classmethod
    def of_run_lengths(cls, lengths: Array, image_size: tuple[int, int]) -> "MaskWindow":
        """
        Return the window of a mask given by COCO's run lengths, without decoding the frame.

        Args:
            lengths: of runs of zeros and ones in turn, column after column, zeros first.
            image_size: (H, W).

        Raises:
            ValueError: if the runs do not fill the frame.
        """
        height, width = image_size
        if lengths.sum() != height * width:
            raise ValueError(
                f"has runs of {lengths.sum()} pixels, which do not fill its frame of {width}x{height}"
            )
        ends = np.cumsum(lengths)[1::2]
        ones = np.asarray(lengths[1::2])
        ends, ones = ends[ones > 0], ones[ones > 0]
        if not ones.size:
            return cls(np.zeros((0, 0), bool), 0, 0, image_size)
        left, top = np.divmod(ends - ones, height)
        right, bottom = np.divmod(ends - 1, height)
        x0, x1 = int(left[0]), int(right[-1]) + 1
        # A run that goes on in the next column fills this one to the bottom, that from the top.
        y0, y1 = (0, height) if (left < right).any() else (int(top.min()), int(bottom.max()) + 1)
        window_height = y1 - y0
        starts = (left - x0) * window_height + top - y0
        edges = np.zeros(2 * len(ones) + 2, np.int64)
        edges[1:-1:2], edges[2:-1:2], edges[-1] = starts, starts + ones, window_height * (x1 - x0)
        columns = np.repeat(np.arange(len(edges) - 1) % 2 == 1, edges[1:] - edges[:-1])
        return cls(columns.reshape(x1 - x0, window_height).T, x0, y0, image_size)

    def full(self) -> Array:
        """Return the mask of the frame, (H, W) bool."""
        mask = np.zeros(self.image_size, bool)
        height, width = self.pixels.shape
        mask[self.y0 : self.y0 + height, self.x0 : self.x0 + width] = self.pixels
        return mask

    def flip_horizontally(self) -> "MaskWindow":
        """Mirror left and right."""
        x0 = self.image_size[1] - self.x0 - self.pixels.shape[1] if self.pixels.size else 0
        return MaskWindow(self.pixels[:, ::-1], x0, self.y0, self.image_size)

    def flip_vertically(self) -> "MaskWindow":
        """Mirror top and bottom."""
        y0 = self.image_size[0] - self.y0 - self.pixels.shape[0] if self.pixels.size else 0
        return MaskWindow(self.pixels[::-1], self.x0, y0, self.image_size)

    def crop(self, x0: int, y0: int, width: int, height: int) -> "MaskWindow":
        """Cut a rectangle out of the frame; what of it lies beyond the frame is left out."""
        frame_height, frame_width = self.image_size
        image_size = (min(height, frame_height - y0), min(width, frame_width - x0))
        pixels = self.pixels[
            max(y0 - self.y0, 0) : max(y0 + height - self.y0, 0),
            max(x0 - self.x0, 0) : max(x0 + width - self.x0, 0),
        ]
        cut = MaskWindow(pixels, max(self.x0 - x0, 0), max(self.y0 - y0, 0), image_size)
        return cut._tight()

    def pad(self, left: int, top: int, right: int, bottom: int) -> "MaskWindow":
        """Enlarge the frame by columns and rows of False."""
        height, width = self.image_size
        image_size = (height + top + bottom, width + left + right)
        if not self.pixels.size:
            return MaskWindow(self.pixels, 0, 0, image_size)
        return MaskWindow(self.pixels, self.x0 + left, self.y0 + top, image_size)

    def resize(self, image_size: tuple[int, int]) -> "MaskWindow":
        """Resize the frame to (height, width): the window of what Pillow's NEAREST makes of it."""
        if image_size == self.image_size:
            return self
        rows, y0 = self._taken(0, self.y0, image_size[0])
        columns, x0 = self._taken(1, self.x0, image_size[1])
        return MaskWindow(self.pixels[rows][:, columns], x0, y0, image_size)._tight()

    def _taken(self, axis: int, begin: int, new_size: int) -> tuple[Array, int]:
        """Return which rows (axis 0) or columns of the window are taken, and where they begin."""
        sources = _nearest(self.image_size[axis], new_size)
        first, end = np.searchsorted(sources, (begin, begin + self.pixels.shape[axis]))
        return sources[first:end] - begin, int(first)

    def _tight(self) -> "MaskWindow":
        window = mask_window(self.pixels)
        if window is None:
            return MaskWindow(np.zeros((0, 0), bool), 0, 0, self.image_size)
        rows, columns = window
        x0, y0 = self.x0 + int(columns.start), self.y0 + int(rows.start)
        return MaskWindow(self.pixels[window], x0, y0, self.image_size)


@functools.lru_cache(maxsize=256)
def _nearest(size: int, new_size: int) -> Array:
    """Return for each of ``new_size`` pixels of a line the one of ``size`` that Pillow takes."""
    # Asked of Pillow, which adds up the step from pixel to pixel with its rounding errors.
    line = Image.fromarray(np.arange(size, dtype=np.int32)[None])
    return np.asarray(line.resize((new_size, 1), Image.Resampling.NEAREST))[0]
