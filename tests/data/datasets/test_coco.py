import json
import logging

import numpy as np
import pycocotools.mask as mask_util
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.coco import load_coco_json
from hypothesis import given, settings
from hypothesis import strategies as st

from d2ft.data import class_names, load_coco_instances, register_coco_instances
from d2ft.errors import UserError

REAL = {
    "coco_train": ("coco/annotations/instances_train2017.json", "coco/train2017", 30, 266),
    "coco_val": ("coco/annotations/instances_val2017.json", "coco/val2017", 20, 140),
    "fruits_nuts": ("fruits_nuts/data/trainval.json", "fruits_nuts/data/images", 18, 165),
}
TRIANGLE = [1.0, 1.0, 9.0, 1.0, 9.0, 9.0]


def annotation(**changes):
    sound = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 8, 8], "iscrowd": 0}
    return {**sound, **changes}


def content(annotations=(), categories=((1, "cat"),), **changes):
    return {
        "images": [{"id": 1, "file_name": "a.jpg", "height": 30, "width": 40}],
        "annotations": list(annotations),
        "categories": [{"id": number, "name": name} for number, name in categories],
        **changes,
    }


def load(tmp_path, written):
    file = tmp_path / "instances.json"
    file.write_text(written if isinstance(written, str) else json.dumps(written))
    return load_coco_instances(file, tmp_path)


@pytest.mark.parametrize("name", REAL)
def test_the_records_are_those_of_detectron2(real_data, name):
    json_file, images, *_ = REAL[name]
    theirs = load_coco_json(str(real_data / json_file), str(real_data / images), "my_set")
    for annotation in (a for record in theirs for a in record["annotations"]):
        segmentation = annotation["segmentation"]
        if isinstance(segmentation, dict):  # pycocotools gives bytes; both are read
            segmentation["counts"] = segmentation["counts"].decode("ascii")
    assert load_coco_instances(real_data / json_file, real_data / images) == theirs


@pytest.mark.parametrize("name", REAL)
def test_nothing_of_a_real_file_is_lost(real_data, name):
    json_file, images, num_images, num_annotations = REAL[name]
    raw = json.loads((real_data / json_file).read_bytes())
    records = load_coco_instances(real_data / json_file, real_data / images)
    assert len(records) == len(raw["images"]) == num_images
    assert sum(len(r["annotations"]) for r in records) == len(raw["annotations"]) == num_annotations
    labelled = {row["image_id"] for row in raw["annotations"]}
    assert {r["image_id"] for r in records if r["annotations"]} == labelled
    crowds = sum(row["iscrowd"] for row in raw["annotations"])
    assert sum(a["iscrowd"] for r in records for a in r["annotations"]) == crowds


def test_the_first_use_writes_the_classes_and_their_ids(real_data):
    json_file, images, *_ = REAL["coco_val"]
    register_coco_instances("my_coco", real_data / json_file, real_data / images)
    assert len(class_names("my_coco")) == 80
    ids = MetadataCatalog.get("my_coco").thing_dataset_id_to_contiguous_id
    assert (ids[1], ids[90]) == (0, 79)
    assert len(DatasetCatalog.get("my_coco")) == 20


def test_given_classes_are_known_before_the_file_is_read(tmp_path):
    register_coco_instances("my_coco", tmp_path / "later.json", tmp_path, ["cat", "dog"])
    assert class_names("my_coco") == ("cat", "dog")
    (tmp_path / "later.json").write_text(json.dumps(content(categories=((0, "dog"), (7, "cat")))))
    with pytest.raises(
        UserError, match=r"classes cat, dog, but .*order of their ids, are dog, cat"
    ):
        DatasetCatalog.get("my_coco")


def test_category_ids_may_have_gaps_begin_at_0_and_stand_in_any_order(tmp_path):
    rows = [annotation(id=n, category_id=c) for n, c in ((1, 7), (2, 0), (3, 3))]
    (record,) = load(tmp_path, content(rows, ((7, "c"), (0, "a"), (3, "b"))))
    assert [a["category_id"] for a in record["annotations"]] == [2, 0, 1]


def test_uncompressed_run_lengths_are_compressed(tmp_path):
    mask = np.zeros((30, 40), np.uint8)
    mask[3:9, 5:20] = 1
    column = mask.T.ravel()
    edges = np.flatnonzero(np.diff(column)) + 1
    counts = np.diff([0, *edges, column.size]).tolist()
    rle = {"size": [30, 40], "counts": counts}
    (record,) = load(tmp_path, content([annotation(segmentation=rle, iscrowd=1)]))
    assert np.array_equal(mask_util.decode(record["annotations"][0]["segmentation"]), mask)


def test_keypoints_are_coordinates_as_detectron2_has_them(tmp_path):
    (record,) = load(tmp_path, content([annotation(keypoints=[3, 4, 2, 0, 0, 0])]))
    assert record["annotations"][0]["keypoints"] == [3.5, 4.5, 2, 0.5, 0.5, 0]


def test_an_empty_segmentation_is_a_box_alone(tmp_path):
    (record,) = load(tmp_path, content([annotation(segmentation=[])]))
    assert "segmentation" not in record["annotations"][0]


def test_the_annotation_id_that_coco_cannot_match_is_told(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    load(tmp_path, content([annotation(id=0)]))
    assert "an annotation has the id 0" in caplog.text


SMALL_RLE = {"size": [3, 4], "counts": [12]}
ODD = [1, 1, 2, 2, 3, 3, 4]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_id": 5}, "annotation 1 has the image_id 5, but the file has no such image"),
        ({"category_id": 5}, "annotation 1 has the category_id 5, but the file has no such"),
        ({"category_id": [1]}, r"has the category_id \[1\]"),
        ({"bbox": [1, 1, -8, 8]}, r"annotation 1 has the bbox \[1, 1, -8, 8\]"),
        ({"bbox": [1, 1, float("nan"), 8]}, "has the bbox .*nan"),
        ({"bbox": [1, 1, 10**400, 8]}, "annotation 1 has the bbox"),
        ({"bbox": []}, r"has the bbox \[\]"),
        ({"bbox": None}, "has the bbox None"),
        ({"segmentation": [TRIANGLE, [1, 1, 2, 2]]}, "annotation 1 .*number 2, of 4 numbers"),
        ({"segmentation": [ODD]}, "annotation 1 .*number 1, of 7 numbers"),
        ({"segmentation": [[1, 1, 2, 2, 3, "x"]]}, "number 1, that is no list of finite numbers"),
        ({"segmentation": "x"}, "neither a list of polygons nor an RLE"),
        ({"segmentation": SMALL_RLE}, r"annotation 1 has the size \[3, 4\], and its image"),
        ({"segmentation": {"size": [30, 40], "counts": [5, 5]}}, "do not add up to the 1200"),
        ({"segmentation": {"size": [30, 40], "counts": "z"}}, "no compressed run lengths"),
        ({"iscrowd": 2}, "has iscrowd 2"),
        ({"ignore": 1}, "is marked 'ignore'"),
        ({"keypoints": [1, 2]}, "keypoints that are not x, y and visibility"),
        ({"id": "a"}, "annotation number 1 has the id 'a'"),
    ],
)
def test_a_broken_annotation_is_refused_by_its_id(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        load(tmp_path, content([annotation(**changes)]))


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("{", "is not JSON: .*line 1"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "has no list of images"),
        ('{"images": [1]}', "has no list of images"),
        (content([annotation(), annotation()]), "the annotation id 1 comes twice"),
        (content(categories=((1, "a"), (1, "b"))), "the category id 1 comes twice"),
        (content(categories=()), "has no category"),
        (content(categories=((1, ""),)), "category 1 has no name"),
        (
            content(categories=((1, "cat"), (4, "cat"))),
            "categories 1 and 4 are both named 'cat'. Rename one, or remove one and give",
        ),
        (content(images=[{"id": 1, "file_name": "a"}]), "image 1 has height None and width None"),
        (content(images=[{"id": 1, "height": 1, "width": 1}]), "image 1 has no file_name"),
    ],
)
def test_a_broken_file_is_refused(tmp_path, written, message):
    with pytest.raises(UserError, match=message):
        load(tmp_path, written)


def test_files_that_are_not_there_are_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.json cannot be read"):
        load_coco_instances(tmp_path / "nowhere.json", tmp_path)
    (tmp_path / "a.json").write_text(json.dumps(content()))
    with pytest.raises(UserError, match=r"the folder .*images with the images of .*a\.json"):
        load_coco_instances(tmp_path / "a.json", tmp_path / "images")


numbers = st.floats(0, 30, allow_nan=False)
polygons = st.lists(
    st.integers(3, 6).flatmap(lambda n: st.lists(numbers, min_size=2 * n, max_size=2 * n)),
    max_size=2,
)
objects = st.tuples(
    st.lists(numbers, min_size=4, max_size=4), polygons, st.integers(0, 1), st.sampled_from([2, 9])
)


@settings(max_examples=50, deadline=None)
@given(images=st.dictionaries(st.integers(0, 99), st.lists(objects, max_size=3), max_size=4))
def test_what_was_written_is_read(tmp_path_factory, images):
    rows = [
        {"image_id": image, "bbox": b, "segmentation": p, "iscrowd": crowd, "category_id": c}
        for image, found in images.items()
        for b, p, crowd, c in found
    ]
    written = content(
        [{**row, "id": number} for number, row in enumerate(rows, start=1)],
        ((9, "dog"), (2, "cat")),
        images=[{"id": i, "file_name": f"{i}.jpg", "height": 30, "width": 40} for i in images],
    )
    read = {
        record["image_id"]: [
            (a["bbox"], a.get("segmentation", []), a["iscrowd"], (2, 9)[a["category_id"]])
            for a in record["annotations"]
        ]
        for record in load(tmp_path_factory.mktemp("coco"), written)
    }
    assert read == images
    assert list(read) == sorted(images)
