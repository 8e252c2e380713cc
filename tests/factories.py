"""Miniature datasets and models that tests share; the scenes come from d2ft's own generator."""

import json
import os
import pickle
import subprocess
import sys
import types
from pathlib import Path

import detectron2
import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from PIL import Image

from d2ft.config import load_cfg
from d2ft.data.synthetic import write_mini_cityscapes

PROJECT = Path(__file__).resolve().parents[1]

# Overrides for a Mask R-CNN R50-FPN config: the real classes at a width that trains in a blink.
TINY_MODEL = [
    "MODEL.DEVICE", "cpu",
    "MODEL.RESNETS.STEM_OUT_CHANNELS", "8",
    "MODEL.RESNETS.RES2_OUT_CHANNELS", "16",
    "MODEL.RESNETS.WIDTH_PER_GROUP", "4",
    "MODEL.FPN.OUT_CHANNELS", "16",
    "MODEL.ROI_BOX_HEAD.FC_DIM", "32",
    "MODEL.ROI_MASK_HEAD.CONV_DIM", "16",
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "32",
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN", "100",
    "MODEL.RPN.POST_NMS_TOPK_TRAIN", "50",
    "MODEL.RPN.PRE_NMS_TOPK_TEST", "100",
    "MODEL.RPN.POST_NMS_TOPK_TEST", "50",
]  # fmt: skip

# Overrides for a run of a few steps on miniature frames.
SHORT_RUN = [
    "INPUT.MIN_SIZE_TRAIN", "(64, 96)",
    "INPUT.MAX_SIZE_TRAIN", "192",
    "INPUT.MIN_SIZE_TEST", "64",
    "INPUT.MAX_SIZE_TEST", "192",
    "SOLVER.IMS_PER_BATCH", "2",
    "SOLVER.BASE_LR", "0.005",
    "DATASETS.TRAIN", "('cityscapes_instance_train',)",
    "SOLVER.EPOCHS", "0",
    "SOLVER.STEPS_EPOCHS", "()",
    "SOLVER.CHECKPOINT_EPOCHS", "0",
    "TEST.EVAL_EPOCHS", "0",
    "SOLVER.MAX_ITER", "4",
    "SOLVER.STEPS", "()",
    "SOLVER.WARMUP_ITERS", "0",
    "SOLVER.CHECKPOINT_PERIOD", "2",
    "TEST.EVAL_PERIOD", "0",
    "LOG_PERIOD", "1",
    "DATALOADER.NUM_WORKERS", "0",
    "SEED", "1",
]  # fmt: skip


def zoo_config_file(name: str) -> Path:
    """Return a config of Detectron2's zoo: inside the installed package, or beside it in git."""
    package = Path(detectron2.__file__).parent
    for folder in (package / "model_zoo" / "configs", package.parent / "configs"):
        if (folder / name).is_file():
            return folder / name
    pytest.skip("the installed Detectron2 ships no configs of its model zoo")


def write_cityscapes(root: Path, *, train: int = 4, val: int = 2) -> Path:
    """Write a miniature Cityscapes of 64x128 frames into ``root/cityscapes``; return ``root``."""
    write_mini_cityscapes(
        root / "cityscapes", splits={"train": train, "val": val}, image_size=(64, 128), seed=3
    )
    return root


def write_coco(root: Path, *, train: int = 4, val: int = 2, classes=("cat", "dog")) -> Path:
    """Write COCO json of 64x96 images, an instance of each class in each, with polygons."""
    (root / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for split, number in (("train", train), ("val", val)):
        content = {
            "images": [],
            "annotations": [],
            "categories": [{"id": 3 * i + 1, "name": name} for i, name in enumerate(classes)],
        }
        for k in range(number):
            name = f"{split}_{k}.png"
            pixels = rng.integers(0, 80, (64, 96, 3), dtype=np.uint8)
            content["images"].append({"id": k, "file_name": name, "height": 64, "width": 96})
            for category in content["categories"]:
                x, y = (int(v) for v in rng.integers(0, 30, 2))
                w, h = (int(v) for v in rng.integers(16, 34, 2))
                pixels[y : y + h, x : x + w] += np.uint8(30 * category["id"])
                content["annotations"].append(
                    {
                        "id": len(content["annotations"]) + 1,
                        "image_id": k,
                        "category_id": category["id"],
                        "bbox": [x, y, w, h],
                        "area": w * h,
                        "iscrowd": 0,
                        "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
                    }
                )
            Image.fromarray(pixels).save(root / "images" / name)
        (root / f"{split}.json").write_text(json.dumps(content))
    return root


def seeded_model(cfg):
    """
    Build the model of a config from a fixed seed, with activations that stay in range.

    Without pretrained weights, FrozenBN is the identity and each residual block doubles the
    variance; damping the last norm of a block keeps losses finite.
    """
    torch.manual_seed(0)
    model = build_model(cfg)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("conv3.norm.weight"):
                tensor.mul_(0.2)
    return model


def write_zoo_weights(path: Path, model) -> Path:
    """Write a model's weights in the format of Detectron2's model zoo: a pickle of arrays."""
    arrays = {name: tensor.cpu().numpy() for name, tensor in model.state_dict().items()}
    with open(path, "wb") as file:
        pickle.dump({"model": arrays, "__author__": "Detectron2 Model Zoo"}, file)
    return path


def write_coco_weights(path: Path, overrides=TINY_MODEL) -> Path:
    """Write zoo weights of an 80-class model that fits ``configs/cityscapes_ft.yaml``."""
    cfg = load_cfg(
        PROJECT / "configs/cityscapes_ft.yaml",
        [*overrides, "MODEL.ROI_HEADS.NUM_CLASSES", "80", "MODEL.DEVICE", "cpu"],
    )
    return write_zoo_weights(path, seeded_model(cfg))


def write_mmengine_file(path: Path, *, weight=None, extra=None, legacy: bool = False) -> Path:
    """Write what MMDetection 3.x saves after an epoch, with the history of a loss."""

    class HistoryBuffer:
        """The state that MMEngine's class of this name gives to pickle."""

        def __init__(self):
            self.log_history = np.ones(3)
            self.count_history = np.ones(3, dtype=np.int64)
            self.last = np.float64(1.0)
            self.statistics_methods = {"mean": HistoryBuffer.mean}

        def mean(self):
            return self.log_history.mean()

    module = types.ModuleType("mmengine.logging.history_buffer")
    module.HistoryBuffer = HistoryBuffer
    HistoryBuffer.__module__ = HistoryBuffer.mean.__module__ = module.__name__
    HistoryBuffer.__qualname__ = "HistoryBuffer"
    HistoryBuffer.mean.__qualname__ = "HistoryBuffer.mean"
    parents = ("mmengine", "mmengine.logging")
    sys.modules |= {name: types.ModuleType(name) for name in parents} | {module.__name__: module}
    try:
        content = {
            "meta": {"epoch": 1, "dataset_meta": {"classes": ("car", "bus")}, "extra": extra},
            "state_dict": {"neck.w": torch.ones(2) if weight is None else weight},
            "message_hub": {"log_scalars": {"train/loss": HistoryBuffer()}},
        }
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    finally:
        for name in (*parents, module.__name__):
            del sys.modules[name]
    return path


def run_script(path, *arguments, cwd=None):
    """Run a script of the project as users do, and return the finished process with its output."""
    python_path = os.pathsep.join([str(PROJECT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-W", "ignore", str(path), *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": python_path},
        capture_output=True,
        text=True,
        check=False,
    )
