#!/usr/bin/env python
"""
Evaluate the predictions that a run has kept, or those of another tool, without a model.

    python tools/evaluate_predictions.py --config-file output/cityscapes_ft/config.yaml
    python tools/evaluate_predictions.py --config-file configs/cityscapes_ft.yaml \
        --dataset cityscapes_instance_val --predictions found.json

The results are printed with every digit, as in results.json. A file of predictions is a JSON list
in COCO's results form: image_id, category_id, bbox, score and, for mask AP, segmentation as a
run-length code.
"""

import argparse
import sys

from detectron2.utils.logger import setup_logger

from d2ft.config import load_cfg
from d2ft.data import register_builtin_datasets
from d2ft.data.catalog import require_registered
from d2ft.errors import UserError
from d2ft.evaluation.offline import evaluate_predictions
from d2ft.evaluation.predictions import predictions_file, results_json


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, help="says which metrics, and OUTPUT_DIR")
    parser.add_argument("--dataset", help="by default the first of DATASETS.TEST")
    parser.add_argument(
        "--predictions", help="by default OUTPUT_DIR/predictions/<dataset>.json of the config"
    )
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE overrides of the config")
    args = parser.parse_args()
    setup_logger(name="d2ft")
    register_builtin_datasets()
    cfg = load_cfg(args.config_file, args.opts)
    if not args.dataset and not cfg.DATASETS.TEST:
        raise UserError(f"{args.config_file} has no DATASETS.TEST; say which set by --dataset")
    dataset = args.dataset or cfg.DATASETS.TEST[0]
    require_registered(dataset)
    path = args.predictions or predictions_file(cfg.OUTPUT_DIR, dataset)
    print(results_json(evaluate_predictions(cfg, dataset, path)))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
