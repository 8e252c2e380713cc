"""
Damaged annotation files: each is refused by name, or loads as what is written in it.

By hand with more of them:
D2FT_FUZZ_FILES=2000 python -m pytest -m slow tests/data/datasets/test_fuzz.py
"""

import json
import math
import os
import random
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pycocotools.mask as mask_util
import pytest
from detectron2.structures import BoxMode
from PIL import Image

from d2ft.data import (
    load_cityscapes_instances,
    load_coco_instances,
    load_kitti_instances,
    load_voc_instances,
    load_wider_face_instances,
)
from d2ft.errors import UserError

pytestmark = [pytest.mark.slow, pytest.mark.ci]

FILES = int(os.environ.get("D2FT_FUZZ_FILES", "100"))
PIECES = (
    b"",
    b"0",
    b"-1",
    b"1e999",
    b"NaN",
    b"null",
    b"[]",
    b"{}",
    b'"',
    b"<",
    b"</",
    b"\xff",
    b"\n",
    b"9" * 20,
)


def _mutate(content, source):
    """Return the bytes with one to three changes, mostly at numbers and names."""
    data = bytearray(content)
    for _ in range(source.randint(1, 3)):
        start = source.randrange(len(data))
        length = source.choice((1, 1, 2, 8))
        kind = source.randrange(3)
        if kind == 0:
            data[start : start + length] = source.choice(PIECES)
        elif kind == 1:
            other = source.randrange(len(data))
            data[start : start + length] = data[other : other + length]
        else:
            data[start] = source.choice(b"0123456789-.,]}>/")
    return bytes(data)


def _assert_usable(records):
    for record in records:
        size = record["height"], record["width"]
        assert min(size) > 0
        for annotation in record["annotations"]:
            assert all(map(math.isfinite, annotation["bbox"]))
            segmentation = annotation.get("segmentation")
            if isinstance(segmentation, dict):
                assert mask_util.decode(segmentation).shape == size
            elif segmentation:
                assert all(len(p) >= 6 and all(map(math.isfinite, p)) for p in segmentation)


def _run(originals, path, load, assert_right, *, least=1):
    """
    Damage ``path`` again and again; ``assert_right`` compares the records with the file.

    At least ``least`` of the damaged files load.
    """
    source = random.Random(0)
    loaded, refusals = 0, []
    for number in range(FILES):
        path.write_bytes(_mutate(originals[number % len(originals)], source))
        # The clock of a file system is too coarse for the cache to tell them apart.
        os.utime(path, ns=(number, number))
        try:
            records = load()
        except UserError as error:
            refusals.append(str(error))
            continue
        loaded += 1
        _assert_usable(records)
        assert_right(records)
    print(f"{path.name}: {FILES} damaged files, {loaded} loaded, {len(refusals)} refused")
    assert least <= loaded < FILES
    assert all(path.stem in message for message in refusals)


def _boxes(records):
    return [annotation["bbox"] for record in records for annotation in record["annotations"]]


def _clip(boxes, image):
    width, height = Image.open(image).size
    limits = (width, height, width, height)
    inside = [[min(max(v, 0), end) for v, end in zip(box, limits, strict=True)] for box in boxes]
    return [box for box in inside if box[0] < box[2] and box[1] < box[3]]


def _boxes_of_xml(path):
    objects = ElementTree.parse(path).getroot().iter("object")
    corners = ("xmin", "ymin", "xmax", "ymax")
    return [[float(element.findtext(f"bndbox/{key}")) for key in corners] for element in objects]


@pytest.mark.parametrize("masks", [True, False], ids=["with masks", "boxes alone"])
def test_damaged_xml_files_end_in_a_clean_error_or_load(real_data, tmp_path, masks):
    for folder in ("JPEGImages", "SegmentationObject"):
        (tmp_path / folder).mkdir()
    name = "2007_000063"
    shutil.copy(real_data / f"voc_samples/JPEGImages/{name}.jpg", tmp_path / "JPEGImages")
    if masks:
        picture = real_data / f"voc_samples/SegmentationObject/{name}.png"
        shutil.copy(picture, tmp_path / "SegmentationObject")
    (tmp_path / "ImageSets/Main").mkdir(parents=True)
    (tmp_path / "ImageSets/Main/train.txt").write_text(name)
    (tmp_path / "Annotations").mkdir()
    xmls = [real_data / f"voc_samples/Annotations/{name}.xml"]
    if not masks:  # those of other images, whose sizes masks would not fit
        xmls.append(real_data / "voc_samples/Annotations/2011_003353.xml")
        xmls += sorted((real_data / "VOC_BCCD/VOCdevkit/VOC2007/Annotations").glob("*.xml"))[:4]
    path = tmp_path / f"Annotations/{name}.xml"

    def assert_right(records):
        boxes = [b for b in _boxes_of_xml(path) if b[0] < b[2] and b[1] < b[3]]
        assert _boxes(records) == [[b[0] - 1, b[1] - 1, b[2], b[3]] for b in boxes]

    _run(
        [xml.read_bytes() for xml in xmls],
        path,
        lambda: load_voc_instances(tmp_path, "train", None),
        assert_right,
    )


def test_damaged_json_files_end_in_a_clean_error_or_load(real_data, tmp_path):
    names = ("coco/annotations/instances_val2017.json", "fruits_nuts/data/trainval.json")
    path = tmp_path / "instances.json"

    def assert_right(records):
        content = json.loads(path.read_bytes())
        assert {r["image_id"] for r in records} == {row["id"] for row in content["images"]}
        for record in records:
            rows = [r for r in content["annotations"] if r["image_id"] == record["image_id"]]
            assert [a["bbox"] for a in record["annotations"]] == [row["bbox"] for row in rows]

    originals = [(real_data / name).read_bytes() for name in names]
    _run(originals, path, lambda: load_coco_instances(path, tmp_path), assert_right)


def test_damaged_polygon_files_end_in_a_clean_error_or_load(real_data, tmp_path):
    frame = "aachen_000000_000019"
    images, labels = tmp_path / "images", tmp_path / "labels"
    for folder in (images, labels):
        (folder / "aachen").mkdir(parents=True)
    Image.new("L", (2048, 1024)).save(images / f"aachen/{frame}_leftImg8bit.png")
    path = labels / f"aachen/{frame}_gtFine_polygons.json"
    originals = sorted(real_data.glob("cityscapes*/gtFine/*/*/*_polygons.json"))

    def assert_right(records):
        names = [item["label"] for item in json.loads(path.read_bytes())["objects"]]
        (record,) = records
        crowd = sum(annotation["iscrowd"] for annotation in record["annotations"])
        assert crowd <= sum(name.endswith("group") for name in names)
        assert len(record["annotations"]) <= len(names)

    _run(
        [file.read_bytes() for file in originals],
        path,
        lambda: load_cityscapes_instances(images, labels),
        assert_right,
    )


def test_damaged_kitti_labels_end_in_a_clean_error_or_load(real_data, tmp_path):
    for folder in ("image_2", "label_2"):
        (tmp_path / "training" / folder).mkdir(parents=True)
    image = tmp_path / "training/image_2/000008.png"
    image.symlink_to(real_data / "kitti/training/image_2/000008.png")
    path = tmp_path / "training/label_2/000008.txt"
    originals = sorted((real_data / "kitti/training/label_2").glob("*.txt"))

    def assert_right(records):
        lines = [line.split() for line in path.read_text().splitlines() if line.strip()]
        boxes = [
            [float(value) for value in line[4:8]]
            for line in lines
            for _ in range({"Car": 1, "Van": 1, "Pedestrian": 1, "DontCare": 2}.get(line[0], 0))
        ]
        assert _boxes(records) == _clip(boxes, image)

    _run(
        [file.read_bytes() for file in originals],
        path,
        lambda: load_kitti_instances(tmp_path, thing_classes=["Car", "Pedestrian"]),
        assert_right,
    )


def _faces(real_data):
    """Return {image: its ten-field lines} of the official list of real images."""
    text = (real_data / "widerface/wider_face_split/wider_face_val_bbx_gt.txt").read_text()
    faces = {}
    for line in text.splitlines():
        if line.endswith(".jpg"):
            rows = faces[line] = []
        elif len(line.split()) == 10:
            rows.append(line.split())
    return faces


def test_damaged_lists_of_faces_end_in_a_clean_error_or_load(real_data, tmp_path):
    images = real_data / "widerface/WIDER_val/images"
    path = tmp_path / "wider_face_val_bbx_gt.txt"
    # One image each, so that not every change hits the hundreds of faces of a crowd.
    originals = [
        f"{name}\n{len(rows)}\n{''.join(' '.join(row) + chr(10) for row in rows)}".encode()
        for name, rows in _faces(real_data).items()
    ]

    def assert_right(records):
        lines = path.read_text().splitlines()
        (image,) = [images / line.strip() for line in lines if line.strip().endswith(".jpg")]
        rows = [[float(v) for v in line.split()[:4]] for line in lines if len(line.split()) == 10]
        boxes = [[x, y, x + width, y + height] for x, y, width, height in rows]
        assert _boxes(records) == _clip(boxes, image)

    _run(originals, path, lambda: load_wider_face_instances(images, path), assert_right)


def test_damaged_xml_files_of_faces_end_in_a_clean_error_or_load(real_data, tmp_path):
    (tmp_path / "Annotations").mkdir()
    name, path = "0_Parade_Parade_0_102", tmp_path / "Annotations/0_Parade_Parade_0_102.xml"
    (tmp_path / "train.txt").write_text(name)
    image = tmp_path / f"0--Parade/{name}.jpg"
    image.parent.mkdir()
    image.symlink_to(real_data / f"widerface/WIDER_val/images/0--Parade/{name}.jpg")
    originals = [
        _xml_of_faces(rows).encode() for rows in list(_faces(real_data).values())
    ]  # of several images, under the name of one

    def assert_right(records):
        assert _boxes(records) == _clip(_boxes_of_xml(path), image)

    _run(
        originals,
        path,
        lambda: load_wider_face_instances(tmp_path, tmp_path / "train.txt"),
        assert_right,
    )


def _xml_of_faces(rows):
    """Return the faces as the XML files that MMDetection reads have them."""
    objects = []
    for row in rows:
        x, y, width, height = map(int, row[:4])
        objects.append(
            f"<object><name>face</name><difficult>{row[7]}</difficult><bndbox>"
            f"<xmin>{x}</xmin><ymin>{y}</ymin><xmax>{x + width}</xmax><ymax>{y + height}</ymax>"
            "</bndbox></object>"
        )
    return f"<annotation><folder>0--Parade</folder>{''.join(objects)}</annotation>"


@pytest.mark.parametrize("split", ["train", "val"])
def test_damaged_lists_of_voc_end_in_a_clean_error_or_load(real_data, tmp_path, split):
    bccd = real_data / "VOC_BCCD/VOCdevkit/VOC2007"
    for folder in ("Annotations", "JPEGImages"):
        (tmp_path / folder).symlink_to(bccd / folder)
    (tmp_path / "ImageSets/Main").mkdir(parents=True)
    path = tmp_path / f"ImageSets/Main/{split}.txt"
    ids = (bccd / f"ImageSets/Main/{split}.txt").read_bytes().splitlines(keepends=True)

    def assert_right(records):
        assert [r["image_id"] for r in records] == path.read_text().split()

    _run(
        [b"".join(ids[i : i + 2]) for i in range(0, 20, 2)],
        path,
        lambda: load_voc_instances(tmp_path, split, ["RBC", "WBC", "Platelets"]),
        assert_right,
        least=0,  # a changed id is hardly ever another one
    )


def test_damaged_split_files_of_kitti_end_in_a_clean_error_or_load(real_data, tmp_path):
    path = tmp_path / "train.txt"
    frames = sorted(Path(p).stem for p in (real_data / "kitti/training/label_2").glob("*.txt"))

    def assert_right(records):
        assert [r["image_id"] for r in records] == path.read_text().split()
        assert all(a["bbox_mode"] is BoxMode.XYXY_ABS for r in records for a in r["annotations"])

    _run(
        ["".join(f"{frame}\n" for frame in frames[i : i + 4]).encode() for i in (0, 4, 8)],
        path,
        lambda: load_kitti_instances(real_data / "kitti", path),
        assert_right,
    )
