import numpy as np
import pytest
import torch
from detectron2.data import transforms as T
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from d2ft.data.aug_input import FastAugInput, channels_first

TRANSFORMS = {
    "flip": [T.HFlipTransform(31)],
    "vertical flip": [T.VFlipTransform(23)],
    "resize to its size": [T.ResizeTransform(23, 31, 23, 31)],
    "smaller, flip": [T.ResizeTransform(23, 31, 11, 15), T.HFlipTransform(15)],
    "flip, larger": [T.HFlipTransform(31), T.ResizeTransform(23, 31, 40, 57)],
    "crop, resize": [T.CropTransform(3, 4, 20, 9), T.ResizeTransform(9, 20, 12, 13)],
    "bicubic": [T.ResizeTransform(23, 31, 12, 13, Image.Resampling.BICUBIC)],
    "colour, flip": [T.BlendTransform(np.float32(20), 0.3, 0.7), T.HFlipTransform(31)],
}


def _apply(inputs, transforms):
    T.AugmentationList(transforms)(inputs)
    return inputs


def _image(height=23, width=31, channels=3):
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_images_and_labels_are_moved_as_in_detectron2(name, channels):
    image, labels = _image(channels=channels), _image()[:, :, 0]
    image.flags.writeable = False  # as those of the cache
    ours = _apply(FastAugInput(image, sem_seg=labels), TRANSFORMS[name])
    stock = _apply(T.AugInput(image, sem_seg=labels), TRANSFORMS[name])
    assert np.array_equal(ours.image, stock.image)
    assert np.array_equal(ours.sem_seg, stock.sem_seg)
    expected = torch.as_tensor(np.ascontiguousarray(stock.image.transpose(2, 0, 1)))
    planes = channels_first(ours.image)
    assert planes.is_contiguous()
    assert torch.equal(planes, expected)


def test_the_tensor_has_memory_of_its_own():
    image = _image()
    channels_first(image).zero_()
    channels_first(image.astype(np.float32)).zero_()
    assert image.any()


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("size", [(11, 15), (40, 57), (23, 62), (7, 31)])
def test_torch_resizes_by_pillows_rule(size, flipped):
    transforms = [T.ResizeTransform(23, 31, *size), *[T.HFlipTransform(size[1])] * flipped]
    ours = _apply(FastAugInput(_image(), resize="torch"), transforms).image
    stock = _apply(T.AugInput(_image()), transforms).image
    # In noise, whose every pixel is a rounding of its own.
    assert np.abs(ours.astype(int) - stock).max() <= 1
    assert (ours != stock).mean() < 0.03
    assert torch.equal(
        channels_first(ours), torch.from_numpy(np.ascontiguousarray(ours)).permute(2, 0, 1)
    )


@settings(max_examples=100, deadline=None)
@given(
    size=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    new_size=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    seed=st.integers(0, 2**32 - 1),
)
def test_torch_is_never_more_than_two_levels_off(size, new_size, seed):
    image = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    resize = T.ResizeTransform(*size, *new_size)
    ours = _apply(FastAugInput(image, resize="torch"), [resize]).image
    assert np.abs(ours.astype(int) - resize.apply_image(image)).max() <= 2


def test_torch_gives_the_bits_of_pillow_at_half_the_size():
    resize = T.ResizeTransform(64, 128, 32, 64)
    image = _image(64, 128)
    ours = _apply(FastAugInput(image, resize="torch"), [resize]).image
    assert np.array_equal(ours, resize.apply_image(image))
