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
from pathlib import Path
from typing import Any

import torch
from detectron2.data import MetadataCatalog
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
    Images whose predictions are some of 200 others, a hundred each, with masks of many shapes.

    Args:
        classes: number of classes; ids are from 1.
    """

    def __init__(self, classes: int) -> None:
        _, pool = make_scored_scenes(300, seed=0)
        boxes = torch.tensor([shape["bbox"] for shape in pool])
        boxes[:, 2:] += boxes[:, :2]
        self.classes = classes
        self.pool = []
        for _ in range(200):
            places = torch.randint(len(pool), (PREDICTIONS,))
            instances = Instances(IMAGE_SIZE, scores=torch.rand(PREDICTIONS))
            instances.pred_boxes = Boxes(boxes[places])
            instances.pred_classes = torch.randint(classes, (PREDICTIONS,))
            instances.pred_masks = RleMasks([pool[place]["segmentation"] for place in places])
            self.pool.append(instances)

    def predictions(self, image_id: int) -> Instances:
        """Return what a model would give, the masks as run-length codes."""
        return self.pool[image_id % len(self.pool)]

    def write_truth(self, path: Path, number: int) -> None:
        """Write COCO's form of the ground truth: the first of each image's predictions."""
        height, width = IMAGE_SIZE
        images = [
            {"id": i, "file_name": f"{i}.jpg", "height": height, "width": width}
            for i in range(number)
        ]
        categories = [{"id": i + 1, "name": f"class {i}"} for i in range(self.classes)]
        with open(path, "w", encoding="utf-8") as file:
            head = json.dumps({"images": images, "categories": categories})
            file.write(f'{head[:-1]}, "annotations": [')
            for image_id in range(number):
                for row in range(OBJECTS):
                    annotation = self._annotation(image_id, row)
                    file.write((", " if annotation["id"] > 1 else "") + json.dumps(annotation))
            file.write("]}")

    def _annotation(self, image_id: int, row: int) -> dict[str, Any]:
        found = self.predictions(image_id)
        x0, y0, x1, y1 = found.pred_boxes.tensor[row].tolist()
        return {
            "id": image_id * OBJECTS + row + 1,
            "image_id": image_id,
            "category_id": int(found.pred_classes[row]) + 1,
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "area": (x1 - x0) * (y1 - y0),
            "iscrowd": 0,
            "segmentation": found.pred_masks.rles[row],
        }


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
    torch.manual_seed(0)
    images = Images(args.classes)
    with tempfile.TemporaryDirectory(prefix="d2ft_benchmark_") as folder:
        json_file = Path(folder) / "truth.json"
        images.write_truth(json_file, args.images)
        register_coco_instances(DATASET, {}, str(json_file), folder)
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
