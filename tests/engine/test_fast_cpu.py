import copy
import platform

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.layers import Conv2d, ROIAlign
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage

from d2ft.config import load_cfg
from d2ft.engine import FinetuneTrainer
from d2ft.engine.fast_cpu import (
    keep_freed_memory,
    swap_roi_align,
    swap_rpn_convolutions,
    use_fast_cpu,
)
from d2ft.layers.roi_align_sparse import SparseROIAlign
from d2ft.layers.sparse_grad_conv import SparseGradConv2d
from tests.factories import PROJECT, TINY_MODEL, seeded_model


def _cfg(*overrides: str) -> CfgNode:
    base = PROJECT / "configs/_base_/models/mask_rcnn_r50_fpn_mini.yaml"
    return load_cfg(base, ["MODEL.DEVICE", "cpu", *overrides])


def _roi_aligns(model):
    return [layer for layer in model.modules() if isinstance(layer, ROIAlign)]


def _batch(height, width, instances, generator):
    boxes = torch.rand(instances, 4, generator=generator) * 0.5
    boxes[:, 2:] += boxes[:, :2] + 0.05
    boxes = boxes.clamp(max=1) * torch.tensor([width, height, width, height])
    masks = torch.zeros(instances, height, width, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.long().tolist(), strict=True):
        mask[y0 : y1 + 1, x0 : x1 + 1] = True
    return {
        "image": torch.randint(0, 256, (3, height, width), generator=generator),
        "instances": Instances(
            (height, width),
            gt_boxes=Boxes(boxes),
            gt_classes=torch.randint(0, 80, (instances,), generator=generator),
            gt_masks=BitMasks(masks),
        ),
    }


def _step(model, batch, seed):
    torch.manual_seed(seed)
    model.zero_grad()
    with EventStorage():
        losses = model(batch)
    sum(losses.values()).backward()
    return losses, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def _gradient_differences(stock, steps, height, width):
    """Assert equal losses; return the largest relative difference of a gradient in each step."""
    ours = copy.deepcopy(stock)
    assert swap_roi_align(ours) == 8
    optimizer = torch.optim.SGD(stock.parameters(), lr=0.002, momentum=0.9)
    generator = torch.Generator().manual_seed(0)
    differences = []
    for step in range(steps):
        ours.load_state_dict(stock.state_dict())
        batch = [_batch(height, width, 5, generator) for _ in range(2)]
        (losses, gradients), (expected, stock_gradients) = (
            _step(model, batch, step) for model in (ours, stock)
        )
        for name, loss in expected.items():
            torch.testing.assert_close(losses[name], loss, rtol=1e-4, atol=1e-4)
        assert gradients.keys() == stock_gradients.keys()
        relative = [
            (gradients[name] - gradient).norm() / (gradient.norm() + 1e-7)
            for name, gradient in stock_gradients.items()
        ]
        differences.append(max(relative).item())
        optimizer.step()
    return differences


def test_steps_have_stocks_losses_and_gradients():
    cfg = load_cfg(PROJECT / "configs/_base_/models/mask_rcnn_r50_fpn.yaml", TINY_MODEL)
    assert max(_gradient_differences(seeded_model(cfg), 2, 96, 128)) < 1e-4


@pytest.mark.slow
@pytest.mark.ci
def test_twenty_steps_of_the_mini_model_have_stocks_losses_and_gradients():
    stock = seeded_model(_cfg())
    # Trained weights, from which steps of this size do not diverge.
    weights = torch.load(PROJECT / "configs/quickstart_weights.pth", weights_only=True)["model"]
    assert not stock.load_state_dict(weights, strict=False).unexpected_keys
    differences = sorted(_gradient_differences(stock, 20, 128, 192))
    # Seen: 18 steps below 1e-6, which is rounding, one at 1.5e-4 and one at 3.1e-4, both in the
    # mask head. Stock with noise of 1e-7 on the output of its own RoIAlign jumps like that too
    # (3.3e-4): it happens where rounding takes the input of a ReLU over zero.
    assert differences[10] < 1e-6
    assert differences[14] < 1e-4
    assert differences[-1] < 1e-3


@pytest.mark.parametrize("fast", [True, False])
def test_the_trainer_swaps_the_poolers_unless_told_not_to(fast):
    cfg = _cfg(*TINY_MODEL, "MODEL.FAST_CPU", str(fast))
    model = FinetuneTrainer.build_model(cfg)
    assert {type(layer) for layer in _roi_aligns(model)} == {SparseROIAlign if fast else ROIAlign}
    assert model.state_dict().keys() == build_model(cfg).state_dict().keys()


WIDE_RPN = [*TINY_MODEL, "MODEL.FPN.OUT_CHANNELS", "128", "MODEL.RPN.BATCH_SIZE_PER_IMAGE", "16"]


@pytest.mark.parametrize("dims", [(-1,), (128, 128)])
def test_a_wide_rpn_has_a_sparse_backward_and_stocks_gradients(dims):
    stock = seeded_model(_cfg(*WIDE_RPN, "MODEL.RPN.CONV_DIMS", str(dims)))
    ours = copy.deepcopy(stock)
    assert swap_rpn_convolutions(ours) == len(dims)
    assert ours.state_dict().keys() == stock.state_dict().keys()
    batch = [_batch(96, 128, 5, torch.Generator().manual_seed(0)) for _ in range(2)]
    (losses, gradients), (expected, stock_gradients) = (
        _step(model, batch, 0) for model in (ours, stock)
    )
    assert losses == expected  # its forward is stock's
    assert gradients.keys() == stock_gradients.keys()
    for name, gradient in stock_gradients.items():
        torch.testing.assert_close(
            gradients[name], gradient, rtol=1e-4, atol=1e-5 * gradient.norm()
        )


@pytest.mark.parametrize("fast", [True, False])
def test_the_trainer_swaps_the_wide_rpn_unless_told_not_to(fast):
    model = FinetuneTrainer.build_model(_cfg(*WIDE_RPN, "MODEL.FAST_CPU", str(fast)))
    layer = model.proposal_generator.rpn_head.conv
    assert type(layer) is (SparseGradConv2d if fast else Conv2d)


def test_a_narrow_rpn_is_left_alone():
    assert swap_rpn_convolutions(build_model(_cfg(*TINY_MODEL))) == 0


def test_a_model_for_the_gpu_is_left_alone():
    cfg = _cfg(*TINY_MODEL)
    model = build_model(cfg)
    cfg.defrost()
    cfg.MODEL.DEVICE = "cuda"
    assert {type(layer) for layer in _roi_aligns(use_fast_cpu(cfg, model))} == {ROIAlign}


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has this setting")
def test_glibc_takes_the_setting():
    assert keep_freed_memory()
