#!/usr/bin/env python
"""
Look for what is wrong in datasets before training on them: files, boxes, classes, leaks.

    python tools/check_dataset.py --config-file configs/cityscapes_ft.yaml
    python tools/check_dataset.py cityscapes_instance_train cityscapes_instance_val --decode

Names on the command line are taken instead of those of the config: the first as the training set,
the others as test sets. A missing or unreadable file, a box that is no box, an image in both sets
and the like are errors, and the exit code is then 1; warnings and notes leave it 0.
"""

import argparse
import json
import sys
from pathlib import Path

from d2ft.config import load_cfg
from d2ft.data import register_builtin_datasets, register_declared_datasets
from d2ft.errors import UserError
from d2ft.files import atomic_write
from d2ft.preflight.check_dataset import load_records
from d2ft.preflight.inspect_dataset import format_report, inspect_datasets


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="registered datasets, the training set first")
    parser.add_argument("--config-file", help="check its DATASETS.TRAIN and DATASETS.TEST")
    parser.add_argument("--decode", action="store_true", help="decode every image, not its header")
    parser.add_argument("--output", type=Path, help="file for the findings as JSON")
    parser.add_argument("--opts", nargs="+", default=[], help="KEY VALUE overrides of the config")
    args = parser.parse_args()
    if not args.names and not args.config_file:
        parser.error("give the names of datasets or --config-file")
    register_builtin_datasets()
    cfg = load_cfg(args.config_file, args.opts)
    register_declared_datasets(cfg, args.names or None)
    train, test = cfg.DATASETS.TRAIN, cfg.DATASETS.TEST
    if args.names:
        train, test = args.names[:1], args.names[1:]
    report = inspect_datasets(cfg, load_records, train, test, decode=args.decode)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(args.output) as file:
            json.dump(report, file, indent=2, default=str)
    print(format_report(report))
    return int(any(finding["level"] == "error" for finding in report["findings"]))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")
