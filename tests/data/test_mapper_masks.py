"""Samples with exact masks are those of Detectron2's mapper, whatever is done to the image."""

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.data import DatasetMapper
from detectron2.structures import BitMasks, BoxMode
from PIL import Image

from d2ft.config import get_cfg
from d2ft.data.mapper import FinetuneDatasetMapper
from d2ft.errors import UserError
from d2ft.structures.window_masks import WindowMasks

HEIGHT, WIDTH = 47, 61

AUGMENTATIONS = {
    "Detectron2's": [],
    "flips": [["RandomFlip", {"prob": 1.0}], ["RandomFlip", {"vertical": True, "horizontal": False}]],
    "crop": [["RandomCrop", {"crop_type": "absolute", "crop_size": [23, 31]}], "RandomFlip"],
    "scale and pad": [
        ["ResizeScale", {"min_scale": 0.3, "max_scale": 2.0, "target_height": 53, "target_width": 53}],
        ["FixedSizeCrop", {"crop_size": [53, 53]}],
        "RandomFlip",
    ],
    "odd sizes": [["Resize", {"shape": [31, 103]}], ["Resize", {"shape": [29, 17]}]],
    "colours": [["RandomBrightness", {"intensity_min": 0.5, "intensity_max": 1.5}], "RandomFlip"],
    "rotation": [["RandomRotation", {"angle": [-40, 40]}], "RandomFlip"],
    "extent": [["RandomExtent", {"scale_range": [0.4, 1.2], "shift_range": [0.2, 0.2]}]],
}  # fmt: skip


def _masks(rng):
    masks = np.zeros((7, HEIGHT, WIDTH), np.uint8)
    masks[0, 10:30, 20:45] = rng.random((20, 25)) < 0.7
    masks[1, 5, 6] = 1  # one pixel, which a smaller size may lose
    masks[2, HEIGHT - 1, WIDTH - 1] = masks[2, 0, 0] = 1
    masks[3, :, :] = 1
    masks[4, :, 17] = 1
    masks[5, 40:, :9] = 1
    return masks  # the last is empty


@pytest.fixture
def record(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "a.png"
    Image.fromarray(rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)).save(path)
    annotations = []
    for category, mask in enumerate(_masks(rng)):
        rle = mask_util.encode(np.asfortranarray(mask))
        x, y, width, height = mask_util.toBbox(rle).tolist()
        # Both ways in which Detectron2 meets compressed counts.
        counts = rle["counts"] if category % 2 else rle["counts"].decode()
        annotations.append(
            {
                "bbox": [x, y, x + width, y + height],
                "bbox_mode": BoxMode.XYXY_ABS,
                "category_id": category,
                "segmentation": {"size": [HEIGHT, WIDTH], "counts": counts},
                "iscrowd": int(category == 4),
            }
        )
    return {"file_name": str(path), "height": HEIGHT, "width": WIDTH, "annotations": annotations}


def _cfg(augmentations=()):
    cfg = get_cfg()
    cfg.MODEL.MASK_ON, cfg.INPUT.MASK_FORMAT = True, "bitmask"
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (33, 47, 71), 101
    cfg.INPUT.AUGMENTATIONS = list(augmentations)
    return cfg


def _stock_mapper(cfg):
    arguments = FinetuneDatasetMapper.from_config(cfg, is_train=True)
    del arguments["resize"]
    return DatasetMapper(**arguments)


def _assert_same_sample(ours, stock):
    assert torch.equal(ours["image"], stock["image"])
    found, expected = ours["instances"], stock["instances"]
    assert isinstance(found.gt_masks, WindowMasks)
    assert type(expected.gt_masks) is BitMasks
    assert torch.equal(found.gt_masks.tensor, expected.gt_masks.tensor)
    assert torch.equal(found.gt_boxes.tensor, expected.gt_boxes.tensor)
    assert torch.equal(found.gt_classes, expected.gt_classes)
    assert found.image_size == expected.image_size
    boxes = expected.gt_boxes.tensor + torch.linspace(-2, 2, 4)
    targets = [instances.gt_masks.crop_and_resize(boxes, 14) for instances in (found, expected)]
    assert torch.equal(*targets)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_samples_are_detectron2s(record, name):
    cfg = _cfg(AUGMENTATIONS[name])
    ours, stock = FinetuneDatasetMapper(cfg, is_train=True), _stock_mapper(cfg)
    for seed in range(12):
        np.random.seed(seed)
        sample = ours(record)
        np.random.seed(seed)
        _assert_same_sample(sample, stock(record))


def test_polygons_become_the_bitmaps_of_detectron2(record):
    shapes = [[3.2, 4.1, 30.5, 8.0, 22.0, 44.4], [40, 2, 60.9, 2, 60.9, 20, 40, 20]]
    record["annotations"] = record["annotations"][:2]
    record["annotations"][0]["segmentation"] = shapes
    cfg = _cfg()
    np.random.seed(3)
    sample = FinetuneDatasetMapper(cfg, is_train=True)(record)
    np.random.seed(3)
    _assert_same_sample(sample, _stock_mapper(cfg)(record))


def test_the_record_is_left_as_it_was(record):
    before = repr(record)
    FinetuneDatasetMapper(_cfg(), is_train=True)(record)
    assert repr(record) == before


def test_an_image_without_objects_is_detectron2s(record):
    record["annotations"] = [a for a in record["annotations"] if a["iscrowd"]]
    sample = FinetuneDatasetMapper(_cfg(), is_train=True)(record)
    assert len(sample["instances"]) == 0
    assert not sample["instances"].has("gt_masks")


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ({"size": [47, 60], "counts": "0"}, r"a mask of .*a.png has the size \[47, 60\], and its"),
        (
            {"size": [47, 61], "counts": "11"},
            "a mask of .*a.png has runs of 2 pixels, which do not fill its frame of 61x47",
        ),
        ("text", "a mask of .*a.png is a str, neither polygons nor a run-length code"),
    ],
)
def test_a_mask_that_cannot_be_used_is_named(record, segmentation, message):
    record["annotations"][0]["segmentation"] = segmentation
    with pytest.raises(UserError, match=message):
        FinetuneDatasetMapper(_cfg(), is_train=True)(record)


def test_an_annotation_without_a_mask_among_others_is_named(record):
    del record["annotations"][0]["segmentation"]
    with pytest.raises(UserError, match=r"a.png: 5 of 6 annotations have a mask"):
        FinetuneDatasetMapper(_cfg(), is_train=True)(record)
