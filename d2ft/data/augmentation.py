"""
Augmentations declared in YAML: INPUT.AUGMENTATIONS, by the names of Detectron2's own classes.

    INPUT:
      AUGMENTATIONS:  # large-scale jitter, https://arxiv.org/abs/2012.07177
        - ["ResizeScale", {min_scale: 0.1, max_scale: 2.0, target_height: 1024, target_width: 1024}]
        - ["FixedSizeCrop", {crop_size: [1024, 1024], pad: False}]
        - "RandomFlip"

They are applied in this order, to the image, its boxes, masks and keypoints alike.
"""

import difflib
import inspect
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import transforms as T

from d2ft.config import get_value, who_set
from d2ft.data.albumentations_bridge import (
    ALBUMENTATIONS,
    build_albumentations,
    find_albumentations,
)
from d2ft.errors import UserError

logger = logging.getLogger(__name__)

# Those that a YAML value cannot describe, or that need labels which d2ft's mapper does not give.
_LEFT_OUT = (
    "Augmentation",
    "AugmentationList",
    "RandomApply",
    "RandomCrop_CategoryAreaConstraint",
    "MinIoURandomCrop",
)

# These weigh the channels as red, green and blue in this order.
_FOR_RGB = (T.RandomSaturation, T.RandomLighting)

_KEEP_EXTENT = (
    T.RandomFlip,
    T.Resize,
    T.ResizeShortestEdge,
    T.ResizeScale,
    T.RandomResize,
    T.RandomBrightness,
    T.RandomContrast,
)


# Keys of Detectron2 that only its own list of augmentations reads.
_REPLACED = (
    "INPUT.MIN_SIZE_TRAIN",
    "INPUT.MIN_SIZE_TRAIN_SAMPLING",
    "INPUT.MAX_SIZE_TRAIN",
    "INPUT.RANDOM_FLIP",
)


class _OnRGB(T.Augmentation):
    """An augmentation of colours that takes its image as RGB, on images in BGR order."""

    def __init__(self, aug: T.Augmentation) -> None:
        self.aug = aug

    def get_transform(self, image: np.ndarray) -> T.BlendTransform:
        blend = self.aug.get_transform(image[:, :, ::-1])
        blend.src_image = blend.src_image[..., ::-1]
        return blend


def build_augmentations(entries: Sequence[Any], image_format: str) -> list[T.Augmentation]:
    """
    Build what INPUT.AUGMENTATIONS lists.

    Args:
        entries: each a name, or [name, {argument: value}]; see :func:`augmentation_names`.
        image_format: INPUT.FORMAT; colours are augmented in RGB and BGR images.

    Raises:
        UserError: for an unknown name or argument, a missing one, a value that the class refuses,
            or albumentations not being installed.
    """
    return [
        _build(entry, f"INPUT.AUGMENTATIONS[{index}]", image_format)
        for index, entry in enumerate(entries)
    ]


def check_augmentations(cfg: CfgNode) -> None:
    """
    Build the augmentations of a config once, and say which keys they replace.

    Raises:
        UserError: as :func:`build_augmentations`, or if INPUT.CROP asks for a crop as well.
    """
    if not cfg.INPUT.AUGMENTATIONS:
        return
    build_augmentations(cfg.INPUT.AUGMENTATIONS, cfg.INPUT.FORMAT)
    if cfg.INPUT.CROP.ENABLED:
        raise UserError(
            f"INPUT.CROP.ENABLED ({who_set(cfg, 'INPUT.CROP.ENABLED')}) has no effect beside "
            f"INPUT.AUGMENTATIONS ({who_set(cfg, 'INPUT.AUGMENTATIONS')}): add "
            f'["RandomCrop", {{crop_type: {cfg.INPUT.CROP.TYPE}, crop_size: '
            f"{list(cfg.INPUT.CROP.SIZE)}}}] to them, and set it to False"
        )
    replaced = [key for key in _REPLACED if who_set(cfg, key) != "default"]
    if replaced:
        described = ", ".join(f"{key} {get_value(cfg, key)}" for key in replaced)
        logger.info("INPUT.AUGMENTATIONS takes the place of %s", described)


def augmentation_names() -> list[str]:
    """Return the names of Detectron2's augmentations that YAML may use."""
    return sorted(
        name
        for name, cls in vars(T).items()
        if inspect.isclass(cls) and issubclass(cls, T.Augmentation) and name not in _LEFT_OUT
    )


def changes_extent(augmentation: T.Augmentation) -> bool:
    """Tell whether an augmentation may cut objects off or turn them, so that boxes are not tight."""
    if isinstance(augmentation, _OnRGB):
        return False
    return not isinstance(augmentation, _KEEP_EXTENT)


def _build(entry: Any, where: str, image_format: str) -> T.Augmentation:
    name, arguments = _take_apart(entry, where)
    if name.startswith(f"{ALBUMENTATIONS}."):
        if image_format not in ("RGB", "BGR"):
            raise UserError(f"{where}: albumentations needs INPUT.FORMAT RGB or BGR")
        transform = find_albumentations(name, where)
        _check_arguments(transform, arguments, f"{where} {name}")
        return _construct(
            lambda **given: build_albumentations(
                transform, given, f"{where} {name}", in_rgb=image_format == "RGB"
            ),
            arguments,
            f"{where} {name}",
        )
    names = augmentation_names()
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(
            f"{where}: there is no augmentation {name!r}; {hint}Known are {', '.join(names)}, and "
            f"those of albumentations as {ALBUMENTATIONS}.<name>"
        )
    cls = getattr(T, name)
    _check_arguments(cls, arguments, f"{where} {name}")
    built = _construct(cls, arguments, f"{where} {name}")
    if not isinstance(built, _FOR_RGB):
        return built
    if image_format not in ("RGB", "BGR"):
        raise UserError(f"{where}: {name} needs INPUT.FORMAT RGB or BGR, not {image_format}")
    return _OnRGB(built) if image_format == "BGR" else built


def _take_apart(entry: Any, where: str) -> tuple[str, dict[str, Any]]:
    if isinstance(entry, str):
        return entry, {}
    if (
        isinstance(entry, (list, tuple))
        and len(entry) == 2
        and isinstance(entry[0], str)
        and isinstance(entry[1], dict)
    ):
        return entry[0], entry[1]
    raise UserError(
        f"{where} is {entry!r}; it must be a name, or a list of a name and its arguments such as "
        '["RandomFlip", {prob: 0.5}]'
    )


def _check_arguments(function: Any, arguments: dict[str, Any], where: str) -> None:
    """
    Compare arguments with a class's or function's signature.

    Raises:
        UserError: naming the argument that is unknown, with the nearest, or missing.
    """
    parameters = inspect.signature(function).parameters
    for name in arguments:
        if name not in parameters:
            near = difflib.get_close_matches(str(name), parameters, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]}? " if near else ""
            raise UserError(
                f"{where} has no argument {name!r}; {hint}It takes {', '.join(parameters) or 'none'}"
            )
    missing = [
        name
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty and name not in arguments
    ]
    if missing:
        raise UserError(f"{where} needs {', '.join(missing)}")


def _construct(cls: Any, arguments: dict[str, Any], where: str) -> Any:
    try:
        return cls(**arguments)
    except UserError:
        raise
    except (AssertionError, TypeError, ValueError) as error:
        raise UserError(f"{where} refuses {arguments}: {error}") from error
