"""The command line of training scripts: Detectron2's arguments, checked before anything starts."""

import argparse
import sys
from collections.abc import Callable
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, launch

from d2ft.config import load_cfg
from d2ft.data import register_builtin_datasets
from d2ft.engine.setup import default_setup, resolve_cfg
from d2ft.engine.trainer import FinetuneTrainer, evaluate, inference_cfg
from d2ft.errors import UserError
from d2ft.preflight import run_preflight

Register = Callable[[], None]


def run_train_net(register: Register = register_builtin_datasets) -> None:
    """
    Train or evaluate what the command line asks for, then exit.

    A mistake of the user is one line on standard error and exit code 1.

    Args:
        register: registers the datasets that the configs name. It runs in every process, because
            a spawned one knows no dataset, and so must be a function of a module or script.
    """
    try:
        check_and_launch(default_argument_parser().parse_args(), register)
    except UserError as error:
        sys.exit(f"error: {error}")


def check_and_launch(args: argparse.Namespace, register: Register) -> None:
    """
    Check config, data and weights once in this process, then start the processes that train.

    Args:
        args: of ``detectron2.engine.default_argument_parser``.
        register: as in :func:`run_train_net`.

    Raises:
        UserError: if a check fails; nothing has been written or started then.
    """
    register()
    cfg = load_cfg(args.config_file, args.opts)
    run_preflight(
        resolve_cfg(cfg),
        world_size=args.num_gpus * args.num_machines,
        eval_only=args.eval_only,
        resume=args.resume,
    )
    launch(
        _run_process,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=(cfg, args, register),
    )


def _run_process(
    cfg: CfgNode, args: argparse.Namespace, register: Register
) -> dict[str, Any] | None:
    register()
    # Here and not before the launch: all machines have to agree on a random seed.
    cfg = resolve_cfg(cfg)
    if args.eval_only:
        default_setup(inference_cfg(cfg), args)
        return evaluate(cfg, resume=args.resume)
    default_setup(cfg, args)
    trainer = FinetuneTrainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()
