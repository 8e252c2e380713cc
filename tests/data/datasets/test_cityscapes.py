import json
import shutil

import numpy as np
import pycocotools.mask as mask_util
import pytest
from detectron2.structures import BoxMode
from PIL import Image

from d2ft.data import load_cityscapes_instances
from d2ft.errors import UserError
from d2ft.labels import CITYSCAPES_INSTANCE_CLASSES
from tests.factories import write_cityscapes

LABEL_IDS = dict(zip((24, 25, 26, 27, 28, 31, 32, 33), CITYSCAPES_INSTANCE_CLASSES, strict=True))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_cityscapes(tmp_path_factory.mktemp("datasets"))


@pytest.fixture
def root(written, tmp_path):
    """Return a copy that a test may damage."""
    shutil.copytree(written / "cityscapes", tmp_path / "cityscapes")
    return tmp_path / "cityscapes"


def _load(root, split="train"):
    return load_cityscapes_instances(root / "leftImg8bit" / split, root / "gtFine" / split)


def _official_instances(path):
    """Return {id: mask} of what the instance task counts, straight from the official image."""
    ids = np.array(Image.open(path))
    values = [int(v) for v in np.unique(ids) if (v if v < 1000 else v // 1000) in LABEL_IDS]
    return {value: ids == value for value in values}


def _assert_masks_are_the_official_instances(records):
    for record in records:
        official = _official_instances(record["instance_file_name"])
        assert len(record["annotations"]) == len(official)
        for annotation, (value, mask) in zip(record["annotations"], official.items(), strict=True):
            assert np.array_equal(mask_util.decode(annotation["segmentation"]).astype(bool), mask)
            label_id = value if value < 1000 else value // 1000
            class_name = CITYSCAPES_INSTANCE_CLASSES[annotation["category_id"]]
            assert class_name == LABEL_IDS[label_id]
            assert annotation["iscrowd"] == (value < 1000)
            ys, xs = np.nonzero(mask)
            assert annotation["bbox"] == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
            assert annotation["bbox_mode"] is BoxMode.XYXY_ABS


def test_masks_equal_the_official_instances_pixel_by_pixel(root):
    records = _load(root)
    assert len(records) == 4
    assert sum(len(record["annotations"]) for record in records) > 10
    _assert_masks_are_the_official_instances(records)


def test_groups_are_crowd(root):
    ids_path = next((root / "gtFine" / "train").glob("*/*_instanceIds.png"))
    ids = np.array(Image.open(ids_path))
    ids[:20, :30] = 26  # cargroup
    Image.fromarray(ids).save(ids_path)
    (record,) = [r for r in _load(root) if r["instance_file_name"] == str(ids_path)]
    group = record["annotations"][0]
    assert (group["iscrowd"], group["bbox"], group["category_id"]) == (1, [0, 0, 30, 20], 2)


def test_frames_without_an_instance_are_kept(root):
    ids_path = next((root / "gtFine" / "val").glob("*/*_instanceIds.png"))
    Image.fromarray(np.full((64, 128), 7, np.uint16)).save(ids_path)
    records = _load(root, "val")
    assert sorted(bool(record["annotations"]) for record in records) == [False, True]


def test_caravans_and_trailers_are_left_out(root):
    ids_path = next((root / "gtFine" / "val").glob("*/*_instanceIds.png"))
    ids = np.full((64, 128), 29, np.uint16)
    ids[:, :30], ids[:, 30:60], ids[:, 60:70] = 29001, 30000, 33002
    Image.fromarray(ids).save(ids_path)
    (record,) = [r for r in _load(root, "val") if r["instance_file_name"] == str(ids_path)]
    assert [annotation["category_id"] for annotation in record["annotations"]] == [7]


def test_names_are_the_frames_and_come_in_order(root):
    names = [record["image_id"] for record in _load(root)]
    assert names == sorted(names)
    assert all(name.count("_") == 2 for name in names)


def test_missing_instance_images_are_drawn_from_the_polygons(root):
    expected = _load(root)
    for path in (root / "gtFine").glob("*/*/*_instanceIds.png"):
        path.unlink()
    derived = _load(root)
    assert [r["annotations"] for r in derived] == [r["annotations"] for r in expected]
    _assert_masks_are_the_official_instances(derived)
    assert not list((root / "gtFine").glob("*/*/*_instanceIds.png"))


def test_polygons_that_changed_are_drawn_again(root):
    for path in (root / "gtFine").glob("*/*/*_instanceIds.png"):
        path.unlink()
    _load(root)
    polygons = next((root / "gtFine" / "train").glob("*/*_polygons.json"))
    content = json.loads(polygons.read_text())
    content["objects"] = [{"label": "bus", "polygon": [[0, 0], [9, 0], [9, 9], [0, 9]]}]
    polygons.write_text(json.dumps(content))
    name = polygons.name.removesuffix("_gtFine_polygons.json")
    (record,) = [r for r in _load(root) if r["image_id"] == name]
    assert [a["bbox"] for a in record["annotations"]] == [[0, 0, 10, 10]]


@pytest.mark.parametrize("content", ["{", '{"imgWidth": 1}', '{"objects": [1]}', ""])
def test_broken_polygons_are_named(root, content):
    polygons = next((root / "gtFine" / "train").glob("*/*_polygons.json"))
    polygons.with_name(polygons.name.replace("polygons.json", "instanceIds.png")).unlink()
    polygons.write_text(content)
    with pytest.raises(UserError, match=f"cannot draw the instances of .*{polygons.name}"):
        _load(root)


def test_an_unknown_label_in_the_polygons_does_not_end_the_process(root):
    polygons = next((root / "gtFine" / "train").glob("*/*_polygons.json"))
    polygons.with_name(polygons.name.replace("polygons.json", "instanceIds.png")).unlink()
    content = json.loads(polygons.read_text())
    content["objects"] = [{"label": "hovercraft", "polygon": [[0, 0], [9, 0], [9, 9]]}]
    polygons.write_text(json.dumps(content))
    with pytest.raises(UserError, match="cannot draw the instances of"):
        _load(root)


def test_a_missing_folder_is_named_with_the_variable_that_leads_there(tmp_path):
    with pytest.raises(UserError, match="leftImg8bit/train does not exist.*DETECTRON2_DATASETS"):
        _load(tmp_path)


def test_a_folder_without_images_is_an_error(tmp_path):
    for folder in ("leftImg8bit", "gtFine"):
        (tmp_path / folder / "train" / "aachen").mkdir(parents=True)
    with pytest.raises(UserError, match="no image .*leftImg8bit.png was found"):
        _load(tmp_path)


def test_a_frame_without_labels_is_named(root):
    ids = next((root / "gtFine" / "train").glob("*/*_instanceIds.png"))
    ids.unlink()
    ids.with_name(ids.name.replace("instanceIds.png", "polygons.json")).unlink()
    with pytest.raises(UserError, match=f"1 of 4 frames .* have no labels: neither .*{ids.name}"):
        _load(root)


@pytest.mark.parametrize("kind", ["instance image", "image"])
@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "flipped bit"])
def test_a_broken_png_is_named(root, kind, damage):
    folder = "gtFine" if kind == "instance image" else "leftImg8bit"
    pattern = "*_instanceIds.png" if kind == "instance image" else "*.png"
    path = next((root / folder / "train").glob(f"*/{pattern}"))
    content = bytearray(path.read_bytes())
    if damage == "flipped bit":
        content[len(content) // 2] ^= 0x10
    path.write_bytes(
        {"truncated": content[: len(content) // 2], "empty": b"", "text": b"<html>"}.get(
            damage, content
        )
    )
    with pytest.raises(UserError, match=f"the {kind} .*{path.name} is broken"):
        _load(root)


def test_labels_of_another_size_than_the_image_are_an_error(root):
    ids = next((root / "gtFine" / "train").glob("*/*_instanceIds.png"))
    Image.fromarray(np.zeros((64, 100), np.uint16)).save(ids)
    with pytest.raises(UserError, match=f"{ids.name} has 100x64 pixels, but its image .* 128x64"):
        _load(root)


def test_a_colour_picture_in_the_place_of_the_labels_is_refused(root):
    ids = next((root / "gtFine" / "train").glob("*/*_instanceIds.png"))
    Image.new("RGB", (128, 64)).save(ids)
    with pytest.raises(UserError, match="is not an instance image"):
        _load(root)


def test_a_frame_added_later_is_found(root):
    assert len(_load(root, "val")) == 2
    for folder, suffix in (("leftImg8bit", "leftImg8bit"), ("gtFine", "gtFine_instanceIds")):
        path = next((root / folder / "val").glob(f"*/*_{suffix}.png"))
        path.with_name(f"{path.parent.name}_999999_000019_{suffix}.png").write_bytes(
            path.read_bytes()
        )
    assert len(_load(root, "val")) == 3


def test_on_the_real_label_sets_masks_equal_the_official_instances(real_data, tmp_path):
    cityscapes = real_data / "cityscapes"
    records = _load(cityscapes) + _load(cityscapes, "val")
    # Labels without their images: blank ones take their place.
    labels = real_data / "cityscapes_labels_only" / "gtFine" / "val"
    for ids in labels.glob("*/*_instanceIds.png"):
        city = tmp_path / ids.parent.name
        city.mkdir(exist_ok=True)
        name = ids.name.replace("gtFine_instanceIds", "leftImg8bit")
        Image.new("L", (2048, 1024)).save(city / name)
    records += load_cityscapes_instances(tmp_path, labels)
    assert len(records) == 14
    _assert_masks_are_the_official_instances(records)
