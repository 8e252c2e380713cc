#!/usr/bin/env python
"""
Measure what FinetuneTrainer costs beside Detectron2's DefaultTrainer: seconds an iteration.

    python tools/benchmark_overhead.py            # about 10 minutes on one core
    python tools/benchmark_overhead.py --quick    # for a look

Both train the mini model on the embedded set with the same kernels, optimizer, sizes and batches,
in turn, so that a machine that gets slower does so for both. Ours has all that works at each step:
seeds, checks of the losses, gathers of signals, the moving average, the best checkpoint.
"""

import argparse
import gc
import json
import logging
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer
from detectron2.utils.events import EventStorage
from tabulate import tabulate

from d2ft.config import load_cfg
from d2ft.data import register_builtin_datasets
from d2ft.data.synthetic import write_mini_cityscapes
from d2ft.engine import FinetuneTrainer, resolve_cfg
from d2ft.engine.hooks.ema import EMAHook
from d2ft.host import bridge_detectron2

PROJECT = Path(__file__).resolve().parents[1]
IMAGES, BATCH = 64, 2
EPOCH = IMAGES // BATCH

# The same for both: stock has neither AdamW nor d2ft's RoIAlign, and images of one size take the
# same time in any order.
SAME = [
    *("MODEL.FAST_CPU", "False"),
    *("MODEL.WEIGHTS", str(PROJECT / "configs/quickstart_weights.pth")),
    *("SOLVER.OPTIMIZER", "SGD"),
    *("SOLVER.BASE_LR", "0.0025"),
    *("SOLVER.MAX_ITER", "100000"),
    *("SOLVER.CHECKPOINT_PERIOD", "100000"),
    *("INPUT.MIN_SIZE_TRAIN", "(256, 256)"),
    *("DATALOADER.NUM_WORKERS", "0"),
    *("LOG_PERIOD", "20"),  # Detectron2's
]
WITHOUT_EMA = ["FINETUNE.BEST.METRIC", "segm/AP", "FINETUNE.EARLY_STOPPING.PATIENCE", "3"]
EVERYTHING = [*WITHOUT_EMA, "FINETUNE.EMA.ENABLED", "True"]
VARIANTS: dict[str, tuple[type[DefaultTrainer], list[str]]] = {
    "DefaultTrainer": (DefaultTrainer, []),
    "FinetuneTrainer, everything on": (FinetuneTrainer, EVERYTHING),
    "the same without moving average": (FinetuneTrainer, WITHOUT_EMA),
}


def seconds_per_iteration(variant: str, folder: str, *, warmup: int, steps: int) -> float:
    """Train from the start; return the mean over ``steps`` iterations after ``warmup``."""
    trainer_class, options = VARIANTS[variant]
    cfg: CfgNode = load_cfg(PROJECT / "configs/quickstart.yaml", [*SAME, *options])
    cfg.OUTPUT_DIR = folder
    trainer = trainer_class(resolve_cfg(cfg))
    trainer.resume_or_load(resume=False)
    start = 0.0
    # The loop of TrainerBase.train, without its end: final checkpoint and evaluation.
    with EventStorage(0) as trainer.storage:
        trainer.before_train()
        for trainer.iter in range(warmup + steps):
            if trainer.iter == warmup:
                start = time.perf_counter()
            trainer.before_step()
            trainer.run_step()
            trainer.after_step()
        seconds = time.perf_counter() - start
    del trainer
    gc.collect()  # a trainer refers to itself
    return seconds / steps


def moving_average_ms() -> float:
    """Return the milliseconds of CPU that the average takes at each step, the median of 50."""
    cfg = resolve_cfg(load_cfg(PROJECT / "configs/quickstart.yaml", SAME))
    hook = EMAHook(cfg.FINETUNE.EMA.DECAY)
    hook.trainer = SimpleNamespace(model=FinetuneTrainer.build_model(cfg))
    hook.before_train()
    seconds = []
    for _ in range(50):
        start = time.process_time()
        hook.after_step()
        seconds.append(time.process_time() - start)
    return 1e3 * statistics.median(seconds)


def describe(times: dict[str, list[float]]) -> str:
    """Return a table: median and range of each variant, and of its ratio to stock by rounds."""
    stock = times["DefaultTrainer"]
    rows = []
    for name, seconds in times.items():
        ratios = [100 * (own / other - 1) for own, other in zip(seconds, stock, strict=True)]
        rows.append(
            [
                name,
                f"{1e3 * statistics.median(seconds):.1f}",
                f"{1e3 * min(seconds):.1f} to {1e3 * max(seconds):.1f}",
                f"{statistics.median(ratios):+.1f}",
                f"{min(ratios):+.1f} to {max(ratios):+.1f}",
            ]
        )
    headers = ["", "ms an iteration", "range", "% more than stock", "range by rounds"]
    return tabulate(rows, headers, disable_numparse=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--epochs", type=int, default=2, help="that are timed, after one that is not"
    )
    parser.add_argument("--quick", action="store_true", help="two rounds of 8 iterations")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the times of each round")
    args = parser.parse_args()
    rounds = 2 if args.quick else args.rounds
    warmup, steps = (2, 8) if args.quick else (EPOCH, args.epochs * EPOCH)
    torch.set_num_threads(1)
    times: dict[str, list[float]] = {name: [] for name in VARIANTS}
    with tempfile.TemporaryDirectory(prefix="d2ft_overhead_") as folder:
        write_mini_cityscapes(Path(folder, "cityscapes"), splits={"train": IMAGES, "val": 1})
        os.environ["DETECTRON2_DATASETS"] = folder
        register_builtin_datasets()
        logging.disable(logging.WARNING)  # of a validation set that is never used
        for number in range(rounds):
            for name in VARIANTS:
                with tempfile.TemporaryDirectory(dir=folder) as run:
                    seconds = seconds_per_iteration(name, run, warmup=warmup, steps=steps)
                times[name].append(seconds)
                print(f"round {number + 1}: {name}, {1e3 * seconds:.1f} ms", flush=True)
    print(describe(times))
    print(f"The moving average by itself: {moving_average_ms():.1f} ms an iteration")
    load = os.getloadavg()[1]
    print(
        f"{bridge_detectron2()}, torch {torch.__version__}; load in the last 5 minutes: {load:.1f}"
    )
    if args.json:
        args.json.write_text(json.dumps(times, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
