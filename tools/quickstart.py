#!/usr/bin/env python
"""
Fine-tune a pretrained model on synthetic street scenes, evaluate it and draw what it finds.

    python tools/quickstart.py

The real job in small: the code, the config keys and the file formats are those of Cityscapes.
`bash tools/quickstart.sh` makes the environment first.
"""

import argparse
import contextlib
import io
import logging
import os
import shutil
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.logger import setup_logger
from detectron2.utils.visualizer import Visualizer

from d2ft.config import load_cfg
from d2ft.data import build_test_loader, register_builtin_datasets
from d2ft.data.synthetic import write_mini_cityscapes
from d2ft.engine import FinetuneTrainer, inference_cfg, resolve_cfg
from d2ft.errors import UserError

PROJECT = Path(__file__).resolve().parents[1]
CONFIG = Path("configs/quickstart.yaml")
DATASETS = Path("output/quickstart/datasets")

# What of the log is shown; all of it is in log.txt of the run.
SHOWN_LOGGERS = ("detectron2.utils.events", "d2ft")


def say(text: str) -> None:
    print(f"[quickstart] {text}", flush=True)


def set_up_logs(output_dir: str) -> None:
    for name in ("detectron2", "fvcore", "d2ft"):
        setup_logger(output_dir, name=name, configure_stdout=False)
    shown = logging.StreamHandler(sys.stdout)
    shown.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    shown.setLevel(logging.INFO)
    shown.addFilter(lambda record: record.name.startswith(SHOWN_LOGGERS))
    for name in ("detectron2", "d2ft"):
        logging.getLogger(name).addHandler(shown)


def make_room(output_dir: Path) -> None:
    """Remove the last quickstart; a folder that the user chose is not ours to remove."""
    if output_dir == Path(load_cfg(CONFIG).OUTPUT_DIR):
        shutil.rmtree(output_dir, ignore_errors=True)
    elif output_dir.exists() and any(output_dir.iterdir()):
        raise UserError(f"OUTPUT_DIR {output_dir} is not empty; choose another folder")


def draw_first_frame(cfg: CfgNode, model: torch.nn.Module, path: Path) -> None:
    """Draw the annotations of a validation frame beside what the model finds in it."""
    name = cfg.DATASETS.TEST[0]
    metadata = MetadataCatalog.get(name)
    # The frame with most to see.
    records = DatasetCatalog.get(name)
    index = int(np.argmax([len(record["annotations"]) for record in records]))
    model.eval()
    with torch.no_grad():
        sample = build_test_loader(cfg, name).dataset[index]
        instances = model([sample])[0]["instances"].to("cpu")
    image = cv2.imread(records[index]["file_name"])[:, :, ::-1]
    truth = Visualizer(image, metadata, scale=2.0).draw_dataset_dict(records[index])
    found = Visualizer(image, metadata, scale=2.0).draw_instance_predictions(
        instances[instances.scores > 0.5]
    )
    beside = np.hstack([truth.get_image(), found.get_image()])
    cv2.imwrite(str(path), beside[:, :, ::-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE overrides of the config")
    args = parser.parse_args()
    start = time.monotonic()
    os.chdir(PROJECT)

    say(f"1/4 Street scenes in the layout of Cityscapes: {DATASETS / 'cityscapes'}")
    write_mini_cityscapes(DATASETS / "cityscapes", splits={"train": 64, "val": 16})
    os.environ["DETECTRON2_DATASETS"] = str(DATASETS)
    register_builtin_datasets()

    cfg = resolve_cfg(load_cfg(CONFIG, args.opts))
    make_room(Path(cfg.OUTPUT_DIR))
    set_up_logs(cfg.OUTPUT_DIR)
    say(f"2/4 A Mask R-CNN with the weights of {cfg.MODEL.WEIGHTS or 'nothing'}")
    trainer = FinetuneTrainer(cfg)
    trainer.resume_or_load(resume=False)
    with contextlib.redirect_stdout(io.StringIO()):  # the long tables of pycocotools
        before = FinetuneTrainer.test(inference_cfg(cfg), trainer.model)

    say(f"3/4 Fine-tuning for {cfg.SOLVER.MAX_ITER} iterations, as would")
    say(f"    DETECTRON2_DATASETS={DATASETS} python tools/train_net.py --config-file {CONFIG}")
    with contextlib.redirect_stdout(io.StringIO()):
        after = trainer.train()

    picture = Path(cfg.OUTPUT_DIR) / "prediction.png"
    say("4/4 Drawing what it finds")
    draw_first_frame(cfg, trainer.model, picture)
    minutes = (time.monotonic() - start) / 60
    say(f"Done in {minutes:.1f} minutes. Official Cityscapes mask AP on the validation frames:")
    heads = "start from rows of COCO" if cfg.FINETUNE.HEAD_INIT == "remap" else "are random"
    say(f"    before fine-tuning {before['segm']['AP']:5.1f}   (the new heads {heads})")
    say(f"    after              {after['segm']['AP']:5.1f}")
    say(f"Ground truth (left) and prediction (right): {picture}")
    say(f"Model, metrics and the whole log: {cfg.OUTPUT_DIR}")
    say("Next, your own data: change the loader in projects/CustomDataset/train_net.py, then")
    say(
        f"    {os.path.relpath(sys.executable)} projects/CustomDataset/train_net.py "
        "--config-file projects/CustomDataset/custom.yaml"
    )


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
