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

from d2ft.structures.mask_window import Array, mask_window

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


class PackedRles:
    """
    N run-length codes of one size in one text: 4 bytes each beside their letters.

    As a list of dicts they take some 300 bytes more each, which counts where the masks of a whole
    dataset are kept. Indexing and iterating give run-length codes.

    Attributes:
        size: (height, width) of all, None without any.
    """

    def __init__(self, rles: Sequence[RunLengths]) -> None:
        """
        Pack codes with compressed counts.

        Raises:
            ValueError: if they differ in size.
        """
        sizes = {tuple(rle["size"]) for rle in rles}
        if len(sizes) > 1:
            raise ValueError(f"has masks of different sizes, {sorted(sizes)}")
        self.size: tuple[int, int] | None = next(iter(sizes), None)
        self._text = "".join(rle["counts"] for rle in rles)
        self._ends = np.cumsum([0, *(len(rle["counts"]) for rle in rles)], dtype=np.int32)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> RunLengths:
        if self.size is None or index >= len(self):
            raise IndexError(index)
        start, end = self._ends[index : index + 2]
        return {"size": list(self.size), "counts": self._text[start:end]}


def run_length_codes(masks: torch.Tensor | RleMasks) -> list[RunLengths]:
    """Return the codes of the ``pred_masks`` of an image, (N, H, W) or read from a file."""
    if isinstance(masks, RleMasks):
        return masks.rles
    return [encode_mask(mask) for mask in masks.bool().numpy()]


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
