#!/usr/bin/env python
"""
Write the synthetic sets: mini_coco in the layout of COCO, mini_cityscapes in that of Cityscapes.

    python tools/make_mini_data.py output/quickstart/datasets

With DETECTRON2_DATASETS set to that folder, the names of COCO and Cityscapes stand for them.
"""

import argparse
import sys
from pathlib import Path

from d2ft.data.synthetic import write_mini_cityscapes, write_mini_coco
from d2ft.errors import UserError


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("root", type=Path, help="gets the folders coco and cityscapes")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    # The sizes that configs/quickstart_pretrain.yaml and configs/quickstart.yaml are made for.
    write_mini_coco(args.root / "coco", num_train=4000, num_val=300, seed=args.seed)
    write_mini_cityscapes(args.root / "cityscapes", splits={"train": 64, "val": 16}, seed=args.seed)
    print(f"DETECTRON2_DATASETS={args.root}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
