import pickle

import numpy as np
import pytest
import torch
from detectron2.data.detection_utils import filter_empty_instances
from detectron2.structures import BitMasks, Boxes, Instances
from hypothesis import given, settings
from hypothesis import strategies as st

from d2ft.structures.window_masks import WindowMasks

MASKS = {
    "none": lambda h, w, rng: np.zeros((0, h, w), bool),
    "empty": lambda h, w, rng: np.zeros((2, h, w), bool),
    "full": lambda h, w, rng: np.ones((2, h, w), bool),
    "one pixel": lambda h, w, rng: _pixels(h, w, [(0, 0), (h - 1, w - 1), (h // 2, w // 3)]),
    "noise": lambda h, w, rng: rng.random((3, h, w)) < 0.3,
    "blobs": lambda h, w, rng: np.stack([_blob(h, w, rng) for _ in range(4)]),
}


def _pixels(height, width, places):
    masks = np.zeros((len(places), height, width), bool)
    for mask, place in zip(masks, places, strict=True):
        mask[place] = True
    return masks


def _blob(height, width, rng):
    mask = np.zeros((height, width), bool)
    y0, y1 = sorted(rng.integers(0, height + 1, 2))
    x0, x1 = sorted(rng.integers(0, width + 1, 2))
    mask[y0:y1, x0:x1] = rng.random((y1 - y0, x1 - x0)) < 0.8
    return mask


def _boxes(number, height, width, rng, kind):
    """Return boxes inside, at and beyond the border of a frame, some without any extent."""
    low = rng.uniform(-0.6, 1.1, (number, 2))
    corners = np.concatenate((low, low + rng.uniform(-0.1, 1.5, (number, 2)).clip(0)), axis=1)
    boxes = corners * (width, height, width, height)
    if kind == "whole":
        boxes = np.rint(boxes)
    elif kind == "frame":
        boxes[:] = (0, 0, width, height)
    return torch.from_numpy(boxes.astype(np.float32))


@settings(max_examples=80, deadline=None)
@given(
    height=st.integers(1, 70),
    width=st.integers(1, 90),
    masks=st.sampled_from(sorted(MASKS)),
    boxes=st.sampled_from(["any", "whole", "frame"]),
    mask_size=st.sampled_from([1, 7, 14, 28]),
    seed=st.integers(0, 2**32 - 1),
)
def test_targets_are_those_of_bitmaps(height, width, masks, boxes, mask_size, seed):
    rng = np.random.default_rng(seed)
    bitmaps = BitMasks(torch.from_numpy(MASKS[masks](height, width, rng)))
    windows = WindowMasks(bitmaps.tensor)
    corners = _boxes(len(bitmaps), height, width, rng, boxes)
    expected = bitmaps.crop_and_resize(corners, mask_size)
    assert torch.equal(windows.crop_and_resize(corners, mask_size), expected)
    assert torch.equal(windows._crop_bitmaps(corners, mask_size), expected)


def test_targets_in_a_large_frame_are_those_of_bitmaps():
    # Coordinates of 2,000 have few bits after the point: another origin would round differently.
    rng = np.random.default_rng(0)
    bitmaps = torch.zeros(40, 300, 2048, dtype=torch.bool)
    for mask in bitmaps:
        x, y = rng.integers(1000, 1900), rng.integers(0, 200)
        mask[y : y + 90, x : x + 120] = torch.from_numpy(_blob(90, 120, rng))[:, : 2048 - x]
    boxes = BitMasks(bitmaps).get_bounding_boxes().tensor
    boxes += torch.from_numpy(rng.uniform(-9, 9, boxes.shape).astype(np.float32))
    expected = BitMasks(bitmaps).crop_and_resize(boxes, 28)
    assert torch.equal(WindowMasks(bitmaps).crop_and_resize(boxes, 28), expected)


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    masks=st.sampled_from(sorted(MASKS)),
    seed=st.integers(0, 2**32 - 1),
)
def test_everything_else_is_that_of_bitmaps(height, width, masks, seed):
    rng = np.random.default_rng(seed)
    tensor = torch.from_numpy(MASKS[masks](height, width, rng))
    bitmaps, windows = BitMasks(tensor), WindowMasks(tensor)
    assert torch.equal(windows.tensor, tensor)
    assert torch.equal(windows.nonempty(), bitmaps.nonempty())
    assert torch.equal(windows.get_bounding_boxes().tensor, bitmaps.get_bounding_boxes().tensor)
    assert tuple(windows.image_size) == tuple(bitmaps.image_size)
    assert len(windows) == len(bitmaps)
    for ours, stock in zip(windows, bitmaps, strict=True):
        assert torch.equal(ours, stock)
    chosen = torch.from_numpy(rng.random(len(tensor)) < 0.5)
    for item in (chosen, chosen.nonzero()[:, 0].repeat(3), slice(1, None), slice(0, 0)):
        assert torch.equal(windows[item].tensor, bitmaps[item].tensor)
    if len(tensor):
        assert torch.equal(windows[-1].tensor, bitmaps[-1].tensor)


def test_indexing_shares_the_pixels():
    masks = WindowMasks(np.ones((2, 30, 40), bool))
    assert masks[torch.tensor([1, 1, 0])]._pixels is masks._pixels


def test_masks_are_joined_by_instances():
    rng = np.random.default_rng(1)
    tensors = [torch.from_numpy(MASKS[name](9, 7, rng)) for name in ("noise", "none", "blobs")]
    joined = Instances.cat([Instances((9, 7), gt_masks=WindowMasks(t)[:]) for t in tensors])
    assert torch.equal(joined.gt_masks.tensor, torch.cat(tensors))
    assert torch.equal(BitMasks.cat([BitMasks(t) for t in tensors]).tensor, torch.cat(tensors))


def test_frames_of_different_sizes_are_not_joined():
    with pytest.raises(AssertionError):
        WindowMasks.cat([WindowMasks(np.ones((1, 3, 4))), WindowMasks(np.ones((1, 4, 3)))])


def test_instances_drop_empty_masks_and_reach_another_process():
    tensor = torch.zeros(3, 8, 8, dtype=torch.bool)
    tensor[0, 2, 3] = tensor[2, 7, 7] = True
    boxes = Boxes(torch.tensor([[0.0, 0, 8, 8]]).repeat(3, 1))
    instances = Instances((8, 8), gt_boxes=boxes, gt_masks=WindowMasks(tensor))
    kept = pickle.loads(pickle.dumps(filter_empty_instances(instances).to("cpu")))
    assert torch.equal(kept.gt_masks.tensor, tensor[[0, 2]])


def test_heads_that_ask_for_bitmaps_get_them():
    tensor = torch.ones(2, 3, 4, dtype=torch.bool)
    masks = WindowMasks(tensor)
    assert isinstance(masks, BitMasks)
    assert type(masks.to_bitmasks()) is BitMasks
    assert torch.equal(masks.to_bitmasks().tensor, tensor)
    assert torch.equal(BitMasks.cat([BitMasks(tensor), masks]).tensor, torch.cat((tensor, tensor)))
