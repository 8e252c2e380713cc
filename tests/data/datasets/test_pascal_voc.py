import logging
import shutil
import xml.etree.ElementTree as ElementTree

import numpy as np
import pycocotools.mask as mask_util
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.pascal_voc import load_voc_instances as detectron2_load
from detectron2.structures import BoxMode
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from d2ft.data import (
    class_names,
    load_voc_instances,
    register_builtin_datasets,
    register_voc_instances,
)
from d2ft.errors import UserError
from d2ft.labels import VOC_CLASSES

SIZE = "<size><width>{}</width><height>{}</height><depth>3</depth></size>"


def xml_object(name, box, extra=""):
    tags = ("xmin", "ymin", "xmax", "ymax")
    corners = "".join(f"<{tag}>{value}</{tag}>" for tag, value in zip(tags, box, strict=True))
    return f"<object><name>{name}</name>{extra}<bndbox>{corners}</bndbox></object>"


def write_voc(root, xmls, split="train", size=(40, 30)):
    """Write images (width, height) and {id: inner XML}."""
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    (root / f"ImageSets/Main/{split}.txt").write_text("\n".join(xmls) + "\n")
    for image_id, inner in xmls.items():
        (root / f"Annotations/{image_id}.xml").write_text(f"<annotation>{inner}</annotation>")
        Image.new("RGB", size).save(root / f"JPEGImages/{image_id}.jpg")
    return root


@pytest.fixture
def bccd(real_data):
    return real_data / "VOC_BCCD" / "VOCdevkit" / "VOC2007"


@pytest.fixture
def samples(real_data, tmp_path):
    """Return the two official images as a devkit folder."""
    shutil.copytree(real_data / "voc_samples", tmp_path / "voc", copy_function=shutil.copy)
    lists = tmp_path / "voc/ImageSets/Main"
    lists.mkdir(parents=True)
    (lists / "both.txt").write_text("2007_000063\n2011_003353\n")
    (lists / "masks.txt").write_text("2007_000063\n")
    return tmp_path / "voc"


@pytest.mark.parametrize(("split", "images"), [("train", 205), ("val", 87)])
def test_real_boxes_are_those_of_the_xml_files(bccd, split, images, caplog):
    load_voc_instances(bccd, split, None)
    caplog.set_level(logging.WARNING)
    records = load_voc_instances(bccd, split, None)  # what was left out is said from the cache too
    classes, expected, empty = ("Platelets", "RBC", "WBC"), [], 0
    for record in records:
        root = ElementTree.parse(bccd / f"Annotations/{record['image_id']}.xml").getroot()
        for element in root.iter("object"):
            x0, y0, x1, y1 = (int(value.text) for value in element.find("bndbox"))
            empty += x0 == x1 or y0 == y1
            if x0 < x1 and y0 < y1:
                category = classes.index(element.find("name").text)
                expected.append((record["image_id"], category, [x0 - 1, y0 - 1, x1, y1]))
    found = [
        (r["image_id"], a["category_id"], a["bbox"]) for r in records for a in r["annotations"]
    ]
    assert len(records) == images
    assert found == expected
    assert empty == 1
    assert "left out 1 object" in caplog.text


def test_the_records_are_those_of_detectron2_without_the_empty_boxes(bccd):
    classes = ("RBC", "WBC", "Platelets")
    theirs = detectron2_load(str(bccd), "trainval", classes)
    for record in theirs:
        record["annotations"] = [
            a
            for a in record["annotations"]
            if a["bbox"][2] - a["bbox"][0] != 1 and a["bbox"][3] - a["bbox"][1] != 1
        ]
    for _ in ("parsed", "cached"):
        ours = load_voc_instances(bccd, "trainval", classes)
        for record in ours:
            del record["dropped_boxes"]
            for annotation in record["annotations"]:
                assert annotation["bbox_mode"] is BoxMode.XYXY_ABS
                for key in ("iscrowd", "difficult", "truncated"):
                    assert annotation.pop(key) in (0, 1)
        assert ours == theirs


def test_the_classes_of_a_split_are_those_of_all_splits(tmp_path):
    write_voc(tmp_path, {"b": SIZE.format(40, 30) + xml_object("zebra", (1, 1, 9, 9))}, "val")
    write_voc(tmp_path, {"a": SIZE.format(40, 30) + xml_object("ant", (1, 1, 9, 9))})
    register_voc_instances("my_val", tmp_path, "val", thing_classes=None)
    assert class_names("my_val") == ("ant", "zebra")
    (record,) = DatasetCatalog.get("my_val")
    assert record["annotations"][0]["category_id"] == 1


def test_official_masks_are_the_pixels_of_the_objects(samples):
    (record,) = load_voc_instances(samples, "masks")
    ids = np.array(Image.open(samples / "SegmentationObject/2007_000063.png"))
    assert [VOC_CLASSES[a["category_id"]] for a in record["annotations"]] == ["dog", "chair"]
    for number, annotation in enumerate(record["annotations"], start=1):
        mask = mask_util.decode(annotation["segmentation"])
        assert np.array_equal(mask, ids == number)
        # The masks end where the void border of some 5 pixels begins, the boxes lie around it.
        ys, xs = np.nonzero(mask)
        around = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
        assert np.abs(np.subtract(annotation["bbox"], around)).max() <= 6


def test_without_a_mask_for_every_image_there_are_boxes_only(samples, caplog):
    caplog.set_level(logging.INFO)
    records = load_voc_instances(samples, "both")
    assert "boxes only, as 1 of 2 images have no file" in caplog.text
    assert all("segmentation" not in a for r in records for a in r["annotations"])


def test_an_object_that_is_left_out_keeps_its_number_in_the_masks(tmp_path):
    objects = xml_object("dog", (5, 5, 5, 5)) + xml_object("cat", (1, 1, 9, 9))
    write_voc(tmp_path, {"a": SIZE.format(40, 30) + objects})
    pixels = np.zeros((30, 40), np.uint8)
    pixels[:9, :9] = 2
    pixels[9] = 255
    (tmp_path / "SegmentationObject").mkdir()
    Image.fromarray(pixels).save(tmp_path / "SegmentationObject/a.png")
    (record,) = load_voc_instances(tmp_path, "train")
    (annotation,) = record["annotations"]
    assert np.array_equal(mask_util.decode(annotation["segmentation"]), pixels == 2)


def test_the_size_is_that_of_the_image_where_the_xml_has_none(tmp_path):
    write_voc(tmp_path, {"a": xml_object("cat", (1, 1, 9, 9)), "b": SIZE.format(0, 0)})
    records = load_voc_instances(tmp_path, "train")
    assert [(r["width"], r["height"]) for r in records] == [(40, 30), (40, 30)]
    assert records[1]["annotations"] == []


def test_difficult_and_truncated_are_kept(tmp_path):
    extra = "<truncated>1</truncated><difficult>1</difficult>"
    write_voc(tmp_path, {"a": SIZE.format(40, 30) + xml_object("cat", (1, 1, 9, 9), extra)})
    (annotation,) = load_voc_instances(tmp_path, "train")[0]["annotations"]
    assert (annotation["difficult"], annotation["truncated"]) == (1, 1)


@pytest.mark.parametrize(
    ("inner", "message"),
    [
        (xml_object("kat", (1, 1, 9, 9)), r"a\.xml, object 1 is of class 'kat'.*nearest are cat"),
        (xml_object("", (1, 1, 9, 9)), r"a\.xml, object 1 has no name"),
        (xml_object("cat", (9, 1, 1, 9)), r"object 1 has a box of negative size: 9, 1 to 1, 9"),
        (xml_object("cat", ("nan", 1, 9, 9)), r"object 1, xmin: a finite number.*'nan'"),
        (xml_object("cat", (1, "inf", 9, 9)), r"object 1, ymin: a finite number.*'inf'"),
        (xml_object("cat", (1, 1, "", 9)), r"object 1, xmax: a finite number is expected, got ''"),
        ("<object><name>cat</name></object>", "object 1 has no bndbox"),
        (
            xml_object("cat", (1, 1, 9, 9), "<difficult>x</difficult>"),
            "difficult is 0 or 1, got 'x'",
        ),
        ("<object>", r"a\.xml cannot be read as XML"),
        (SIZE.format(-4, 30), r"a\.xml has a size of -4x30 pixels"),
        (SIZE.format("", 30), r"a\.xml, size: a finite number is expected, got ''"),
    ],
)
def test_a_broken_annotation_is_refused_with_its_place(tmp_path, inner, message):
    write_voc(tmp_path, {"a": inner})
    with pytest.raises(UserError, match=message):
        load_voc_instances(tmp_path, "train")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a\na\n", "names the image 'a' twice"),
        ("\n", "names no image"),
        ("a\nb\n", "1 of the 2 ids .* have no image .*'b'"),
    ],
)
def test_a_list_that_does_not_fit_is_refused(tmp_path, content, message):
    write_voc(tmp_path, {"a": ""})
    (tmp_path / "ImageSets/Main/train.txt").write_text(content)
    with pytest.raises(UserError, match=message):
        load_voc_instances(tmp_path, "train")


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.full((30, 40), 2, np.uint8), r"has an object 2, but .*a\.xml has only 1"),
        (np.zeros((10, 40), np.uint8), "has 40x10 pixels, but .* says 40x30"),
        (np.zeros((30, 40, 3), np.uint8), "is of mode RGB"),
    ],
)
def test_masks_that_do_not_fit_are_refused(tmp_path, pixels, message):
    write_voc(tmp_path, {"a": xml_object("cat", (1, 1, 9, 9))})
    (tmp_path / "SegmentationObject").mkdir()
    Image.fromarray(pixels).save(tmp_path / "SegmentationObject/a.png")
    with pytest.raises(UserError, match=message):
        load_voc_instances(tmp_path, "train")


def test_a_split_or_folder_that_is_not_there_is_named(tmp_path):
    write_voc(tmp_path, {"a": ""})
    with pytest.raises(UserError, match=r"there is no list .*trian\.txt; lists beside it: train"):
        load_voc_instances(tmp_path, "trian")
    with pytest.raises(UserError, match="does not exist; a dataset in VOC's format has"):
        load_voc_instances(tmp_path / "nowhere", "train")


def test_built_in_names_find_the_devkit(tmp_path):
    objects = xml_object("cat", (1, 1, 9, 9))
    for year in (2007, 2012):
        write_voc(tmp_path / f"VOC{year}", {"a": objects}, "trainval")
    register_builtin_datasets(tmp_path)
    for year in (2007, 2012):
        (record,) = DatasetCatalog.get(f"voc{year}_trainval")
        assert record["annotations"][0]["category_id"] == VOC_CLASSES.index("cat")
        assert MetadataCatalog.get(f"voc{year}_trainval").year == year
    assert class_names("voc2007_test") == VOC_CLASSES


boxes = st.tuples(*[st.integers(1, 30)] * 2, *[st.integers(1, 30)] * 2).map(
    lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3])
)
images = st.lists(st.tuples(st.sampled_from(VOC_CLASSES), boxes, st.integers(0, 1)), max_size=4)


@settings(max_examples=20, deadline=None)
@given(images=st.lists(images, min_size=1, max_size=3))
def test_what_was_written_is_read(tmp_path_factory, images):
    inner = [
        SIZE.format(40, 30)
        + "".join(xml_object(n, b, f"<difficult>{d}</difficult>") for n, b, d in image)
        for image in images
    ]
    root = tmp_path_factory.mktemp("voc")
    write_voc(root, {f"image {number}": xml for number, xml in enumerate(inner)})
    found = [
        [
            (VOC_CLASSES[a["category_id"]], tuple(np.add(a["bbox"], (1, 1, 0, 0))), a["difficult"])
            for a in record["annotations"]
        ]
        for record in load_voc_instances(root, "train")
    ]
    assert found == images
