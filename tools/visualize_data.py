#!/usr/bin/env python
"""
Draw images of a dataset with their annotations, or as the training mapper gives them.

    python tools/visualize_data.py --config-file configs/cityscapes_ft.yaml --num 8
    python tools/visualize_data.py cityscapes_instance_val --output-dir output/val
    python tools/visualize_data.py --config-file configs/cityscapes_ft.yaml --mapped

Crowd and ignore regions are grey with dashed boxes; --mapped shows what is learned, and so not
those. An image that cannot be drawn is named and skipped; the exit code is then 3.
"""

import argparse
import copy
import random
import sys
from pathlib import Path

from detectron2.data import MetadataCatalog
from PIL import Image
from tqdm import tqdm

from d2ft.config import load_cfg
from d2ft.data import (
    class_names,
    register_builtin_datasets,
    register_declared_datasets,
    resolve_from_data,
)
from d2ft.data.bad_images import BadImageError
from d2ft.data.draw import draw_annotations, draw_mapped
from d2ft.data.mapper import FinetuneDatasetMapper
from d2ft.data.stream import seed_generators
from d2ft.errors import UserError
from d2ft.files import atomic_write
from d2ft.preflight.check_dataset import load_records
from d2ft.preflight.image_files import UNREADABLE

EXIT_SKIPPED = 3


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="registered datasets; default: DATASETS.TRAIN")
    parser.add_argument("--config-file", help="whose DATASETS.TRAIN and INPUT are used")
    parser.add_argument("--mapped", action="store_true", help="draw what the model is trained on")
    parser.add_argument("--num", type=int, default=20, help="images of each dataset (default 20)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice and the augmentation")
    parser.add_argument("--output-dir", type=Path, default=Path("output/visualize_data"))
    parser.add_argument("--opts", nargs="+", default=[], help="KEY VALUE overrides of the config")
    args = parser.parse_args()
    if args.num < 1:
        parser.error("--num is at least 1")
    register_builtin_datasets()
    cfg = load_cfg(args.config_file, args.opts)
    names = args.names or cfg.DATASETS.TRAIN
    register_declared_datasets(cfg, names)
    cfg = resolve_from_data(cfg)
    if not names:
        parser.error("give the names of datasets, or a --config-file with DATASETS.TRAIN")
    mapper = FinetuneDatasetMapper(cfg, is_train=True) if args.mapped else None
    skipped = 0
    for name in names:
        records = load_records(name)
        class_names(name)
        metadata = MetadataCatalog.get(name)
        chosen = sorted(
            random.Random(args.seed).sample(range(len(records)), min(args.num, len(records)))
        )
        folder = args.output_dir / name
        folder.mkdir(parents=True, exist_ok=True)
        for index in tqdm(chosen, desc=name, unit="image"):
            record = copy.deepcopy(records[index])  # a mapper changes what it is given
            source = Path(record["file_name"])
            try:
                if mapper:
                    seed_generators(args.seed, index)
                    picture = draw_mapped(record, metadata, mapper, cfg.INPUT.FORMAT)
                else:
                    picture = draw_annotations(record, metadata)
            except (*UNREADABLE, BadImageError) as error:
                skipped += 1
                tqdm.write(f"skipped {source}: {type(error).__name__}: {error}", file=sys.stderr)
                continue
            # The index tells images of the same name in different folders apart.
            with atomic_write(folder / f"{index:06d}_{source.stem}.jpg", "wb") as file:
                Image.fromarray(picture).save(file, format="JPEG", quality=92)
        print(f"{name}: {len(chosen)} of {len(records)} images, drawn to {folder}")
    return EXIT_SKIPPED if skipped else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")
