import importlib.util
import shutil

import numpy as np
import pytest
import torch
from detectron2.structures import BoxMode
from PIL import ExifTags, Image

from d2ft.config import get_cfg
from d2ft.data import register_instances
from d2ft.data.bad_images import BadImageError, BadImages
from d2ft.data.loader import build_train_loader
from d2ft.data.mapper import FinetuneDatasetMapper
from d2ft.errors import UserError

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)


@pytest.fixture
def cfg(tmp_path):
    cfg = get_cfg()
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.RANDOM_FLIP = (20,), "none"
    cfg.OUTPUT_DIR = str(tmp_path / "output")
    return cfg


def _record(path, size=(30, 20)):
    annotation = {
        "bbox": [2.0, 3.0, 12.0, 13.0],
        "bbox_mode": BoxMode.XYXY_ABS,
        "category_id": 0,
        "iscrowd": 0,
    }
    width, height = size
    return {
        "file_name": str(path),
        "image_id": path.name,
        "width": width,
        "height": height,
        "annotations": [annotation],
    }


def _save(path, image, **options):
    image.save(path, **options)
    return path


def _read(cfg, path, size=(30, 20)):
    return FinetuneDatasetMapper(cfg, is_train=True)(_record(path, size))["image"]


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [("L", "png"), ("LA", "png"), ("P", "png"), ("1", "png"), ("RGBA", "png"), ("CMYK", "jpg"),
     ("YCbCr", "jpg"), ("RGB", "bmp"), ("RGB", "webp"), ("P", "gif")],
)  # fmt: skip
def test_images_of_other_modes_are_read_as_three_channels(cfg, tmp_path, mode, suffix):
    image = Image.fromarray(PIXELS).convert(mode)
    path = _save(
        tmp_path / f"an ïmage.{suffix}", image, **({"quality": 100} if suffix == "jpg" else {})
    )
    sample = _read(cfg, path)
    assert sample.shape == (3, 20, 30)
    with Image.open(path) as stored:
        bgr = np.asarray(stored.convert("RGB"))[:, :, ::-1]
    assert np.array_equal(sample.numpy().transpose(1, 2, 0), bgr)


@pytest.mark.parametrize(
    "array",
    [np.full((20, 30), 4000, np.uint16), np.full((20, 30), 4000, np.int32),
     np.full((20, 30), 0.5, np.float32)],
)  # fmt: skip
def test_an_image_of_more_than_8_bits_is_not_cut_off(cfg, tmp_path, array):
    path = _save(tmp_path / "deep.tif", Image.fromarray(array))
    with pytest.raises(BadImageError, match="deep.tif has more than 8 bits .* scale it to 8 bits"):
        _read(cfg, path)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photo_that_is_annotated_as_it_is_shown_is_read(cfg, tmp_path, orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    path = _save(tmp_path / "photo.png", Image.fromarray(PIXELS), exif=exif)
    size = (20, 30) if orientation > 4 else (30, 20)
    assert _read(cfg, path, size).shape == (3, size[1], size[0])


def test_a_photo_that_is_annotated_as_it_is_stored_is_named(cfg, tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    path = _save(tmp_path / "photo.jpg", Image.fromarray(PIXELS), exif=exif)
    with pytest.raises(
        BadImageError, match="photo.jpg has 20x30 pixels, annotated 30x20: .* EXIF orientation"
    ):
        _read(cfg, path)


def test_an_image_of_another_size_is_named_with_both_sizes(cfg, tmp_path):
    path = _save(tmp_path / "a.png", Image.fromarray(PIXELS))
    with pytest.raises(BadImageError, match="a.png has 30x20 pixels, annotated 31x20; annotate"):
        _read(cfg, path, (31, 20))


def _break(path, how):
    _save(path, Image.fromarray(PIXELS))
    content = path.read_bytes()
    broken = {
        "missing": None,
        "empty": b"",
        "text": b"no image",
        "half": content[: len(content) // 2],
    }[how]
    path.unlink()
    if broken is not None:
        path.write_bytes(broken)


@pytest.mark.parametrize("suffix", ["png", "jpg"])
@pytest.mark.parametrize("how", ["missing", "empty", "text", "half"])
@pytest.mark.parametrize("is_train", [True, False])
def test_a_file_that_cannot_be_read_is_named(cfg, tmp_path, how, suffix, is_train):
    path = tmp_path / f"a.{suffix}"
    _break(path, how)
    with pytest.raises(BadImageError, match=rf"the image .*a\.{suffix} cannot be read: "):
        FinetuneDatasetMapper(cfg, is_train=is_train)(_record(path))


def test_a_symbolic_link_is_followed(cfg, tmp_path):
    _save(tmp_path / "a.png", Image.fromarray(PIXELS))
    (tmp_path / "b.png").symlink_to("a.png")
    assert torch.equal(_read(cfg, tmp_path / "b.png"), _read(cfg, tmp_path / "a.png"))


def test_a_remainder_of_a_polygon_needs_shapely(cfg, tmp_path):
    if importlib.util.find_spec("shapely"):
        pytest.skip("shapely is installed here")
    cfg.MODEL.MASK_ON = True
    cfg.INPUT.AUGMENTATIONS = [["RandomCrop", {"crop_type": "absolute", "crop_size": [9, 9]}]]
    record = _record(_save(tmp_path / "a.png", Image.fromarray(PIXELS)))
    record["annotations"][0]["segmentation"] = [[2.0, 3.0, 12.0, 3.0, 12.0, 13.0]]
    with pytest.raises(UserError, match="a.png: cropping polygons needs .* pip install shapely"):
        FinetuneDatasetMapper(cfg, is_train=True)(record)


@pytest.fixture
def ten_images(cfg, tmp_path):
    """Register ten images, of which two are bad."""
    _save(tmp_path / "0.png", Image.fromarray(PIXELS))
    for index in range(1, 10):
        shutil.copy(tmp_path / "0.png", tmp_path / f"{index}.png")
    _break(tmp_path / "3.png", "half")
    _break(tmp_path / "7.png", "empty")
    records = [_record(tmp_path / f"{index}.png") for index in range(10)]
    register_instances("ten", lambda: records, thing_classes=["thing"])
    cfg.DATASETS.TRAIN, cfg.SEED, cfg.SOLVER.IMS_PER_BATCH = ("ten",), 1, 2
    return cfg


def _batches(cfg, count):
    loader = iter(build_train_loader(cfg))
    return [[sample["image_id"] for sample in next(loader)] for _ in range(count)]


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_within_the_limit_are_replaced_and_listed(ten_images, workers):
    cfg = ten_images
    cfg.DATALOADER.NUM_WORKERS, cfg.DATALOADER.MAX_BAD_IMAGES = workers, 2
    seen = _batches(cfg, 15)
    assert {name for batch in seen for name in batch} == {
        f"{k}.png" for k in (0, 1, 2, 4, 5, 6, 8, 9)
    }
    problems = BadImages.of(cfg).problems()
    assert {path.rpartition("/")[2] for path in problems} == {"3.png", "7.png"}
    # Replacements are part of the order that a resumed run repeats.
    assert _batches(cfg, 15) == seen


def test_the_list_of_bad_images_is_logged(ten_images, caplog):
    cfg = ten_images
    cfg.DATALOADER.NUM_WORKERS, cfg.DATALOADER.MAX_BAD_IMAGES = 0, 5
    _batches(cfg, 10)
    with caplog.at_level("WARNING", logger="d2ft"):
        BadImages.of(cfg).log_all()
    assert "Left out of training for being bad" in caplog.text
    assert "7.png cannot be read" in caplog.text


def test_one_bad_image_too_many_stops_and_lists_them(ten_images):
    ten_images.DATALOADER.NUM_WORKERS, ten_images.DATALOADER.MAX_BAD_IMAGES = 0, 1
    with pytest.raises(UserError, match=r"2 images are bad, but .*MAX_BAD_IMAGES is 1:\n.*\n.*png"):
        _batches(ten_images, 15)


def test_by_default_a_bad_image_is_an_error(ten_images):
    ten_images.DATALOADER.NUM_WORKERS = 0
    with pytest.raises(BadImageError, match="cannot be read"):
        _batches(ten_images, 15)
