#!/usr/bin/env python
"""
Measure the recipes of configs/_base_/schedules on the embedded sets: AP and time by recipe and seed.

    python projects/Recipes/measure.py

Each run is ``tools/train_net.py`` with a config of this folder, eight epochs whatever the recipe
says, so that all have the same budget. Runs that ``--output`` holds already are not repeated, so
the command may be stopped and called again; the table is made of those that are there.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tabulate import tabulate

from d2ft.data.synthetic import write_mini_cityscapes
from d2ft.files import atomic_write

FOLDER = Path(__file__).resolve().parent
PROJECT = FOLDER.parents[1]
DATASETS = Path("output/quickstart/datasets")
TIME_FILE = "cpu_seconds.json"

# Configs of this folder, and rows of the table.
RECIPES = ("finetune_8e", "linear_probe_then_finetune", "custom_small")
# The same for all: eight epochs, two evaluations, nothing that ends a run early.
BUDGET = [
    *("SOLVER.EPOCHS", "8"),
    *("SOLVER.CHECKPOINT_EPOCHS", "8"),
    *("TEST.EVAL_EPOCHS", "4"),
    *("FINETUNE.EARLY_STOPPING.PATIENCE", "0"),
    *("DATALOADER.NUM_WORKERS", "0"),
]


def train(recipe: str, seed: int, output: Path, extra: list[str]) -> None:
    """Do a run in a process of its own, on one thread, and keep the time it took."""
    command = [
        *(sys.executable, PROJECT / "tools/train_net.py", "--config-file"),
        *(FOLDER / f"{recipe}.yaml", *BUDGET, *extra, "SEED", str(seed), "OUTPUT_DIR", output),
    ]
    shutil.rmtree(output, ignore_errors=True)  # of a run that was stopped
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with Path(f"{output}.log").open("w") as log:
        arguments = list(map(str, command))
        subprocess.run(arguments, check=True, cwd=PROJECT, stdout=log, stderr=subprocess.STDOUT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    with atomic_write(output / TIME_FILE) as file:
        json.dump(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, file)


def measured(run: Path) -> dict[str, float] | None:
    """Return mask and box AP of the last weights and of their average, and minutes; None if open."""
    if not (run / TIME_FILE).is_file():
        return None
    results = {"last": json.loads((run / "results.json").read_text())}
    if (run / "ema/results.json").is_file():
        results["average"] = json.loads((run / "ema/results.json").read_text())
    values = {
        f"{task} AP, {which}": result[task]["AP"]
        for task in ("segm", "bbox")
        for which, result in results.items()
    }
    return {**values, "minutes": json.loads((run / TIME_FILE).read_text()) / 60}


def table(folder: Callable[[str, int], Path], seeds: list[int]) -> str:
    """Return median and range over the seeds, by recipe."""
    rows = []
    for recipe in RECIPES:
        runs = [values for seed in seeds if (values := measured(folder(recipe, seed)))]
        row = {"schedule": recipe, "seeds": str(len(runs))}
        for name in runs[0] if runs else ():
            of_seeds = [run[name] for run in runs]
            median = statistics.median(of_seeds)
            row[name] = f"{median:.1f} ({min(of_seeds):.1f} to {max(of_seeds):.1f})"
        rows.append(row)
    return tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=RECIPES)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("output/recipes"))
    parser.add_argument("opts", nargs="*", help="KEY VALUE overrides for all runs")
    args = parser.parse_args()
    write_mini_cityscapes(DATASETS / "cityscapes", splits={"train": 64, "val": 16})
    os.environ["DETECTRON2_DATASETS"] = str(DATASETS.resolve())
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    output = args.output.resolve()
    output.mkdir(parents=True, exist_ok=True)

    def folder(recipe: str, seed: int) -> Path:
        return output / f"{recipe}_{seed}"

    for seed in args.seeds:
        for recipe in args.recipes:
            if measured(folder(recipe, seed)) is None:
                print(f"{recipe}, seed {seed}: {folder(recipe, seed)}.log", flush=True)
                train(recipe, seed, folder(recipe, seed), args.opts)
    print(table(folder, args.seeds))


if __name__ == "__main__":
    sys.exit(main())
