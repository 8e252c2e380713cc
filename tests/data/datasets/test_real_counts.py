"""Images and objects of each class in the real sets, as the raw files have them."""

import json
import re
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from d2ft.data import (
    load_cityscapes_instances,
    load_coco_instances,
    load_kitti_instances,
    load_voc_instances,
    load_wider_face_instances,
)
from d2ft.data.datasets.kitti import KITTI_CLASSES
from d2ft.labels import CITYSCAPES_INSTANCE_CLASSES


def _loaded(records, classes):
    """Return how many images there are, and (class, instance, crowd or ignore) -> number."""
    kinds = Counter()
    for annotation in (a for record in records for a in record["annotations"]):
        kind = (
            "ignore" if annotation.get("ignore") else "crowd" if annotation.get("iscrowd") else ""
        )
        kinds[classes[annotation["category_id"]], kind] += 1
    return len(records), kinds


def _raw_cityscapes(folder):
    # Ids of https://github.com/mcordts/cityscapesScripts, helpers/labels.py.
    ids = (24, 25, 26, 27, 28, 31, 32, 33)
    names = dict(zip(ids, CITYSCAPES_INSTANCE_CLASSES, strict=True))
    files = list(folder.glob("*/*_instanceIds.png"))
    values = [int(v) for file in files for v in np.unique(np.asarray(Image.open(file)))]
    counts = Counter((names[v], "crowd") for v in values if v in names)
    counts += Counter((names[v // 1000], "") for v in values if v // 1000 in names)
    return len(files), counts


@pytest.mark.parametrize("split", ["train", "val"])
def test_cityscapes(real_data, split):
    root = real_data / "cityscapes"
    records = load_cityscapes_instances(root / "leftImg8bit" / split, root / "gtFine" / split)
    raw = _raw_cityscapes(root / "gtFine" / split)
    assert _loaded(records, CITYSCAPES_INSTANCE_CLASSES) == raw


@pytest.mark.parametrize(
    ("json_file", "images"),
    [
        ("coco/annotations/instances_train2017.json", "coco/train2017"),
        ("coco/annotations/instances_val2017.json", "coco/val2017"),
        ("fruits_nuts/data/trainval.json", "fruits_nuts/data/images"),
    ],
)
def test_coco_and_fruits_nuts(real_data, json_file, images):
    raw = json.loads((real_data / json_file).read_bytes())
    names = {row["id"]: row["name"] for row in raw["categories"]}
    counts = Counter(
        (names[row["category_id"]], "crowd" if row["iscrowd"] else "") for row in raw["annotations"]
    )
    records = load_coco_instances(real_data / json_file, real_data / images)
    classes = [names[number] for number in sorted(names)]
    assert _loaded(records, classes) == (len(raw["images"]), counts)


def test_kitti(real_data):
    files = list((real_data / "kitti/training/label_2").glob("*.txt"))
    types = Counter(re.findall(r"^\S+", "".join(file.read_text() for file in files), re.M))
    counts = Counter({(name, ""): types[name] for name in KITTI_CLASSES})
    counts += Counter({(name, "ignore"): types["DontCare"] for name in KITTI_CLASSES})
    counts["Car", "ignore"] += types["Van"]
    counts["Pedestrian", "ignore"] += types["Person_sitting"]
    records = load_kitti_instances(real_data / "kitti")
    assert not any(record["dropped_boxes"] for record in records)
    assert _loaded(records, KITTI_CLASSES) == (len(files), counts)


@pytest.mark.parametrize("split", ["train", "val"])
def test_wider_face(real_data, split):
    root = real_data / "widerface"
    text = (root / f"wider_face_split/wider_face_{split}_bbx_gt.txt").read_text()
    faces = re.findall(r"^\d+ \d+ (\d+) (\d+) \d \d \d (\d) \d \d ?$", text, re.M)
    solid = [invalid for width, height, invalid in faces if width != "0" and height != "0"]
    counts = Counter(("face", "ignore" if invalid == "1" else "") for invalid in solid)
    records = load_wider_face_instances(
        root / f"WIDER_{split}/images", root / f"wider_face_split/wider_face_{split}_bbx_gt.txt"
    )
    assert _loaded(records, ["face"]) == (len(re.findall(r"\.jpg$", text, re.M)), counts)
    assert sum(record["dropped_boxes"] for record in records) == len(faces) - len(solid)


def _objects_of(xmls):
    """Return (class, box has an extent) of each object, by its text alone."""
    found = []
    for xml in xmls:
        for block in re.findall(r"<object>.*?</object>", xml.read_text(), re.S):
            name, *_ = re.findall(r"<name>(\w+)</name>", block)
            # The first of each: parts of a person, in VOC, have a name and a box as well.
            x0, y0, x1, y1 = (
                re.findall(rf"<{key}>([\d.]+)</{key}>", block)[0]
                for key in ("xmin", "ymin", "xmax", "ymax")
            )
            found.append((name, x0 != x1 and y0 != y1))
    return found


@pytest.mark.parametrize("split", ["train", "val"])
def test_bccd(real_data, split):
    root = real_data / "VOC_BCCD/VOCdevkit/VOC2007"
    ids = (root / f"ImageSets/Main/{split}.txt").read_text().split()
    objects = _objects_of([root / f"Annotations/{image_id}.xml" for image_id in ids])
    counts = Counter((name, "") for name, is_solid in objects if is_solid)
    records = load_voc_instances(root, split, None)
    assert _loaded(records, ["Platelets", "RBC", "WBC"]) == (len(ids), counts)
    assert sum(record["dropped_boxes"] for record in records) == 1
    assert not all(is_solid for _, is_solid in objects)


def test_voc_samples(real_data, tmp_path):
    samples = real_data / "voc_samples"
    for folder in ("Annotations", "JPEGImages", "SegmentationObject"):
        (tmp_path / folder).symlink_to(samples / folder)
    (tmp_path / "ImageSets/Main").mkdir(parents=True)
    xmls = sorted((samples / "Annotations").glob("*.xml"))
    (tmp_path / "ImageSets/Main/all.txt").write_text("\n".join(xml.stem for xml in xmls))
    (tmp_path / "ImageSets/Main/masks.txt").write_text("2007_000063")
    objects = _objects_of(xmls)
    classes = sorted({name for name, _ in objects})
    records = load_voc_instances(tmp_path, "all", classes)
    assert _loaded(records, classes) == (2, Counter((name, "") for name, _ in objects))
    (record,) = load_voc_instances(tmp_path, "masks", classes)
    pixels = np.asarray(Image.open(samples / "SegmentationObject/2007_000063.png"))
    with_mask = [a for a in record["annotations"] if "segmentation" in a]
    assert len(with_mask) == len(set(np.unique(pixels)) - {0, 255})
