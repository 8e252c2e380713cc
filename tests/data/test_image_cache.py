import multiprocessing
import os
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from d2ft.config import load_cfg
from d2ft.data import build_train_loader, register_builtin_datasets
from d2ft.data.image_cache import build_image_cache
from d2ft.data.read_image import read_image
from d2ft.errors import UserError
from tests.factories import PROJECT, SHORT_RUN, write_cityscapes


@pytest.fixture
def records(tmp_path, monkeypatch):
    """Write seven images of different sizes, and a cache folder of their own."""
    monkeypatch.setenv("D2FT_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    records = []
    for index in range(7):
        height, width = 10 + index, 20 - index
        path = tmp_path / f"{index}.png"
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
        records.append({"file_name": str(path), "height": height, "width": width})
    return records


def _stored(tmp_path):
    return sorted((tmp_path / "cache" / "images").glob("*.raw"))


def _assert_same_images(cache, records, image_format="BGR"):
    for record in records:
        expected = read_image(record["file_name"], image_format)
        assert np.array_equal(cache.read(record["file_name"]), expected)


@pytest.mark.parametrize("image_format", ["RGB", "BGR"])
def test_images_are_those_of_the_files(records, image_format):
    cache = build_image_cache(records * 8, image_format, 1.0)  # as in a repeated dataset
    assert len(cache) == 7
    _assert_same_images(cache, records, image_format)
    assert cache.read("another.png") is None


def test_images_cannot_be_written_to(records):
    image = build_image_cache(records, "BGR", 1.0).read(records[0]["file_name"])
    with pytest.raises(ValueError, match="read-only"):
        image[0] = 0


def test_the_second_run_decodes_nothing(records, monkeypatch):
    build_image_cache(records, "BGR", 1.0)
    monkeypatch.setattr("d2ft.data.image_cache.read_image", None)
    assert len(build_image_cache(records, "BGR", 1.0)) == 7


def test_a_changed_file_makes_the_cache_anew(records, tmp_path):
    old = build_image_cache(records, "BGR", 1.0)
    before = old.read(records[0]["file_name"]).copy()
    Image.new("RGB", (20, 10), "red").save(records[0]["file_name"])
    new = build_image_cache(records, "BGR", 1.0)
    _assert_same_images(new, records)
    assert _stored(tmp_path) == [new.path]
    # A run that has the old one mapped goes on with it.
    assert np.array_equal(old.read(records[0]["file_name"]), before)


def test_an_interrupted_build_leaves_nothing_behind(records, tmp_path, monkeypatch):
    calls = []

    def interrupted(name, image_format):
        calls.append(name)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return read_image(name, image_format)

    with monkeypatch.context() as patch:
        patch.setattr("d2ft.data.image_cache.read_image", interrupted)
        with pytest.raises(KeyboardInterrupt):
            build_image_cache(records, "BGR", 1.0)
    assert not list((tmp_path / "cache" / "images").glob("*.raw"))
    # As a killed process leaves it, which cannot clean up.
    cache = build_image_cache(records, "BGR", 1.0)
    cache.path.with_suffix(".json").unlink()
    partial = cache.path.with_name(f".{cache.path.name}.0123.tmp")
    partial.write_bytes(b"partial")
    _assert_same_images(build_image_cache(records, "BGR", 1.0), records)
    assert not partial.exists()


def test_bad_images_are_left_to_the_mapper(records, tmp_path):
    (tmp_path / "0.png").write_bytes(b"no image")
    (tmp_path / "1.png").unlink()
    records[2]["height"] += 1
    Image.fromarray(np.zeros((13, 17), np.uint16)).save(tmp_path / "3.png")
    cache = build_image_cache(records, "BGR", 1.0)
    assert [cache.read(record["file_name"]) is None for record in records] == [True] * 4 + [
        False
    ] * 3
    _assert_same_images(cache, records[4:])


def test_a_cache_over_the_limit_is_refused_with_its_size(records):
    pixels = sum(record["height"] * record["width"] for record in records)
    build_image_cache(records, "BGR", pixels * 3 / 1e9)
    with pytest.raises(UserError, match=r"7 training images .*IMAGE_CACHE_GB is 1e-06: set it"):
        build_image_cache(records, "BGR", 1e-6)


def test_a_format_of_other_pixels_is_refused(records):
    with pytest.raises(UserError, match="needs INPUT.FORMAT RGB or BGR, not L"):
        build_image_cache(records, "L", 1.0)


def test_a_full_disk_is_an_error_that_says_what_to_do(records, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("d2ft.files.os.fsync", full)
    with pytest.raises(UserError, match="No space left on device.*D2FT_CACHE to a folder with"):
        build_image_cache(records, "BGR", 1.0)


def test_a_pickled_cache_has_no_pixels_and_reads_the_same(records):
    cache = build_image_cache(records, "BGR", 1.0)
    _assert_same_images(cache, records)
    content = pickle.dumps(cache)
    assert len(content) < 1500
    _assert_same_images(pickle.loads(content), records)


def _build_in_process(records, folder, barrier, decoded):
    os.environ["D2FT_CACHE"] = folder

    def count(name, image_format):
        with decoded.get_lock():
            decoded.value += 1
        return read_image(name, image_format)

    import d2ft.data.image_cache

    d2ft.data.image_cache.read_image = count
    barrier.wait()
    _assert_same_images(build_image_cache(records, "BGR", 1.0), records)


def test_of_several_processes_one_decodes(records, tmp_path):
    context = multiprocessing.get_context("fork")
    barrier, decoded = context.Barrier(3), context.Value("i", 0)
    arguments = (records, str(tmp_path / "cache"), barrier, decoded)
    processes = [context.Process(target=_build_in_process, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert decoded.value == 7


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_with_the_cache_are_those_without(tmp_path, monkeypatch, workers):
    monkeypatch.setenv("D2FT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("DETECTRON2_DATASETS", str(write_cityscapes(tmp_path)))
    register_builtin_datasets()

    def batches(*overrides):
        cfg = load_cfg(PROJECT / "configs" / "cityscapes_ft.yaml", [*SHORT_RUN, *overrides])
        loader = iter(build_train_loader(cfg))
        return [next(loader) for _ in range(4)]

    common = ("DATALOADER.NUM_WORKERS", str(workers))
    plain = batches(*common)
    cached = batches(*common, "DATALOADER.IMAGE_CACHE_GB", "0.5")
    assert len(_stored(tmp_path)) == 1
    for batch, other in zip(cached, plain, strict=True):
        for sample, expected in zip(batch, other, strict=True):
            assert sample["file_name"] == expected["file_name"]
            assert torch.equal(sample["image"], expected["image"])
