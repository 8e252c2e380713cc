"""
Check run-length codes of masks before anything decodes them.

A run-length code is COCO's: ``{"size": [height, width], "counts": ...}``, the lengths of runs of
zeros and ones in turn, beginning with zeros, column after column, compressed to text:
https://github.com/cocodataset/cocoapi/blob/master/common/maskApi.h
"""

from typing import Any

import numpy as np
import pycocotools.mask as mask_util


def check_rle(rle: Any, size: tuple[int, int]) -> dict[str, Any]:
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
    lengths = run_lengths(counts)
    total = size[0] * size[1]
    if lengths.dtype.kind != "i" or (lengths < 0).any() or lengths.sum() != total:
        raise ValueError(f"has runs that do not add up to the {total} pixels of its image")
    if isinstance(counts, list):
        code = mask_util.frPyObjects({"size": list(size), "counts": counts}, *size)
        counts = code["counts"].decode("ascii")  # as files have it
    return {"size": list(size), "counts": counts}


def run_lengths(counts: Any) -> "np.ndarray[Any, Any]":
    """
    Return the lengths of the runs that a code stands for, as they are if it is a list of them.

    Six bits a character from "0" on: five of the number, lowest first, and one that says that it
    goes on; the fifth of the last is its sign. From the fourth number on, it is the difference
    to the one two places before: ``rleFrString`` in
    https://github.com/cocodataset/cocoapi/blob/master/common/maskApi.c

    Args:
        counts: compressed, as text or bytes, or a list.

    Raises:
        ValueError: if it is none of these, or no compressed code.
    """
    if isinstance(counts, list):
        return np.asarray(counts)
    if isinstance(counts, str) and counts.isascii():
        counts = counts.encode("ascii")
    if not isinstance(counts, bytes):
        message = "has counts that are neither text nor a list of numbers"
        raise ValueError(message)  # noqa: TRY004 (the file is wrong, not the caller)
    bits = np.frombuffer(counts, np.uint8).astype(np.int64) - 48
    if not bits.size or (bits < 0).any() or (bits > 63).any() or bits[-1] & 32:
        raise ValueError("has counts that are no compressed run lengths")
    ends = np.flatnonzero(bits < 32)
    starts = np.zeros_like(ends)
    starts[1:] = ends[:-1] + 1
    digits = ends - starts + 1
    if digits.max() > 7:
        raise ValueError("has counts that are no compressed run lengths")
    place = np.arange(len(bits)) - np.repeat(starts, digits)
    values = np.add.reduceat((bits & 31) << (5 * place), starts)
    values -= np.where(bits[ends] & 16, 1 << (5 * digits), 0)
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    return values
