"""A part of ``benchmark.py loader``: reading COCO json and Pascal VOC, as Detectron2 reads them."""

import json
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmark_timing import time_in_turn
from detectron2.data.datasets.coco import load_coco_json
from detectron2.data.datasets.pascal_voc import load_voc_instances as stock_load_voc

from d2ft.data import load_coco_instances, load_voc_instances
from d2ft.labels import COCO_CATEGORY_IDS, COCO_CLASSES, VOC_CLASSES

WIDTH, HEIGHT = 640, 480
OBJECTS = 7  # an image, as in COCO
POINTS = 20  # a polygon

Records = list[dict[str, Any]]
# name, unit, values of ours, values of the stock way
Row = tuple[str, str, list[float], list[float]]


def benchmark_datasets(*, quick: bool) -> Iterator[Row]:
    """Compare reading ``images`` files of annotations; the images themselves are empty files."""
    images, repetitions = (200, 2) if quick else (2000, 5)
    with tempfile.TemporaryDirectory(prefix="d2ft_benchmark_") as name:
        folder = Path(name)
        json_file = _write_coco(folder, images)
        root = _write_voc(folder / "VOC2012", images)
        for title, ours, stock, cached in (
            (
                "COCO json",
                lambda: load_coco_instances(json_file, folder),
                lambda: load_coco_json(str(json_file), str(folder), "benchmark_coco"),
                False,
            ),
            (
                "VOC xml",
                lambda: load_voc_instances(root, "train"),
                lambda: stock_load_voc(str(root), "train", VOC_CLASSES),
                True,
            ),
        ):
            yield from _compare(title, ours, stock, images, repetitions, cached=cached)


def _compare(
    title: str,
    ours: Callable[[], Records],
    stock: Callable[[], Records],
    images: int,
    repetitions: int,
    *,
    cached: bool,
) -> Iterator[Row]:
    def first_time() -> Records:
        return _with_empty_cache(ours)

    expected = stock()
    assert _common(first_time()) == expected, title
    assert _common(ours()) == expected, title  # and fills the cache
    ways = {"first time": first_time, "cached": ours} if cached else {"never cached": ours}
    for name, way in ways.items():
        sides = time_in_turn(way, stock, repetitions)
        ours_ms, stock_ms = ([s / images * 1e3 for s in side] for side in sides)
        yield f"read {title}, {name}", "ms an image", ours_ms, stock_ms


def _with_empty_cache(load: Callable[[], Records]) -> Records:
    before = os.environ.get("D2FT_CACHE")
    with tempfile.TemporaryDirectory() as empty:
        os.environ["D2FT_CACHE"] = empty
        try:
            return load()
        finally:
            os.environ.pop("D2FT_CACHE")
            if before is not None:
                os.environ["D2FT_CACHE"] = before


def _common(records: Records) -> Records:
    """Return the records without what d2ft keeps of VOC and Detectron2 does not."""
    more = ("dropped_boxes", "difficult", "truncated")
    return [
        {
            **{key: value for key, value in record.items() if key not in more},
            "annotations": [_without_flags(a, more) for a in record["annotations"]],
        }
        for record in records
    ]


def _without_flags(annotation: dict[str, Any], more: tuple[str, ...]) -> dict[str, Any]:
    # Detectron2's records of VOC have no iscrowd; those of COCO have, and no truncated.
    left_out = (*more, "iscrowd") if "truncated" in annotation else more
    return {key: value for key, value in annotation.items() if key not in left_out}


def _write_coco(folder: Path, images: int) -> Path:
    chance = random.Random(0)
    annotations = []
    for number in range(images * OBJECTS):
        x, y, width, height = _box(chance)
        corners = [
            round(chance.uniform(start, start + size), 2)
            for _ in range(POINTS)
            for start, size in ((x, width), (y, height))
        ]
        annotations.append(
            {
                "id": number + 1,
                "image_id": number // OBJECTS,
                "category_id": chance.choice(COCO_CATEGORY_IDS),
                "bbox": [x, y, width, height],
                "area": width * height,
                "iscrowd": 0,
                "segmentation": [corners],
            }
        )
    content = {
        "images": [
            {"id": i, "file_name": f"{i:012}.jpg", "height": HEIGHT, "width": WIDTH}
            for i in range(images)
        ],
        "annotations": annotations,
        "categories": [
            {"id": number, "name": name}
            for number, name in zip(COCO_CATEGORY_IDS, COCO_CLASSES, strict=True)
        ],
    }
    path = folder / "instances.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def _write_voc(root: Path, images: int) -> Path:
    chance = random.Random(0)
    for part in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (root / part).mkdir(parents=True)
    names = [f"2012_{number:06}" for number in range(images)]
    (root / "ImageSets/Main/train.txt").write_text("\n".join(names), encoding="utf-8")
    for name in names:
        objects = []
        for _ in range(OBJECTS):
            x, y, width, height = _box(chance)
            objects.append(
                f"<object><name>{chance.choice(VOC_CLASSES)}</name><pose>Left</pose>"
                "<truncated>0</truncated><difficult>0</difficult><bndbox>"
                f"<xmin>{x + 1}</xmin><ymin>{y + 1}</ymin><xmax>{x + width}</xmax>"
                f"<ymax>{y + height}</ymax></bndbox></object>"
            )
        size = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height><depth>3</depth></size>"
        (root / f"Annotations/{name}.xml").write_text(
            f"<annotation><filename>{name}.jpg</filename>{size}{''.join(objects)}</annotation>",
            encoding="utf-8",
        )
        (root / f"JPEGImages/{name}.jpg").touch()
    return root


def _box(chance: random.Random) -> tuple[int, int, int, int]:
    """Return x, y, width, height of a box in the image, at least two pixels wide and high."""
    x, y = chance.randrange(WIDTH - 10), chance.randrange(HEIGHT - 10)
    return x, y, chance.randrange(2, WIDTH - x), chance.randrange(2, HEIGHT - y)
