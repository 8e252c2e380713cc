#!/usr/bin/env python
"""
Print what a checkpoint is: format, framework, architecture, classes, and what it says of itself.

    python tools/inspect_checkpoint.py output/cityscapes_ft/model_final.pth
    python tools/inspect_checkpoint.py mask_rcnn_r50_fpn_1x_coco.pth --json
    python tools/inspect_checkpoint.py model_final.pth --config > model.yaml

The file is read without running anything in it. --config prints the YAML of its model.
"""

import argparse
import json
import sys

from d2ft.checkpoint.describe import describe_checkpoint, format_description
from d2ft.checkpoint.safe_load import METADATA_KEY
from d2ft.errors import UserError


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file")
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--json", action="store_true", help="print everything as JSON")
    shown.add_argument("--config", action="store_true", help="print the config in the file")
    args = parser.parse_args()
    description = describe_checkpoint(args.file)
    if args.json:
        print(json.dumps(description, indent=2))
    elif args.config:
        own = description[METADATA_KEY] or {}
        if "config" not in own:
            raise UserError(f"{args.file} holds no config: it was not saved by d2ft")
        print(own["config"], end="")
    else:
        print(format_description(description))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
