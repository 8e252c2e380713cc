"""
Use transforms of albumentations (optional, MIT licence) as augmentations of Detectron2.

Works with version 2.0.8. Their randomness is drawn from NumPy's generator, which d2ft seeds for
each sample, so that a resumed run augments as one that was never stopped.
"""

import difflib
import inspect
from typing import Any

import numpy as np
from detectron2.data import transforms as T

from d2ft.errors import UserError

ALBUMENTATIONS = "albumentations"

# Those that move points, and so boxes and polygons, as they move masks. Others of albumentations'
# DualTransform move boxes by what they find in a mask, or need labels to be drawn.
SPATIAL_TRANSFORMS = (
    "Affine",
    "CenterCrop",
    "Crop",
    "CropAndPad",
    "D4",
    "HorizontalFlip",
    "LongestMaxSize",
    "Pad",
    "PadIfNeeded",
    "Perspective",
    "RandomCrop",
    "RandomCropFromBorders",
    "RandomResizedCrop",
    "RandomRotate90",
    "RandomScale",
    "RandomSizedCrop",
    "Resize",
    "Rotate",
    "SafeRotate",
    "ShiftScaleRotate",
    "SmallestMaxSize",
    "SquareSymmetry",
    "Transpose",
    "VerticalFlip",
)


class AlbumentationsTransform(T.Transform):
    """
    One drawing of an albumentations transform, for images, coordinates and masks alike.

    Args:
        transform: the transform, of a kind that :func:`build_albumentations` accepts.
        image: (H, W, 3) uint8 that it is drawn for.
        in_rgb: the channels are in RGB order, else in BGR.
    """

    def __init__(self, transform: Any, image: np.ndarray, *, in_rgb: bool) -> None:
        super().__init__()
        self._transform = transform
        self._order = 1 if in_rgb else -1
        self._source = image
        self._result = self._in_order(transform(image=self._in_order(image))["image"])
        # Empty where the transform's own probability left it out.
        self._params = dict(transform.params)
        self._is_spatial = bool(self._params) and hasattr(transform, "apply_to_bboxes")

    def _in_order(self, image: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(image[:, :, :: self._order])

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        """Transform an image; the one that this was drawn for has been already."""
        if img is self._source:
            return self._result
        if not self._params:
            return img
        return self._in_order(self._transform.apply(self._in_order(img), **self._params))

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        """Transform (N, 2) points x, y in pixels, where a pixel at column x spans x to x + 1."""
        if not self._is_spatial or not len(coords):
            return coords
        # As boxes without extent: albumentations counts those from the edges of pixels, as
        # Detectron2 does, but keypoints from their centres in some transforms only.
        height, width = self._source.shape[:2]
        boxes = np.tile(np.asarray(coords, np.float64) / (width, height), 2)
        moved = self._transform.apply_to_bboxes(boxes, **self._params)[:, :2]
        height, width = self._result.shape[:2]
        return np.asarray(moved * (width, height), dtype=np.asarray(coords).dtype)

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        """Transform a mask (H, W)."""
        if not self._is_spatial:
            return segmentation
        return self._transform.apply_to_mask(np.ascontiguousarray(segmentation), **self._params)

    def apply_polygons(self, polygons: list[np.ndarray]) -> list[np.ndarray]:
        """Transform polygons, each (N, 2), and cut off what leaves the image; needs shapely."""
        if not self._is_spatial:
            return polygons
        height, width = self._result.shape[:2]
        moved = [self.apply_coords(polygon) for polygon in polygons]
        return T.CropTransform(0, 0, width, height).apply_polygons(moved)


class _Albumentations(T.Augmentation):
    def __init__(self, transform: Any, *, in_rgb: bool) -> None:
        self.transform = transform
        self.in_rgb = in_rgb

    def get_transform(self, image: np.ndarray) -> AlbumentationsTransform:
        self.transform.set_random_seed(int(np.random.randint(2**31)))
        return AlbumentationsTransform(self.transform, image, in_rgb=self.in_rgb)

    def __repr__(self) -> str:
        return f"{ALBUMENTATIONS}.{self.transform!r}"


def find_albumentations(name: str, where: str) -> type:
    """
    Return the class that ``albumentations.<name>`` means.

    Args:
        name: with the prefix.
        where: the config key, for messages.

    Raises:
        UserError: if albumentations is not installed, or has no such transform that moves boxes
            and masks together or leaves both alone.
    """
    try:
        import albumentations
    except ImportError as error:
        raise UserError(
            f"{where}: {name} needs albumentations, which cannot be imported ({error}); install it "
            "with: python -m pip install albumentations==2.0.8"
        ) from error
    known = {
        key: cls
        for key, cls in vars(albumentations).items()
        if inspect.isclass(cls)
        and (issubclass(cls, albumentations.ImageOnlyTransform) or key in SPATIAL_TRANSFORMS)
    }
    short = name.removeprefix(f"{ALBUMENTATIONS}.")
    if short not in known:
        near = difflib.get_close_matches(short, known, n=1, cutoff=0.4)
        hint = f"; did you mean {ALBUMENTATIONS}.{near[0]}?" if near else ""
        raise UserError(
            f"{where}: albumentations has no transform {short!r}, or none that moves boxes as it "
            f"moves the image{hint}"
        )
    return known[short]


def build_albumentations(
    cls: Any, arguments: dict[str, Any], where: str, *, in_rgb: bool
) -> T.Augmentation:
    """
    Build a transform of :func:`find_albumentations`.

    Raises:
        UserError: if it needs more than an image to be drawn.
    """
    transform = cls(**arguments)
    needed = sorted(set(transform.targets_as_params) - {"image"})
    if needed:
        raise UserError(f"{where} needs {', '.join(needed)} beside the image, which is not given")
    return _Albumentations(transform, in_rgb=in_rgb)
