"""
RoIAlign on the CPU as the product of a sparse matrix with the pixels.

RoIAlign is linear in the features: each bin of a RoI is a weighted sum of pixels. The weights of a
bin are the outer product of those along y and along x, so samples that fall on the same pixels are
merged along each axis before the product is taken. A row of the sum has all channels, which is why
the features are laid out with channels last first.

Shape shorthand in this module:

    N, C, H, W: images, channels, height and width of the features
    R: RoIs; P: bins along an axis (output height or width)
    B: bins of all RoIs, R * P_y * P_x
    E: entries of the matrix, one for each bin and pixel that meet
    T: weights along one axis of all RoIs and bins

The rule, with its two forms (``aligned``) and samples outside of the features, is torchvision's:
https://github.com/pytorch/vision/blob/v0.20.0/torchvision/csrc/ops/cpu/roi_align_kernel.cpp
https://github.com/pytorch/vision/blob/v0.20.0/torchvision/csrc/ops/cpu/roi_align_common.h
"""

from typing import Any, NamedTuple

import torch
import torchvision
from detectron2.layers import ROIAlign
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag

from d2ft.layers.plain_cpu import is_plain_cpu


class SparseROIAlign(ROIAlign):
    """
    Same as :class:`ROIAlign`, but fast on the CPU, where torchvision's kernel is serial.

    What is not a float32 or float64 tensor in the memory of the CPU, and what is traced, scripted
    or compiled, goes through torchvision's kernel as before.
    """

    def forward(self, input: torch.Tensor, rois: torch.Tensor) -> torch.Tensor:
        """
        Pool the features under each RoI.

        Args:
            input: (N, C, H, W) features.
            rois: (R, 5), image index and XYXY_ABS box, in pixels of the image.

        Returns:
            (R, C, P_y, P_x).
        """
        assert rois.dim() == 2
        assert rois.size(1) == 5
        if torch.jit.is_scripting():
            return self._torchvision(input, rois)
        elif is_plain_cpu(input):
            return roi_align_sparse(
                input, rois, self.output_size, self.spatial_scale, self.sampling_ratio, self.aligned
            )
        else:
            return self._torchvision(input, rois)

    def _torchvision(self, input: torch.Tensor, rois: torch.Tensor) -> torch.Tensor:
        # What ROIAlign.forward does; TorchScript knows no super().
        if input.is_quantized:
            input = input.dequantize()
        return torchvision.ops.roi_align(
            input,
            rois.to(dtype=input.dtype),
            self.output_size,
            self.spatial_scale,
            self.sampling_ratio,
            self.aligned,
        )


def roi_align_sparse(
    features: torch.Tensor,
    rois: torch.Tensor,
    output_size: tuple[int, int],
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
) -> torch.Tensor:
    """
    Same as :func:`torchvision.ops.roi_align`, for the CPU.

    The result of a bin is summed in a fixed order, whatever the number of threads. Gradients
    reach the features only, as in torchvision, and cannot be differentiated again.

    Args:
        features: (N, C, H, W) float32 or float64, of any strides.
        rois: (R, 5), image index in [0, N) and XYXY_ABS box.
        output_size: (P_y, P_x).
        spatial_scale: size of the features over that of the space of the boxes.
        sampling_ratio: samples along each axis of a bin; 0 or less takes as many as the bin has
            pixels, rounded up.
        aligned: whether pixel centres are at half coordinates. If not, a RoI is also at least one
            pixel wide and high.

    Returns:
        (R, C, P_y, P_x), contiguous, in the dtype of ``features``.
    """
    return _SparseRoIAlign.apply(
        features, rois.to(features.dtype), output_size, spatial_scale, sampling_ratio, aligned
    )


class _SparseRoIAlign(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        features: torch.Tensor,
        rois: torch.Tensor,
        output_size: tuple[int, int],
        spatial_scale: float,
        sampling_ratio: int,
        aligned: bool,
    ) -> torch.Tensor:
        ctx.shape = features.shape
        num_channels = features.shape[1]
        if not len(rois) or not features.numel():
            return features.new_zeros(len(rois), num_channels, *output_size)
        matrix = _build_matrix(
            features.shape, rois, output_size, spatial_scale, sampling_ratio, aligned
        )
        ctx.save_for_backward(*matrix)
        bins = _multiply(matrix, _channels_last(features))
        return _channels_first(bins, (len(rois), num_channels, *output_size))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if not ctx.saved_tensors:
            return grad.new_zeros(ctx.shape), None, None, None, None, None
        num_images, _, height, width = ctx.shape
        matrix = _transpose(_Matrix(*ctx.saved_tensors), num_images * height * width)
        pixels = _multiply(matrix, _channels_last(grad))
        return _channels_first(pixels, ctx.shape), None, None, None, None, None


class _Matrix(NamedTuple):
    """A sparse matrix by rows: ``starts`` (rows + 1,), ``columns`` (E,) and ``weights`` (E,)."""

    starts: torch.Tensor
    columns: torch.Tensor
    weights: torch.Tensor


class _Axis(NamedTuple):
    """
    The pixels that each bin takes along one axis.

    Attributes:
        first: (R, P) first pixel.
        counts: (R, P) number of pixels, which follow one another.
        starts: (R, P) place of the first one's weight in ``weights``.
        weights: (T,) sums over the samples of a bin.
        num_samples: (R,) samples in a bin.
    """

    first: torch.Tensor
    counts: torch.Tensor
    starts: torch.Tensor
    weights: torch.Tensor
    num_samples: torch.Tensor


def _build_matrix(
    shape: torch.Size,
    rois: torch.Tensor,
    output_size: tuple[int, int],
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
) -> _Matrix:
    """Return the (B, N*H*W) weights, with the bins in the order (R, P_y, P_x)."""
    height, width = shape[-2:]
    boxes = rois[:, 1:] * spatial_scale - (0.5 if aligned else 0.0)
    lengths = boxes[:, 2:] - boxes[:, :2]
    if not aligned:
        lengths = lengths.clamp(min=1.0)
    y = _weigh_axis(boxes[:, 1], lengths[:, 1], output_size[0], height, sampling_ratio)
    x = _weigh_axis(boxes[:, 0], lengths[:, 0], output_size[1], width, sampling_ratio)

    def by_bin(values: torch.Tensor) -> torch.Tensor:
        return values.expand(len(rois), *output_size).reshape(-1)

    image = rois[:, 0].long()[:, None, None] * (height * width)
    corner = by_bin(image + y.first[:, :, None] * width + x.first[:, None, :])
    share = 1.0 / (y.num_samples * x.num_samples).clamp(min=1).to(rois.dtype)
    y_count, x_count = by_bin(y.counts[:, :, None]), by_bin(x.counts[:, None, :])
    # First the rows of pixels in a bin, then the pixels in a row.
    bin_of_row, row = _enumerate(y_count)
    row_weight = y.weights[by_bin(y.starts[:, :, None])[bin_of_row] + row]
    row_weight *= by_bin(share[:, None, None])[bin_of_row]
    row_corner = corner[bin_of_row] + row * width
    row_start = by_bin(x.starts[:, None, :])[bin_of_row]
    row_of_pixel, column = _enumerate(x_count[bin_of_row])
    weights = row_weight[row_of_pixel] * x.weights[row_start[row_of_pixel] + column]
    return _Matrix(_starts(y_count * x_count), row_corner[row_of_pixel] + column, weights)


def _weigh_axis(
    begin: torch.Tensor, length: torch.Tensor, num_bins: int, size: int, sampling_ratio: int
) -> _Axis:
    """
    Spread the samples of each bin over the two pixels beside each.

    Args:
        begin: (R,) where the RoI begins, in pixels of the features.
        length: (R,) its length. Zero or less has no samples, unless their number is fixed.
        num_bins: P.
        size: pixels of the features, at least 1.
        sampling_ratio: as in :func:`roi_align_sparse`.
    """
    bin_length = length / num_bins
    if sampling_ratio > 0:
        num_samples = torch.full_like(length, sampling_ratio, dtype=torch.long)
    else:
        num_samples = bin_length.ceil().long().clamp(min=0)
    per_bin = num_samples.repeat_interleave(num_bins)
    bin_of_sample, sample = _enumerate(per_bin)
    roi = torch.div(bin_of_sample, num_bins, rounding_mode="floor")
    place = begin[roi] + (bin_of_sample - roi * num_bins) * bin_length[roi]
    place += (sample + 0.5) * bin_length[roi] / num_samples[roi]
    # Up to one pixel outside, a sample takes the value at the border; beyond it, nothing.
    inside = (place >= -1) & (place <= size)
    place = place.clamp(0, size - 1)
    low = place.long()
    high = (low + 1).clamp(max=size - 1)
    high_weight = place - low

    starts = _starts(per_bin)
    filled = per_bin > 0
    first = torch.zeros_like(per_bin)
    last = first - 1
    # Samples follow one another, backwards in a RoI of negative length.
    begins, ends = starts[:-1][filled], starts[1:][filled] - 1
    first[filled] = torch.minimum(low[begins], low[ends])
    last[filled] = torch.maximum(high[begins], high[ends])
    counts = last - first + 1
    weight_starts = _starts(counts)
    weights = place.new_zeros(int(weight_starts[-1]))
    shift = (weight_starts[:-1] - first)[bin_of_sample]
    weights.index_add_(0, shift + low, (1 - high_weight) * inside)
    weights.index_add_(0, shift + high, high_weight * inside)
    shape = (len(begin), num_bins)
    return _Axis(
        first.view(shape), counts.view(shape), weight_starts[:-1].view(shape), weights, num_samples
    )


def _starts(counts: torch.Tensor) -> torch.Tensor:
    """Return where each of the groups of these sizes starts, and where the last one ends."""
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0))


def _enumerate(counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return for each member of groups of these sizes its group, and its place in the group."""
    group = torch.repeat_interleave(counts)
    return group, torch.arange(len(group)) - _starts(counts)[group]


def _multiply(matrix: _Matrix, dense: torch.Tensor) -> torch.Tensor:
    # The kernel for bags of embeddings is that of a sparse product, and 2 to 3 times as fast as
    # torch.sparse's with MKL. It runs over rows in parallel and over a row's entries in order.
    return embedding_bag(
        matrix.columns,
        dense,
        matrix.starts,
        mode="sum",
        per_sample_weights=matrix.weights,
        include_last_offset=True,
    )


def _transpose(matrix: _Matrix, num_columns: int) -> _Matrix:
    columns, order = torch.sort(matrix.columns, stable=True)
    rows = torch.repeat_interleave(matrix.starts.diff())
    starts = _starts(torch.bincount(columns, minlength=num_columns))
    return _Matrix(starts, rows[order], matrix.weights[order])


def _channels_last(tensor: torch.Tensor) -> torch.Tensor:
    """Return (N, C, H, W) as (N*H*W, C)."""
    if tensor.is_contiguous(memory_format=torch.channels_last):
        return tensor.permute(0, 2, 3, 1).reshape(-1, tensor.shape[1])
    matrices = tensor.contiguous().flatten(2)
    return _transpose_each(matrices).flatten(0, 1)


def _channels_first(rows: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Return (N*H*W, C) as contiguous (N, C, H, W)."""
    return _transpose_each(rows.view(shape[0], -1, shape[1])).view(shape)


def _transpose_each(matrices: torch.Tensor) -> torch.Tensor:
    """Return (N, X, Y) as contiguous (N, Y, X)."""
    result = matrices.new_empty(matrices.shape[0], matrices.shape[2], matrices.shape[1])
    if matrices[:1].numel() > 2**16:
        # PyTorch copies one matrix in blocks, and a stack of them not. Measured: 4 times as fast
        # for features, slower for the bins of a RoI.
        for target, source in zip(result, matrices, strict=True):
            target.copy_(source.t())
        return result
    return result.copy_(matrices.transpose(1, 2))
