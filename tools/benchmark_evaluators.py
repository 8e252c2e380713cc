"""The task ``evaluators`` of ``benchmark.py``: evaluators against the stock ones."""

import contextlib
import io
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from benchmark_coco_voc import Timing, compare_coco, compare_voc
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import BitMasks, Instances

from d2ft.data import register_cityscapes_instances
from d2ft.evaluation import CityscapesInstanceEvaluator
from d2ft.evaluation.masks import decode_mask
from d2ft.evaluation.predictions import instances_to_results
from d2ft.host import cityscapesscripts_bridge

DATASET = "benchmark_frames"
FRAMES = 4

# name, unit, values of ours, values of the stock way
Row = tuple[str, str, list[float], list[float]]


def benchmark_evaluators(root: Path, *, quick: bool) -> Iterator[Row]:
    """Compare evaluators on the same predictions, each side on the same single core."""
    threads, cores = torch.get_num_threads(), os.sched_getaffinity(0)
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {min(cores)})
    try:
        with tempfile.TemporaryDirectory(prefix="d2ft_benchmark_") as folder:
            _register_frames(root, Path(folder))
            for number in (50, 100):
                yield from _compare_cityscapes(number, repetitions=1 if quick else 5)
        repetitions = 1 if quick else 3
        for images in (50,) if quick else (500, 5000):
            yield from _in_ms(compare_coco(images, repetitions=repetitions), images)
        images = 50 if quick else 500
        yield from _in_ms(compare_voc(images, repetitions=repetitions), images)
    finally:
        torch.set_num_threads(threads)
        os.sched_setaffinity(0, cores)


def _in_ms(timings: list[Timing], images: int) -> Iterator[Row]:
    for name, *sides in timings:
        ours, stock = ([seconds / images * 1e3 for seconds in side] for side in sides)
        yield name, "ms an image", ours, stock


def _register_frames(root: Path, folder: Path) -> None:
    """Make a dataset of the first frames; the stock evaluator takes whatever is in a folder."""
    for image in sorted((root / "leftImg8bit" / "train").glob("*/*.png"))[:FRAMES]:
        labels = root / "gtFine" / "train" / image.parent.name
        name = image.name.removesuffix("_leftImg8bit.png")
        for file in (image, labels / f"{name}_gtFine_instanceIds.png"):
            link = folder / file.relative_to(root)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file.resolve())
    register_cityscapes_instances(
        DATASET, folder / "leftImg8bit" / "train", folder / "gtFine" / "train"
    )


def _compare_cityscapes(number: int, repetitions: int) -> Iterator[Row]:
    records = DatasetCatalog.get(DATASET)
    outputs = [_predict(record, number, seed) for seed, record in enumerate(records)]
    times: dict[str, list[float]] = {"ours": [], "stock": [], "matching": []}
    for _ in range(repetitions):
        results, ours, _ = _run(CityscapesInstanceEvaluator(DATASET), records, outputs)
        try:
            expected, stock, matching = _run_stock(records, outputs)
        except ImportError as error:  # its main branch needs a package that is internal to Meta
            print(
                f"Detectron2's own Cityscapes evaluator cannot be imported ({error}), so there is "
                "no stock way to compare with; tests/parity compares with cityscapesscripts"
            )
            return
        assert 0 < results["AP"] < 100
        assert {key: results[key] for key in expected} == expected
        for side, seconds in (("ours", ours), ("stock", stock), ("matching", matching)):
            times[side].append(seconds / len(records) * 1e3)
    title = f"{number} instances in {records[0]['width']}x{records[0]['height']}"
    yield f"Cityscapes AP, {title}", "ms an image", times["ours"], times["stock"]
    name = f"Cityscapes AP, {title}, only the stock matching"
    yield name, "ms an image", times["ours"], times["matching"]
    yield _compare_run_lengths(title, outputs, repetitions)


def _run(evaluator: Any, records: list[Any], outputs: list[Instances]) -> tuple[Any, float, float]:
    """Return the results, the seconds of all and those of ``evaluate`` alone."""
    start = time.perf_counter()
    evaluator.reset()
    for record, instances in zip(records, outputs, strict=True):
        evaluator.process([record], [{"instances": instances}])
    processed = time.perf_counter()
    results = evaluator.evaluate()["segm"]
    end = time.perf_counter()
    return results, end - start, end - processed


def _run_stock(records: list[Any], outputs: list[Instances]) -> tuple[Any, float, float]:
    from detectron2.evaluation.cityscapes_evaluation import CityscapesInstanceEvaluator as Stock

    assert MetadataCatalog.get(DATASET).gt_dir
    with cityscapesscripts_bridge(), contextlib.redirect_stdout(io.StringIO()):
        return _run(Stock(DATASET), records, outputs)


def _compare_run_lengths(title: str, outputs: list[Instances], repetitions: int) -> Row:
    """Compare the way of predictions into COCO's results form."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repetitions):
        found = []
        for side in times:
            start = time.perf_counter()
            if side is times[0]:
                found.append([instances_to_results(o, 1, range(8)) for o in outputs])
            else:
                found.append([instances_to_coco_json(o, 1) for o in outputs])
            side.append((time.perf_counter() - start) / len(outputs) * 1e3)
        for ours, stock in zip(*found, strict=True):
            assert [r["segmentation"] for r in ours] == [r["segmentation"] for r in stock]
            assert [r["score"] for r in ours] == [r["score"] for r in stock]
    return f"masks to run lengths, {title}", "ms an image", *times


def _predict(record: dict[str, Any], number: int, seed: int) -> Instances:
    """Return so many predictions: objects of the frame, moved, with random scores."""
    generator = torch.Generator().manual_seed(seed)
    objects = [a for a in record["annotations"] if not a["iscrowd"]]
    chosen = [objects[i % len(objects)] for i in range(number)]
    moves = torch.randint(-4, 5, (number, 2), generator=generator).tolist()
    masks = torch.stack(
        [
            decode_mask(a["segmentation"]).roll(move, (0, 1))
            for a, move in zip(chosen, moves, strict=True)
        ]
    )
    instances = Instances((record["height"], record["width"]))
    instances.pred_masks = masks.contiguous()
    instances.pred_boxes = BitMasks(masks).get_bounding_boxes()
    instances.pred_classes = torch.tensor([a["category_id"] for a in chosen])
    instances.scores = torch.rand(number, generator=generator)
    return instances
