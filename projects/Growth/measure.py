#!/usr/bin/env python
"""
Measure how time and memory grow with the number of images, and of instances in an image.

    python projects/Growth/measure.py --output output/growth.json

Each figure comes from processes of their own: what a part needs is made first and not counted,
then it runs once, with a single thread. Time is that of the CPU, the least of the repetitions, so
that other programs on the machine hardly change it. Memory is how far the peak of the process rose
above what it had just before. Needs Linux.
"""

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from detectron2.data import DatasetCatalog
from detectron2.structures import Instances
from detectron2.utils.events import EventStorage

from d2ft.config import load_cfg
from d2ft.data import (
    build_train_loader,
    load_cityscapes_instances,
    register_cityscapes_instances,
)
from d2ft.data.mapper import FinetuneDatasetMapper
from d2ft.data.synthetic import write_mini_cityscapes
from d2ft.data.synthetic.scored_scenes import make_scored_scenes
from d2ft.engine import FinetuneTrainer
from d2ft.evaluation import CityscapesInstanceEvaluator
from d2ft.evaluation.coco_ap import CocoDetections, evaluate_coco, fastest_backend
from d2ft.evaluation.masks import RleMasks
from d2ft.files import atomic_write
from d2ft.preflight import check_config_and_data

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
NAME = "growth"
Run = Callable[[], Any]


class Frames(NamedTuple):
    """A generated Cityscapes: how many frames, of which size, with how many objects each."""

    count: int
    size: tuple[int, int]
    objects: tuple[int, int]


def by_images(count: int) -> Frames:
    """Return many small frames."""
    return Frames(count, (64, 128), (5, 14))


def by_instances(count: int) -> Frames:
    """Return few frames with ``count`` objects each, some of them hidden by others."""
    return Frames(8, (512, 1024), (count, count))


def parse(folder: Path, frames: Frames) -> Run:
    """Read the labels for the first time."""
    images, labels = _write(folder, frames)
    os.environ["D2FT_CACHE"] = tempfile.mkdtemp(dir=folder)
    return lambda: load_cityscapes_instances(images, labels)


def read(folder: Path, frames: Frames) -> Run:
    """Read them from the cache."""
    images, labels = _write(folder, frames)
    load_cityscapes_instances(images, labels)
    return lambda: load_cityscapes_instances(images, labels)


def check(folder: Path, frames: Frames) -> Run:
    """Check config and data before a run."""
    cfg = _cfg(folder, frames)
    return lambda: check_config_and_data(cfg)


def loader(folder: Path, frames: Frames) -> Run:
    """Build the training loader; the records stay in it."""
    cfg = _cfg(folder, frames)
    return lambda: build_train_loader(cfg)


def mapper(folder: Path, frames: Frames) -> Run:
    """Map each training image once."""
    cfg = _cfg(folder, frames)
    map_record = FinetuneDatasetMapper(cfg, is_train=True)
    records = DatasetCatalog.get(NAME)
    return lambda: [map_record(record) for record in records][-1]


def training_step(folder: Path, frames: Frames) -> Run:
    """Train the mini model on each image once, two at a time."""
    cfg = _cfg(folder, frames, "quickstart.yaml")
    map_record = FinetuneDatasetMapper(cfg, is_train=True)
    samples = [map_record(record) for record in DatasetCatalog.get(NAME)]
    model = FinetuneTrainer.build_model(cfg)
    model.train()

    def run() -> None:
        with EventStorage(0):
            for first in range(0, len(samples), 2):
                sum(model(samples[first : first + 2]).values()).backward()

    return run


def cityscapes_ap(folder: Path, frames: Frames) -> Run:
    """Evaluate as many predictions as there are objects."""
    _cfg(folder, frames)
    records = DatasetCatalog.get(NAME)
    evaluator = CityscapesInstanceEvaluator(NAME)
    outputs = [_predict(record) for record in records]

    def run() -> Any:
        evaluator.reset()
        for record, output in zip(records, outputs, strict=True):
            evaluator.process([record], [{"instances": output}])
        return evaluator.evaluate()

    return run


def coco_ap(folder: Path, images: int) -> Run:
    """Evaluate masks by COCO's rules."""
    del folder
    dataset, results = make_scored_scenes(images, seed=0)
    return lambda: evaluate_coco(
        dataset, CocoDetections.from_results(results), "segm", backend=fastest_backend()
    )


# what grows -> its values; part -> what prepares it for a value of them.
IMAGES = (250, 1000, 4000)
INSTANCES = (8, 32, 128)
DISTINCT = 50  # frames that are drawn; drawing takes longer than all that is measured
PARTS: dict[str, dict[str, tuple[Callable[..., Run], Callable[[int], Any]]]] = {
    "images": {
        "labels, read the first time": (parse, by_images),
        "labels, read from the cache": (read, by_images),
        "checks before a run": (check, by_images),
        "training loader, built": (loader, by_images),
        "Cityscapes AP": (cityscapes_ap, by_images),
        "COCO AP": (coco_ap, int),
    },
    "instances": {
        "labels, read the first time": (parse, by_instances),
        "mapper": (mapper, by_instances),
        "training step, mini model": (training_step, by_instances),
        "Cityscapes AP": (cityscapes_ap, by_instances),
    },
}


def _write(folder: Path, frames: Frames) -> tuple[Path, Path]:
    """Return the folders of images and labels; what exceeds DISTINCT are links to the first."""
    os.environ["D2FT_CACHE"] = str(folder / "cache")
    kind = "_".join(map(str, (*frames.size, *frames.objects)))
    count = min(frames.count, DISTINCT)
    source, root = folder / f"{count}_of_{kind}", folder / f"{frames.count}_links_of_{kind}"
    write_mini_cityscapes(
        source, splits={"train": count}, image_size=frames.size, num_objects=frames.objects
    )
    suffixes = {"leftImg8bit": "leftImg8bit.png", "gtFine": "gtFine_instanceIds.png"}
    for part, suffix in suffixes.items():
        files = sorted((source / part).glob(f"train/*/*_{suffix}"))
        city = root / part / "train" / "city"
        if not city.is_dir():
            city.mkdir(parents=True)
            for number in range(frames.count):
                (city / f"city_{number:06d}_000019_{suffix}").symlink_to(files[number % count])
    return root / "leftImg8bit" / "train", root / "gtFine" / "train"


def _cfg(folder: Path, frames: Frames, config: str = "cityscapes_ft.yaml") -> Any:
    """Return a config that trains on the frames and evaluates on them."""
    register_cityscapes_instances(NAME, *_write(folder, frames))
    DatasetCatalog.get(NAME)  # into the cache
    names = f"('{NAME}',)"
    overrides = ["MODEL.DEVICE", "cpu", "DATALOADER.NUM_WORKERS", "0", "SEED", "1"]
    return load_cfg(CONFIGS / config, [*overrides, "DATASETS.TRAIN", names, "DATASETS.TEST", names])


def _predict(record: dict[str, Any]) -> Instances:
    objects = [a for a in record["annotations"] if not a["iscrowd"]]
    instances = Instances((record["height"], record["width"]))
    instances.pred_masks = RleMasks([a["segmentation"] for a in objects])
    instances.pred_classes = torch.tensor([a["category_id"] for a in objects], dtype=torch.int64)
    instances.scores = torch.linspace(0.1, 0.9, len(objects))
    return instances


def _measure(connection: Any, prepare: Callable[..., Run], folder: Path, size: Any) -> None:
    run = prepare(folder, size)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak is what is there now
    before, start = _memory("VmRSS"), time.process_time()
    kept = run()
    seconds = time.process_time() - start
    connection.send((seconds, _memory("VmHWM") - before))
    del kept


def _memory(key: str) -> float:
    """Return a value of this process's status in MiB."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split(f"{key}:")[1].split()[0]) / 1024


def measure(prepare: Callable[..., Run], folder: Path, size: Any) -> tuple[float, float]:
    """Return the seconds and MiB of one run in a process of its own."""
    context = multiprocessing.get_context("fork")  # imports are done
    ours, theirs = context.Pipe()
    process = context.Process(target=_measure, args=(theirs, prepare, folder, size))
    process.start()
    theirs.close()
    found = ours.recv()
    process.join()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("output/growth.json"))
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--images", type=int, nargs="+", default=IMAGES)
    parser.add_argument("--instances", type=int, nargs="+", default=INSTANCES)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory(prefix="d2ft_growth_") as folder:
        for axis, parts in PARTS.items():
            for name, (prepare, size_of) in parts.items():
                for number in getattr(args, axis):
                    runs = [
                        measure(prepare, Path(folder), size_of(number))
                        for _ in range(args.repetitions)
                    ]
                    seconds, memory = (min(values) for values in zip(*runs, strict=True))
                    row = {"axis": axis, "part": name, "size": number}
                    rows.append({**row, "seconds": seconds, "mib": memory})
                    print(f"{name}, {number} {axis}: {seconds:.3f} s, {memory:.1f} MiB")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(args.output) as file:
        json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
