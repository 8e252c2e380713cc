#!/usr/bin/env python
"""
Measure d2ft against the stock way, both in one run and on the same data.

    python tools/benchmark.py loader            # reading a dataset, and the training loader
    python tools/benchmark.py evaluators        # evaluating predictions
    python tools/benchmark.py mapper            # an image and its masks, made ready for a step
    python tools/benchmark.py train             # a step of Mask R-CNN R50-FPN on the CPU
    python tools/benchmark.py inference         # an image, through the model into run lengths
    python tools/benchmark.py startup           # from the start of a process to its first batch
    python tools/benchmark.py index             # opening a set of 500,000 images
    python tools/benchmark.py loader --quick    # a minute at most, for a look
    python tools/benchmark.py loader --real     # on ../shared/data instead of generated frames

Both sides are shown to give the same before they are timed. They run in turn, so that a machine
that gets slower does so for both. Times are medians with the smallest and the largest value.
"""

import argparse
import functools
import itertools
import json
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from benchmark_datasets import benchmark_datasets
from benchmark_evaluators import benchmark_evaluators
from benchmark_index import benchmark_index
from benchmark_inference import benchmark_inference
from benchmark_mapper import benchmark_mapper
from benchmark_startup import benchmark_startup
from benchmark_timing import time_in_turn
from benchmark_train import benchmark_train
from detectron2.config import CfgNode
from detectron2.data import (
    DatasetCatalog,
    DatasetMapper,
    build_detection_train_loader,
    get_detection_dataset_dicts,
)
from detectron2.data.samplers import TrainingSampler
from tabulate import tabulate

from d2ft.config import load_cfg
from d2ft.data import build_train_loader, load_cityscapes_instances, register_builtin_datasets
from d2ft.data.synthetic import write_mini_cityscapes
from d2ft.host import bridge_detectron2

PROJECT = Path(__file__).resolve().parents[1]


class Comparison(NamedTuple):
    """What two ways of doing the same took, in seconds, one value a repetition."""

    name: str
    unit: str
    ours: list[float]
    stock: list[float]
    ours_peak_mib: float | None = None  # of a process of its own
    stock_peak_mib: float | None = None

    @property
    def ratio(self) -> float:
        """How many times faster ours is."""
        return statistics.median(self.stock) / statistics.median(self.ours)


def benchmark_loader(root: Path, *, quick: bool) -> Iterator[Comparison]:
    """Compare reading the dataset, and the batches of the training loader."""
    images, labels = root / "leftImg8bit" / "train", root / "gtFine" / "train"
    yield from _compare_reading(images, labels, repetitions=2 if quick else 5)
    yield from itertools.starmap(Comparison, benchmark_datasets(quick=quick))
    yield from _compare_batches(quick=quick)


def _compare_reading(images: Path, labels: Path, repetitions: int) -> Iterator[Comparison]:
    stock = _stock_reader(images, labels)
    if stock is None:
        print("Detectron2's own Cityscapes loader cannot run here, so reading is not compared.")
        return

    def ours_cold() -> list[dict[str, Any]]:
        with tempfile.TemporaryDirectory() as empty:
            before = os.environ.get("D2FT_CACHE")
            os.environ["D2FT_CACHE"] = empty
            try:
                return load_cityscapes_instances(images, labels)
            finally:
                os.environ.pop("D2FT_CACHE")
                if before is not None:
                    os.environ["D2FT_CACHE"] = before

    ours_found, stock_found = _contents(ours_cold()), _contents(stock())
    assert not stock_found - ours_found, "Detectron2 finds instances that d2ft does not"
    left_out = (ours_found - stock_found).total()
    if left_out:
        print(
            f"Detectron2 leaves out {left_out} of {ours_found.total()} instances, whose contours "
            "are too small"
        )
    load_cityscapes_instances(images, labels)  # fill the cache
    frames = len(list(images.glob("*/*.png")))
    for name, ours_way in (
        ("read, first time", ours_cold),
        ("read, cached", lambda: load_cityscapes_instances(images, labels)),
    ):
        seconds = time_in_turn(ours_way, stock, repetitions)
        yield Comparison(name, "ms an image", *([s / frames * 1e3 for s in t] for t in seconds))


def _stock_reader(images: Path, labels: Path) -> Callable[[], list[dict[str, Any]]] | None:
    from detectron2.data.datasets.cityscapes import load_cityscapes_instances as stock

    def read() -> list[dict[str, Any]]:
        return list(stock(str(images), str(labels), from_json=False))

    try:
        read()
    except ImportError:  # its main branch needs a package that is internal to Meta
        return None
    return read


def _contents(records: list[dict[str, Any]]) -> Counter[tuple[str, int]]:
    return Counter(
        (Path(record["file_name"]).name, annotation["category_id"])
        for record in records
        for annotation in record["annotations"]
        if not annotation.get("iscrowd")
    )


def _compare_batches(*, quick: bool) -> Iterator[Comparison]:
    # Nothing random but the order, so that both loaders give the same tensors.
    fixed = (
        "INPUT.MIN_SIZE_TRAIN (800,) INPUT.MIN_SIZE_TRAIN_SAMPLING choice INPUT.RANDOM_FLIP none "
        "DATALOADER.ASPECT_RATIO_GROUPING False SOLVER.IMS_PER_BATCH 2 SEED 1"
    )
    train = [
        "DATASETS.TRAIN",
        "('cityscapes_instance_train',)",
    ]  # not repeated: the stock has it too
    cfg = load_cfg(PROJECT / "configs" / "cityscapes_ft.yaml", [*fixed.split(), *train])
    batches = 4 if quick else 20
    for workers in (0, 2):
        cfg.DATALOADER.NUM_WORKERS = workers
        ours, stock = build_train_loader(cfg), _stock_loader(cfg)
        _assert_equal_batches(_take(ours, batches), _take(stock, batches))
        # Each run starts and ends its workers: they would read ahead while the other is timed.
        seconds = time_in_turn(
            functools.partial(_take, ours, batches),
            functools.partial(_take, stock, batches),
            2 if quick else 5,
        )
        per_image = ([s / batches / 2 * 1e3 for s in side] for side in seconds)
        yield Comparison(f"training loader, {workers} workers", "ms an image", *per_image)


def _stock_loader(cfg: CfgNode) -> Any:
    records = get_detection_dataset_dicts(list(cfg.DATASETS.TRAIN))
    return build_detection_train_loader(
        records,
        mapper=DatasetMapper(cfg, is_train=True),
        sampler=TrainingSampler(len(records), seed=cfg.SEED),
        total_batch_size=cfg.SOLVER.IMS_PER_BATCH,
        aspect_ratio_grouping=False,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
    )


def _take(loader: Any, count: int) -> list[Any]:
    return list(itertools.islice(iter(loader), count))


def _assert_equal_batches(ours: list[Any], stock: list[Any]) -> None:
    for batch, other in zip(ours, stock, strict=True):
        for sample, expected in zip(batch, other, strict=True):
            assert sample["file_name"] == expected["file_name"]
            assert torch.equal(sample["image"], expected["image"])
            ours_gt, stock_gt = sample["instances"], expected["instances"]
            assert torch.equal(ours_gt.gt_masks.tensor, stock_gt.gt_masks.tensor)
            assert torch.equal(ours_gt.gt_classes, stock_gt.gt_classes)


def _task(rows: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Comparison]]:
    return lambda root, quick: itertools.starmap(Comparison, rows(root, quick=quick))


TASKS: dict[str, Callable[..., Iterator[Comparison]]] = {
    "loader": benchmark_loader,
    "evaluators": _task(benchmark_evaluators),
    "mapper": _task(benchmark_mapper),
    "train": _task(benchmark_train),
    "inference": _task(benchmark_inference),
    "startup": _task(benchmark_startup),
    "index": _task(benchmark_index),
}


def _describe(comparison: Comparison) -> list[str]:
    def seconds(values: list[float]) -> str:
        return f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"

    peaks = (comparison.ours_peak_mib, comparison.stock_peak_mib)
    return [
        f"{comparison.name}, {comparison.unit}",
        seconds(comparison.ours),
        seconds(comparison.stock),
        f"{comparison.ratio:.2f}x",
        "" if peaks[0] is None else f"{peaks[0]:.0f} / {peaks[1]:.0f}",
    ]


def _environment() -> dict[str, Any]:
    return {
        "date": time.strftime("%Y-%m-%d"),
        "host": str(bridge_detectron2()),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _data(folder: Path, *, real: bool, quick: bool) -> Path:
    """Return the ``cityscapes`` folder to measure on, and make it the built-in one."""
    root = PROJECT.parent / "shared" / "data" if real else folder
    if not real:
        os.environ["D2FT_CACHE"] = str(folder / "cache")
        write_mini_cityscapes(
            root / "cityscapes",
            splits={"train": 4 if quick else 16},
            image_size=(1024, 2048),
            num_objects=(10, 35),
        )
    os.environ["DETECTRON2_DATASETS"] = str(root)
    register_builtin_datasets()
    DatasetCatalog.get("cityscapes_instance_train")
    return root / "cityscapes"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", choices=sorted(TASKS))
    parser.add_argument("--quick", action="store_true", help="less data, fewer repetitions")
    parser.add_argument("--real", action="store_true", help="measure on ../shared/data")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured")
    args = parser.parse_args()
    environment = _environment()
    with tempfile.TemporaryDirectory(prefix="d2ft_benchmark_") as folder:
        root = _data(Path(folder), real=args.real, quick=args.quick)
        comparisons = list(TASKS[args.task](root, quick=args.quick))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(tabulate(map(_describe, comparisons), ["", "d2ft", "stock", "ratio", "peak MiB of each"]))
    print(f"Peak memory of this process: {peak:.0f} MiB")
    print("  ".join(f"{key}: {value}" for key, value in environment.items()))
    if args.json:
        rows = [{**c._asdict(), "ratio": c.ratio} for c in comparisons]
        content = {"environment": environment, "peak_memory_mib": peak, "results": rows}
        args.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
