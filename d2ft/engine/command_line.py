"""The command line of training scripts: Detectron2's arguments, checked before anything starts."""

import argparse
import errno
import logging
import re
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, launch
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from d2ft.config import load_cfg
from d2ft.data import register_builtin_datasets, register_declared_datasets, resolve_from_data
from d2ft.data.cache import forget_loaded, loaded_once
from d2ft.engine.interrupt import EXIT_CODES, pass_signals_on
from d2ft.engine.run_folder import check_output_dir, run_lock
from d2ft.engine.setup import default_setup, inference_cfg, leave_process_group, resolve_cfg
from d2ft.engine.trainer import FinetuneTrainer
from d2ft.errors import UserError
from d2ft.preflight import already_checked, run_preflight

logger = logging.getLogger(__name__)

Register = Callable[[], None]


def run_train_net(
    register: Register = register_builtin_datasets,
    trainer: type[FinetuneTrainer] = FinetuneTrainer,
) -> None:
    """
    Train or evaluate what the command line asks for, then exit.

    A mistake of the user is one line on standard error and exit code 1. A run that ends early
    because of SIGTERM or SIGUSR1 has saved where it stands and exits with 75; by Ctrl-C, with 130.

    Args:
        register: registers the datasets that the configs name. It runs in every process, because
            a spawned one knows no dataset, and so must be a function of a module or script.
        trainer: the class that trains and evaluates.
    """
    try:
        check_and_launch(default_argument_parser().parse_args(), register, trainer)
    except UserError as error:
        sys.exit(f"error: {error}")
    except ProcessExitedException as error:
        if error.exit_code not in EXIT_CODES.values():
            raise
        sys.exit(error.exit_code)
    except ProcessRaisedException as error:
        # What a spawned process raised arrives as the text of its traceback.
        message = _text_of_user_error(str(error))
        if message is None:
            raise
        sys.exit(f"error: {message}")
    except OSError as error:
        # The metrics of a run that could not save its checkpoint do not fit on the disk either.
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        cause = error.__context__
        sys.exit(f"error: {cause if isinstance(cause, UserError) else error}")


def _text_of_user_error(traceback: str) -> str | None:
    pattern = rf"^{re.escape(UserError.__module__)}\.UserError: (.*?)(?=\n\n|\Z)"
    found = re.findall(pattern, traceback.strip(), re.DOTALL | re.MULTILINE)
    return found[-1].strip() if found else None


@loaded_once()
def check_and_launch(
    args: argparse.Namespace, register: Register, trainer: type[FinetuneTrainer] = FinetuneTrainer
) -> None:
    """
    Check config, data and weights once in this process, then start the processes that train.

    Args:
        args: of ``detectron2.engine.default_argument_parser``.
        register: as in :func:`run_train_net`.
        trainer: as in :func:`run_train_net`.

    Raises:
        UserError: if a check fails; nothing has been written or started then.
    """
    setup_logger(name="d2ft")
    register()
    cfg = load_cfg(args.config_file, args.opts)
    register_declared_datasets(cfg, cfg.DATASETS.TEST if args.eval_only else None)
    # The processes get what it sets with the config.
    cfg = resolve_from_data(cfg, eval_only=args.eval_only)
    num_processes = max(1, args.num_gpus)  # Detectron2 takes 0 for a single one too
    resolved = resolve_cfg(cfg)
    _check_devices(resolved, num_processes)
    if not args.eval_only:
        check_output_dir(cfg.OUTPUT_DIR, resume=args.resume)
    found = run_preflight(
        resolved,
        world_size=num_processes * args.num_machines,
        eval_only=args.eval_only,
        resume=args.resume,
    )
    if num_processes > 1:
        forget_loaded()  # the processes load for themselves
    seed = found.pop("weights").get("seed")
    if seed is not None:
        if cfg.SEED not in (-1, seed):
            logger.warning("The run goes on with its SEED %d; %d is left aside", seed, cfg.SEED)
        cfg.SEED = seed
    with pass_signals_on() if num_processes * args.num_machines > 1 else nullcontext():
        launch(
            _run_in_group,
            num_processes,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(cfg, args, register, trainer, found),
        )


def _check_devices(cfg: CfgNode, num_processes: int) -> None:
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if num_processes == 1 or not gpus:
        return
    if cfg.MODEL.DEVICE == "cpu":
        # Detectron2 then joins the processes by NCCL, which knows no CPU.
        raise UserError(
            f"--num-gpus {num_processes} with MODEL.DEVICE cpu needs a machine without GPUs: hide "
            "them by CUDA_VISIBLE_DEVICES="
        )
    if num_processes > gpus:
        raise UserError(f"--num-gpus is {num_processes}, but PyTorch finds {gpus} GPUs here")


def _run_process(
    cfg: CfgNode,
    args: argparse.Namespace,
    register: Register,
    trainer: type[FinetuneTrainer],
    checked: dict[str, Any],
) -> dict[str, Any] | None:
    register()
    register_declared_datasets(cfg, cfg.DATASETS.TEST if args.eval_only else None)
    # Here and not before the launch: all machines have to agree on a random seed.
    cfg = resolve_cfg(cfg)
    if args.eval_only:
        forget_loaded()
        default_setup(inference_cfg(cfg), args)
        return trainer.evaluate(cfg, resume=args.resume)
    with run_lock(cfg.OUTPUT_DIR) if comm.is_main_process() else nullcontext():
        default_setup(cfg, args)
        with already_checked(checked):
            training = trainer(cfg)
        forget_loaded()
        training.resume_or_load(resume=args.resume)
        return training.train()


def _run_in_group(*arguments: Any) -> dict[str, Any] | None:
    results = _run_process(*arguments)
    leave_process_group()
    return results
