#!/usr/bin/env python
"""
Convert a checkpoint of torchvision or MMDetection to one of Detectron2.

    python tools/convert_weights.py maskrcnn_resnet50_fpn_coco.pth weights/mask_rcnn.pth

Beside the weights it writes weights/mask_rcnn.yaml: the config lines without which the weights
compute something else, such as the order of the colour channels, and MODEL.WEIGHTS. Name the file
last in the _BASE_ of a config.

Training converts such files on its own as well: give the original as MODEL.WEIGHTS.
"""

import argparse
import logging
import sys
from pathlib import Path

import torch

from d2ft.checkpoint.convert.build import format_yaml, required_config
from d2ft.checkpoint.safe_load import METADATA_KEY
from d2ft.checkpoint.weights import read_weights
from d2ft.errors import UserError
from d2ft.files import atomic_write


def convert(source: str, target: Path) -> None:
    if target.suffix != ".pth":
        raise UserError(f"{target}: the name of the converted file has to end in .pth.")
    checkpoint = read_weights(source)
    required = required_config(checkpoint)
    if not required or checkpoint.get("matching_heuristics"):
        raise UserError(
            f"{source}: its keys are not those of a torchvision or MMDetection model. A file of "
            "Detectron2 or Caffe2 needs no conversion: give it as MODEL.WEIGHTS."
        )
    description = checkpoint[METADATA_KEY]
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(target, "wb") as file:
        torch.save({"model": checkpoint["model"], METADATA_KEY: description}, file)
    with atomic_write(target.with_suffix(".yaml")) as file:
        file.write(f"# What the weights need, converted from {description['converted_from']}.\n")
        file.write(format_yaml(required | {"MODEL.WEIGHTS": str(target), "VERSION": 2}))
    classes = description.get("thing_classes")
    print(
        f"{description['converted_from']}, "
        + (f"{len(classes)} classes" if classes else "its class names are not known")
    )
    print(f"{target}: {len(checkpoint['model'])} tensors")
    print(f"{target.with_suffix('.yaml')}: {len(required)} config lines that they need")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help="file or URL, as for MODEL.WEIGHTS")
    parser.add_argument("target", type=Path, help="the .pth file to write")
    args = parser.parse_args()
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    convert(args.source, args.target)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
