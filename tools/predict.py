#!/usr/bin/env python
"""
Run a checkpoint on images: draw what it finds, or write it as COCO results.

    python tools/predict.py --weights output/cityscapes_ft/model_final.pth photos/ --output drawn
    python tools/predict.py --weights model_final.pth 'frames/**/*.png' --json found.json

A checkpoint of d2ft holds its config and class names; for others, such as Detectron2's zoo, give
--config-file. An image that cannot be read is named and skipped; the exit code is then 3.
"""

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from d2ft.engine.predict import CheckpointPredictor, find_images, predict_images
from d2ft.errors import UserError

EXIT_SKIPPED = 3


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images", nargs="+", help="files, folders or patterns in quotes")
    parser.add_argument("--recursive", action="store_true", help="search folders below folders")
    parser.add_argument("--weights", required=True, help="checkpoint file or URL")
    parser.add_argument("--config-file", help="instead of the config in the checkpoint")
    parser.add_argument("--output", type=Path, help="folder for the pictures")
    parser.add_argument("--json", type=Path, help="file for the detections as COCO results")
    parser.add_argument("--threshold", type=float, default=0.5, help="lowest score (default 0.5)")
    parser.add_argument("--opts", nargs="+", default=[], help="KEY VALUE overrides of the config")
    args = parser.parse_args()
    if not args.output and not args.json:
        parser.error("give --output, --json or both")
    images = find_images(args.images, recursive=args.recursive)
    predictor = CheckpointPredictor(
        args.weights, args.config_file, threshold=args.threshold, opts=args.opts
    )
    skipped = 0
    predicted = predict_images(predictor, images, output=args.output, json_file=args.json)
    for path, reason in tqdm(predicted, total=len(images), unit="image"):
        if reason:
            skipped += 1
            tqdm.write(f"skipped {path}: {reason}", file=sys.stderr)
    where = " and ".join(str(target) for target in (args.output, args.json) if target)
    print(f"{len(images) - skipped} of {len(images)} images predicted, written to {where}")
    return EXIT_SKIPPED if skipped else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")
