#!/usr/bin/env python
"""
Fine-tune on a dataset of one's own: copy this folder, then change CLASSES and the loader.

    python projects/CustomDataset/train_net.py --config-file projects/CustomDataset/custom.yaml

The example reads polygons drawn with the VGG Image Annotator: a folder of images with their
``via_region_data.json``, as in Detectron2's balloon tutorial.
"""

import json
import os
from functools import partial
from pathlib import Path

from detectron2.structures import BoxMode
from PIL import Image

from d2ft.data import register_instances
from d2ft.engine import run_train_net

CLASSES = ["balloon"]


def load_via_instances(folder: Path) -> list[dict]:
    """Return Detectron2 dataset dicts; corners of polygons are pixels, so their centre is +0.5."""
    records = []
    for entry in json.loads((folder / "via_region_data.json").read_text()).values():
        path = folder / entry["filename"]
        with Image.open(path) as image:
            width, height = image.size
        record = {"file_name": str(path), "image_id": entry["filename"]}
        record |= {"height": height, "width": width, "annotations": []}
        for region in entry["regions"].values():
            shape = region["shape_attributes"]
            xs, ys = ([v + 0.5 for v in shape[f"all_points_{axis}"]] for axis in "xy")
            record["annotations"].append(
                {
                    "bbox": [min(xs), min(ys), max(xs), max(ys)],
                    "bbox_mode": BoxMode.XYXY_ABS,
                    "segmentation": [
                        [value for point in zip(xs, ys, strict=True) for value in point]
                    ],
                    "category_id": 0,  # the index into CLASSES
                }
            )
        records.append(record)
    return records


def register() -> None:
    root = Path(os.environ.get("DETECTRON2_DATASETS", "datasets")) / "balloon"
    for split in ("train", "val"):
        loader = partial(load_via_instances, root / split)
        register_instances(f"balloon_{split}", loader, thing_classes=CLASSES)


if __name__ == "__main__":
    run_train_net(register)
