"""What a run does once before anything is built: resolve the config, set up the logs."""

import argparse
import gc
import logging
import os

import torch
from detectron2.config import CfgNode
from detectron2.engine import default_setup as detectron2_default_setup
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from d2ft.config import who_set
from d2ft.errors import UserError
from d2ft.host import bridge_detectron2

logger = logging.getLogger(__name__)


def resolve_cfg(cfg: CfgNode) -> CfgNode:
    """
    Return a frozen copy of ``cfg`` with what depends on the machine filled in.

    MODEL.DEVICE becomes ``cpu`` where there is no GPU and nobody asked for one, and SEED -1 a
    random seed that all processes share. Resolving again changes nothing.

    Raises:
        UserError: if a GPU is asked for and there is none.
    """
    cfg = cfg.clone()
    cfg.defrost()
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        asked_by = who_set(cfg, "MODEL.DEVICE")
        if asked_by != "default":
            raise UserError(
                f"MODEL.DEVICE {cfg.MODEL.DEVICE!r} ({asked_by}): PyTorch {torch.__version__} finds "
                "no GPU here; use MODEL.DEVICE cpu"
            )
        cfg.MODEL.DEVICE = "cpu"
    if cfg.SEED < 0:
        cfg.SEED = comm.shared_random_seed()
    cfg.freeze()
    return cfg


def inference_cfg(cfg: CfgNode) -> CfgNode:
    """Return ``cfg`` with OUTPUT_DIR/inference, so that an evaluation leaves the run as it is."""
    return cfg_below(cfg, "inference")


def cfg_below(cfg: CfgNode, folder: str) -> CfgNode:
    """Return a frozen copy of ``cfg`` that writes to ``folder`` inside of OUTPUT_DIR."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.OUTPUT_DIR = os.path.join(cfg.OUTPUT_DIR, folder)
    cfg.freeze()
    return cfg


def leave_process_group() -> None:
    """
    End the communication of this process with the others, if there are any, before it exits.

    Threads of gloo may still hold tensors of the last gather. If they let go of them while Python
    shuts down, PyTorch aborts the process, and a run that is complete seems to have failed.
    Detectron2 never leaves the group; the references that it keeps are dropped here, so that the
    threads end with the group.
    """
    if not torch.distributed.is_initialized():
        return
    comm.synchronize()  # nobody leaves while others still talk to it
    comm._get_global_gloo_group.cache_clear()
    comm._LOCAL_PROCESS_GROUP = None
    torch.distributed.destroy_process_group()
    gc.collect()  # a trainer refers to itself, and its DDP model to the group


def default_setup(cfg: CfgNode, args: argparse.Namespace) -> None:
    """
    Same as ``detectron2.engine.default_setup``, but d2ft's own log lines are shown and kept too.

    Args:
        cfg: the resolved config; logs and ``config.yaml`` go to its OUTPUT_DIR.
        args: of ``detectron2.engine.default_argument_parser``.
    """
    detectron2_default_setup(cfg, args)
    # A process that has checked the run before it started shows d2ft's lines already.
    shown = bool(logging.getLogger("d2ft").handlers)
    setup_logger(
        cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="d2ft", configure_stdout=not shown
    )
    logger.info("Using %s", bridge_detectron2())
