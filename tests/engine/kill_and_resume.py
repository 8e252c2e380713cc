#!/usr/bin/env python
"""
Kill a run at random moments, resume it each time, and compare it with one that never stopped.

    PYTHONPATH=. python tests/engine/kill_and_resume.py --kills 20 --workers 2 --processes 1

Kills come by SIGKILL to all processes of the run, in turn inside a step, while a checkpoint is being
written, inside an evaluation, and at any time. The run has a moving average, validation loss and a
best checkpoint, and is stopped early. The end must have the same bits in all that the last checkpoint,
the best and the averaged model hold, and the same lines in metrics.json, without times and memory.
Exit code 0 says that it had.

With --quickstart it is the run of configs/quickstart.yaml, its model, weights and sets, in fewer steps.
"""

import argparse
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

from d2ft.data.synthetic import write_mini_cityscapes
from tests.engine.runs import (
    Runs,
    assert_same_run,
    iterations_in,
    kill_group,
    output_of,
    wait_for,
)
from tests.factories import PROJECT, write_cityscapes, write_coco_weights

MOMENTS = ("step", "checkpoint write", "evaluation", "any time")
# Each evaluation is better than the one before, and none gains enough: the best changes each time,
# and the run ends early, after the fourth.
OPTIONS = [
    "TEST.VALIDATION_LOSS", "True",
    "FINETUNE.EMA.ENABLED", "True",
    "FINETUNE.EARLY_STOPPING.PATIENCE", "3",
    "FINETUNE.EARLY_STOPPING.MIN_GAIN", "1000",
    "LOG_PERIOD", "2",
]  # fmt: skip
TINY = [
    "SOLVER.MAX_ITER", "20",
    "SOLVER.CHECKPOINT_PERIOD", "3",
    "TEST.EVAL_PERIOD", "4",
    "FINETUNE.BEST.METRIC", "val/total_loss",
    "FINETUNE.BEST.MODE", "min",
]  # fmt: skip
QUICKSTART = [
    "SOLVER.MAX_ITER", "60",
    "SOLVER.CHECKPOINT_PERIOD", "4",
    "TEST.EVAL_PERIOD", "10",
    "FINETUNE.BEST.METRIC", "ema/segm/AP",
]  # fmt: skip


def make_portraits(datasets):
    """Turn every second training image, and its labels, by 90 degrees."""
    root = datasets / "cityscapes"
    for image in sorted((root / "leftImg8bit" / "train").glob("*/*.png"))[::2]:
        stem = image.name.removesuffix("_leftImg8bit.png")
        labels = sorted((root / "gtFine" / "train" / image.parent.name).glob(f"{stem}_*.png"))
        for path in (image, *labels):
            with Image.open(path) as picture:
                picture.transpose(Image.Transpose.ROTATE_90).save(path)
        for polygons in (root / "gtFine" / "train" / image.parent.name).glob(f"{stem}_*.json"):
            text = polygons.read_text()
            size = '"imgHeight": 64', '"imgWidth": 128'
            assert all(part in text for part in size), text[:200]
            polygons.write_text(
                text.replace(size[0], '"imgHeight": 128').replace(size[1], '"imgWidth": 64')
            )


def kill_once(runs, folder, moment, source, seconds, evaluation):
    """
    Start or resume the run, kill it at the moment; return whether it was alive until then.

    ``seconds`` is what the whole run takes, ``evaluation`` what an evaluation does.
    """
    process = runs.start(folder, "--resume")
    before = output_of(folder).count("Start inference on")
    lines = iterations_in(folder)
    target = source.randint(1, 3)
    if moment == "step":
        reached = wait_for(process, lambda: iterations_in(folder) >= lines + target)
        time.sleep(source.uniform(0, 0.1))
    elif moment == "checkpoint write":
        reached = wait_for(process, lambda: any(folder.glob(".model_*.tmp")), pause=0.0005)
    elif moment == "evaluation":
        reached = wait_for(process, lambda: output_of(folder).count("Start inference on") > before)
        time.sleep(source.uniform(0, evaluation))
    else:
        time.sleep(source.uniform(0, seconds))
        reached = process.poll() is None
    left = [path.name for path in folder.glob(".model_*.tmp")]
    kill_group(process)
    print(f"  killed: {moment:16}  alive: {reached}  half-written: {len(left)}", flush=True)
    return reached


def kill_and_resume(work, *, kills, workers, processes, portraits, seed, quickstart=False):
    """Do the whole comparison in the folder ``work``; raise AssertionError where it fails."""
    more = [*OPTIONS, "DATALOADER.NUM_WORKERS", str(workers)]
    if quickstart:
        write_mini_cityscapes(work / "data/cityscapes", splits={"train": 64, "val": 16})
        folder = PROJECT / "configs"
        runs = Runs(
            work / "data",
            folder / "quickstart_weights.pth",
            *QUICKSTART,
            *more,
            num_processes=processes,
            config=folder / "quickstart.yaml",
            base=(),
        )
    else:
        datasets = write_cityscapes(work / "data", train=8, val=2)
        if portraits:
            make_portraits(datasets)
        weights = write_coco_weights(work / "coco.pkl")
        runs = Runs(datasets, weights, *TINY, *more, num_processes=processes)
    whole, stopped = work / "whole", work / "stopped"
    start = time.monotonic()
    assert runs.finish(whole) == 0, output_of(whole)
    seconds = time.monotonic() - start
    assert "has not been better" in output_of(whole), "it was to be stopped early"
    print(f"uninterrupted: {seconds:.0f} s, {iterations_in(whole)} lines", flush=True)
    source = random.Random(seed)
    stopped.mkdir()
    done = 0
    while done < kills:
        moment = MOMENTS[done % len(MOMENTS)]
        if not kill_once(runs, stopped, moment, source, seconds, 4 if quickstart else 0.3):
            # It had come to its end: compare, and start over for the kills that are left.
            assert_same_run(whole, stopped)
            print("  ended, equal; from the start again", flush=True)
            shutil.rmtree(stopped)
            stopped.mkdir()
            continue
        done += 1
    assert runs.finish(stopped, "--resume") == 0, output_of(stopped)
    assert_same_run(whole, stopped)
    lines = iterations_in(whole)
    print(f"{kills} kills: checkpoints bit-equal, {lines} lines of metrics.json equal", flush=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--portraits", action="store_true", help="turn half of the images")
    parser.add_argument("--quickstart", action="store_true", help="the run of the quickstart")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    arguments = vars(parser.parse_args())
    with tempfile.TemporaryDirectory() as folder:
        kill_and_resume(Path(folder), **arguments)


if __name__ == "__main__":
    sys.exit(main())
