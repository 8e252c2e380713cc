"""Move the masks of annotations as Detectron2's transforms move the image, by their windows."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
from detectron2.data import transforms as T

from d2ft.rle import run_lengths
from d2ft.structures.mask_window import MaskWindow


def transform_segmentation(
    segmentation: Any, transforms: T.TransformList, size: tuple[int, int], new_size: tuple[int, int]
) -> MaskWindow:
    """
    Return the mask that Detectron2 makes of an annotation for INPUT.MASK_FORMAT "bitmask".

    Polygons are moved and then drawn, bitmaps are moved as such: pixel by pixel what
    ``transform_instance_annotations`` and ``annotations_to_instances`` of Detectron2 give.

    Args:
        segmentation: polygons, each [x0, y0, x1, y1, ...], or a run-length code of the frame.
        transforms: of the image.
        size: (height, width) of the image before them.
        new_size: (height, width) after them.

    Raises:
        ValueError: if it is neither, or a code of another size.
    """
    if isinstance(segmentation, dict):
        if tuple(segmentation["size"]) != size:
            raise ValueError(f"has the size {segmentation['size']}, and its image {list(size)}")
        lengths = run_lengths(segmentation["counts"])
        return transform_window(MaskWindow.of_run_lengths(lengths, size), transforms.transforms)
    if isinstance(segmentation, list):
        polygons = [np.asarray(polygon).reshape(-1, 2) for polygon in segmentation]
        moved = [polygon.reshape(-1) for polygon in transforms.apply_polygons(polygons)]
        if not moved:  # cut off, or there was none
            return MaskWindow.of_mask(np.zeros(new_size, bool))
        rle = mask_util.merge(mask_util.frPyObjects(moved, *new_size))
        return MaskWindow.of_run_lengths(run_lengths(rle["counts"]), new_size)
    raise ValueError(f"is a {type(segmentation).__name__}, neither polygons nor a run-length code")


def transform_window(window: MaskWindow, transforms: Sequence[T.Transform]) -> MaskWindow:
    """
    Apply what Detectron2's transforms do to a segmentation, one after the other.

    Flips, crops, pads and resizes touch the window alone. Any other transform is given the frame.
    """
    for transform in transforms:
        # Not isinstance: what is derived from these may move masks in another way.
        move = _WINDOW_MOVES.get(type(transform), _move_frame)
        window = move(window, transform)
    return window


def _move_frame(window: MaskWindow, transform: T.Transform) -> MaskWindow:
    frame = np.asfortranarray(window.full().view(np.uint8))  # as pycocotools decodes it
    return MaskWindow.of_mask(transform.apply_segmentation(frame))


def _crop(window: MaskWindow, crop: T.CropTransform) -> MaskWindow:
    return window.crop(crop.x0, crop.y0, crop.w, crop.h)


def _pad(window: MaskWindow, pad: T.PadTransform) -> MaskWindow:
    if pad.seg_pad_value:
        return _move_frame(window, pad)
    return window.pad(pad.x0, pad.y0, pad.x1, pad.y1)


def _resize(window: MaskWindow, resize: T.ResizeTransform) -> MaskWindow:
    if window.image_size != (resize.h, resize.w):  # its own assertion says so
        return _move_frame(window, resize)
    return window.resize((resize.new_h, resize.new_w))


_WINDOW_MOVES = {
    T.NoOpTransform: lambda window, _: window,
    T.BlendTransform: lambda window, _: window,
    T.ColorTransform: lambda window, _: window,
    T.PILColorTransform: lambda window, _: window,
    T.HFlipTransform: lambda window, _: window.flip_horizontally(),
    T.VFlipTransform: lambda window, _: window.flip_vertically(),
    T.CropTransform: _crop,
    T.PadTransform: _pad,
    T.ResizeTransform: _resize,
}
