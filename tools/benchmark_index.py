"""The task ``index`` of ``benchmark.py``: opening a large set, and what further processes pay."""

import gc
import hashlib
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

IMAGES, OBJECTS, POINTS = 500_000, 7, 8  # COCO has 7.3 instances an image
WORKERS, SAMPLES = 2, 2000
NAME = "large"

# name, unit, values of ours, values of the stock way
Row = tuple[str, str, list[float], list[float]]


def benchmark_index(root: Path, *, quick: bool) -> Iterator[Row]:
    """Compare training loaders of a large set in COCO's format."""
    del root  # the set is generated; its images are never opened
    images = IMAGES // 250 if quick else IMAGES
    with tempfile.TemporaryDirectory(prefix="d2ft_benchmark_") as folder:
        _write_set(Path(folder), images)
        print(f"first opening by d2ft, parsing included: {_run('ours', folder)['seconds']:.1f} s")
        runs: dict[str, list[dict[str, Any]]] = {"ours": [], "stock": []}
        for _ in range(1 if quick else 3):
            for side, done in runs.items():
                done.append(_run(side, folder))
    assert len({run["digest"] for done in runs.values() for run in done}) == 1, "other samples"
    for key, name, unit in (
        ("seconds", "training loader opened", "s"),
        ("process_mib", "memory of the process that opened it", "MiB"),
        ("worker_mib", f"memory of a worker after {SAMPLES // WORKERS} samples", "MiB"),
    ):
        yield f"{images} images: {name}", unit, *([run[key] for run in d] for d in runs.values())


def _write_set(folder: Path, images: int) -> None:
    generator = random.Random(0)
    shapes = [[round(generator.uniform(0, 400), 2) for _ in range(2 * POINTS)] for _ in range(1000)]
    rows = [
        {"id": i, "file_name": f"{i:012d}.jpg", "height": 427, "width": 640} for i in range(images)
    ]
    categories = [{"id": i, "name": f"class {i}"} for i in range(1, 81)]
    with open(folder / "instances.json", "w", encoding="utf-8") as file:
        file.write(json.dumps({"images": rows, "categories": categories})[:-1])
        file.write(', "annotations": [')
        for number in range(images * OBJECTS):
            points = shapes[generator.randrange(1000)]
            xs, ys = points[::2], points[1::2]
            box = [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]
            row = {
                "id": number + 1,
                "image_id": number // OBJECTS,
                "category_id": generator.randint(1, 80),
                "bbox": box,
                "area": box[2] * box[3],
                "iscrowd": 0,
                "segmentation": [points],
            }
            file.write((", " if number else "") + json.dumps(row))
        file.write("]}")


def _run(side: str, folder: str) -> dict[str, Any]:
    environment = {**os.environ, "D2FT_CACHE": f"{folder}/cache"}
    command = [sys.executable, "-W", "ignore", __file__, side, folder]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"{side} failed:\n{result.stdout[-2000:]}{result.stderr[-4000:]}")
    return json.loads(result.stdout.splitlines()[-1])


def _measure(side: str, folder: Path) -> dict[str, Any]:
    """Build a loader, and take samples from its workers."""
    from d2ft.config import load_cfg

    config = Path(__file__).resolve().parents[1] / "configs" / "cityscapes_ft.yaml"
    overrides = ["DATASETS.TRAIN", f"('{NAME}',)", "DATALOADER.NUM_WORKERS", str(WORKERS)]
    cfg = load_cfg(config, [*overrides, "SEED", "1", "DATALOADER.ASPECT_RATIO_GROUPING", "False"])
    before = _private_mib("self")
    build = _build_ours if side == "ours" else _build_stock
    start = time.perf_counter()
    loader = build(cfg, folder)
    seconds = time.perf_counter() - start
    gc.collect()
    process_mib = _private_mib("self") - before
    digest = hashlib.sha256()
    batches = iter(loader)
    for batch in itertools.islice(batches, SAMPLES // cfg.SOLVER.IMS_PER_BATCH):
        for sample in batch:
            digest.update(json.dumps(sample, sort_keys=True).encode())
    worker_mib = max(_private_mib(str(worker.pid)) for worker in batches._workers)
    return {
        "seconds": seconds,
        "process_mib": process_mib,
        "worker_mib": worker_mib,
        "digest": digest.hexdigest(),
    }


def _as_it_is(record: dict[str, Any]) -> dict[str, Any]:
    return record


def _build_ours(cfg: Any, folder: Path) -> Any:
    from d2ft.data import build_train_loader, register_coco_instances

    register_coco_instances(NAME, folder / "instances.json", folder)
    return build_train_loader(cfg, mapper=_as_it_is)


def _build_stock(cfg: Any, folder: Path) -> Any:
    from detectron2.data import build_detection_train_loader, get_detection_dataset_dicts
    from detectron2.data.datasets import register_coco_instances
    from detectron2.data.samplers import TrainingSampler

    register_coco_instances(NAME, {}, str(folder / "instances.json"), str(folder))
    records = get_detection_dataset_dicts([NAME])
    return build_detection_train_loader(
        records,
        mapper=_as_it_is,
        sampler=TrainingSampler(len(records), seed=cfg.SEED),
        total_batch_size=cfg.SOLVER.IMS_PER_BATCH,
        aspect_ratio_grouping=False,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
    )


def _private_mib(process: str) -> float:
    """Return what a process has in memory for itself; pages of a mapped file are not its own."""
    rows = Path(f"/proc/{process}/smaps_rollup").read_text(encoding="ascii").splitlines()
    private = (row.split()[1] for row in rows if row.startswith("Private_Dirty"))
    return sum(map(int, private)) / 1024


if __name__ == "__main__":
    print(json.dumps(_measure(sys.argv[1], Path(sys.argv[2]))))
