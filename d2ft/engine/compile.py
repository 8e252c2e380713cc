"""Compile the backbone, where the machine can."""

import logging

import torch

logger = logging.getLogger(__name__)


def compile_backbone(model: torch.nn.Module) -> bool:
    """
    Let ``torch.compile`` make the backbone; the heads, whose shapes change, stay as they are.

    Names in checkpoints stay as well. A machine that cannot compile, for example without a C++
    compiler, is told by a warning, and the model then runs uncompiled.

    Args:
        model: with a ``backbone``; changed in place.

    Returns:
        Whether the backbone is compiled.
    """
    device = next(model.parameters()).device
    try:
        # PyTorch compiles at the first call: without this trial a run would fail in its first step.
        torch.compile(lambda x: x * 2 + 1, dynamic=False)(torch.ones(8, device=device))
    except Exception as error:  # noqa: BLE001, whatever the compilers of a machine may raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        logger.warning("MODEL.COMPILE has no effect: torch.compile does not work here: %s", reason)
        return False
    model.get_submodule("backbone").compile(dynamic=True)
    logger.info("The backbone is compiled at the first steps, which take longer")
    return True
