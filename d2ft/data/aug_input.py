"""What augmentations are applied to: the image, moved by faster means where the result is known."""

import warnings
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.data import transforms as T
from PIL import Image

Array = np.ndarray[Any, np.dtype[Any]]


class FastAugInput(T.AugInput):
    """
    Same as :class:`AugInput`, but an image that has its size already is not resized.

    Args:
        image: (H, W, C), and ``sem_seg`` (H, W) or None, as for :class:`AugInput`.
        resize: "pil", or "torch" for bilinear resizes of uint8 images by PyTorch. Both follow the
            same rule, with an intermediate result in uint8; PyTorch's weights have fewer bits.
    """

    image: Array
    sem_seg: Array | None

    def __init__(self, image: Array, *, sem_seg: Array | None = None, resize: str = "pil") -> None:
        super().__init__(image, sem_seg=sem_seg)
        self._resize = resize

    def transform(self, tfm: T.Transform) -> None:
        """Apply a transform to the image and the labels of its pixels."""
        self.image = self._moved_image(tfm)
        if self.sem_seg is not None:
            self.sem_seg = tfm.apply_segmentation(self.sem_seg)

    def _moved_image(self, tfm: T.Transform) -> Array:
        image = self.image
        if image.dtype != np.uint8 or image.ndim != 3:
            return tfm.apply_image(image)
        if type(tfm) is T.HFlipTransform:
            return _flip_horizontally(image)
        if type(tfm) is not T.ResizeTransform or image.shape[:2] != (tfm.h, tfm.w):
            return tfm.apply_image(image)
        if (tfm.h, tfm.w) == (tfm.new_h, tfm.new_w):
            return image
        if self._resize == "torch" and tfm.interp == Image.Resampling.BILINEAR:
            return _resize_by_torch(image, (tfm.new_h, tfm.new_w))
        return tfm.apply_image(image)


def _flip_horizontally(image: Array) -> Array:
    if image.flags.c_contiguous:
        return cv2.flip(image, 1).reshape(image.shape)
    planes = image.transpose(2, 0, 1)
    if planes.flags.c_contiguous and planes.flags.writeable:  # of _resize_by_torch
        return torch.from_numpy(planes).flip(2).numpy().transpose(1, 2, 0)
    return np.flip(image, axis=1)


def _resize_by_torch(image: Array, size: tuple[int, int]) -> Array:
    with warnings.catch_warnings():
        # An image of the cache, which is only read here.
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        batch = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None]
    resized = torch.nn.functional.interpolate(batch, size, mode="bilinear", antialias=True)
    # A view of planar memory, in which the channels need no further sorting.
    return resized[0].permute(1, 2, 0).numpy()


def channels_first(image: Array) -> torch.Tensor:
    """Return an (H, W, C) image as a contiguous (C, H, W) tensor of its own memory."""
    if image.dtype == np.uint8 and image.shape[2] == 3 and image.flags.c_contiguous:
        planes = np.empty((3, *image.shape[:2]), np.uint8)
        cv2.split(image, list(planes))  # NumPy's copy takes 7 times as long
        return torch.from_numpy(planes)
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
