import logging
import random
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from detectron2.structures import BoxMode
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from d2ft.data import load_kitti_instances, write_kitti_split
from d2ft.data.cache import warn_once
from d2ft.data.datasets.kitti import KITTI_CLASSES, KITTI_RAW_CLASSES
from d2ft.errors import UserError

REST = "1.5 1.6 3.7 0 1 20 0.1"
CAR = f"Car 0.25 1 -1.5 10 20 30.5 40 {REST}"


def _write(root, frames):
    for folder in ("image_2", "label_2"):
        (root / "training" / folder).mkdir(parents=True, exist_ok=True)
    for name, text in frames.items():
        Image.new("RGB", (100, 50)).save(root / "training" / "image_2" / f"{name}.png")
        (root / "training" / "label_2" / f"{name}.txt").write_text(text, encoding="utf-8")
    return root


def _counts(records):
    return Counter((a["kitti_type"], a["category_id"]) for r in records for a in r["annotations"])


def test_real_frames_have_the_objects_of_their_label_files(real_data):
    lines = [
        line.split()[0]
        for path in (real_data / "kitti/training/label_2").glob("*.txt")
        for line in path.read_text().splitlines()
    ]
    raw = Counter(lines)
    three = _counts(load_kitti_instances(real_data / "kitti"))
    assert three == Counter(
        {
            ("Car", 0): raw["Car"],
            ("Van", 0): raw["Van"],
            ("Pedestrian", 1): raw["Pedestrian"],
            **{("DontCare", c): raw["DontCare"] for c in range(3)},
        }
    )
    eight = load_kitti_instances(real_data / "kitti", thing_classes=KITTI_RAW_CLASSES)
    for index, name in enumerate(KITTI_RAW_CLASSES):
        assert _counts(eight)[name, index] == raw[name]


def test_fields_of_an_object_are_kept(tmp_path):
    (record,) = load_kitti_instances(_write(tmp_path, {"000000": CAR}))
    assert (record["width"], record["height"], record["image_id"]) == (100, 50, "000000")
    assert record["annotations"] == [
        {
            "bbox": [10.0, 20.0, 30.5, 40.0],
            "bbox_mode": BoxMode.XYXY_ABS,
            "category_id": 0,
            "iscrowd": 0,
            "ignore": 0,
            "kitti_type": "Car",
            "truncated": 0.25,
            "occluded": 1,
        }
    ]


def test_clipped_and_dropped_boxes_are_counted_on_cached_loads_too(tmp_path, caplog):
    text = f"Car 0 0 0 90 20 120 40 {REST}\nCar 0 0 0 110 20 120 40 {REST}\n"
    _write(tmp_path, {"000000": text})
    for _ in range(2):
        caplog.clear()
        warn_once.cache_clear()  # as in another process
        with caplog.at_level(logging.WARNING):
            (record,) = load_kitti_instances(tmp_path)
        assert "1 boxes lie outside the image and were dropped, 1 were clipped" in caplog.text
    (annotation,) = record["annotations"]
    assert annotation["bbox"] == [90.0, 20.0, 100.0, 40.0]
    assert annotation["kitti_bbox"] == [90.0, 20.0, 120.0, 40.0]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("Car 0 0", "has 3 fields"),
        (CAR.replace("Car", "Cat"), "'Cat' is no type of KITTI"),
        (CAR.replace("30.5", "nan"), "not finite"),
        (CAR.replace("30.5", "5"), "has no area"),
        (CAR.replace("0.25", "2"), "truncation"),
        (CAR.replace("30.5", "x"), "could not convert"),
    ],
)
def test_malformed_line_is_named(tmp_path, line, message):
    _write(tmp_path, {"000000": f"{CAR}\n{line}\n"})
    with pytest.raises(UserError, match=rf"000000\.txt, line 2: .*{message}"):
        load_kitti_instances(tmp_path)


def test_split_file_chooses_frames(tmp_path):
    _write(tmp_path, {f"{i:06}": CAR for i in range(3)})
    split = tmp_path / "train.txt"
    split.write_text("000002\n000000\n")
    records = load_kitti_instances(tmp_path, split)
    assert [record["image_id"] for record in records] == ["000002", "000000"]
    split.write_text("000002\n000002\n")
    with pytest.raises(UserError, match="names 000002 twice"):
        load_kitti_instances(tmp_path, split)
    for name in ("000009", "9" * 300):
        split.write_text(f"{name}\n")
        message = rf"{name}\.png does not exist, but .*train\.txt names its frame"
        with pytest.raises(UserError, match=message):
            load_kitti_instances(tmp_path, split)


def test_written_split_is_seeded_and_holds_each_frame_once(tmp_path):
    names = [f"{i:06}" for i in range(10)]
    _write(tmp_path, dict.fromkeys(names, CAR))
    texts = []
    for folder in ("a", "b"):
        paths = write_kitti_split(tmp_path, tmp_path / folder, val_fraction=0.3, seed=1)
        texts.append([path.read_text().split() for path in paths])
    assert texts[0] == texts[1]
    assert len(texts[0][1]) == 3
    assert sorted(texts[0][0] + texts[0][1]) == names


def test_images_without_labels_are_counted(tmp_path, caplog):
    _write(tmp_path, {"000000": CAR, "000001": CAR})
    (tmp_path / "training/label_2/000001.txt").unlink()
    with caplog.at_level(logging.WARNING):
        assert len(load_kitti_instances(tmp_path)) == 1
    assert "1 images have no label file" in caplog.text


def test_empty_image_file_is_named(tmp_path):
    _write(tmp_path, {"000000": CAR})
    (tmp_path / "training/image_2/000000.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"000000\.png is broken"):
        load_kitti_instances(tmp_path)


def test_symlinks_and_unicode_names_with_spaces_are_followed(tmp_path):
    root = _write(tmp_path / "straße ü", {"bild 1 é": CAR})
    (tmp_path / "link").symlink_to(root)
    assert [r["image_id"] for r in load_kitti_instances(tmp_path / "link")] == ["bild 1 é"]


def test_unknown_class_is_refused(tmp_path):
    with pytest.raises(UserError, match="KITTI has no class 'Cat'"):
        load_kitti_instances(tmp_path, thing_classes=["Cat"])


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(KITTI_CLASSES),
            st.integers(0, 49),
            st.integers(0, 24),
            st.integers(1, 50),
            st.integers(1, 25),
        )
    )
)
def test_written_scene_reads_back(scene):
    lines = [f"{n} 0 0 0 {x} {y} {x + w} {y + h} {REST}" for n, x, y, w, h in scene]
    with tempfile.TemporaryDirectory() as folder:
        (record,) = load_kitti_instances(_write(Path(folder), {"000000": "\n".join(lines)}))
    read = [(KITTI_CLASSES[a["category_id"]], *a["bbox"]) for a in record["annotations"]]
    assert read == [(n, x, y, x + w, y + h) for n, x, y, w, h in scene]


def test_mutated_labels_load_or_are_refused(tmp_path):
    rng = random.Random(0)
    _write(tmp_path, {"000000": CAR})
    label = tmp_path / "training/label_2/000000.txt"
    source = f"{CAR}\nDontCare -1 -1 -10 1 2 30 40 -1 -1 -1 -1000 -1000 -1000 -10\n".encode()
    outcomes = Counter()
    for _ in range(100):
        data = bytearray(source)
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.choice(b"0123456789. -x\n\xff")
        label.write_bytes(data)
        try:
            load_kitti_instances(tmp_path)
            outcomes["loaded"] += 1
        except UserError as error:
            message = str(error)
            outcomes["unnamed"] += "000000.txt" not in message
            outcomes["refused"] += 1
    assert outcomes["unnamed"] == 0
    assert min(outcomes["loaded"], outcomes["refused"]) > 3
