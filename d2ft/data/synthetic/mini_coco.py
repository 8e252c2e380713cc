"""Write pictures of all 80 COCO classes in the layout of COCO's instance sets."""

import json
import os
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image
from pycocotools import mask as mask_utils

from d2ft.data.synthetic.arrangement import (
    SADDLES,
    Stage,
    Thing,
    group,
    image_rng,
    mounted,
    visible_ids,
)
from d2ft.data.synthetic.backdrop import clutter
from d2ft.data.synthetic.drawing import (
    Image8,
    Light,
    Placed,
    draw_sprite,
    paste,
    take_photo,
)
from d2ft.data.synthetic.folder import dataset_folder
from d2ft.data.synthetic.styles import COCO_STYLES, ROAD_STYLES, SHAPES
from d2ft.labels import COCO_CATEGORY_IDS, COCO_CLASSES

# How an annotation comes about, with its share. Road classes and the people on two wheels make
# up half of the instances: they are what is carried over to streets.
_KINDS = {"road": 0.40, "mounted": 0.07, "group": 0.02, "other": 0.51}
_EMPTY_SHARE = 0.04
_OTHER_CLASSES = tuple(name for name in COCO_CLASSES if name not in ROAD_STYLES)
_CATEGORY_IDS = dict(zip(COCO_CLASSES, COCO_CATEGORY_IDS, strict=True))
# Square root of an object's width times height, for pictures whose shorter side has 144 pixels.
_SMALLEST, _LARGEST, _SIDE = 20.0, 84.0, 144
_LEAST_SHARE, _LEAST_PIXELS = 0.35, 60
_JPEG_QUALITY = 92


def write_mini_coco(
    root: str | os.PathLike[str],
    *,
    num_train: int,
    num_val: int,
    image_size: tuple[int, int] = (144, 176),
    seed: int = 0,
) -> None:
    """
    Write a synthetic data set with COCO's 80 classes, category ids and annotation format.

    The files have the names of COCO 2017, so that what reads COCO finds them. Picture k of a split
    depends on ``seed``, the split and the size alone, not on how many there are. A ``root`` that
    already holds this very set is left as it is.

    Args:
        root: gets ``annotations/instances_{train,val}2017.json``, ``train2017`` and ``val2017``.
        num_train: number of pictures in ``train2017``.
        num_val: number of pictures in ``val2017``.
        image_size: (height, width) in pixels.
        seed: at least 0.

    Raises:
        UserError: if ``root`` holds something else.
    """
    splits = {"train2017": num_train, "val2017": num_val}
    with dataset_folder(
        root, "mini_coco", seed=seed, splits=splits, image_size=image_size
    ) as folder:
        if folder is None:
            return
        (folder / "annotations").mkdir()
        for split, count in splits.items():
            _write_split(folder, split, count, image_size, seed)


def _write_split(
    folder: Path, split: str, count: int, image_size: tuple[int, int], seed: int
) -> None:
    (folder / split).mkdir()
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in range(count):
        rng = image_rng(seed, f"mini_coco/{split}", index)
        image, found = _make_picture(rng, image_size)
        image_id = index + 1
        name = f"{image_id:012d}.jpg"
        Image.fromarray(image).save(folder / split / name, quality=_JPEG_QUALITY)
        height, width = image_size
        images.append({"id": image_id, "file_name": name, "height": height, "width": width})
        for annotation in found:
            identity = {"id": len(annotations) + 1, "image_id": image_id}
            annotations.append({**identity, **annotation})
    categories = [{"id": _CATEGORY_IDS[name], "name": name} for name in COCO_CLASSES]
    instances = {
        "info": {"description": "mini_coco: drawn by d2ft, synthetic"},
        "images": images,
        "annotations": annotations,
        "categories": categories,
    }
    path = folder / "annotations" / f"instances_{split}.json"
    path.write_text(json.dumps(instances), encoding="utf-8")


def _make_picture(
    rng: np.random.Generator, image_size: tuple[int, int]
) -> tuple[Image8, list[dict[str, Any]]]:
    """Return a picture and its annotations, without the ids."""
    light = Light(
        saturation=rng.uniform(0.80, 1.10),
        value=rng.uniform(0.85, 1.05),
        hue=rng.uniform(-6, 6),
        shading=rng.uniform(0.15, 0.35),
    )
    image = clutter(rng, image_size)
    things = [] if rng.random() < _EMPTY_SHARE else _still_life(rng, image_size, light)
    for thing in things:
        for placed in thing.members:
            paste(image, placed, (0, 0, 0))
    red, green, blue = rng.uniform(0.94, 1.06, 3)
    photo = take_photo(
        rng,
        image,
        blur=rng.uniform(0.3, 0.6),
        noise=rng.uniform(1, 5),
        gain=(red, green, blue),
        offset=rng.uniform(-8, 8),
    )
    ids = visible_ids(things, image_size)
    return photo, [_annotation(ids == n, thing) for n, thing in enumerate(things, start=1)]


def _still_life(rng: np.random.Generator, image_size: tuple[int, int], light: Light) -> list[Thing]:
    """Return things in painting order: what stands lower in the picture is nearer."""
    stage = Stage(image_size, least_share=_LEAST_SHARE, least_pixels=_LEAST_PIXELS)
    grounds = image_size[0] * rng.uniform(0.30, 1.05, int(rng.integers(3, 10)))
    for ground in sorted(grounds, reverse=True):
        kind = str(rng.choice(list(_KINDS), p=list(_KINDS.values())))
        stage.admit(_enter(rng, kind, ground, image_size, light))
    return stage.things


def _enter(
    rng: np.random.Generator,
    kind: str,
    ground: float,
    image_size: tuple[int, int],
    light: Light,
) -> list[Thing]:
    """Put something of a kind of ``_KINDS`` on row ``ground``."""
    H, W = image_size
    unit = min(H, W) / _SIDE
    size = unit * np.exp(rng.uniform(np.log(_SMALLEST), np.log(_LARGEST)))
    centre = W * rng.uniform(0.05, 0.95)
    if kind == "mounted":
        vehicle = str(rng.choice(list(SADDLES)))
        return mounted(rng, vehicle, "person", centre, ground, size * 0.7, light)
    name = str(rng.choice(_OTHER_CLASSES if kind == "other" else list(ROAD_STYLES)))
    style = COCO_STYLES[name]
    shape_name = str(rng.choice(style.shapes))
    width = SHAPES[shape_name].width
    height = min(size / width**0.5, 0.95 * H, 1.15 * W / width)
    if kind == "group":
        return [group(rng, name, name, centre, ground, height * 0.6, light)]
    # Cars do not lean; things on a table lie as they fell.
    tilt = rng.uniform(-25, 25) if kind == "other" else rng.uniform(-5, 5)
    sprite = draw_sprite(rng, style, height, light, shape_name=shape_name, tilt=tilt)
    h, w = sprite.alpha.shape
    return [Thing(name, (Placed(sprite, round(centre - w / 2), round(ground - h)),))]


def _annotation(mask: npt.NDArray[np.bool_], thing: Thing) -> dict[str, Any]:
    """Return COCO's annotation of the visible pixels: polygons, or an RLE for a group."""
    category = {"category_id": _CATEGORY_IDS[thing.label], "iscrowd": int(thing.is_group)}
    if thing.is_group:
        # COCO keeps crowds as uncompressed run lengths, column by column, background first.
        column_major = np.concatenate([[False], mask.ravel(order="F"), [False]])
        changes = np.flatnonzero(column_major[1:] != column_major[:-1])
        counts = np.diff(np.concatenate([[0], changes, [mask.size]])).tolist()
        encoded = mask_utils.encode(np.asfortranarray(mask, dtype=np.uint8))
        segmentation: Any = {"counts": counts, "size": list(mask.shape)}
    else:
        segmentation = _polygons(mask)
        encoded = mask_utils.merge(mask_utils.frPyObjects(segmentation, *mask.shape))
    box = [float(value) for value in mask_utils.toBbox(encoded)]
    area = float(mask_utils.area(encoded))
    return {**category, "segmentation": segmentation, "bbox": box, "area": area}


def _polygons(mask: npt.NDArray[np.bool_]) -> list[list[float]]:
    """Return the outlines of a mask's pieces as ``[x0, y0, x1, y1, ...]``, without its holes."""
    # COCO's coordinates begin at the corner of a pixel and contours run through pixel centres:
    # twice the resolution keeps them within a quarter of a pixel of the border.
    fine = cv2.resize(mask.astype(np.uint8), None, fx=2, fy=2, interpolation=cv2.INTER_NEAREST)
    contours, _ = cv2.findContours(fine, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    largest = max(cv2.contourArea(contour) for contour in contours)
    polygons = []
    for contour in contours:
        corners = cv2.approxPolyDP(contour, 0.9, closed=True)[:, 0]
        # Crumbs left by an object in front are not worth a polygon; it takes three corners.
        if len(corners) >= 3 and cv2.contourArea(contour) >= min(largest, 40):
            polygons.append(((corners + 0.5) / 2).ravel().tolist())
    return polygons
