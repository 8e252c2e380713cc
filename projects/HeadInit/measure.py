#!/usr/bin/env python
"""
Measure what FINETUNE.HEAD_INIT remap is worth on the embedded sets: AP by budget and seed.

    python projects/HeadInit/measure.py

Each budget is a run of configs/quickstart.yaml with a whole schedule of its own: curves of one
long decaying schedule meet at its end and would hide a difference. Runs that
``--output``/results.json holds already are not repeated, so the command may be stopped and called
again.
"""

import argparse
import contextlib
import io
import json
import logging
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode

from d2ft.config import load_cfg
from d2ft.data import register_builtin_datasets
from d2ft.data.synthetic import write_mini_cityscapes
from d2ft.engine import FinetuneTrainer, inference_cfg, resolve_cfg
from d2ft.errors import UserError
from d2ft.files import atomic_write

PROJECT = Path(__file__).resolve().parents[2]
CONFIG = PROJECT / "configs/quickstart.yaml"
WEIGHTS = PROJECT / "configs/quickstart_weights.pth"
DATASETS = Path("output/quickstart/datasets")
FEW_NAMES = ("person", "car", "bicycle")

# How the class rows start: the name of a curve -> the overrides of the config.
CURVES: dict[str, list[str]] = {
    "skip": [],
    "remap": [],
    "remap, 3 of 8 names": [],
    "remap, matched": ["FINETUNE.UNMATCHED", "matched"],
    "remap, rider: person": ["FINETUNE.CLASS_MAP.rider", "person"],
    "remap, background afresh": [],
    "remap, warm-up 60": ["SOLVER.WARMUP_ITERS", "60"],
    "remap, predictors first": [
        *("FINETUNE.PHASES", "[{'ITERS': 40, 'FREEZE': ['*', '!*predictor*']}]"),
    ],
    "remap, predictors slower": [
        *("FINETUNE.LR_FACTORS.box_predictor", "0.3"),
        *("FINETUNE.LR_FACTORS.mask_predictor", "0.3"),
    ],
    "remap, twice the rate": ["SOLVER.BASE_LR", "0.0006"],
    "skip, twice the rate": ["SOLVER.BASE_LR", "0.0006"],
}


def forget_names(path: Path) -> Path:
    """Write the weights once more, knowing the classes of ``FEW_NAMES`` alone by name."""
    file = torch.load(WEIGHTS, weights_only=True)
    names = file["d2ft"]["thing_classes"]
    file["d2ft"]["thing_classes"] = [
        name if name in FEW_NAMES else f"unnamed {i}" for i, name in enumerate(names)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(file, path)
    return path


def build_cfg(curve: str, seed: int, budget: int, output: Path, extra: list[str]) -> CfgNode:
    weights = forget_names(output / "few_names.pth") if "3 of 8" in curve else WEIGHTS
    opts = [
        *("MODEL.WEIGHTS", str(weights)),
        *("SEED", str(seed)),
        *("SOLVER.MAX_ITER", str(budget)),
        *("SOLVER.CHECKPOINT_PERIOD", str(budget)),
        *("FINETUNE.HEAD_INIT", curve.partition(",")[0]),
        *("OUTPUT_DIR", tempfile.mkdtemp(prefix="run_", dir=output)),
    ]
    return resolve_cfg(load_cfg(CONFIG, [*opts, *CURVES[curve], *extra]))


def measure(cfg: CfgNode, *, before: bool, fresh_background: bool) -> dict[str, float]:
    """Return the official mask AP and the box AP in percent, after training or instead of it."""
    trainer = FinetuneTrainer(cfg)
    scores = trainer.model.roi_heads.box_predictor.cls_score
    background = [parameter[-1].detach().clone() for parameter in scores.parameters()]
    trainer.resume_or_load(resume=False)
    if fresh_background:
        for parameter, row in zip(scores.parameters(), background, strict=True):
            parameter.data[-1] = row
    with contextlib.redirect_stdout(io.StringIO()):  # the long tables of pycocotools
        if before:
            results = FinetuneTrainer.test(inference_cfg(cfg), trainer.model)
        else:
            results = trainer.train()
    return {"segm": results["segm"]["AP"], "bbox": results["bbox"]["AP"]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--curves", nargs="+", choices=CURVES, default=["skip", "remap"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--budgets", nargs="+", type=int, default=[0, 50, 100, 200, 400, 800])
    parser.add_argument("--datasets", type=Path, help="folder of another cityscapes")
    parser.add_argument("--output", type=Path, default=Path("output/head_init"))
    parser.add_argument("opts", nargs="*", help="KEY VALUE overrides for all runs")
    args = parser.parse_args()
    if args.datasets is None:
        write_mini_cityscapes(DATASETS / "cityscapes", splits={"train": 64, "val": 16})
    os.environ["DETECTRON2_DATASETS"] = str(args.datasets or DATASETS)
    register_builtin_datasets()
    logging.disable(logging.INFO)

    path = args.output / "results.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else []
    known = {(row["curve"], row["seed"], row["iterations"]) for row in rows}
    wanted = [(c, s, b) for s in args.seeds for b in args.budgets for c in args.curves]
    for curve, seed, budget in wanted:
        if (curve, seed, budget) in known:
            continue
        cfg = build_cfg(curve, seed, max(budget, 1), args.output, args.opts)
        row = {"curve": curve, "seed": seed, "iterations": budget}
        row |= measure(
            cfg, before=budget == 0, fresh_background=curve.endswith("background afresh")
        )
        shutil.rmtree(cfg.OUTPUT_DIR)
        rows.append(row)
        with atomic_write(path) as file:
            json.dump(rows, file, indent=1)
        print(f"{curve:24} seed {seed}  {budget:4} it.  mask AP {row['segm']:5.1f}", flush=True)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
