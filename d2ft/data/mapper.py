"""Turn dataset dicts into training and test samples, with errors that name the image."""

from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.data.detection_utils import SizeMismatchError
from detectron2.utils.file_io import PathManager
from PIL import ExifTags, Image

from d2ft.data.augmentation import build_augmentations, changes_extent
from d2ft.data.bad_images import BadImageError
from d2ft.errors import UserError

# Pillow's modes of more than 8 bits a channel: https://pillow.readthedocs.io/en/stable/handbook/
# concepts.html#modes. Converting them to RGB cuts every value above 255 off.
_DEEP_MODES = ("I", "F")

_TURNED = (5, 6, 7, 8)  # EXIF orientations that exchange width and height

# What Pillow raises for a file that is no image or breaks off.
_READ_ERRORS = (OSError, SyntaxError, Image.DecompressionBombError)


class FinetuneDatasetMapper(DatasetMapper):
    """
    Same as :class:`DatasetMapper`, but INPUT.AUGMENTATIONS replaces Detectron2's, where set.

    A bad image is an error that names the file. As in Detectron2, grey, palette, CMYK and
    transparent images become INPUT.FORMAT and EXIF rotation is applied.
    """

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        """Return Detectron2's arguments with the augmentations of the config."""
        arguments: dict[str, Any] = super().from_config(cfg, is_train)
        if is_train and cfg.INPUT.AUGMENTATIONS:
            augmentations = build_augmentations(cfg.INPUT.AUGMENTATIONS, cfg.INPUT.FORMAT)
            arguments["augmentations"] = augmentations
            # As Detectron2 does for its crop: a box cut off is not tight around what is left.
            arguments["recompute_boxes"] = cfg.MODEL.MASK_ON and any(
                map(changes_extent, augmentations)
            )
        return arguments

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """
        Return the sample.

        Raises:
            BadImageError: if the image cannot be read, is not of the annotated size, or has more
                than 8 bits in a single channel.
            UserError: if a polygon is to be cropped and shapely is not installed.
        """
        name = dataset_dict["file_name"]
        try:
            with PathManager.open(name, "rb") as file, Image.open(file) as image:
                mode = image.mode
            if mode.startswith(_DEEP_MODES):
                raise BadImageError(
                    f"{name} has more than 8 bits a pixel (Pillow's mode {mode}), which reading as "
                    f"{self.image_format} would cut off at 255: scale it to 8 bits"
                )
            return super().__call__(dataset_dict)
        except SizeMismatchError as error:
            raise BadImageError(_describe_mismatch(dataset_dict)) from error
        except _READ_ERRORS as error:
            raise BadImageError(f"the image {name} cannot be read: {error}") from error
        except ModuleNotFoundError as error:
            if error.name != "shapely":
                raise
            raise UserError(
                f"{name}: cropping polygons needs the package shapely, which is not installed: "
                "python -m pip install shapely"
            ) from error


def _describe_mismatch(dataset_dict: dict[str, Any]) -> str:
    name = dataset_dict["file_name"]
    with Image.open(PathManager.get_local_path(name)) as image:
        width, height = image.size
        turned = image.getexif().get(ExifTags.Base.Orientation) in _TURNED
    annotated = (dataset_dict["width"], dataset_dict["height"])
    as_shown = (height, width) if turned else (width, height)
    message = (
        f"{name} has {as_shown[0]}x{as_shown[1]} pixels, annotated {annotated[0]}x{annotated[1]}"
    )
    if turned and annotated == (width, height):
        return (
            f"{message}: it is stored so and turned by its EXIF orientation, which the annotations "
            "leave out; save it without EXIF, so that it is shown as it was annotated"
        )
    return f"{message}; annotate it anew, or put the image back that was annotated"
