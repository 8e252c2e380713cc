"""What makes a built model faster on the CPU without changing what it computes."""

import ctypes
import functools
import logging
import platform

from detectron2.config import CfgNode
from detectron2.layers import Conv2d, ROIAlign
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.proposal_generator.rpn import StandardRPNHead
from torch import nn

from d2ft.layers.roi_align_sparse import SparseROIAlign
from d2ft.layers.sparse_grad_conv import SparseGradConv2d

logger = logging.getLogger(__name__)

_MIN_CHANNELS = 128

# Parameters of mallopt: /usr/include/malloc.h, https://man7.org/linux/man-pages/man3/mallopt.3.html
_M_TRIM_THRESHOLD = -1
_M_TOP_PAD = -2
_M_MMAP_THRESHOLD = -3


def use_fast_cpu(cfg: CfgNode, model: nn.Module) -> nn.Module:
    """
    Let a model on the CPU use d2ft's layers, and the process keep the memory that it frees.

    Nothing happens unless MODEL.FAST_CPU is set and MODEL.DEVICE is the CPU. The state dict of
    the model stays the same.

    Args:
        cfg: the resolved config.
        model: as ``build_model`` returns it; changed in place.

    Returns:
        ``model``.
    """
    if cfg.MODEL.FAST_CPU and cfg.MODEL.DEVICE == "cpu":
        keep_freed_memory()
        logger.info(
            "MODEL.FAST_CPU: %d RoIAlign layers use the sparse product, %d convolutions of the RPN "
            "a sparse backward",
            swap_roi_align(model),
            swap_rpn_convolutions(model),
        )
    return model


def swap_roi_align(model: nn.Module) -> int:
    """Replace Detectron2's RoIAlign in the poolers of ``model`` by ours; return how many."""
    swapped = 0
    for pooler in model.modules():
        if not isinstance(pooler, ROIPooler):
            continue
        for name, layer in pooler.level_poolers.named_children():
            if type(layer) is ROIAlign:  # what is derived from it may compute something else
                ours = SparseROIAlign(
                    layer.output_size, layer.spatial_scale, layer.sampling_ratio, layer.aligned
                )
                setattr(pooler.level_poolers, name, ours.train(layer.training))
                swapped += 1
    return swapped


def swap_rpn_convolutions(model: nn.Module) -> int:
    """Let wide hidden convolutions of RPNs use the sparse backward; return how many do."""
    heads = [module for module in model.modules() if isinstance(module, StandardRPNHead)]
    swapped = 0
    for layer in (layer for head in heads for layer in head.conv.modules()):
        # What is derived from it may compute something else.
        if type(layer) is Conv2d and _can_be_sparse(layer):
            layer.__class__ = SparseGradConv2d
            swapped += 1
    return swapped


def _can_be_sparse(layer: Conv2d) -> bool:
    is_plain = layer.stride == layer.padding == layer.dilation == (1, 1) and layer.groups == 1
    # With 64 channels a step gained 2 %, which is not worth other roundings.
    is_wide = layer.in_channels >= _MIN_CHANNELS
    return is_plain and is_wide and layer.kernel_size == (3, 3) and layer.norm is None


@functools.cache
def keep_freed_memory() -> bool:
    """
    Tell glibc to keep freed memory for the next allocation instead of giving it back.

    A step of a detector allocates the same large buffers again and again. By default each comes
    from the system and goes back to it, and every one of its pages is zeroed and mapped anew.
    The setting holds for the whole process and for good; resident memory stays at its peak.

    Returns:
        Whether it was set: with the GNU C library only.
    """
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        logger.debug("The C library is not glibc: its allocator is left as it is")
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = (
        (_M_MMAP_THRESHOLD, 2**31 - 1),
        (_M_TRIM_THRESHOLD, 2**31 - 1),
        (_M_TOP_PAD, 2**26),
    )
    # Each returns 0 if this glibc refuses the value.
    accepted = [mallopt(parameter, value) for parameter, value in settings]
    if not all(accepted):
        logger.debug("mallopt refused a value: %s", accepted)
    return all(accepted)
