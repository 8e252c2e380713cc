"""
Instances in COCO's JSON format: https://cocodataset.org/#format-data.

Detectron2's loader leaves out what it cannot use, or stops with an assertion that does not say
where; this one returns the same dicts for a sound file and names what is wrong with another.
"""

import functools
import json
import logging
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from detectron2.structures import BoxMode

from d2ft.data.cache import list_once, open_cached, warn_once
from d2ft.data.catalog import add_metadata, register_instances
from d2ft.data.record_store import StoredRecords
from d2ft.errors import UserError
from d2ft.rle import check_rle

logger = logging.getLogger(__name__)

Json = dict[str, Any]

# Raise it when the records change, so that older caches are parsed again.
_PARSER_VERSION = 1


def register_coco_instances(
    name: str,
    json_file: str | os.PathLike[str],
    image_root: str | os.PathLike[str],
    thing_classes: Sequence[str] | None = None,
) -> None:
    """
    Register a dataset in COCO's format; nothing is read before it is used.

    Args:
        name: goes into DATASETS.TRAIN or DATASETS.TEST.
        json_file: images, annotations and categories.
        image_root: the folder that ``file_name`` of the images is relative to.
        thing_classes: names of the categories in the order of their ids. None: whoever asks for
            the classes first reads the whole file. Given, they are compared with the file's.
    """
    json_file, image_root = Path(json_file).absolute(), Path(image_root).absolute()
    open_index = functools.partial(_open_with_classes, name, json_file, image_root, thing_classes)
    register_instances(
        name,
        functools.partial(_load_with_classes, open_index),
        open_index=open_index,
        thing_classes=thing_classes,
        evaluator_type="coco",
        json_file=str(json_file),
        image_root=str(image_root),
    )


def load_coco_instances(
    json_file: str | os.PathLike[str], image_root: str | os.PathLike[str]
) -> list[Json]:
    """
    Return the images as Detectron2 dataset dicts in order of their ids, also those without objects.

    The result is cached on disk.

    Args:
        json_file: images, annotations and categories.
        image_root: the folder that ``file_name`` of the images is relative to.

    Returns:
        Dicts with ``file_name``, ``image_id``, ``height``, ``width`` (pixels) and ``annotations``
        in the order of the file: ``bbox`` in XYWH_ABS, ``category_id`` (position among the
        category ids, from 0), and where the file has them ``iscrowd``, ``segmentation`` (polygons
        or compressed RLE) and ``keypoints``. As in Detectron2, 0.5 is added to x and y of
        keypoints, which count pixels where polygons are coordinates.

    Raises:
        UserError: if the file cannot be read, ids or names come twice, or an annotation belongs to
            no image or category or has a box, polygon, RLE or keypoints that mean nothing.
    """
    json_file, image_root = Path(json_file).absolute(), Path(image_root).absolute()
    return list_once(_open(json_file, image_root))


def _load_with_classes(open_index: Callable[[], StoredRecords]) -> list[Json]:
    return list_once(open_index())


def _open_with_classes(
    name: str, json_file: Path, image_root: Path, thing_classes: Sequence[str] | None
) -> StoredRecords:
    stored = _open(json_file, image_root)
    # JSON has no numbers for keys.
    categories: list[tuple[int, str]] = stored.about["facts"]["categories"]
    classes = [category for _, category in categories]
    # Also the order has to be that of the ids: COCO's evaluation numbers classes by it.
    if thing_classes is not None and list(thing_classes) != classes:
        raise UserError(
            f"dataset {name!r} was registered with the classes {', '.join(thing_classes)}, but "
            f"the categories of {json_file}, in the order of their ids, are {', '.join(classes)}"
        )
    ids = {category_id: index for index, (category_id, _) in enumerate(categories)}
    add_metadata(name, thing_classes=classes, thing_dataset_id_to_contiguous_id=ids)
    return stored


def _open(json_file: Path, image_root: Path) -> StoredRecords:
    if not json_file.is_file():
        raise UserError(f"the annotations {json_file} cannot be read: there is no such file")
    if not image_root.is_dir():
        raise UserError(f"the folder {image_root} with the images of {json_file} does not exist")
    stored = open_cached(
        f"COCO instances of {json_file}, images {image_root}",
        [json_file],
        lambda: _parse(json_file, image_root),
        version=_PARSER_VERSION,
    )
    if stored.about["facts"]["has_annotation_0"]:
        warn_once(
            logger,
            "%s: an annotation has the id 0, which pycocotools takes for no match, so that a "
            "detection of this object counts as false; start the ids at 1",
            json_file,
        )
    return stored


def _parse(json_file: Path, image_root: Path) -> tuple[list[Json], Json]:
    content = _read(json_file)
    names = _category_names(content, json_file)
    records = _records(content, json_file, image_root, names)
    has_annotation_0 = any(annotation["id"] == 0 for annotation in content["annotations"])
    return records, {"categories": list(names.items()), "has_annotation_0": has_annotation_0}


def _read(json_file: Path) -> dict[str, list[Json]]:
    try:
        content = json.loads(json_file.read_bytes())
    except OSError as error:
        raise UserError(f"the annotations {json_file} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{json_file} is not JSON: {error}") from error
    for key in ("images", "annotations", "categories"):
        rows = content.get(key) if isinstance(content, dict) else None
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise UserError(
                f"{json_file} has no list of {key}; COCO's format is an object with the lists "
                "images, annotations and categories"
            )
    return content


def _category_names(content: dict[str, list[Json]], json_file: Path) -> dict[int, str]:
    """Return id -> name in order of the ids, which may have gaps and start anywhere."""
    categories = _by_id(content["categories"], "category", json_file)
    if not categories:
        raise UserError(f"{json_file} has no category")
    ids_of: dict[str, int] = {}
    for category_id, category in categories.items():
        name = category.get("name")
        if not isinstance(name, str) or not name:
            raise UserError(f"{json_file}: category {category_id} has no name")
        if name in ids_of:
            raise UserError(
                f"{json_file}: the categories {ids_of[name]} and {category_id} are both named "
                f"{name!r}. Rename one, or remove one and give its annotations the id of the other"
            )
        ids_of[name] = category_id
    return {category_id: name for name, category_id in ids_of.items()}


def _by_id(rows: list[Json], kind: str, json_file: Path) -> dict[int, Json]:
    """Return id -> row in order of the ids."""
    found: dict[int, Json] = {}
    for number, row in enumerate(rows, start=1):
        row_id = row.get("id")
        if type(row_id) is not int:
            raise UserError(
                f"{json_file}: {kind} number {number} has the id {row_id!r}; ids are whole numbers"
            )
        if row_id in found:
            raise UserError(f"{json_file}: the {kind} id {row_id} comes twice; ids are unique")
        found[row_id] = row
    return dict(sorted(found.items()))


def _records(
    content: dict[str, list[Json]], json_file: Path, image_root: Path, names: dict[int, str]
) -> list[Json]:
    records = {
        image_id: _record(image, image_id, json_file, image_root)
        for image_id, image in _by_id(content["images"], "image", json_file).items()
    }
    index = {category_id: position for position, category_id in enumerate(names)}
    annotations = _by_id(content["annotations"], "annotation", json_file)
    for annotation in content["annotations"]:
        try:
            record = _lookup(records, annotation.get("image_id"), "image")
            category = _lookup(index, annotation.get("category_id"), "category")
            instance = _instance(annotation, category, (record["height"], record["width"]))
        except ValueError as error:
            raise UserError(f"{json_file}: annotation {annotation['id']} {error}") from error
        record["annotations"].append(instance)
    logger.info("%s: %d images, %d annotations", json_file, len(records), len(annotations))
    return list(records.values())


def _record(image: Json, image_id: int, json_file: Path, image_root: Path) -> Json:
    name, height, width = (image.get(key) for key in ("file_name", "height", "width"))
    if not isinstance(name, str) or not name:
        raise UserError(f"{json_file}: image {image_id} has no file_name")
    if type(height) is not int or type(width) is not int or min(height, width) < 1:
        raise UserError(
            f"{json_file}: image {image_id} has height {height!r} and width {width!r}; both are "
            "whole numbers of pixels"
        )
    return {
        "file_name": os.path.join(image_root, name),
        "height": height,
        "width": width,
        "image_id": image_id,
        "annotations": [],
    }


def _lookup(known: dict[int, Any], key: Any, kind: str) -> Any:
    if type(key) is not int or key not in known:
        raise ValueError(f"has the {kind}_id {key!r}, but the file has no such {kind}")
    return known[key]


def _instance(annotation: Json, category: int, size: tuple[int, int]) -> Json:
    """Return the annotation as Detectron2 has it, or raise ValueError with the rest of a sentence."""
    box = annotation.get("bbox")
    if not _are_numbers(box) or len(box) != 4 or min(box[2:]) < 0:
        raise ValueError(
            f"has the bbox {box!r}; a box is x, y, width, height, none of them negative"
        )
    if annotation.get("ignore", 0) != 0:
        raise ValueError("is marked 'ignore', which COCO's format does not have; use 'iscrowd'")
    instance: Json = {"bbox": box, "bbox_mode": BoxMode.XYWH_ABS, "category_id": category}
    if "iscrowd" in annotation:
        if annotation["iscrowd"] not in (0, 1):
            raise ValueError(f"has iscrowd {annotation['iscrowd']!r}; it is 0 or 1")
        instance["iscrowd"] = annotation["iscrowd"]
    segmentation = annotation.get("segmentation")
    if isinstance(segmentation, dict) and segmentation:
        instance["segmentation"] = check_rle(segmentation, size)
    elif isinstance(segmentation, list) and segmentation:
        _check_polygons(segmentation)
        instance["segmentation"] = segmentation
    elif segmentation:
        raise ValueError("has a segmentation that is neither a list of polygons nor an RLE")
    if "keypoints" in annotation:
        instance["keypoints"] = _keypoints(annotation["keypoints"])
    return instance


def _check_polygons(polygons: list[Any]) -> None:
    for number, polygon in enumerate(polygons, start=1):
        if not _are_numbers(polygon):
            raise ValueError(f"has a polygon, number {number}, that is no list of finite numbers")
        if len(polygon) < 6 or len(polygon) % 2:
            raise ValueError(
                f"has a polygon, number {number}, of {len(polygon)} numbers; x and y of at least "
                "3 points are an even number of them, 6 or more. Remove it, or leave segmentation "
                "empty to keep the box alone"
            )


def _keypoints(values: Any) -> list[float]:
    if not _are_numbers(values) or len(values) % 3:
        raise ValueError("has keypoints that are not x, y and visibility of each point")
    return [value if i % 3 == 2 else value + 0.5 for i, value in enumerate(values)]


def _are_numbers(values: Any) -> TypeGuard[list[float]]:
    # By built-in functions alone, as COCO has 40 million numbers.
    try:
        return (
            isinstance(values, list)
            and set(map(type, values)) <= {int, float}
            and all(map(math.isfinite, values))
        )
    except OverflowError:  # a whole number that no float can be
        return False
