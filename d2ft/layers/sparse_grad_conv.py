"""
3x3 convolution on the CPU whose backward is computed only where there is a gradient.

The loss of an RPN is that of a few hundred anchors, so nearly all of the gradient of its hidden
features is zero; a backward convolution multiplies the zeros like everything else.

Shape shorthand in this module:

    N, C, K, H, W: images, channels of the input and of the output, height and width
    M: positions, of all images, where any channel has a gradient
"""

from typing import Any

import torch
from detectron2.layers import Conv2d
from torch.autograd.function import once_differentiable
from torch.nn.functional import conv2d

from d2ft.layers.plain_cpu import is_plain_cpu

# Gathering and scattering cost more than they save if more than this share has a gradient.
_MAX_SHARE = 1 / 8


class SparseGradConv2d(Conv2d):
    """
    Same as :class:`Conv2d` of 3x3, stride 1, padding 1 and no norm, but with a fast backward.

    It has no state of its own: a layer becomes one by its class alone. What ``is_plain_cpu``
    refuses, and mixed precision, go through PyTorch's backward as before.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (N, C, H, W) features to (N, K, H, W), with the activation."""
        if torch.jit.is_scripting():
            x = conv2d(x, self.weight, self.bias, padding=1)
        elif is_plain_cpu(x) and not torch.is_autocast_enabled("cpu"):
            x = conv2d_sparse_grad(x, self.weight, self.bias)
        else:
            x = conv2d(x, self.weight, self.bias, padding=1)
        return x if self.activation is None else self.activation(x)


def conv2d_sparse_grad(
    features: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Same as :func:`torch.nn.functional.conv2d` with padding 1, for gradients that are mostly zero.

    The output has the same bits, gradients are sums in another order. Where many positions have a
    gradient, PyTorch's backward is used.

    Args:
        features: (N, C, H, W).
        weight: (K, C, 3, 3).
        bias: (K,), or None.

    Returns:
        (N, K, H, W). Its gradients cannot be differentiated again.
    """
    return _SparseGradConv2d.apply(features, weight, bias)


class _SparseGradConv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, features: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(features, weight)
        return conv2d(features, weight, bias, padding=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        features, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        has_grad = grad.any(dim=1)
        image, y, x = has_grad.nonzero(as_tuple=True)
        if len(image) > _MAX_SHARE * has_grad.numel():
            return torch.ops.aten.convolution_backward(
                grad,
                features,
                weight,
                [len(weight)],
                [1, 1],
                [1, 1],
                [1, 1],
                False,
                [0, 0],
                1,
                wanted,
            )
        grads = grad[image, :, y, x]
        taps = _Taps(features.shape, image, y, x)
        return (
            taps.scatter(grads, weight) if wanted[0] else None,
            taps.correlate(grads, features) if wanted[1] else None,
            grads.sum(dim=0) if wanted[2] else None,
        )


class _Taps:
    """The 9 inputs of each of M outputs."""

    def __init__(
        self, shape: torch.Size, image: torch.Tensor, y: torch.Tensor, x: torch.Tensor
    ) -> None:
        """Find them in features of ``shape`` (N, C, H, W)."""
        height, width = shape[2:]
        shifts = torch.arange(-1, 2)
        rows, columns = y[:, None, None] + shifts[:, None], x[:, None, None] + shifts
        inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
        self._shape = shape
        self._image = image
        self._inside = inside.flatten(1)  # (M, 9)
        self._place = (rows * width + columns).flatten(1)  # (M, 9) in H * W, if inside

    def correlate(self, grads: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """Return the (K, C, 3, 3) gradient of the weight from (M, K) gradients."""
        place = torch.where(self._inside, self._place, 0)
        inputs = features.flatten(2)[self._image[:, None], :, place]
        inputs[~self._inside] = 0
        sums = grads.t() @ inputs.flatten(1)
        return sums.view(-1, 3, 3, features.shape[1]).permute(0, 3, 1, 2).contiguous()

    def scatter(self, grads: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Return the (N, C, H, W) gradient of the features from (M, K) gradients."""
        values = (grads @ weight.permute(0, 2, 3, 1).flatten(1)).unflatten(1, (9, -1))
        result = grads.new_zeros(self._shape).flatten(2)
        # Tap by tap, as the outputs of one tap have different inputs.
        for tap, inside in enumerate(self._inside.t()):
            result[self._image[inside], :, self._place[inside, tap]] += values[inside, tap]
        return result.view(self._shape)
