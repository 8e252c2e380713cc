#!/usr/bin/env python
"""
Measure the memory of evaluating a large set with COCO's box and mask AP.

    python tools/benchmark_memory.py --images 2500
    python tools/benchmark_memory.py --images 40000

Generated predictions, 100 masks an image, go through the evaluator and the file of predictions as
in a run. What is said is the resident memory of this process, which does nothing else; a model
and its images are not in it.
"""

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import DatasetEvaluators
from detectron2.structures import Boxes, Instances
from tqdm import trange

from d2ft.data.synthetic.scored_scenes import IMAGE_SIZE, make_scored_scenes
from d2ft.evaluation import CocoEvaluator
from d2ft.evaluation.masks import RleMasks
from d2ft.evaluation.predictions import PredictionWriter, predictions_file

DATASET = "benchmark_memory"
OBJECTS, PREDICTIONS = 7, 100


class Images:
    """
    Images whose objects and predictions have shapes from a pool of some thousand.

    Args:
        classes: number of classes; ids are from 1.
    """

    def __init__(self, classes: int) -> None:
        _, self.pool = make_scored_scenes(300, seed=0)
        boxes = torch.tensor([shape["bbox"] for shape in self.pool])
        boxes[:, 2:] += boxes[:, :2]
        self.boxes, self.classes = boxes, classes

    def shapes(self, image_id: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the places in the pool, the classes from 0 and the scores; objects come first."""
        generator = torch.Generator().manual_seed(image_id)
        places = torch.randint(len(self.pool), (PREDICTIONS,), generator=generator)
        classes = torch.randint(self.classes, (PREDICTIONS,), generator=generator)
        return places, classes, torch.rand(PREDICTIONS, generator=generator)

    def truth(self, number: int) -> dict[str, Any]:
        """Return COCO's form of the ground truth."""
        return {
            "images": [
                {"id": i, "file_name": f"{i}.jpg", "height": IMAGE_SIZE[0], "width": IMAGE_SIZE[1]}
                for i in range(number)
            ],
            "categories": [{"id": i + 1, "name": f"class {i}"} for i in range(self.classes)],
            "annotations": list(self._annotations(number)),
        }

    def _annotations(self, number: int) -> Iterator[dict[str, Any]]:
        for image_id in range(number):
            places, classes, _ = self.shapes(image_id)
            for i in range(OBJECTS):
                shape = self.pool[places[i]]
                yield {
                    "id": image_id * OBJECTS + i + 1,
                    "image_id": image_id,
                    "category_id": int(classes[i]) + 1,
                    "bbox": shape["bbox"],
                    "area": shape["bbox"][2] * shape["bbox"][3],
                    "iscrowd": 0,
                    "segmentation": shape["segmentation"],
                }

    def predictions(self, image_id: int) -> Instances:
        """Return what a model would give, the masks as run-length codes."""
        places, classes, scores = self.shapes(image_id)
        instances = Instances(IMAGE_SIZE, scores=scores, pred_classes=classes)
        instances.pred_boxes = Boxes(self.boxes[places])
        instances.pred_masks = RleMasks([self.pool[place]["segmentation"] for place in places])
        return instances


def resident() -> float:
    """Return the memory of this process in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=2500)
    parser.add_argument("--classes", type=int, default=80)
    args = parser.parse_args()
    torch.set_num_threads(1)
    images = Images(args.classes)
    with tempfile.TemporaryDirectory(prefix="d2ft_benchmark_") as folder:
        json_file = Path(folder) / "truth.json"
        json_file.write_text(json.dumps(images.truth(args.images)), encoding="utf-8")
        register_coco_instances(DATASET, {}, str(json_file), folder)
        from detectron2.data import MetadataCatalog

        MetadataCatalog.get(DATASET).set(
            thing_classes=[f"class {i}" for i in range(args.classes)],
            thing_dataset_id_to_contiguous_id={i + 1: i for i in range(args.classes)},
        )
        path = predictions_file(folder, DATASET)
        evaluator = DatasetEvaluators(
            [PredictionWriter(DATASET, path), CocoEvaluator(DATASET, ["bbox", "segm"])]
        )
        start, before = time.perf_counter(), resident()
        evaluator.reset()
        for image_id in trange(args.images, desc="Predicting", unit="image", disable=None):
            found = images.predictions(image_id)
            evaluator.process([{"image_id": image_id}], [{"instances": found}])
        kept, processed = resident(), time.perf_counter()
        results = evaluator.evaluate()
        size = path.stat().st_size / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{args.images} images x {PREDICTIONS} masks, {args.classes} classes")
    print(f"box AP {results['bbox']['AP']:.3f}, mask AP {results['segm']['AP']:.3f}")
    print(f"process: {processed - start:.0f} s, evaluate: {time.perf_counter() - processed:.0f} s")
    print(
        f"memory: {before:.0f} MiB before, {kept:.0f} MiB before evaluate, at most {peak:.0f} MiB"
    )
    print(f"file of predictions: {size:.0f} MiB")


if __name__ == "__main__":
    main()
