import logging
import random
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from d2ft.data import load_wider_face_instances
from d2ft.data.cache import warn_once
from d2ft.errors import UserError

FACE = "10 5 20 10 0 0 0 0 0 0"
INVALID = "40 5 20 10 0 0 0 1 0 0"


def _write(root, text, names=("0--Parade/a.jpg",)):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (100, 50)).save(root / name)
    annotations = root / "gt.txt"
    annotations.write_text(text, encoding="utf-8")
    return root, annotations


def _xml(body, folder="0--Parade"):
    return f"<annotation><folder>{folder}</folder>{body}</annotation>"


def _object(box, difficult=0, name="face"):
    corners = "".join(
        f"<{key}>{value}</{key}>"
        for key, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
    )
    return (
        f"<object><name>{name}</name><difficult>{difficult}</difficult>"
        f"<bndbox>{corners}</bndbox></object>"
    )


@pytest.mark.parametrize(("split", "images"), [("train", 20), ("val", 13)])
def test_real_images_have_the_faces_of_the_text_file(real_data, split, images):
    root = real_data / "widerface"
    text = root / f"wider_face_split/wider_face_{split}_bbx_gt.txt"
    rows = [line.split() for line in text.read_text().splitlines()]
    faces = [row for row in rows if len(row) == 10 and "0" not in row[2:4]]
    records = load_wider_face_instances(root / f"WIDER_{split}/images", text)
    assert len(records) == images
    annotations = [a for record in records for a in record["annotations"]]
    assert len(annotations) == len(faces)
    assert sum(a["ignore"] for a in annotations) == sum(row[7] == "1" for row in faces)


@pytest.mark.parametrize("empty", ["0\n0 0 0 0 0 0 0 0 0 0\n", "0\n"])
def test_image_without_faces_is_read_in_both_forms(tmp_path, empty):
    names = ("0--Parade/a.jpg", "1--B/b c ü.jpg")
    text = f"{names[0]}\n{empty}{names[1]}\n2\n{FACE}\n{INVALID}\n"
    first, second = load_wider_face_instances(*_write(tmp_path, text, names))
    assert first["annotations"] == []
    assert second["image_id"] == "1--B/b c ü"
    assert [a["bbox"] for a in second["annotations"]] == [[10, 5, 30, 15], [40, 5, 60, 15]]
    assert [(a["ignore"], a["iscrowd"]) for a in second["annotations"]] == [(0, 0), (1, 1)]


def test_boxes_without_area_are_dropped_and_counted_on_cached_loads_too(tmp_path, caplog):
    text = f"0--Parade/a.jpg\n3\n{FACE}\n10 5 0 10 0 0 0 0 0 0\n90 5 20 10 0 0 0 0 0 0\n"
    place = _write(tmp_path, text)
    for _ in range(2):
        caplog.clear()
        warn_once.cache_clear()  # as in another process
        with caplog.at_level(logging.WARNING):
            (record,) = load_wider_face_instances(*place)
        assert "1 boxes have no area in the image and were dropped, 1 were clipped" in caplog.text
    assert len(record["annotations"]) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0--Parade/a.jpg\nx\n", "line 2: expected the number of faces"),
        ("0--Parade/a.jpg\n2\n" + FACE, "line 4: a face of 0--Parade/a.jpg has 0 fields"),
        ("0--Parade/a.jpg\n1\n1 2 -3 4 0 0 0 0 0 0", "line 3: .* has a negative size"),
        ("0--Parade/a.jpg\n1\n1 2 nan 4 0 0 0 0 0 0", "line 3: .* not finite"),
        ("0--Parade/a.jpg\n1\n1 2 x 4 0 0 0 0 0 0", "line 3: .* not a number"),
        (f"0--Parade/a.jpg\n1\n{FACE}\n{FACE}", "line 4: expected the path of an image"),
        (f"0--Parade/a.jpg\n1\n{FACE}\n" * 2, "line 4: names 0--Parade/a.jpg twice"),
        ("0--Parade/z.jpg\n0\n", "names the image .*z.jpg, which does not exist"),
        ("z" * 300 + ".jpg\n0\n", "names the image .*z.jpg, which does not exist"),
        ("", "names no image"),
    ],
)
def test_malformed_text_is_named(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        load_wider_face_instances(*_write(tmp_path, text))


def test_layout_of_mmdetection_is_read(tmp_path):
    place = _write(tmp_path, "a\n")
    (tmp_path / "Annotations").mkdir()
    xml = tmp_path / "Annotations/a.xml"
    xml.write_text(_xml(_object((1, 2, 30, 40)) + _object((5, 5, 9, 9), difficult=1)))
    (record,) = load_wider_face_instances(*place)
    assert record["image_id"] == "0--Parade/a"
    assert [(a["bbox"], a["ignore"]) for a in record["annotations"]] == [
        ([1, 2, 30, 40], 0),
        ([5, 5, 9, 9], 1),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<annotation>", "cannot be read as XML"),
        (_xml("", folder=""), "has no folder"),
        (_xml(_object((1, 2, 3, 4), name="cat")), "object 1: is 'cat'"),
        (_xml(_object((9, 2, 3, 4))), "object 1: has the box"),
        (_xml(_object((1, 2, "nan", 4))), "object 1: has the box"),
        (_xml(_object((1, 2, 3, 4), difficult="x")), "object 1: difficult is 0 or 1, got 'x'"),
        (_xml("", folder="1--B"), "names the image .*1--B/a.jpg, which does not exist"),
    ],
)
def test_malformed_xml_is_named(tmp_path, text, message):
    place = _write(tmp_path, "a\n")
    (tmp_path / "Annotations").mkdir()
    (tmp_path / "Annotations/a.xml").write_text(text)
    with pytest.raises(UserError, match=rf"a\.xml.*{message}"):
        load_wider_face_instances(*place)


def test_empty_image_file_is_named(tmp_path):
    place = _write(tmp_path, f"0--Parade/a.jpg\n1\n{FACE}\n")
    (tmp_path / "0--Parade/a.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"a\.jpg is broken"):
        load_wider_face_instances(*place)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 49),
            st.integers(0, 24),
            st.integers(1, 50),
            st.integers(1, 25),
            st.integers(0, 1),
        )
    )
)
def test_written_scene_reads_back(scene):
    faces = [f"{x} {y} {w} {h} 0 0 0 {invalid} 0 0" for x, y, w, h, invalid in scene]
    text = "\n".join(["0--Parade/a.jpg", str(len(faces)), *faces])
    with tempfile.TemporaryDirectory() as folder:
        (record,) = load_wider_face_instances(*_write(Path(folder), text))
    read = [(*a["bbox"], a["ignore"]) for a in record["annotations"]]
    assert read == [(x, y, x + w, y + h, invalid) for x, y, w, h, invalid in scene]


def test_mutated_files_load_or_are_refused(tmp_path):
    rng = random.Random(0)
    source = f"0--Parade/a.jpg\n2\n{FACE}\n{INVALID}\n".encode()
    root, annotations = _write(tmp_path, "")
    outcomes = Counter()
    for _ in range(100):
        data = bytearray(source)
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(len(data))] = rng.choice(b"0123456789. -x\n\xff")
        annotations.write_bytes(data)
        try:
            load_wider_face_instances(root, annotations)
            outcomes["loaded"] += 1
        except UserError as error:
            message = str(error)
            outcomes["unnamed"] += "gt.txt" not in message
            outcomes["refused"] += 1
    assert outcomes["unnamed"] == 0
    assert min(outcomes["loaded"], outcomes["refused"]) > 3
