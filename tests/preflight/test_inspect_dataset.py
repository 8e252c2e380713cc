import json
import os
import runpy
import shutil
import sys

import numpy as np
import pytest
from detectron2.structures import BoxMode
from PIL import Image

from d2ft.config import get_cfg
from d2ft.data import register_instances
from d2ft.errors import UserError
from d2ft.preflight.check_dataset import load_records
from d2ft.preflight.inspect_dataset import format_report, inspect_datasets, table_of_records
from d2ft.preflight.run import check_config_and_data
from tests.factories import PROJECT


def picture(height=40, width=60, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def record(path, *, height=40, width=60, image_id=None, box=(1, 2, 30, 20)):
    annotation = {"bbox": list(box), "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
    return {
        "file_name": str(path),
        "image_id": image_id or os.path.basename(path),
        "height": height,
        "width": width,
        "annotations": [annotation] * 10,
    }


def inspect(train, val=(), *, decode=False):
    register_instances("train", lambda: list(train), thing_classes=["cat"])
    register_instances("val", lambda: list(val), thing_classes=["cat"])
    report = inspect_datasets(
        get_cfg(), load_records, ["train"], ["val"] if val else [], decode=decode
    )
    return report, {f["code"]: f for f in report["findings"] if f["code"] != "instances-small"}


def save(path, image, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def test_missing_empty_and_broken_files_and_links_are_told_apart(tmp_path):
    good = save(tmp_path / "good.png", picture())
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "page.jpg").write_text("<html>")
    (tmp_path / "link.png").symlink_to("nowhere.png")
    (tmp_path / "folder.png").mkdir()
    names = ["gone.png", "empty.jpg", "page.jpg", "link.png", "folder.png"]

    report, _ = inspect([record(good), *(record(tmp_path / name) for name in names)])

    messages = "\n".join(f["message"] for f in report["findings"] if f["level"] == "error")
    for problem, name in (
        ("does not exist", "gone.png"),
        ("has 0 bytes", "empty.jpg"),
        ("is no image that Pillow can read", "page.jpg"),
        ("is a link to nowhere.png, which does not exist", "link.png"),
        ("is a folder", "folder.png"),
    ):
        assert f"1 of 6 images: the file {problem}: {tmp_path / name}" in messages
    assert "good.png" not in messages


def test_broken_pixels_are_found_by_decoding(tmp_path):
    path = save(tmp_path / "cut.jpg", picture(200, 300))
    path.write_bytes(path.read_bytes()[:-3000])
    records = [record(path, height=200, width=300)]
    assert "file-unreadable" not in inspect(records)[1]
    assert "cut.jpg" in inspect(records, decode=True)[1]["file-unreadable"]["message"]


def test_an_image_that_exif_turns_is_an_error_if_annotated_as_stored(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = save(tmp_path / "photo.jpg", picture(), exif=exif)
    _, found = inspect([record(path)])
    assert "photo.jpg (60x40, read as 40x60)" in found["image-turned"]["message"]
    assert not inspect([record(path, height=60, width=40)])[1]


def test_another_size_than_annotated_is_an_error(tmp_path):
    path = save(tmp_path / "small.png", picture(20, 30))
    _, found = inspect([record(path)])
    assert "small.png (60x40, read as 30x20)" in found["image-size"]["message"]


@pytest.mark.parametrize(
    ("mode", "suffix", "code", "level"),
    [
        ("L", "png", "image-kind", "note"),
        ("P", "png", "image-kind", "note"),
        ("RGBA", "png", "image-kind", "note"),
        ("CMYK", "jpg", "image-cmyk", "warning"),
        ("I;16", "png", "image-16-bit", "error"),
        ("I;16", "tif", "image-16-bit", "error"),
    ],
)
def test_kinds_of_images_are_reported(mode, suffix, code, level, tmp_path):
    deep = np.arange(2400, dtype=np.uint16).reshape(40, 60) * 20
    image = Image.fromarray(deep) if mode == "I;16" else picture().convert(mode)
    path = save(tmp_path / f"image.{suffix}", image)
    _, found = inspect([record(path)], decode=True)
    assert list(found) == [code]
    assert found[code]["level"] == level
    assert path.name in found[code]["message"]


@pytest.mark.parametrize("name", ["with space.png", "größe 猫.png", "a'b\"c.png"])
def test_any_name_of_a_file_is_good(name, tmp_path):
    path = save(tmp_path / "sub dir" / name, picture())
    link = tmp_path / f"link to {name}"
    link.symlink_to(path)
    for file in (path, link):
        assert not inspect([record(file)], decode=True)[1]


def test_images_of_both_sets_are_found_by_content_and_compared_by_labels(tmp_path):
    first = save(tmp_path / "a.png", picture(seed=1))
    second = save(tmp_path / "b.png", picture(seed=2))
    other = save(tmp_path / "c.png", picture(seed=3))
    copies = [shutil.copy(path, tmp_path / f"copy_{path.name}") for path in (first, second)]
    val = [record(copies[0]), record(copies[1], box=(3, 3, 9, 9)), record(other)]

    _, found = inspect([record(first), record(second)], val)

    assert set(found) == {"leak-labels", "leak-image"}
    assert f"{copies[0]} = {first}" in found["leak-labels"]["message"]
    assert f"{copies[1]} = {second}" in found["leak-image"]["message"]
    assert found["leak-image"]["level"] == "error"


def test_a_set_that_cannot_be_loaded_does_not_hide_the_others(tmp_path):
    path = save(tmp_path / "a.png", picture())
    register_instances("train", list, thing_classes=["cat"])
    register_instances("val", lambda: [record(path)], thing_classes=["cat"])
    report = inspect_datasets(get_cfg(), load_records, ["train"], ["val", "trian"])
    assert list(report["datasets"]) == ["val"]
    messages = [f["message"] for f in report["findings"] if f["code"] == "not-loadable"]
    assert "holds no image" in messages[0]
    assert "Did you mean 'train'?" in messages[1]


def test_boxes_are_read_in_both_modes():
    both = record("a.png")
    xywh = {"bbox": [1, 2, 29, 18], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0}
    both["annotations"] = [both["annotations"][0], xywh]
    register_instances("set", lambda: [both], thing_classes=["cat"])
    boxes = table_of_records("set", [both], is_test=False).boxes
    assert boxes.tolist() == [[1, 2, 30, 20]] * 2
    xywh["bbox"] = [1, 2, 3]
    with pytest.raises(UserError, match=r"a\.png has an annotation without a bbox of four"):
        table_of_records("set", [both], is_test=False)


def test_a_run_with_missing_files_is_refused_before_it_starts(tmp_path):
    path = save(tmp_path / "a.png", picture())
    cfg = get_cfg()
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("train",), ("val",)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.MODEL.DEVICE = 1, "cpu"
    cfg.INPUT.MIN_SIZE_TEST = 20
    for name in ("train", "val"):
        register_instances(name, lambda: [record(path)], thing_classes=["cat"])
    found = json.loads(json.dumps(check_config_and_data(cfg)))["findings"]
    assert [f["code"] for f in found if f["dataset"] == "train"] == ["instances-small"]

    path.unlink()
    with pytest.raises(
        UserError, match=r"'train': 1 of 1 images: the file does not exist: .*a.png"
    ):
        check_config_and_data(cfg)


def test_tool_writes_json_and_fails_on_errors_alone(tmp_path, monkeypatch, capsys):
    path = save(tmp_path / "a.png", picture().convert("L"))
    target = tmp_path / "new" / "report.json"
    arguments = ["check_dataset.py", "train", "--output", str(target)]

    def run():
        register_instances("train", lambda: [record(path)], thing_classes=["cat", "dog"])
        monkeypatch.setattr(sys, "argv", arguments)
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(PROJECT / "tools/check_dataset.py"), run_name="__main__")
        return stop.value.code, capsys.readouterr().out

    code, shown = run()
    assert code == 0
    assert "0 errors" in shown
    report = json.loads(target.read_text())
    assert report["datasets"]["train"]["classes"] == {"cat": 10, "dog": 0}
    assert {f["code"] for f in report["findings"]} >= {"class-empty", "image-kind"}
    assert format_report(report) in shown

    path.unlink()
    code, shown = run()
    assert code == 1
    assert "-> put the files there" in shown
