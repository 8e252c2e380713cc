import copy

import pytest
import torch
from detectron2.layers import Conv2d
from torch.nn.functional import conv2d

from d2ft.layers.sparse_grad_conv import SparseGradConv2d, conv2d_sparse_grad

# Rows are (image, y, x) of outputs with a gradient, of 2 maps of 9x12.
PLACES = {
    "none": [],
    "inside": [(0, 4, 5), (1, 7, 3)],
    "corners": [(0, 0, 0), (0, 0, 11), (1, 8, 0), (1, 8, 11)],
    "edges": [(0, 0, 6), (0, 8, 6), (1, 4, 0), (1, 4, 11)],
    "side by side": [(0, 4, 4), (0, 4, 5), (0, 5, 4), (0, 5, 5), (0, 4, 6)],
    "all in one image": [(1, y, x) for y in range(2) for x in range(12)],
    "many": [(i, y, x) for i in range(2) for y in range(9) for x in range(12)],
}


def _inputs(shape=(2, 3, 9, 12), out=4, dtype=torch.float64, bias=True):
    torch.manual_seed(0)
    return [
        torch.randn(shape, dtype=dtype, requires_grad=True),
        torch.randn(out, shape[1], 3, 3, dtype=dtype, requires_grad=True),
        torch.randn(out, dtype=dtype, requires_grad=True) if bias else None,
    ]


def _results(convolve, inputs, places):
    """Return the output, and the gradients when those of the output are at ``places`` alone."""
    output = convolve(*inputs)
    grad = torch.zeros_like(output)
    for number, (image, y, x) in enumerate(places):
        grad[image, number % grad.shape[1] :, y, x] = 0.5 + number
    learned = [tensor for tensor in inputs if tensor is not None and tensor.requires_grad]
    return output, torch.autograd.grad(output, learned, grad)


def _stock(features, weight, bias):
    return conv2d(features, weight, bias, padding=1)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", PLACES)
def test_outputs_have_the_same_bits_and_gradients_the_same_sums(name, bias):
    inputs = _inputs(bias=bias)
    output, gradients = _results(conv2d_sparse_grad, inputs, PLACES[name])
    expected, stock_gradients = _results(_stock, inputs, PLACES[name])
    assert torch.equal(output, expected)
    for found, gradient in zip(gradients, stock_gradients, strict=True):
        torch.testing.assert_close(found, gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (2, 3, 1, 30), (2, 3, 30, 1), (3, 1, 16, 17)])
def test_maps_of_one_pixel_a_row_or_a_column(shape):
    places = [(0, 0, 0), (shape[0] - 1, shape[2] - 1, shape[3] - 1)]
    inputs = _inputs(shape)
    (output, gradients), (expected, stock_gradients) = (
        _results(convolve, inputs, places) for convolve in (conv2d_sparse_grad, _stock)
    )
    assert torch.equal(output, expected)
    for found, gradient in zip(gradients, stock_gradients, strict=True):
        torch.testing.assert_close(found, gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "strided",
    [
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        lambda x: torch.cat([x, x], dim=3)[:, :, :, ::2],
    ],
    ids=["channels last", "transposed", "every other column"],
)
def test_features_of_any_strides(strided):
    features, weight, bias = _inputs()
    inputs = [strided(features.detach()).requires_grad_(), weight, bias]
    (_, gradients), (_, expected) = (
        _results(convolve, inputs, PLACES["corners"]) for convolve in (conv2d_sparse_grad, _stock)
    )
    for found, gradient in zip(gradients, expected, strict=True):
        torch.testing.assert_close(found, gradient, rtol=1e-12, atol=1e-12)


def test_single_precision_agrees():
    inputs = _inputs((2, 64, 32, 40), 64, torch.float32)
    places = [(i % 2, i % 32, 3 * i % 40) for i in range(60)]
    (_, gradients), (_, expected) = (
        _results(convolve, inputs, places) for convolve in (conv2d_sparse_grad, _stock)
    )
    for found, gradient in zip(gradients, expected, strict=True):
        assert (found - gradient).norm() < 1e-6 * gradient.norm()


def test_gradients_are_those_of_differences():
    # Each output by itself, so that the gradient is at one position.
    assert torch.autograd.gradcheck(conv2d_sparse_grad, _inputs((1, 2, 5, 6), 2))


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (1, 2), (0, 2)])
def test_what_does_not_learn_gets_no_gradient(frozen):
    inputs = _inputs()
    for index in frozen:
        inputs[index].requires_grad_(False)
    (_, gradients), (_, expected) = (
        _results(convolve, inputs, PLACES["edges"]) for convolve in (conv2d_sparse_grad, _stock)
    )
    assert len(gradients) == 3 - len(frozen)
    for found, gradient in zip(gradients, expected, strict=True):
        torch.testing.assert_close(found, gradient, rtol=1e-12, atol=1e-12)


def _layers():
    stock = Conv2d(3, 4, 3, padding=1, activation=torch.nn.ReLU())
    ours = copy.deepcopy(stock)
    ours.__class__ = SparseGradConv2d
    return stock, ours


def test_a_layer_becomes_one_by_its_class():
    stock, ours = _layers()
    features = torch.randn(2, 3, 9, 12)
    assert torch.equal(ours(features), stock(features))
    assert ours.state_dict().keys() == stock.state_dict().keys()
    assert ours(features).grad_fn is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions_give_what_the_stock_layer_gives(dtype):
    stock, ours = (layer.to(dtype) for layer in _layers())
    features = torch.randn(2, 3, 9, 12, dtype=dtype)
    assert torch.equal(ours(features), stock(features))


def test_mixed_precision_gives_what_the_stock_layer_gives():
    stock, ours = _layers()
    features = torch.randn(2, 3, 9, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ours(features), stock(features))


def test_a_traced_layer_is_pytorchs_convolution():
    stock, ours = _layers()
    features = torch.randn(2, 3, 9, 12)
    traced = torch.jit.trace(ours, features)
    assert torch.equal(traced(features), stock(features))
    assert "_SparseGradConv2d" not in str(traced.graph)
