import pytest
import torch
from detectron2.layers import ROIAlign
from torchvision.ops import roi_align

from d2ft.layers.roi_align_sparse import SparseROIAlign, roi_align_sparse

# On a map of 13x17 pixels at a scale of 1/4, so the image has 52x68. Image index, then the box.
ROIS = {
    "none": [],
    "inside": [[0, 4.3, 6.1, 40.2, 31.7], [1, 10, 10, 30, 50]],
    "at the border": [[0, 0, 0, 68, 52], [1, 60, 40, 68, 52], [0, 0, 0, 3, 3]],
    "over the border": [[0, -10, -12, 30, 20], [1, 50, 40, 90, 70], [0, -3.9, -4.1, 72.1, 56.2]],
    "outside": [[0, -90, -90, -40, -40], [1, 200, 10, 260, 30], [0, 10, 200, 30, 260]],
    "one pixel": [[0, 8, 8, 12, 12], [1, 33, 21, 34, 22], [0, 67, 51, 68, 52]],
    "huge": [[0, -300, -200, 500, 400], [1, 0, 0, 900, 3]],
    "degenerate": [[0, 20, 20, 20, 20], [1, 30, 10, 30, 40], [0, 40, 30, 20, 10], [0, 9, 9, 9, 2]],
    "samples on pixels and edges": [[0, -2, -2, 66, 50], [1, 4, 4, 32, 32], [0, -4, -4, 68, 52]],
}


def _features(dtype=torch.float64, channels=3):
    return torch.randn(2, channels, 13, 17, dtype=dtype, requires_grad=True)


def _rois(name, dtype=torch.float64):
    return torch.tensor(ROIS[name], dtype=dtype).reshape(-1, 5)


def _results(pool, features, *arguments):
    """Return the output, and the gradient of a sum of it with fixed weights."""
    output = pool(features, *arguments)
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    (gradient,) = torch.autograd.grad((output * weights).sum(), features)
    return output, gradient


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("sampling_ratio", [0, 1, 2, 3])
@pytest.mark.parametrize("output_size", [(7, 7), (1, 1), (3, 5)])
@pytest.mark.parametrize("name", ROIS)
def test_outputs_and_gradients_are_torchvisions(name, output_size, sampling_ratio, aligned):
    features, rois = _features(), _rois(name)
    arguments = (rois, output_size, 0.25, sampling_ratio, aligned)
    ours, stock = (_results(f, features, *arguments) for f in (roi_align_sparse, roi_align))
    for found, expected in zip(ours, stock, strict=True):
        assert found.is_contiguous()
        # Sums in another order, in double.
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("scale", [1.0, 0.3, 1 / 32])
def test_single_precision_agrees_at_any_scale(scale):
    features = _features(torch.float32, channels=8)
    rois = torch.cat([_rois(name, torch.float32) for name in ("inside", "at the border")])
    arguments = (rois, (14, 14), scale, 0, True)
    ours, stock = (_results(f, features, *arguments) for f in (roi_align_sparse, roi_align))
    torch.testing.assert_close(ours[0], stock[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours[1], stock[1], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("shape", [(0, 3, 13, 17), (2, 0, 13, 17), (1, 3, 1, 1), (1, 3, 1, 30)])
def test_maps_without_content_or_of_one_pixel(shape):
    features = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    rois = _rois("none") if shape[0] == 0 else torch.tensor([[0.0, 0, 0, 4, 4]]).double()
    ours, stock = (
        _results(f, features, rois, (2, 2), 0.25, 0, True) for f in (roi_align_sparse, roi_align)
    )
    for found, expected in zip(ours, stock, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


def test_features_without_pixels_give_zeros():
    output = roi_align_sparse(torch.zeros(1, 3, 0, 5), torch.zeros(2, 5), (2, 2), 1.0, 0, True)
    assert torch.equal(output, torch.zeros(2, 3, 2, 2))


@pytest.mark.parametrize(
    "strided",
    [
        lambda f: f.transpose(2, 3),
        lambda f: f[:, ::2, 1:, ::2],
        lambda f: f.contiguous(memory_format=torch.channels_last),
        lambda f: f[:, :, :1].expand(-1, -1, 9, -1),
    ],
)
def test_features_may_have_any_strides(strided):
    features, rois = _features(), _rois("inside")
    ours, stock = (
        _results(lambda x, f=f: f(strided(x), rois, (3, 3), 0.25, 0, True), features)
        for f in (roi_align_sparse, roi_align)
    )
    for found, expected in zip(ours, stock, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


def test_large_maps_are_the_same():
    # 70,000 values an image: laid out by another path than small ones.
    features = torch.randn(2, 5, 100, 140, dtype=torch.float64, requires_grad=True)
    rois = torch.cat([_rois("inside"), _rois("over the border")])
    arguments = (rois, (7, 7), 1.0, 0, True)
    ours, stock = (_results(f, features, *arguments) for f in (roi_align_sparse, roi_align))
    for found, expected in zip(ours, stock, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("name", ["inside", "over the border", "huge", "degenerate"])
def test_gradients_are_those_of_finite_differences(name, aligned):
    features = torch.randn(2, 1, 4, 5, dtype=torch.float64, requires_grad=True)
    rois = _rois(name)
    assert torch.autograd.gradcheck(
        lambda x: roi_align_sparse(x, rois, (2, 3), 1 / 13, 0, aligned), features
    )


def test_the_result_does_not_depend_on_the_number_of_threads():
    features = _features(torch.float32, channels=16)
    rois = torch.cat([_rois(name, torch.float32) for name in ROIS if name != "none"])
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            results.append(_results(roi_align_sparse, features, rois, (7, 7), 0.25, 0, True))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_layer_is_detectron2s(dtype):
    features, rois = _features(torch.float32).to(dtype), _rois("inside", torch.float32)
    ours, stock = (layer((7, 7), 0.25, 0, aligned=True) for layer in (SparseROIAlign, ROIAlign))
    torch.testing.assert_close(ours(features, rois), stock(features, rois), rtol=1e-5, atol=1e-5)
    assert ours.state_dict() == {}


def test_a_traced_or_scripted_layer_holds_torchvisions_operator():
    features, rois = _features(torch.float32).detach(), _rois("inside", torch.float32)
    layer = SparseROIAlign((7, 7), 0.25, 0)
    for exported in (torch.jit.trace(layer, (features, rois)), torch.jit.script(layer)):
        assert "torchvision::roi_align" in str(exported.inlined_graph)
        torch.testing.assert_close(exported(features, rois), layer(features, rois))
