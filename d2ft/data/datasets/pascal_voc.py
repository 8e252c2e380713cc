"""
Boxes, and where there are any masks, in the format of Pascal VOC.

Source format: a folder with ``Annotations/<id>.xml``, ``JPEGImages/<id>.jpg``,
``ImageSets/Main/<split>.txt`` (an id per line) and, for some images, ``SegmentationObject/<id>.png``:
http://host.robots.ox.ac.uk/pascal/VOC/voc2012/htmldoc/devkit_doc.html
"""

import difflib
import functools
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pycocotools.mask as mask_util
from detectron2.structures import BoxMode
from tqdm import tqdm

from d2ft.data.cache import cached_records, open_cached, warn_once
from d2ft.data.catalog import add_metadata, register_instances
from d2ft.data.datasets.voc_xml import (
    image_size,
    object_box,
    object_flag,
    object_text,
    read_masks,
    read_xml,
)
from d2ft.errors import UserError
from d2ft.labels import VOC_CLASSES

logger = logging.getLogger(__name__)

_T = TypeVar("_T")
_R = TypeVar("_R")

_PARSER_VERSION = 2
_EVALUATOR_TYPE = "pascal_voc"
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class _Sample:
    image_id: str
    image: Path
    xml: Path
    masks: Path | None  # None: of this split boxes only


def register_voc_instances(
    name: str,
    root: str | os.PathLike[str],
    split: str,
    thing_classes: Sequence[str] | None = VOC_CLASSES,
    *,
    year: int = 2012,
) -> None:
    """
    Register one split of a dataset in VOC's format; nothing is read before it is used.

    Args:
        name: e.g. "voc2007_trainval".
        root: folder of ``Annotations``, ``ImageSets`` and ``JPEGImages``.
        split: as in :func:`load_voc_instances`.
        thing_classes: class names in the order of ``category_id``. None: those of all XML files of
            ``root``, so that its splits agree, in alphabetical order.
        year: 2007 for VOC's AP at 11 recalls; with later years it is an area.
    """
    root = Path(root).absolute()
    if thing_classes is None:
        loader: Callable[[], list[dict[str, Any]]] = functools.partial(
            _load_with_classes, name, root, split
        )
    else:
        loader = functools.partial(load_voc_instances, root, split, tuple(thing_classes))
    register_instances(
        name,
        loader,
        thing_classes=thing_classes,
        evaluator_type=_EVALUATOR_TYPE,
        dirname=str(root),
        split=split,
        year=year,
    )


def _load_with_classes(name: str, root: Path, split: str) -> list[dict[str, Any]]:
    classes = _find_classes(root)
    add_metadata(name, thing_classes=classes)
    return load_voc_instances(root, split, classes)


def load_voc_instances(
    root: str | os.PathLike[str],
    split: str,
    thing_classes: Sequence[str] | None = VOC_CLASSES,
) -> list[dict[str, Any]]:
    """
    Return a split as Detectron2 dataset dicts, in the order of its list.

    VOC counts pixels from 1 and a box includes its last pixel, so 1 is taken from xmin and ymin,
    as in Detectron2. Objects whose xmin equals xmax or ymin equals ymax are left out, and counted
    in the log. If every image of the split has a SegmentationObject file, objects get their masks;
    else none gets one, which the log says. The mask of an object without pixels there is empty. The
    result is cached on disk.

    Args:
        root: folder of ``Annotations``, ``ImageSets`` and ``JPEGImages``.
        split: name of a list in ``ImageSets/Main``, or with its folder: "Segmentation/train".
        thing_classes: class names in the order of ``category_id``; None takes those of all XML
            files of ``root`` in alphabetical order.

    Returns:
        Dicts with ``file_name``, ``image_id``, ``height``, ``width`` (pixels; those of the image
        where the XML has none) and ``annotations``: ``bbox`` in XYXY_ABS, ``category_id``,
        ``iscrowd`` 0, ``difficult`` and ``truncated`` (0 or 1), and perhaps ``segmentation`` as
        compressed RLE. ``dropped_boxes`` is the number of objects that were left out.

    Raises:
        UserError: if a file is missing or broken, a class is not in ``thing_classes``, a box is
            not of finite numbers or has a negative size, or masks do not fit their image.
    """
    root = Path(root).absolute()
    if thing_classes is None:
        thing_classes = _find_classes(root)
    samples = _find_samples(root, split)
    list_file = _list_file(root, split)
    files = [file for s in samples for file in (s.xml, s.image, s.masks) if file is not None]
    records = cached_records(
        f"VOC instances of {list_file} with classes {', '.join(thing_classes)}",
        [list_file, *files],
        lambda: _parse_samples(samples, list_file, tuple(thing_classes)),
        version=_PARSER_VERSION,
    )
    dropped = sum(record["dropped_boxes"] for record in records)
    if dropped:
        warn_once(
            logger, "%s: left out %d objects whose box has no width or height", list_file, dropped
        )
    return records


def _list_file(root: Path, split: str) -> Path:
    return root / "ImageSets" / f"{split if '/' in split else f'Main/{split}'}.txt"


def _find_samples(root: Path, split: str) -> list[_Sample]:
    ids = _read_ids(_list_file(root, split))
    images: dict[str, Path] = {}
    # JPEG first where an image is there in several formats, as it is VOC's own.
    for file in sorted(_files(root / "JPEGImages"), key=lambda f: f.suffix.lower() != ".jpg"):
        if file.suffix.lower() in _IMAGE_SUFFIXES:
            images.setdefault(file.name.removesuffix(file.suffix), file)
    xmls = {file.stem: file for file in _files(root / "Annotations") if file.suffix == ".xml"}
    mask_dir = root / "SegmentationObject"
    masks = {file.stem: file for file in _files(mask_dir)} if mask_dir.is_dir() else {}
    for kind, found, place in (
        ("image", images, root / "JPEGImages"),
        ("XML file", xmls, root / "Annotations"),
    ):
        missing = [image_id for image_id in ids if image_id not in found]
        if missing:
            raise UserError(
                f"{len(missing)} of the {len(ids)} ids of {_list_file(root, split)} have no {kind} "
                f"in {place}, the first is {missing[0]!r}"
            )
    have_masks = sum(image_id in masks for image_id in ids)
    if 0 < have_masks < len(ids):
        logger.info(
            "%s: boxes only, as %d of %d images have no file in %s",
            _list_file(root, split),
            len(ids) - have_masks,
            len(ids),
            mask_dir,
        )
    use_masks = have_masks == len(ids)
    return [_Sample(i, images[i], xmls[i], masks[i] if use_masks else None) for i in ids]


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise UserError(
            f"the folder {folder} does not exist; a dataset in VOC's format has Annotations, "
            "ImageSets/Main and JPEGImages. Built-in names look under $DETECTRON2_DATASETS/VOC2007 "
            f"and VOC2012, and DETECTRON2_DATASETS is "
            f"{os.environ.get('DETECTRON2_DATASETS', 'not set')}"
        )
    return sorted(folder.iterdir())


def _read_ids(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        known = [file.stem for file in _files(path.parent) if file.suffix == ".txt"]
        near = difflib.get_close_matches(path.stem, known, n=3, cutoff=0.0)
        raise UserError(
            f"there is no list {path}; lists beside it: {', '.join(near) or 'none'}"
        ) from None
    except ValueError as error:
        raise UserError(f"the list {path} is not UTF-8 text: {error}") from error
    ids = [line.strip() for line in lines if line.strip()]
    if not ids:
        raise UserError(f"the list {path} names no image")
    if len(set(ids)) < len(ids):
        twice = next(image_id for image_id in ids if ids.count(image_id) > 1)
        raise UserError(f"the list {path} names the image {twice!r} twice")
    return ids


def _find_classes(root: Path) -> list[str]:
    xmls = [file for file in _files(root / "Annotations") if file.suffix == ".xml"]
    if not xmls:
        raise UserError(f"{root / 'Annotations'} has no XML file to take class names from")

    def parse() -> tuple[list[dict[str, Any]], dict[str, Any]]:
        found = _in_threads(_class_names_of, xmls, f"Finding the classes of {root}")
        return [], {"thing_classes": sorted(set().union(*found))}

    found = open_cached(f"VOC classes of {root}", xmls, parse, version=_PARSER_VERSION)
    names: list[str] = found.about["facts"]["thing_classes"]
    if not names:
        raise UserError(
            f"the XML files of {root / 'Annotations'} have no object to take a class from"
        )
    return names


def _class_names_of(xml: Path) -> set[str]:
    return {
        object_text(element, "name", f"{xml}, object {number}")
        for number, element in enumerate(read_xml(xml).findall("object"), start=1)
    }


def _in_threads(work: Callable[[_T], _R], items: Sequence[_T], description: str) -> Iterable[_R]:
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        done = pool.map(work, items)
        return list(tqdm(done, total=len(items), desc=description, unit="image", disable=None))


def _parse_samples(
    samples: Sequence[_Sample], list_file: Path, thing_classes: tuple[str, ...]
) -> list[dict[str, Any]]:
    index = {name: category for category, name in enumerate(thing_classes)}
    parse = functools.partial(_parse_sample, category_of=index)
    return list(_in_threads(parse, samples, f"Reading {list_file}"))


def _parse_sample(sample: _Sample, category_of: dict[str, int]) -> dict[str, Any]:
    tree = read_xml(sample.xml)
    width, height = image_size(tree, sample.xml, sample.image)
    objects = tree.findall("object")
    masks = None
    if sample.masks is not None:
        masks = read_masks(sample.masks, sample.xml, (height, width), len(objects))
    annotations, dropped = [], 0
    for number, element in enumerate(objects, start=1):
        where = f"{sample.xml}, object {number}"
        name = object_text(element, "name", where)
        if name not in category_of:
            near = difflib.get_close_matches(name, category_of, n=3, cutoff=0.4)
            raise UserError(
                f"{where} is of class {name!r}, which is not among the dataset's "
                f"{len(category_of)} classes; the nearest are {', '.join(near) or 'none'}. "
                "thing_classes=None takes the classes that the XML files have"
            )
        box = object_box(element, where)
        if box is None:
            dropped += 1
            continue
        annotation = {
            "bbox": box,
            "bbox_mode": BoxMode.XYXY_ABS,
            "category_id": category_of[name],
            "iscrowd": 0,
            "difficult": object_flag(element, "difficult", where),
            "truncated": object_flag(element, "truncated", where),
        }
        if masks is not None:
            rle = mask_util.encode(np.asfortranarray(masks == number, dtype=np.uint8))
            counts = rle["counts"].decode("ascii")
            annotation["segmentation"] = {"size": rle["size"], "counts": counts}
        annotations.append(annotation)
    return {
        "file_name": str(sample.image),
        "image_id": sample.image_id,
        "height": height,
        "width": width,
        "annotations": annotations,
        "dropped_boxes": dropped,
    }
