"""Parts of ``benchmark.py evaluators``: COCO's and Pascal VOC's AP against the stock way."""

import contextlib
import io
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from benchmark_timing import time_in_turn
from detectron2.evaluation.pascal_voc_evaluation import parse_rec, voc_eval

from d2ft.data.synthetic.scored_scenes import make_scored_scenes
from d2ft.evaluation.coco_ap import CocoDetections, evaluate_coco, fastest_backend
from d2ft.evaluation.pascal_voc_ap import average_precision, best_matches, box_overlaps

# name, seconds of ours, seconds of the stock way; one value a repetition
Timing = tuple[str, list[float], list[float]]


def compare_coco(num_images: int, *, repetitions: int) -> list[Timing]:
    """Time the fastest backend against pycocotools, once all their numbers were equal."""
    dataset, results = make_scored_scenes(num_images, seed=num_images)
    backend = fastest_backend()
    timings = []
    for task in ("bbox", "segm"):

        def run(backend: str, task: str = task) -> Any:
            return evaluate_coco(
                dataset, CocoDetections.from_results(results), task, backend=backend
            )

        ours, stock = run(backend), run("pycocotools")
        for key, values in stock.eval.items():
            assert np.array_equal(ours.eval[key], values), (task, key)
        assert np.array_equal(ours.stats, stock.stats)
        timings.append(
            (
                f"COCO {task}, {num_images} images, {backend}",
                *time_in_turn(
                    lambda run=run: run(backend), lambda run=run: run("pycocotools"), repetitions
                ),
            )
        )
    return timings


def compare_voc(num_images: int, *, repetitions: int) -> list[Timing]:
    """Time box AP at 0.5 to 0.95 against Detectron2's functions, which read files."""
    dataset, results = make_scored_scenes(num_images, seed=1, num_classes=20, masks=False)
    generator = np.random.default_rng(0)
    for result in results:  # Detectron2 orders equal scores at random
        result["score"] = float(generator.random())
    for item in (*dataset["annotations"], *results):
        item["bbox"] = [float(round(v)) for v in item["bbox"]]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write_truth(folder, dataset)

        def stock() -> list[float]:
            parse_rec.cache_clear()
            return _stock_voc(folder, dataset, results)

        def ours() -> list[float]:
            return _our_voc(dataset, results)

        assert ours() == stock()
        seconds = time_in_turn(ours, stock, repetitions)
    return [(f"VOC bbox, {num_images} images", *seconds)]


def _our_voc(dataset: dict[str, Any], results: list[dict[str, Any]]) -> list[float]:
    images = len(dataset["images"])
    aps = []
    for category in range(1, 21):
        boxes: list[list[list[float]]] = [[] for _ in range(images)]
        found: list[list[list[float]]] = [[] for _ in range(images)]
        scores: list[list[float]] = [[] for _ in range(images)]
        for annotation in dataset["annotations"]:
            if annotation["category_id"] == category:
                boxes[annotation["image_id"] - 1].append(_corners(annotation))
        for result in results:
            if result["category_id"] == category:
                found[result["image_id"] - 1].append(_corners(result))
                scores[result["image_id"] - 1].append(result["score"])
        matches = best_matches(
            [
                box_overlaps(np.reshape(f, (-1, 4)), np.reshape(b, (-1, 4)))
                for f, b in zip(found, boxes, strict=True)
            ],
            [np.array(s) for s in scores],
            [np.zeros(len(b), dtype=bool) for b in boxes],
        )
        aps += [
            average_precision(matches, percent / 100, eleven_points=False)
            for percent in range(50, 100, 5)
        ]
    return aps


def _corners(item: dict[str, Any]) -> list[float]:
    x, y, width, height = item["bbox"]
    return [x, y, x + width, y + height]


def _write_truth(folder: Path, dataset: dict[str, Any]) -> None:
    objects: dict[int, list[str]] = {image["id"]: [] for image in dataset["images"]}
    for annotation in dataset["annotations"]:
        x0, y0, x1, y1 = map(int, _corners(annotation))
        objects[annotation["image_id"]].append(
            f"<object><name>{annotation['category_id']}</name><pose/><truncated>0</truncated>"
            f"<difficult>0</difficult><bndbox><xmin>{x0 + 1}</xmin><ymin>{y0 + 1}</ymin>"
            f"<xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox></object>"
        )
    for image, lines in objects.items():
        (folder / f"{image}.xml").write_text(f"<annotation>{''.join(lines)}</annotation>")
    (folder / "set").write_text("\n".join(map(str, objects)))


def _stock_voc(folder: Path, dataset: dict[str, Any], results: list[dict[str, Any]]) -> list[float]:
    lines: dict[int, list[str]] = {i: [] for i in range(1, 21)}
    for result in results:
        x0, y0, x1, y1 = _corners(result)
        lines[result["category_id"]].append(
            f"{result['image_id']} {result['score']!r} {x0 + 1} {y0 + 1} {x1} {y1}"
        )
    aps = []
    for category, rows in lines.items():
        (folder / f"{category}.txt").write_text("\n".join(rows))
        with contextlib.redirect_stdout(io.StringIO()):
            aps += [
                float(
                    voc_eval(
                        str(folder / "{}.txt"),
                        str(folder / "{}.xml"),
                        str(folder / "set"),
                        str(category),
                        ovthresh=percent / 100,
                    )[2]
                )
                for percent in range(50, 100, 5)
            ]
    return aps
