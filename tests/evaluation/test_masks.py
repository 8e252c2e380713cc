import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.structures import Instances

from d2ft.evaluation.masks import RleMasks, decode_mask, encode_mask
from d2ft.rle import check_rle
from d2ft.structures.mask_window import mask_window


def _stock(mask):
    rle = mask_util.encode(np.asfortranarray(mask.view(np.uint8)))
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def _masks():
    rng = np.random.default_rng(0)
    for height, width in ((1, 1), (1, 9), (9, 1), (7, 5), (40, 64)):
        for density in (0, 0.02, 0.5, 1):
            yield rng.random((height, width)) < density
        # Windows at each border, of full height and of full width.
        for _ in range(20):
            mask = np.zeros((height, width), bool)
            top, bottom = np.sort(rng.integers(0, height + 1, 2))
            left, right = np.sort(rng.integers(0, width + 1, 2))
            mask[top:bottom, left:right] = True
            yield mask
            yield mask & (rng.random(mask.shape) < 0.8)
    full_columns = np.zeros((6, 8), bool)
    full_columns[:, 2:5] = True
    yield full_columns


def test_a_mask_has_the_code_of_pycocotools_and_comes_back():
    for mask in _masks():
        rle = encode_mask(mask)
        assert rle == _stock(mask)
        assert check_rle(rle, mask.shape) == rle
        assert torch.equal(decode_mask(rle), torch.from_numpy(mask))


def test_the_window_is_the_smallest_one():
    mask = np.zeros((6, 8), bool)
    assert mask_window(mask) is None
    mask[2, 3] = mask[4, 6] = True
    assert mask_window(mask) == (slice(2, 5), slice(3, 7))


def test_a_list_of_run_lengths_is_taken_too():
    mask = next(m for m in _masks() if 0 < m.sum() < m.size)
    columns = mask.T.ravel()
    changes = np.flatnonzero(np.diff(columns, prepend=False))
    lengths = np.diff(changes, prepend=0, append=mask.size).tolist()
    rle = check_rle({"size": list(mask.shape), "counts": lengths}, mask.shape)
    assert torch.equal(decode_mask(rle), torch.from_numpy(mask))


GOOD = encode_mask(np.eye(4, dtype=bool))


@pytest.mark.parametrize(
    ("rle", "reason"),
    [
        ([[0, 0, 4, 0, 4, 4]], "is no run-length code"),
        ({"counts": GOOD["counts"]}, "is no run-length code"),
        ({**GOOD, "size": [4, 5]}, r"has the size \[4, 5\], and its image \[4, 4\]"),
        ({**GOOD, "size": 4}, "has the size 4"),
        ({**GOOD, "counts": "04"}, "do not add up to the 16 pixels"),
        ({**GOOD, "counts": GOOD["counts"] + "9"}, "do not add up"),
        ({**GOOD, "counts": [2, 3]}, "do not add up"),
        ({**GOOD, "counts": [-2, 18]}, "do not add up"),
        ({**GOOD, "counts": [1.5, 14.5]}, "do not add up"),
        ({**GOOD, "counts": "oooo"}, "no compressed run lengths"),
        ({**GOOD, "counts": "ooooooooo0"}, "no compressed run lengths"),
        ({**GOOD, "counts": " !"}, "no compressed run lengths"),
        ({**GOOD, "counts": ""}, "no compressed run lengths"),
        ({**GOOD, "counts": 7}, "neither text nor a list"),
    ],
)
def test_a_code_that_pycocotools_would_decode_to_garbage_is_refused(rle, reason):
    with pytest.raises(ValueError, match=reason):
        check_rle(rle, (4, 4))


def test_kept_masks_take_the_place_of_a_tensor_in_instances():
    masks = torch.rand(5, 6, 8) < 0.5
    kept = RleMasks([encode_mask(mask.numpy()) for mask in masks])
    instances = Instances((6, 8), pred_masks=kept)
    assert torch.equal(torch.stack(list(instances.to("cpu").pred_masks)), masks)
    chosen = torch.tensor([True, False, True, False, True])
    assert torch.equal(torch.stack(list(instances[chosen].pred_masks)), masks[chosen])
    assert torch.equal(instances.pred_masks[1], masks[1])
