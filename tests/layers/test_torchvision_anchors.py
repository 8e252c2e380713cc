import pytest
import torch

from d2ft.layers.torchvision_anchors import TorchvisionAnchorGenerator

anchor_utils = pytest.importorskip("torchvision.models.detection.anchor_utils")
ImageList = pytest.importorskip("torchvision.models.detection.image_list").ImageList

RATIOS = (0.5, 1.0, 2.0)


@pytest.mark.parametrize(
    ("sizes", "strides"),
    [
        ([[32], [64], [128], [256], [512]], [4, 8, 16, 32, 64]),
        ([[32], [64, 80, 101], [128, 161, 203]], [8, 64, 128]),
    ],
)
@pytest.mark.parametrize("image_size", [(160, 224), (256, 128)])
def test_anchors_equal_torchvisions_also_where_a_map_was_rounded_up(sizes, strides, image_size):
    # One ratio list for each level, and levels whose anchors differ in number.
    maps = [torch.zeros(1, 1, *(-(-length // s) for length in image_size)) for s in strides]
    theirs = anchor_utils.AnchorGenerator(sizes, (RATIOS,) * len(sizes))
    images = ImageList(torch.zeros(1, 3, *image_size), [image_size])
    expected = theirs(images, maps)[0]
    ours = TorchvisionAnchorGenerator(
        sizes=sizes, aspect_ratios=[RATIOS], strides=strides, offset=0.0
    )
    found = [boxes.tensor for boxes in ours(maps)]
    if len(sizes[-1]) == 1:
        assert torch.equal(torch.cat(found), expected)
    for boxes, theirs_of_level in zip(found, expected.split([len(b) for b in found]), strict=True):
        order_free = [{tuple(box) for box in rows.tolist()} for rows in (boxes, theirs_of_level)]
        assert order_free[0] == order_free[1]
