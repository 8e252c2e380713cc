"""
Damaged annotation files: each is refused by name, or loads as dicts that can be used.

By hand with more of them:
D2FT_FUZZ_FILES=2000 python -m pytest -m slow tests/data/datasets/test_fuzz.py
"""

import math
import os
import random
import shutil

import pycocotools.mask as mask_util
import pytest

from d2ft.data import load_coco_instances, load_voc_instances
from d2ft.errors import UserError

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


def _run(originals, path, load):
    source = random.Random(0)
    loaded, messages = 0, []
    for number in range(FILES):
        path.write_bytes(_mutate(originals[number % len(originals)], source))
        try:
            records = load()
        except UserError as error:
            messages.append(str(error))
            continue
        loaded += 1
        _assert_usable(records)
    assert loaded and messages
    assert [message for message in messages if path.stem not in message] == []


@pytest.mark.slow
@pytest.mark.ci
def test_damaged_xml_files_end_in_a_clean_error_or_load(real_data, tmp_path):
    for folder in ("JPEGImages", "SegmentationObject"):
        (tmp_path / folder).mkdir()
    name = "2007_000063"
    shutil.copy(real_data / f"voc_samples/JPEGImages/{name}.jpg", tmp_path / "JPEGImages")
    masks = real_data / f"voc_samples/SegmentationObject/{name}.png"
    shutil.copy(masks, tmp_path / "SegmentationObject")
    (tmp_path / "ImageSets/Main").mkdir(parents=True)
    (tmp_path / "ImageSets/Main/train.txt").write_text(name)
    (tmp_path / "Annotations").mkdir()
    xmls = [real_data / f"voc_samples/Annotations/{n}.xml" for n in (name, "2011_003353")]
    xmls += sorted((real_data / "VOC_BCCD/VOCdevkit/VOC2007/Annotations").glob("*.xml"))[:4]
    _run(
        [xml.read_bytes() for xml in xmls],
        tmp_path / f"Annotations/{name}.xml",
        lambda: load_voc_instances(tmp_path, "train", None),
    )


@pytest.mark.slow
@pytest.mark.ci
def test_damaged_json_files_end_in_a_clean_error_or_load(real_data, tmp_path):
    names = ("coco/annotations/instances_val2017.json", "fruits_nuts/data/trainval.json")
    path = tmp_path / "instances.json"
    originals = [(real_data / name).read_bytes() for name in names]
    _run(originals, path, lambda: load_coco_instances(path, tmp_path))
