import importlib.util
import sys

import numpy as np
import pytest
from detectron2.data import transforms as T

from d2ft.data.albumentations_bridge import SPATIAL_TRANSFORMS
from d2ft.data.augmentation import build_augmentations
from d2ft.data.stream import seeded_generators
from d2ft.errors import UserError

installed = pytest.mark.skipif(
    importlib.util.find_spec("albumentations") is None,
    reason="albumentations is optional and not installed here",
)

ARGUMENTS = {
    "CenterCrop": {"height": 60, "width": 100},
    "Crop": {"x_min": 3, "x_max": 110, "y_max": 70},
    "CropAndPad": {"px": [4, 6]},
    "LongestMaxSize": {"max_size": 90},
    "PadIfNeeded": {"min_height": 128, "min_width": 200},
    "Pad": {"padding": 7},
    "RandomCrop": {"height": 60, "width": 100},
    "RandomResizedCrop": {"size": [64, 64], "scale": [0.6, 1.0]},
    "RandomSizedCrop": {"min_max_height": [60, 80], "size": [64, 64]},
    "Resize": {"height": 160, "width": 200},
    "SmallestMaxSize": {"max_size": 50},
}


def _augment(name, arguments, image, image_format="BGR", seed=0):
    (augmentation,) = build_augmentations([[f"albumentations.{name}", arguments]], image_format)
    with seeded_generators(seed):
        inputs = T.AugInput(image)
        transform = augmentation(inputs)
    return inputs.image, transform


@installed
@pytest.mark.parametrize("name", SPATIAL_TRANSFORMS)
def test_image_mask_box_and_polygon_move_together(name):
    mask = np.zeros((80, 120), np.uint8)
    mask[30:50, 50:75] = 1
    image = np.repeat(mask[:, :, None] * 200, 3, axis=2)
    corners = np.array([[50.0, 30.0], [75.0, 30.0], [75.0, 50.0], [50.0, 50.0]])
    for seed in range(3):
        moved, transform = _augment(name, {**ARGUMENTS.get(name, {}), "p": 1.0}, image, seed=seed)
        moved_mask = transform.apply_segmentation(mask)
        assert moved.shape[:2] == moved_mask.shape
        assert ((moved[:, :, 0] > 100) != moved_mask).mean() < 0.02  # only pixels on an edge
        rows, columns = np.nonzero(moved_mask)
        around = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        points = transform.apply_coords(corners)
        height, width = moved_mask.shape
        box = np.r_[points.min(0), points.max(0)].clip(0, [width, height, width, height])
        assert np.abs(box - around).max() <= 2.0
        assert np.abs(transform.apply_box(np.array([[50.0, 30, 75, 50]]))[0].clip(0) - np.r_[
            points.min(0), points.max(0)].clip(0)).max() < 1e-3  # fmt: skip


@installed
def test_the_drawing_depends_on_the_seed_of_the_sample_alone():
    image = np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)
    once, _ = _augment("RandomBrightnessContrast", {"p": 1.0}, image, seed=4)
    again, _ = _augment("RandomBrightnessContrast", {"p": 1.0}, image, seed=4)
    other, _ = _augment("RandomBrightnessContrast", {"p": 1.0}, image, seed=5)
    assert np.array_equal(once, again)
    assert not np.array_equal(once, other)


@installed
def test_colours_are_those_of_rgb_in_both_orders():
    rgb = np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)
    one, _ = _augment("HueSaturationValue", {"p": 1.0}, rgb, "RGB")
    two, _ = _augment("HueSaturationValue", {"p": 1.0}, rgb[:, :, ::-1], "BGR")
    assert np.array_equal(one, two[:, :, ::-1])


@installed
def test_a_transform_left_out_by_its_probability_changes_nothing():
    image = np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)
    moved, transform = _augment("HorizontalFlip", {"p": 0.0}, image)
    assert np.array_equal(moved, image)
    assert transform.apply_coords(np.array([[3.0, 4.0]])).tolist() == [[3.0, 4.0]]


@installed
@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (["albumentations.HorizontalFlop", {}], "did you mean albumentations.HorizontalFlip"),
        (["albumentations.ElasticTransform", {}], "or none that moves boxes"),
        (["albumentations.CLAHE", {"clip": 2}], "no argument 'clip'; did you mean clip_limit"),
        (["albumentations.RandomCrop", {}], "RandomCrop needs height, width"),
        (["albumentations.CLAHE", {"clip_limit": "x"}], "CLAHE refuses"),
    ],
)
def test_mistakes_are_named(entry, message):
    with pytest.raises(UserError, match=message):
        build_augmentations([entry], "BGR")


def test_without_albumentations_the_message_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "albumentations", None)
    with pytest.raises(UserError, match=r"pip install albumentations==2\.0\.8"):
        build_augmentations(["albumentations.CLAHE"], "BGR")
