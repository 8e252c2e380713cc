import numpy as np
import pytest
import torch
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from detectron2.structures import BoxMode
from PIL import Image

from d2ft.config import load_cfg_text
from d2ft.data.augmentation import augmentation_names, build_augmentations, check_augmentations
from d2ft.data.mapper import FinetuneDatasetMapper
from d2ft.data.stream import seeded_generators
from d2ft.errors import UserError

LSJ = [
    ["ResizeScale", {"min_scale": 0.1, "max_scale": 2.0, "target_height": 64, "target_width": 64}],
    ["FixedSizeCrop", {"crop_size": [64, 64], "pad": False}],
    "RandomFlip",
]


@pytest.fixture
def record(tmp_path):
    """Return the dict of a noisy image whose square object is brighter than the rest."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 90, (80, 120, 3), dtype=np.uint8)
    pixels[20:60, 40:100] += 120
    Image.fromarray(pixels).save(tmp_path / "a.png")
    mask = np.zeros((80, 120), np.uint8, order="F")
    mask[20:60, 40:100] = 1
    return _dict(tmp_path / "a.png", mask)


def _dict(path, mask):
    import pycocotools.mask as mask_util

    height, width = mask.shape
    rle = mask_util.encode(mask)
    annotation = {
        "bbox": [40.0, 20.0, 100.0, 60.0],
        "bbox_mode": BoxMode.XYXY_ABS,
        "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
        "category_id": 0,
        "iscrowd": 0,
    }
    crowd = {**annotation, "iscrowd": 1}
    return {
        "file_name": str(path),
        "image_id": 1,
        "height": height,
        "width": width,
        "annotations": [annotation, crowd],
    }


def _cfg(text="", **opts):
    return load_cfg_text(
        "INPUT: {MASK_FORMAT: bitmask, MIN_SIZE_TRAIN: [48, 64], MAX_SIZE_TRAIN: 200}\n"
        "MODEL: {MASK_ON: True}\n" + text,
        "my.yaml",
        [word for item in opts.items() for word in item],
    )


def _sample(mapper_class, cfg, record, seed, is_train=True):
    with seeded_generators(seed):
        return mapper_class(cfg, is_train=is_train)(record)


def _assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert torch.equal(ours["image"], theirs["image"])
    if "instances" in theirs:
        one, two = ours["instances"], theirs["instances"]
        assert one.image_size == two.image_size
        assert torch.equal(one.gt_boxes.tensor, two.gt_boxes.tensor)
        assert torch.equal(one.gt_classes, two.gt_classes)
        assert torch.equal(one.gt_masks.tensor, two.gt_masks.tensor)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("crop", ["False", "True"])
@pytest.mark.parametrize("is_train", [True, False])
def test_without_our_keys_samples_are_those_of_detectron2(record, seed, crop, is_train):
    cfg = _cfg(**{"INPUT.CROP.ENABLED": crop})
    ours = _sample(FinetuneDatasetMapper, cfg, record, seed, is_train)
    _assert_equal(ours, _sample(DatasetMapper, cfg, record, seed, is_train))


@pytest.mark.parametrize("seed", range(4))
def test_detectron2s_defaults_can_be_written_as_augmentations(record, seed):
    cfg = _cfg()
    cfg.INPUT.AUGMENTATIONS = [
        ["ResizeShortestEdge", {"short_edge_length": [48, 64], "max_size": 200,
                                "sample_style": "choice"}],
        "RandomFlip",
    ]  # fmt: skip
    ours = _sample(FinetuneDatasetMapper, cfg, record, seed)
    _assert_equal(ours, _sample(DatasetMapper, cfg, record, seed))


def test_large_scale_jitter_moves_image_boxes_and_masks_together(record):
    cfg = _cfg()
    cfg.INPUT.AUGMENTATIONS = LSJ
    sizes = set()
    for seed in range(20):
        sample = _sample(FinetuneDatasetMapper, cfg, record, seed)
        sizes.add(tuple(sample["image"].shape[1:]))
        _assert_boxes_are_around_what_is_bright(sample)
    assert max(max(size) for size in sizes) == 64
    assert len(sizes) > 5


def _assert_boxes_are_around_what_is_bright(sample):
    instances = sample["instances"]
    assert len(instances) <= 1  # crowd is dropped, as Detectron2 does
    for box, mask in zip(instances.gt_boxes, instances.gt_masks.tensor, strict=True):
        rows, columns = torch.nonzero(mask, as_tuple=True)
        around = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert (box - torch.stack(around)).abs().max() <= 1.5
        bright = sample["image"].float().mean(0) > 105
        if mask.sum() > 100:
            assert (bright == mask).float().mean() > 0.9


def test_evaluation_is_not_augmented(record):
    cfg = _cfg()
    stock = _sample(DatasetMapper, cfg, record, 0, is_train=False)
    cfg.INPUT.AUGMENTATIONS = LSJ
    _assert_equal(_sample(FinetuneDatasetMapper, cfg, record, 0, is_train=False), stock)


def test_augmentations_are_read_from_yaml_and_the_command_line_and_dumped():
    text = 'INPUT:\n  AUGMENTATIONS:\n    - ["RandomCrop", {crop_type: relative, crop_size: [0.5, 0.5]}]\n    - RandomFlip\n'
    cfg = load_cfg_text(text, "my.yaml")
    assert load_cfg_text(cfg.dump(), "config.yaml") == cfg
    crop, flip = build_augmentations(cfg.INPUT.AUGMENTATIONS, "BGR")
    assert (crop.crop_type, crop.crop_size, flip.prob) == ("relative", [0.5, 0.5], 0.5)
    opts = ["INPUT.AUGMENTATIONS", "[['RandomFlip', {'prob': 0.1}]]"]
    (flip,) = build_augmentations(load_cfg_text(text, "my.yaml", opts).INPUT.AUGMENTATIONS, "BGR")
    assert flip.prob == 0.1


@pytest.mark.parametrize(
    "entry",
    [
        ["RandomSaturation", {"intensity_min": 0.2, "intensity_max": 0.3}],
        ["RandomLighting", {"scale": 500.0}],
    ],
)
def test_colours_of_a_bgr_image_are_augmented_as_those_of_rgb(entry):
    rgb = np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    results = []
    for image, order in ((rgb, "RGB"), (rgb[:, :, ::-1], "BGR")):
        with seeded_generators(3):
            inputs = T.AugInput(np.ascontiguousarray(image))
            T.AugmentationList(build_augmentations([entry], order))(inputs)
        results.append(inputs.image)
    assert np.array_equal(results[0], results[1][:, :, ::-1])
    assert not np.array_equal(results[0], rgb)


def test_every_name_that_is_offered_is_a_class_of_detectron2():
    assert {"ResizeShortestEdge", "ResizeScale", "FixedSizeCrop", "RandomCrop", "RandomFlip",
            "RandomBrightness", "RandomContrast", "RandomSaturation", "RandomLighting"} <= set(
        augmentation_names()
    )  # fmt: skip
    assert all(issubclass(getattr(T, name), T.Augmentation) for name in augmentation_names())


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("RandomFlp", r"AUGMENTATIONS\[0\]: there is no augmentation 'RandomFlp'; did you mean RandomFlip"),
        (["RandomFlip", {"probability": 1}], "RandomFlip has no argument 'probability'; did you mean prob"),
        ("RandomCrop", "RandomCrop needs crop_type, crop_size"),
        (["RandomFlip", {"horizontal": True, "vertical": True}], "RandomFlip refuses .*Cannot do both"),
        (["RandomCrop", {"crop_type": "half", "crop_size": [1, 1]}], "RandomCrop refuses"),
        ({"RandomFlip": {}}, "must be a name, or a list of a name and its arguments"),
        (["RandomFlip", 0.5], "must be a name, or a list of a name and its arguments"),
        ("AugmentationList", "there is no augmentation 'AugmentationList'"),
    ],
)  # fmt: skip
def test_mistakes_in_augmentations_are_named(entry, message):
    with pytest.raises(UserError, match=message):
        build_augmentations([entry], "BGR")


def test_colour_augmentations_need_colours():
    with pytest.raises(UserError, match="RandomLighting needs INPUT.FORMAT RGB or BGR, not L"):
        build_augmentations([["RandomLighting", {"scale": 1.0}]], "L")


def test_a_second_crop_is_refused_with_the_line_that_replaces_it():
    cfg = _cfg("DATASETS: {TRAIN: []}", **{"INPUT.CROP.ENABLED": "True"})
    cfg.INPUT.AUGMENTATIONS = ["RandomFlip"]
    with pytest.raises(
        UserError, match=r'CROP.ENABLED \(command line\) .* add \["RandomCrop", {crop_'
    ):
        check_augmentations(cfg)


def test_what_has_no_effect_any_more_is_said(caplog):
    cfg = _cfg()
    cfg.INPUT.AUGMENTATIONS = LSJ
    with caplog.at_level("INFO", logger="d2ft"):
        check_augmentations(cfg)
    assert "takes the place of INPUT.MIN_SIZE_TRAIN (48, 64), INPUT.MAX_SIZE_TRAIN" in caplog.text
