#!/usr/bin/env python
"""
Fine-tune or evaluate the model of a config, with Detectron2's own arguments.

    python tools/train_net.py --config-file configs/cityscapes_ft.yaml
    python tools/train_net.py --config-file configs/cityscapes_ft.yaml --eval-only \
        MODEL.WEIGHTS output/cityscapes_ft/model_final.pth
"""

import argparse
import sys
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, launch

from d2ft.config import load_cfg
from d2ft.data import register_builtin_datasets
from d2ft.engine import FinetuneTrainer, default_setup, evaluate, inference_cfg, resolve_cfg
from d2ft.errors import UserError
from d2ft.preflight import run_preflight


def main(cfg: CfgNode, args: argparse.Namespace) -> dict[str, Any] | None:
    """Run in every process: a spawned one knows no dataset until it registers them."""
    register_builtin_datasets()
    cfg = resolve_cfg(cfg)
    if args.eval_only:
        default_setup(inference_cfg(cfg), args)
        return evaluate(cfg, resume=args.resume)
    default_setup(cfg, args)
    trainer = FinetuneTrainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


def check_and_launch(args: argparse.Namespace) -> None:
    """Check everything once, in this process, then start the processes that train."""
    register_builtin_datasets()
    cfg = load_cfg(args.config_file, args.opts)
    run_preflight(
        resolve_cfg(cfg),
        world_size=args.num_gpus * args.num_machines,
        eval_only=args.eval_only,
        resume=args.resume,
    )
    launch(
        main,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=(cfg, args),
    )


if __name__ == "__main__":
    try:
        check_and_launch(default_argument_parser().parse_args())
    except UserError as error:
        sys.exit(f"error: {error}")
