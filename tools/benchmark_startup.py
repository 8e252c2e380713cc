"""The task ``startup`` of ``benchmark.py``: from the start of a process to its first batch."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "cityscapes_ft.yaml"
SPLITS = {"train": 2975, "val": 500}

# Model and weights are not what is measured.
_OVERRIDES = (
    "MODEL.DEVICE cpu MODEL.RESNETS.STEM_OUT_CHANNELS 8 MODEL.RESNETS.RES2_OUT_CHANNELS 16 "
    "MODEL.RESNETS.WIDTH_PER_GROUP 4 MODEL.FPN.OUT_CHANNELS 16 MODEL.ROI_BOX_HEAD.FC_DIM 32 "
    "MODEL.ROI_MASK_HEAD.CONV_DIM 16 SOLVER.IMS_PER_BATCH 2 DATALOADER.NUM_WORKERS 2 SEED 1 "
    "DATASETS.TRAIN ('cityscapes_instance_train',) SOLVER.EPOCHS 0 SOLVER.STEPS_EPOCHS () "
    "SOLVER.CHECKPOINT_EPOCHS 0 TEST.EVAL_EPOCHS 0 SOLVER.MAX_ITER 4 SOLVER.STEPS ()"
)

# name, unit, values of ours, values of the stock way
Row = tuple[str, str, list[float], list[float]]


def benchmark_startup(root: Path, *, quick: bool) -> Iterator[Row]:
    """Compare warm starts on as many frames as Cityscapes has."""
    with tempfile.TemporaryDirectory(prefix="d2ft_benchmark_") as folder:
        environment = {
            **os.environ,
            "DETECTRON2_DATASETS": folder,
            "D2FT_CACHE": f"{folder}/cache",
        }
        splits = {name: count // 50 if quick else count for name, count in SPLITS.items()}
        with mock.patch.dict(os.environ, environment):
            _write_links(root, Path(folder, "cityscapes"), splits)
        runs: dict[str, list[dict[str, float]]] = {"ours": [], "stock": []}
        for _ in range(1 if quick else 5):
            for side, done in runs.items():
                done.append(_start(side, folder, environment))
    images = sum(splits.values())
    print(f"Seconds of the last start of each: { ({s: d[-1] for s, d in runs.items()}) }")
    beyond = ([run["beyond"] for run in done] for done in runs.values())
    yield f"start to first batch, {images} images", "s beyond imports and model", *beyond


def _write_links(root: Path, folder: Path, splits: dict[str, int]) -> None:
    """Make a dataset of links to the frames in ``root``, and put it into the cache."""
    from d2ft.data import load_cityscapes_instances
    from d2ft.data.datasets import cityscapes

    sources = load_cityscapes_instances(root / "leftImg8bit" / "train", root / "gtFine" / "train")
    records = {}
    for split, count in splits.items():
        for number in range(count):
            source = sources[number % len(sources)]
            name = f"city_{number:06d}_000019"
            images, labels = (folder / part / split / "city" for part in ("leftImg8bit", "gtFine"))
            targets = {
                "file_name": images / f"{name}_leftImg8bit.png",
                "instance_file_name": labels / f"{name}_gtFine_instanceIds.png",
            }
            for key, target in targets.items():
                target.parent.mkdir(parents=True, exist_ok=True)
                target.symlink_to(source[key])
            paths = {key: str(target) for key, target in targets.items()}
            records[paths["file_name"]] = {**source, **paths, "image_id": name}
    # Reading each label image again would take minutes.
    with mock.patch.object(cityscapes, "_parse_frame", lambda frame: records[frame.image]):
        for split in splits:
            load_cityscapes_instances(folder / "leftImg8bit" / split, folder / "gtFine" / split)


def _start(side: str, folder: str, environment: dict[str, str]) -> dict[str, float]:
    """Return the seconds of each part of a start."""
    output = tempfile.mkdtemp(dir=folder)
    command = [sys.executable, "-W", "ignore", __file__, side, output, str(time.time())]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"the {side} start failed:\n{result.stdout[-2000:]}{result.stderr}")
    return json.loads(Path(output, "seconds.json").read_text(encoding="utf-8"))


def _reach_first_batch(side: str, output: str, started: float) -> NoReturn:
    """Start a training run, and end it when the first batch is there."""
    seconds = {"python": time.time() - started}
    begin = time.time()
    from detectron2.engine import DefaultTrainer, default_argument_parser, default_setup

    from d2ft.config import load_cfg
    from d2ft.data import register_builtin_datasets
    from d2ft.engine.command_line import check_and_launch
    from d2ft.engine.trainer import FinetuneTrainer

    seconds["imports"] = time.time() - begin
    base: Any = FinetuneTrainer if side == "ours" else DefaultTrainer

    class Timed(base):
        @classmethod
        def build_model(cls, cfg: Any) -> Any:
            begin = time.time()
            model = super().build_model(cfg)
            seconds["model"] = time.time() - begin
            return model

        def run_step(self) -> NoReturn:
            next(self._trainer._data_loader_iter)
            total = time.time() - started
            seconds["beyond"] = total - sum(seconds.values())
            Path(output, "seconds.json").write_text(json.dumps(seconds), encoding="utf-8")
            raise SystemExit(0)

    options = [
        "--config-file",
        str(CONFIG),
        *_OVERRIDES.split(),
        "OUTPUT_DIR",
        output,
        "MODEL.WEIGHTS",
        "",
    ]
    args = default_argument_parser().parse_args(options)
    if side == "ours":
        check_and_launch(args, register_builtin_datasets, Timed)
    else:
        register_builtin_datasets()
        cfg = load_cfg(CONFIG, args.opts)
        default_setup(cfg, args)
        trainer = Timed(cfg)
        trainer.resume_or_load(resume=False)
        trainer.train()
    raise AssertionError("the run ended before its first step")


if __name__ == "__main__":
    _reach_first_batch(sys.argv[1], sys.argv[2], float(sys.argv[3]))
