"""Which tensors our own layers for the CPU take."""

import torch
from detectron2.utils.tracing import is_fx_tracing


def is_plain_cpu(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor is float32 or float64 on the CPU, and nothing is traced or compiled."""
    if is_fx_tracing() or torch.jit.is_tracing() or torch.compiler.is_compiling():
        return False
    return tensor.is_cpu and tensor.dtype in (torch.float32, torch.float64)
