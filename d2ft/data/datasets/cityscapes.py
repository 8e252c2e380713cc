"""
Cityscapes instances with their official masks.

Source format: Cityscapes' own folders, ``leftImg8bit/<split>/<city>/*_leftImg8bit.png`` and
``gtFine/<split>/<city>/*_gtFine_instanceIds.png``. The instance image is what the official
evaluation compares with; masks made from ``polygons.json`` lose pixels against it.
"""

import functools
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
from detectron2.structures import BoxMode
from filelock import FileLock
from PIL import Image
from tqdm import tqdm

from d2ft.data.cache import cache_dir, cached_records
from d2ft.data.catalog import register_instances
from d2ft.errors import UserError
from d2ft.files import atomic_write, fingerprint
from d2ft.host import cityscapesscripts_bridge
from d2ft.labels import CITYSCAPES_INSTANCE_CLASSES, CITYSCAPES_INSTANCE_LABELS

logger = logging.getLogger(__name__)

_IMAGE_SUFFIX = "_leftImg8bit.png"
_INSTANCE_SUFFIX = "_gtFine_instanceIds.png"
_POLYGONS_SUFFIX = "_gtFine_polygons.json"

# In instanceIds.png an instance is id * 1000 + number, a group of them is the id alone:
# https://github.com/mcordts/cityscapesScripts/blob/v2.3.0/cityscapesscripts/helpers/labels.py
_INSTANCES_PER_LABEL = 1000

_CATEGORY_OF_LABEL_ID = {
    label.id: category for category, label in enumerate(CITYSCAPES_INSTANCE_LABELS)
}

_PARSER_VERSION = 1


@dataclass(frozen=True)
class _Frame:
    name: str
    image: str
    instance_ids: str


def register_cityscapes_instances(
    name: str, image_dir: str | os.PathLike[str], gt_dir: str | os.PathLike[str]
) -> None:
    """
    Register one split of Cityscapes, evaluated by the official instance AP.

    Args:
        name: e.g. "cityscapes_instance_train".
        image_dir: e.g. ``cityscapes/leftImg8bit/train``.
        gt_dir: e.g. ``cityscapes/gtFine/train``.
    """
    image_dir, gt_dir = Path(image_dir).absolute(), Path(gt_dir).absolute()
    register_instances(
        name,
        functools.partial(load_cityscapes_instances, image_dir, gt_dir),
        thing_classes=CITYSCAPES_INSTANCE_CLASSES,
        evaluator_type="cityscapes_instance",
        image_dir=str(image_dir),
        gt_dir=str(gt_dir),
    )


def load_cityscapes_instances(
    image_dir: str | os.PathLike[str], gt_dir: str | os.PathLike[str]
) -> list[dict[str, Any]]:
    """
    Return the frames of a split as Detectron2 dataset dicts, in order of their names.

    Masks equal the official instances pixel by pixel. Groups (``cargroup``) are crowd; caravans
    and trailers, which no official metric counts, are left out; frames without any instance are
    kept. The result is cached on disk. Where ``instanceIds.png`` is missing, it is made from
    ``polygons.json`` by cityscapesscripts' own code, into the cache.

    Args:
        image_dir: a folder of city folders with ``*_leftImg8bit.png``.
        gt_dir: a folder of the same city folders with the labels.

    Returns:
        Dicts with ``file_name``, ``image_id`` (``<city>_<sequence>_<frame>``), ``height``,
        ``width``, ``instance_file_name`` (the instance image) and ``annotations``: ``bbox`` in
        XYXY_ABS around the mask's pixels (a pixel at column x spans x to x + 1), ``segmentation``
        as compressed RLE of the whole frame, ``category_id``, ``iscrowd``.

    Raises:
        UserError: if a folder is missing or has no frames, a frame has no labels, or a file is
            broken, is of another type or of another size than its counterpart.
    """
    # Absolute, so that a cached path means the same from every working directory.
    image_dir, gt_dir = Path(image_dir).absolute(), Path(gt_dir).absolute()
    frames = _find_frames(image_dir, gt_dir)
    return cached_records(
        f"cityscapes instances of {image_dir} with {gt_dir}",
        [file for frame in frames for file in (frame.image, frame.instance_ids)],
        lambda: _parse_frames(frames, f"Reading Cityscapes labels of {gt_dir}"),
        version=_PARSER_VERSION,
    )


def _find_frames(image_dir: Path, gt_dir: Path) -> list[_Frame]:
    for folder, content in ((image_dir, f"*{_IMAGE_SUFFIX}"), (gt_dir, f"*{_INSTANCE_SUFFIX}")):
        if not folder.is_dir():
            raise UserError(
                f"the Cityscapes folder {folder} does not exist; it should hold a folder per city "
                f"with {content}. Built-in names look under $DETECTRON2_DATASETS/cityscapes, and "
                f"DETECTRON2_DATASETS is {os.environ.get('DETECTRON2_DATASETS', 'not set')}"
            )
    names = _list_images(image_dir)
    if not names:
        raise UserError(f"no image {image_dir}/<city>/*{_IMAGE_SUFFIX} was found")
    without_labels, to_derive = [], []
    instance_ids: dict[str, str] = {}
    for name in names:
        # Plain strings: every start comes through here, and paths as objects take 10 times as long.
        official = f"{gt_dir}/{name}{_INSTANCE_SUFFIX}"
        polygons = f"{gt_dir}/{name}{_POLYGONS_SUFFIX}"
        instance_ids[name] = official
        if os.path.isfile(official):
            continue
        if os.path.isfile(polygons):
            image = Path(f"{image_dir}/{name}{_IMAGE_SUFFIX}")
            to_derive.append((name, (image, Path(polygons))))
        else:
            without_labels.append(official)
    if without_labels:
        raise UserError(
            f"{len(without_labels)} of {len(names)} frames of {image_dir} have no labels: neither "
            f"{without_labels[0]} nor its {_POLYGONS_SUFFIX} exists"
        )
    if to_derive:
        derived = _derive_instance_ids([pair for _, pair in to_derive])
        instance_ids.update(zip((name for name, _ in to_derive), map(str, derived), strict=True))
    return [
        _Frame(os.path.basename(name), f"{image_dir}/{name}{_IMAGE_SUFFIX}", instance_ids[name])
        for name in names
    ]


def _list_images(image_dir: Path) -> list[str]:
    """Return ``<city>/<name>`` of each image without its suffix, in order."""
    return [
        f"{city.name}/{file.removesuffix(_IMAGE_SUFFIX)}"
        for city in sorted(image_dir.iterdir())
        if city.is_dir()
        for file in sorted(os.listdir(city))
        if file.endswith(_IMAGE_SUFFIX)
    ]


def _derive_instance_ids(pairs: Sequence[tuple[Path, Path]]) -> list[Path]:
    """
    Return instance images in the cache, drawn by cityscapesscripts where not there yet.

    Args:
        pairs: image and polygons of each frame.
    """
    folder = cache_dir() / "cityscapes_instance_ids"
    folder.mkdir(exist_ok=True)
    targets = {
        polygons: folder / f"{fingerprint([polygons])[:20]}{_INSTANCE_SUFFIX}"
        for _, polygons in pairs
    }
    if all(target.is_file() for target in targets.values()):
        return list(targets.values())
    with FileLock(folder / "lock"):  # of several processes one draws
        missing = [
            (image, polygons) for image, polygons in pairs if not targets[polygons].is_file()
        ]
        logger.info("%d frames have polygons but no instance image: drawing them", len(missing))
        for image, polygons in tqdm(
            missing, desc="Drawing instanceIds", unit="frame", disable=None
        ):
            ids = _draw_instance_ids(image, polygons)
            with atomic_write(targets[polygons], "wb") as file:
                Image.fromarray(ids).save(file, format="PNG")
    return list(targets.values())


def _draw_instance_ids(image: Path, polygons: Path) -> "np.ndarray[Any, np.dtype[np.uint16]]":
    from cityscapesscripts.helpers.annotation import Annotation
    from cityscapesscripts.preparation.json2instanceImg import createInstanceImage

    annotation = Annotation()
    try:
        with cityscapesscripts_bridge():
            annotation.fromJsonFile(str(polygons))
            size, expected = (annotation.imgWidth, annotation.imgHeight), _check_image(str(image))
            # Before a picture of that size is made.
            if size != expected:
                raise UserError(
                    f"{polygons} is for {size[0]}x{size[1]} pixels, but its image {image} has "
                    f"{expected[0]}x{expected[1]}"
                )
            drawn = createInstanceImage(annotation, "ids")
    except UserError:
        raise
    # printError of cityscapesscripts, for a label it does not know, exits the process.
    except (
        ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError, SystemExit,
    ) as error:  # fmt: skip
        raise UserError(f"cannot draw the instances of {polygons}: {error!r}") from error
    return np.asarray(drawn).astype(np.uint16)


def _parse_frames(frames: Sequence[_Frame], description: str) -> list[dict[str, Any]]:
    # Decoding PNG releases the GIL, so threads are enough and need no pickling.
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        done = pool.map(_parse_frame, frames)
        return list(tqdm(done, total=len(frames), desc=description, unit="frame", disable=None))


def _parse_frame(frame: _Frame) -> dict[str, Any]:
    width, height = _check_image(frame.image)
    ids = _read_instance_ids(frame.instance_ids)
    if ids.shape != (height, width):
        raise UserError(
            f"{frame.instance_ids} has {ids.shape[1]}x{ids.shape[0]} pixels, but its image "
            f"{frame.image} has {width}x{height}"
        )
    return {
        "file_name": frame.image,
        "image_id": frame.name,
        "height": height,
        "width": width,
        "instance_file_name": frame.instance_ids,
        "annotations": _annotations(ids),
    }


def _check_image(path: str) -> tuple[int, int]:
    """Return (width, height) of a PNG after checking every chunk's checksum, not the pixels."""
    try:
        with Image.open(path) as image:
            size = image.size
            image.verify()
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"the image {path} is broken: {error}") from error
    return size


def _read_instance_ids(path: str) -> "np.ndarray[Any, Any]":
    try:
        with Image.open(path) as image:
            ids = np.asarray(image)
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"the instance image {path} is broken: {error}") from error
    if ids.ndim != 2 or ids.dtype.kind not in "iu":
        raise UserError(
            f"{path} is not an instance image: expected one channel of 16-bit ids, got shape "
            f"{ids.shape} of {ids.dtype}"
        )
    return ids


def _annotations(ids: "np.ndarray[Any, Any]") -> list[dict[str, Any]]:
    # Columns first, as COCO's run lengths are ordered: masks are then contiguous for the encoder.
    columns = np.ascontiguousarray(ids.T)
    annotations = []
    for value in np.flatnonzero(np.bincount(columns.ravel())):
        is_group = value < _INSTANCES_PER_LABEL
        label_id = value if is_group else value // _INSTANCES_PER_LABEL
        category = _CATEGORY_OF_LABEL_ID.get(int(label_id))
        if category is None:
            continue
        mask = columns == value
        rle = mask_util.encode(mask.view(np.uint8).T)
        x, y, width, height = (float(v) for v in mask_util.toBbox(rle))
        annotations.append(
            {
                "bbox": [x, y, x + width, y + height],
                "bbox_mode": BoxMode.XYXY_ABS,
                "segmentation": {"size": rle["size"], "counts": rle["counts"].decode("ascii")},
                "category_id": category,
                "iscrowd": int(is_group),
            }
        )
    return annotations
