"""
Instance masks that need the memory and the time of their windows, not of their frames.

Shape shorthand in this module:

    N: instances
    H, W: height and width of the frame
    P: pixels of all windows
    M: side of a mask target
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.layers import ROIAlign
from detectron2.structures import BitMasks, Boxes

from d2ft.structures.mask_window import Array, MaskWindow


class WindowMasks(BitMasks):
    """
    Same as :class:`BitMasks`, but only the window around each mask is kept.

    Every method gives what :class:`BitMasks` gives. Code that asks for bitmaps finds them in
    ``tensor``, which is made anew at each access, or takes :meth:`to_bitmasks`: heads such as
    PointRend's, which read ``gt_masks.tensor``, work unchanged.

    Indexing shares the pixels, so that the mask of an instance which many RoIs are matched to is
    there once.

    Args:
        tensor: (N, H, W) bool.

    Attributes:
        image_size: (H, W).
    """

    def __init__(self, tensor: torch.Tensor | Array) -> None:
        masks = torch.as_tensor(tensor)
        assert masks.dim() == 3, masks.shape
        windows = WindowMasks.from_windows(
            map(MaskWindow.of_mask, masks.cpu().numpy()), masks.shape[1:]
        ).to(masks.device)
        self._set(windows._pixels, windows._table, windows.image_size)

    def _set(
        self, pixels: torch.Tensor, table: torch.Tensor, image_size: Sequence[int]
    ) -> "WindowMasks":
        self._pixels = pixels  # (P,) bool, row by row of each window
        self._table = table  # (N, 5) int64: XYXY of the window, place of its first pixel
        self.image_size = torch.Size(image_size)
        return self

    def _with(self, pixels: torch.Tensor, table: torch.Tensor) -> "WindowMasks":
        return object.__new__(type(self))._set(pixels, table, self.image_size)

    @classmethod
    def from_windows(
        cls, windows: Iterable[MaskWindow], image_size: Sequence[int]
    ) -> "WindowMasks":
        """Return the masks of N windows, all of them of frames of ``image_size``."""
        windows = list(windows)
        table = torch.zeros(len(windows), 5, dtype=torch.int64)
        start = 0
        for row, window in zip(table.numpy(), windows, strict=True):
            if tuple(window.image_size) != tuple(image_size):
                raise ValueError(f"a mask of {window.image_size} in a frame of {image_size}")
            height, width = window.pixels.shape
            row[:] = window.x0, window.y0, window.x0 + width, window.y0 + height, start
            start += window.pixels.size
        pixels = np.zeros(start, bool)
        for window, start in zip(windows, table[:, 4].tolist(), strict=True):
            target = pixels[start : start + window.pixels.size]
            target.reshape(window.pixels.shape)[...] = window.pixels
        return object.__new__(cls)._set(torch.from_numpy(pixels), table, image_size)

    @property
    def tensor(self) -> torch.Tensor:
        """The bitmaps, (N, H, W) bool, on the device of the windows."""
        full = torch.zeros((len(self), *self.image_size), dtype=torch.bool, device=self.device)
        x0, y0, x1, y1, start = self._table.unbind(1)
        width = x1 - x0
        areas = width * (y1 - y0)
        mask = torch.repeat_interleave(areas)
        place = torch.arange(len(mask), device=self.device) - (areas.cumsum(0) - areas)[mask]
        row = torch.div(place, width[mask], rounding_mode="floor")
        column = place - row * width[mask]
        full[mask, y0[mask] + row, x0[mask] + column] = self._pixels[start[mask] + place]
        return full

    def to_bitmasks(self) -> BitMasks:
        """Return the same masks as Detectron2's :class:`BitMasks`."""
        return BitMasks(self.tensor)

    def to(self, *args: Any, **kwargs: Any) -> "WindowMasks":
        """Return the masks on another device, given as to :meth:`torch.Tensor.to`."""
        pixels = self._pixels.to(*args, **kwargs).to(torch.bool)
        return self._with(pixels, self._table.to(pixels.device))

    @property
    def device(self) -> torch.device:
        """Where the windows are."""
        return self._table.device

    def __len__(self) -> int:
        return len(self._table)

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (self[index].tensor[0] for index in range(len(self)))

    def __repr__(self) -> str:
        return f"{type(self).__name__}(num_instances={len(self)})"

    def __getitem__(self, item: Any) -> "WindowMasks":
        """Return the masks of an int, a slice, or a (N,) bool or index tensor, array or list."""
        return self._with(self._pixels, self._table[item].view(-1, 5))

    def nonempty(self) -> torch.Tensor:
        """Return (N,) bool: whether the mask has a pixel."""
        return self._table[:, 2] > self._table[:, 0]

    def get_bounding_boxes(self) -> Boxes:
        """Return the boxes around the masks' pixels, zeros for empty masks."""
        return Boxes(self._table[:, :4].to("cpu", torch.float32))

    @staticmethod
    def cat(bitmasks_list: "Sequence[WindowMasks]") -> "WindowMasks":
        """Return the masks of several, all of them of frames of the same size."""
        first = bitmasks_list[0]
        tables, start = [], 0
        for masks in bitmasks_list:
            assert isinstance(masks, WindowMasks)
            assert masks.image_size == first.image_size
            table = masks._table.clone()
            table[:, 4] += start
            start += len(masks._pixels)
            tables.append(table)
        return first._with(torch.cat([masks._pixels for masks in bitmasks_list]), torch.cat(tables))

    def crop_and_resize(self, boxes: torch.Tensor, mask_size: int) -> torch.Tensor:
        """
        Return the targets of mask heads: each mask in its box, at another size.

        On the CPU the arithmetic is that of torchvision's RoIAlign on the bitmap, in the same
        order, so the targets are equal bit by bit where its compiler fuses no operations (x86-64).
        On another device it is that kernel itself, on one bitmap for each different mask.

        Args:
            boxes: (N, 4) XYXY, a box for each mask.
            mask_size: M.

        Returns:
            (N, M, M) bool, on the device of the masks.
        """
        assert len(boxes) == len(self), f"{len(boxes)} boxes for {len(self)} masks"
        if not self._table.is_cpu:
            return self._crop_bitmaps(boxes, mask_size)
        pixels = self._pixels.numpy()
        targets = np.zeros((len(self), mask_size, mask_size), bool)
        corners = boxes.detach().to("cpu", torch.float32).numpy()
        for target, (x0, y0, x1, y1, start), box in zip(
            targets, self._table.tolist(), corners, strict=True
        ):
            if x1 > x0:
                end = start + (y1 - y0) * (x1 - x0)
                window = pixels[start:end].reshape(y1 - y0, x1 - x0)
                _align(window, (x0, y0), self.image_size, box, target)
        return torch.from_numpy(targets)

    def _crop_bitmaps(self, boxes: torch.Tensor, mask_size: int) -> torch.Tensor:
        table, which = torch.unique(self._table, dim=0, return_inverse=True)
        bitmaps = self._with(self._pixels, table).tensor[:, None].float()
        rois = torch.cat((which[:, None], boxes.to(self.device)), dim=1).float()
        align = ROIAlign((mask_size, mask_size), 1.0, 0, aligned=True)
        return align(bitmaps, rois)[:, 0] >= 0.5


def _align(
    window: Array, corner: tuple[int, int], image_size: Sequence[int], box: Array, target: Array
) -> None:
    """
    Write RoIAlign's result for one mask and box, at least a half, into ``target``.

    Each of the M*M bins is the mean over a grid of samples, as many as the bin has pixels, each
    interpolated between four pixels. Everything is float32 and in the order of
    https://github.com/pytorch/vision/blob/v0.20.0/torchvision/csrc/ops/cpu/roi_align_kernel.cpp
    https://github.com/pytorch/vision/blob/v0.20.0/torchvision/csrc/ops/cpu/roi_align_common.h

    Args:
        window: (h, w) bool, not empty.
        corner: (x0, y0) of the window.
        image_size: (H, W) of the frame.
        box: (4,) float32, XYXY.
        target: (M, M) bool.
    """
    rows = _sample_axis(box[1], box[3], len(target), image_size[0], corner[1], window.shape[0])
    columns = _sample_axis(box[0], box[2], len(target), image_size[1], corner[0], window.shape[1])
    if rows is None or columns is None:
        return
    # A ring of False stands for all of the frame around the window.
    values = np.pad(window, 1).astype(np.float32)
    low_rows, high_rows = values[rows.low], values[rows.high]
    y_low, y_high = rows.low_weight[:, None], rows.high_weight[:, None]
    samples = (y_low * columns.low_weight) * low_rows[:, columns.low]
    samples += (y_low * columns.high_weight) * low_rows[:, columns.high]
    samples += (y_high * columns.low_weight) * high_rows[:, columns.low]
    samples += (y_high * columns.high_weight) * high_rows[:, columns.high]
    grid = samples.reshape(rows.num_samples, len(target), columns.num_samples, len(target))
    total = np.zeros(target.shape, np.float32)
    for row in grid:
        for column in range(columns.num_samples):
            total += row[:, column]
    target[...] = total / np.float32(rows.num_samples * columns.num_samples) >= 0.5


class _Samples(NamedTuple):
    """
    The samples of all bins along one axis, the i-th of every bin before the i+1-th of any.

    Attributes:
        low: (S*M,) the pixel before each, in the window with a ring around it.
        high: (S*M,) the pixel after each.
        low_weight: (S*M,) float32 share of the pixel before.
        high_weight: (S*M,) float32 share of the pixel after.
        num_samples: S.
    """

    low: Array
    high: Array
    low_weight: Array
    high_weight: Array
    num_samples: int


def _sample_axis(
    begin: np.float32, end: np.float32, bins: int, size: int, window_begin: int, window_size: int
) -> _Samples | None:
    """
    Return the samples along one axis, None if there are none.

    Args:
        begin: where the box begins.
        end: where it ends.
        bins: M.
        size: pixels of the frame.
        window_begin: pixel of the frame where the window begins.
        window_size: pixels of the window.
    """
    half = np.float32(0.5)
    begin = begin - half
    bin_size = (end - half - begin) / np.float32(bins)
    num_samples = int(np.ceil(bin_size))
    if num_samples < 1:
        return None
    bin_begins = begin + np.arange(bins, dtype=np.float32) * bin_size
    within = (np.arange(num_samples, dtype=np.float32) + half) * bin_size / np.float32(num_samples)
    place = (bin_begins + within[:, None]).ravel()
    # Up to one pixel outside, a sample takes the value at the border; beyond it, nothing.
    outside = (place < -1) | (place > size)
    place = place.clip(0, size - 1)
    low = place.astype(np.int64)
    high_weight = place - low.astype(np.float32)
    low_weight = np.float32(1) - high_weight
    low = low - window_begin + 1
    high = np.minimum(low + 1, size - window_begin)
    ring = window_size + 1
    low[outside] = high[outside] = 0
    return _Samples(low.clip(0, ring), high.clip(0, ring), low_weight, high_weight, num_samples)
