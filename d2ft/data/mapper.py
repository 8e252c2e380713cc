"""Turn dataset dicts into training and test samples, with errors that name the image."""

from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import DatasetMapper
from detectron2.data import detection_utils as detection
from detectron2.data import transforms as T
from detectron2.utils.file_io import PathManager
from PIL import ExifTags, Image

from d2ft.data.aug_input import FastAugInput, channels_first
from d2ft.data.augmentation import build_augmentations, changes_extent
from d2ft.data.bad_images import BadImageError
from d2ft.data.image_cache import ImageCache
from d2ft.data.mask_transforms import transform_segmentation
from d2ft.data.read_image import READ_ERRORS, read_image
from d2ft.errors import UserError
from d2ft.structures.window_masks import WindowMasks

_TURNED = (5, 6, 7, 8)  # EXIF orientations that exchange width and height


class FinetuneDatasetMapper(DatasetMapper):
    """
    Same as :class:`DatasetMapper`, but INPUT.AUGMENTATIONS replaces Detectron2's, where set.

    A bad image is an error that names the file. As in Detectron2, grey, palette, CMYK and
    transparent images become INPUT.FORMAT and EXIF rotation is applied.

    Samples are Detectron2's, in less time: bitmaps (INPUT.MASK_FORMAT) are :class:`WindowMasks`,
    PNG files are read by :func:`d2ft.data.read_image.read_image`.

    Args:
        is_train: for training.
        resize: "pil" or "torch", see :class:`FastAugInput`.
        image_cache: images that need not be read from their files.
        arguments: of :class:`DatasetMapper`.
    """

    @configurable
    def __init__(
        self,
        is_train: bool,
        *,
        resize: str = "pil",
        image_cache: ImageCache | None = None,
        **arguments: Any,
    ) -> None:
        super().__init__(is_train, **arguments)
        self._resize = resize
        self._image_cache = image_cache

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        """Return Detectron2's arguments with the augmentations of the config."""
        arguments: dict[str, Any] = super().from_config(cfg, is_train)
        if is_train:
            arguments["resize"] = cfg.INPUT.RESIZE_TRAIN
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
            UserError: if a mask cannot be used, or a polygon is to be cropped and shapely is not
                installed.
        """
        name = dataset_dict["file_name"]
        try:
            return self._map(dataset_dict)
        except detection.SizeMismatchError as error:
            raise BadImageError(_describe_mismatch(dataset_dict)) from error
        except READ_ERRORS as error:
            raise BadImageError(f"the image {name} cannot be read: {error}") from error
        except ModuleNotFoundError as error:
            if error.name != "shapely":
                raise
            raise UserError(
                f"{name}: cropping polygons needs the package shapely, which is not installed: "
                "python -m pip install shapely"
            ) from error

    def _map(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """Same as :meth:`DatasetMapper.__call__`, but it copies only what it will change."""
        sample = dict(dataset_dict)
        image = self._read_image(sample["file_name"])
        detection.check_image_size(sample, image)
        sem_seg = None
        if "sem_seg_file_name" in sample:
            sem_seg = detection.read_image(sample.pop("sem_seg_file_name"), "L").squeeze(2)
        inputs = FastAugInput(image, sem_seg=sem_seg, resize=self._resize)
        transforms = self.augmentations(inputs)
        image_size = inputs.image.shape[:2]
        sample["image"] = channels_first(inputs.image)
        if inputs.sem_seg is not None:
            sample["sem_seg"] = torch.as_tensor(inputs.sem_seg.astype("long"))
        if self.proposal_topk is not None:
            detection.transform_proposals(
                sample, image_size, transforms, proposal_topk=self.proposal_topk
            )
        annotations = sample.pop("annotations", None)
        if self.is_train and annotations is not None:
            sample["annotations"] = [dict(annotation) for annotation in annotations]
            self._transform_annotations(sample, transforms, image_size)
        return sample

    def _read_image(self, file_name: str) -> Any:
        image = self._image_cache.read(file_name) if self._image_cache is not None else None
        return read_image(file_name, self.image_format) if image is None else image

    def _transform_annotations(
        self, dataset_dict: dict[str, Any], transforms: T.TransformList, image_shape: Any
    ) -> None:
        if not self.use_instance_mask or self.instance_mask_format != "bitmask":
            super()._transform_annotations(dataset_dict, transforms, image_shape)
            return
        name, size = dataset_dict["file_name"], (dataset_dict["height"], dataset_dict["width"])
        annotations = [a for a in dataset_dict.pop("annotations") if not a.get("iscrowd", 0)]
        masks = [a.pop("segmentation") for a in annotations if "segmentation" in a]
        if masks and len(masks) < len(annotations):
            raise UserError(f"{name}: {len(masks)} of {len(annotations)} annotations have a mask")
        annotations = [
            detection.transform_instance_annotations(
                a, transforms, image_shape, keypoint_hflip_indices=self.keypoint_hflip_indices
            )
            for a in annotations
        ]
        instances = detection.annotations_to_instances(annotations, image_shape)
        if masks:
            try:
                windows = [transform_segmentation(m, transforms, size, image_shape) for m in masks]
            except ValueError as error:
                raise UserError(f"a mask of {name} {error}") from error
            instances.gt_masks = WindowMasks.from_windows(windows, image_shape)
        if self.recompute_boxes:
            instances.gt_boxes = instances.gt_masks.get_bounding_boxes()
        dataset_dict["instances"] = detection.filter_empty_instances(instances)


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
