"""
Instance masks as windows and as run-length codes.

A run-length code is COCO's: ``{"size": [height, width], "counts": ...}``, the lengths of runs of
zeros and ones in turn, beginning with zeros, column after column, compressed to text:
https://github.com/cocodataset/cocoapi/blob/master/common/maskApi.h
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import torch

Array = np.ndarray[Any, np.dtype[Any]]
RunLengths = dict[str, Any]


class RleMasks:
    """
    N masks in the place of a (N, H, W) bool tensor, decoded one at a time.

    A hundred masks of a large frame take 200 MB as a tensor and some 30 kB here.

    Attributes:
        rles: N run-length codes.
    """

    def __init__(self, rles: Sequence[RunLengths]) -> None:
        self.rles = list(rles)

    def __len__(self) -> int:
        return len(self.rles)

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (decode_mask(rle) for rle in self.rles)

    def __getitem__(self, item: Any) -> Any:
        if isinstance(item, int):
            return decode_mask(self.rles[item])
        return RleMasks([self.rles[i] for i in np.arange(len(self))[item]])


def mask_window(mask: Array) -> tuple[slice, slice] | None:
    """Return the rows and columns (H, W) around all pixels of a bool mask, None without any."""
    rows = np.flatnonzero(mask.any(axis=1))
    if not rows.size:
        return None
    height = slice(rows[0], rows[-1] + 1)
    columns = np.flatnonzero(mask[height].any(axis=0))
    return height, slice(columns[0], columns[-1] + 1)


def encode_mask(mask: Array) -> RunLengths:
    """
    Return the run-length code of a mask, the same text that ``pycocotools.mask.encode`` makes.

    Only the window around the pixels is looked at, so the usual mask, which covers a small part
    of its frame, is encoded many times faster.

    Args:
        mask: (H, W) bool.
    """
    height, width = mask.shape
    edges = _edges(mask)
    lengths = np.diff(edges, prepend=0, append=height * width)
    if edges.size and not lengths[-1]:
        lengths = lengths[:-1]
    uncompressed = {"size": [height, width], "counts": lengths.tolist()}
    rle = mask_util.frPyObjects(uncompressed, height, width)
    return {"size": [height, width], "counts": rle["counts"].decode("ascii")}


def decode_mask(rle: RunLengths) -> torch.Tensor:
    """Return the (H, W) bool tensor of a sound run-length code."""
    return torch.from_numpy(mask_util.decode(rle)).view(torch.bool)


def check_rle(rle: Any, size: tuple[int, int]) -> RunLengths:
    """
    Return a run-length code in compressed form, after checking that it can be decoded.

    pycocotools takes a code that does not fill its frame and leaves the rest of the mask
    uninitialised, so whatever comes from a file passes through here.

    Args:
        rle: what a file has; the counts compressed, or a list of numbers.
        size: (height, width) that it has to have.

    Raises:
        ValueError: if it is no run-length code, has another size or does not fill its frame.
    """
    if not isinstance(rle, dict) or not {"size", "counts"} <= set(rle):
        raise ValueError("is no run-length code with 'size' and 'counts'")
    if rle["size"] != list(size):
        raise ValueError(f"has the size {rle['size']}, and its image [{size[0]}, {size[1]}]")
    counts = rle["counts"]
    lengths = np.asarray(counts) if isinstance(counts, list) else _run_lengths(counts)
    total = size[0] * size[1]
    if lengths.dtype.kind != "i" or (lengths < 0).any() or lengths.sum() != total:
        raise ValueError(f"has runs that do not add up to the {total} pixels of its image")
    if isinstance(counts, list):
        return dict(mask_util.frPyObjects({"size": list(size), "counts": counts}, *size))
    return {"size": list(size), "counts": counts}


def _edges(mask: Array) -> Array:
    """Return where a mask changes, counting pixels column after column."""
    window = mask_window(mask)
    if window is None:
        return np.zeros(0, np.int64)
    rows, columns = window
    height = rows.stop - rows.start
    padded = np.zeros((columns.stop - columns.start, height + 2), bool)
    padded[:, 1:-1] = mask[window].T
    column, row = np.divmod(np.flatnonzero(padded[:, 1:] != padded[:, :-1]), height + 1)
    edges = (columns.start + column) * mask.shape[0] + rows.start + row
    # A run that reaches the bottom goes on where the next column begins at the top.
    joins = np.flatnonzero(edges[1:] == edges[:-1])
    return np.delete(edges, np.concatenate((joins, joins + 1)))


def _run_lengths(counts: Any) -> Array:
    """
    Return the lengths that a compressed code stands for.

    Six bits a character from "0" on: five of the number, lowest first, and one that says that it
    goes on; the fifth of the last is its sign. From the fourth number on, it is the difference
    to the one two places before: ``rleFrString`` in
    https://github.com/cocodataset/cocoapi/blob/master/common/maskApi.c
    """
    if not isinstance(counts, str) or not counts.isascii():
        raise ValueError("has counts that are neither text nor a list of numbers")
    bits = np.frombuffer(counts.encode("ascii"), np.uint8).astype(np.int64) - 48
    if not bits.size or (bits < 0).any() or (bits > 63).any() or bits[-1] & 32:
        raise ValueError("has counts that are no compressed run lengths")
    ends = np.flatnonzero(bits < 32)
    starts = np.append(0, ends[:-1] + 1)
    digits = ends - starts + 1
    if digits.max() > 7:
        raise ValueError("has counts that are no compressed run lengths")
    place = np.arange(len(bits)) - np.repeat(starts, digits)
    values = np.add.reduceat((bits & 31) << (5 * place), starts)
    values -= np.where(bits[ends] & 16, 1 << (5 * digits), 0)
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    return values
