import numpy as np
import pycocotools.mask as mask_util
import pytest
from detectron2.data import transforms as T
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from d2ft.rle import run_lengths
from d2ft.structures.mask_window import MaskWindow

SIZES = st.tuples(st.integers(1, 33), st.integers(1, 37))
MASKS = SIZES.flatmap(
    lambda size: st.one_of(
        arrays(bool, size),
        # A rectangle, so that windows are smaller than frames.
        st.tuples(*(st.tuples(st.integers(0, n), st.integers(0, n)) for n in size)).map(
            lambda corners: _rectangle(size, *map(sorted, corners))
        ),
    )
)


def _rectangle(size, rows, columns):
    mask = np.zeros(size, bool)
    mask[slice(*rows), slice(*columns)] = True
    return mask


def _assert_window(window, mask):
    """Compare with a mask, and with the window that is tight around it."""
    assert np.array_equal(window.full(), mask)
    tight = MaskWindow.of_mask(mask)
    assert (window.x0, window.y0, window.pixels.shape) == (tight.x0, tight.y0, tight.pixels.shape)
    if mask.any():
        assert tight.pixels[0].any()
        assert tight.pixels[-1].any()
        assert tight.pixels[:, 0].any()
        assert tight.pixels[:, -1].any()


@settings(max_examples=80, deadline=None)
@given(mask=MASKS)
def test_run_lengths_give_what_pycocotools_decodes(mask):
    rle = mask_util.encode(np.asfortranarray(mask.view(np.uint8)))
    lengths = run_lengths(rle["counts"].decode())
    _assert_window(MaskWindow.of_run_lengths(lengths, mask.shape), mask)


def test_run_lengths_may_have_zeros_between():
    lengths = np.array([2, 3, 0, 1, 6])
    window = MaskWindow.of_run_lengths(lengths, (4, 3))
    _assert_window(window, (np.arange(12) // 2 % 3 != 0).reshape(3, 4).T & (np.arange(3) < 2))


def test_run_lengths_that_do_not_fill_the_frame_are_refused():
    with pytest.raises(ValueError, match="runs of 5 pixels, which do not fill its frame of 3x4"):
        MaskWindow.of_run_lengths(np.array([2, 3]), (4, 3))


@settings(max_examples=100, deadline=None)
@given(mask=MASKS)
def test_flips_are_those_of_the_frame(mask):
    window = MaskWindow.of_mask(mask)
    _assert_window(window.flip_horizontally(), mask[:, ::-1])
    _assert_window(window.flip_vertically(), mask[::-1])


@settings(max_examples=80, deadline=None)
@given(mask=MASKS, new_size=st.tuples(st.integers(1, 90), st.integers(1, 90)))
def test_resizing_is_detectron2s_of_the_frame(mask, new_size):
    resize = T.ResizeTransform(*mask.shape, *new_size)
    _assert_window(
        MaskWindow.of_mask(mask).resize(new_size),
        resize.apply_segmentation(mask.astype(np.uint8)).astype(bool),
    )


@pytest.mark.parametrize("new_size", [(800, 1600), (767, 1535), (1024, 2048), (531, 1063)])
def test_resizing_is_detectron2s_at_the_sizes_of_cityscapes(new_size):
    mask = np.random.default_rng(0).random((1024, 2048)) < 0.5
    resized = T.ResizeTransform(1024, 2048, *new_size).apply_segmentation(mask.view(np.uint8))
    assert np.array_equal(MaskWindow.of_mask(mask).resize(new_size).full(), resized)


@settings(max_examples=80, deadline=None)
@given(mask=MASKS, data=st.data())
def test_crops_and_pads_are_those_of_the_frame(mask, data):
    y0, x0 = (data.draw(st.integers(0, n - 1)) for n in mask.shape)
    height, width = data.draw(SIZES)
    window = MaskWindow.of_mask(mask)
    _assert_window(
        window.crop(x0, y0, width, height),
        T.CropTransform(x0, y0, width, height).apply_segmentation(mask),
    )
    pads = [data.draw(st.integers(0, 5)) for _ in range(4)]
    _assert_window(window.pad(*pads), T.PadTransform(*pads).apply_segmentation(mask))
