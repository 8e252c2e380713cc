"""Each real set, by its entry config or a few lines of YAML, through train_net.py to its AP."""

import json
import math
import os
import subprocess
import sys

import pytest

from d2ft.files import atomic_write
from tests.factories import PROJECT

pytestmark = pytest.mark.slow

CONFIGS = PROJECT / "configs"
# Three steps from random weights, as the weights of the entry configs are not part of the tests.
SHORT = [
    "INPUT.MIN_SIZE_TRAIN", "(128, 160)",
    "INPUT.MAX_SIZE_TRAIN", "320",
    "INPUT.MIN_SIZE_TEST", "128",
    "INPUT.MAX_SIZE_TEST", "320",
    "SOLVER.IMS_PER_BATCH", "2",
    "SOLVER.BASE_LR", "0.001",
    "SOLVER.EPOCHS", "0",
    "SOLVER.STEPS_EPOCHS", "()",
    "SOLVER.CHECKPOINT_EPOCHS", "0",
    "TEST.EVAL_EPOCHS", "0",
    "SOLVER.MAX_ITER", "3",
    "SOLVER.STEPS", "()",
    "LOG_PERIOD", "1",
    "SEED", "1",
]  # fmt: skip
RANDOM = [
    "MODEL.WEIGHTS", "",
    "MODEL.RESNETS.NORM", "BN",
    "MODEL.BACKBONE.FREEZE_AT", "0",
]  # fmt: skip
COCO_KEYS = {"AP", "AP50", "AP75"}


def _train(folder, config, options, *, datasets=None):
    """Run train_net.py in ``folder``; return results.json after looking at what the run wrote."""
    command = [sys.executable, "-W", "ignore", PROJECT / "tools/train_net.py"]
    command += ["--config-file", config, *SHORT, "OUTPUT_DIR", folder / "run", *options]
    environment = {
        "DETECTRON2_DATASETS": str(datasets or folder),
        "PYTHONPATH": os.pathsep.join([str(PROJECT), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        list(map(str, command)),
        cwd=PROJECT,  # paths of configs are relative to it
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    lines = (folder / "run/metrics.json").read_text().splitlines()
    losses = [row["total_loss"] for row in map(json.loads, lines) if "total_loss" in row]
    assert len(losses) == 3
    assert all(map(math.isfinite, losses))
    assert (folder / "run/model_final.pth").is_file()
    return json.loads((folder / "run/results.json").read_text())


def _write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(text)
    return path


def _boxes_alone(datasets):
    """Return the YAML of a Faster R-CNN on one's own data: a base, the sets, their names."""
    base = CONFIGS / "_base_/models/faster_rcnn_r50_fpn.yaml"
    return f"_BASE_: {base}\nDATASETS:\n{datasets}VERSION: 2\n"


def test_cityscapes(real_data, tmp_path):
    results = _train(tmp_path, CONFIGS / "cityscapes_ft.yaml", RANDOM, datasets=real_data)
    assert set(results) == {"bbox", "segm", "segm_coco"}
    assert all("AP" in found for found in results.values())


def test_coco(real_data, tmp_path):
    results = _train(tmp_path, CONFIGS / "coco_ft.yaml", RANDOM, datasets=real_data)
    assert set(results) == {"bbox", "segm"}
    assert results["segm"].keys() > COCO_KEYS


def test_wider_face(real_data, tmp_path):
    results = _train(tmp_path, CONFIGS / "wider_face_ft.yaml", RANDOM, datasets=real_data)
    assert set(results["bbox"]) == {"AP", "AP-easy", "AP-medium", "AP-hard"}


def test_kitti(real_data, tmp_path):
    (tmp_path / "kitti").mkdir()
    (tmp_path / "kitti/training").symlink_to(real_data / "kitti/training")
    frames = sorted(p.stem for p in (real_data / "kitti/training/label_2").glob("*.txt"))
    _write(tmp_path / "kitti/ImageSets/train.txt", "\n".join(frames[:12]))
    _write(tmp_path / "kitti/ImageSets/val.txt", "\n".join(frames[12:]))
    results = _train(tmp_path, CONFIGS / "kitti_ft.yaml", RANDOM)
    assert {"AP", "AP-moderate", "AP-Car-easy", "AP-Car-easy-R11"} < results["bbox"].keys()


def test_bccd(real_data, tmp_path):
    root = real_data / "VOC_BCCD/VOCdevkit/VOC2007"
    config = _write(
        tmp_path / "bccd.yaml",
        _boxes_alone(
            "  CUSTOM:\n"
            f"    bccd_train: {{FORMAT: voc, ROOT: {root}, SPLIT: train}}\n"
            f"    bccd_val: {{FORMAT: voc, ROOT: {root}, SPLIT: val}}\n"
            '  TRAIN: ("bccd_train",)\n  TEST: ("bccd_val",)\n'
        ),
    )
    results = _train(tmp_path, config, RANDOM)
    assert results["bbox"].keys() == COCO_KEYS | {
        f"{ap}-{name}" for ap in ("AP", "AP50") for name in ("Platelets", "RBC", "WBC")
    }


def test_voc_samples_under_the_names_of_voc(real_data, tmp_path):
    images = "2007_000063\n2011_003353\n"
    for folder, lists in (
        ("VOC2007", {"trainval": images, "test": images}),
        ("VOC2012", {"trainval": images}),
    ):
        for part in ("Annotations", "JPEGImages"):
            (tmp_path / folder).mkdir(exist_ok=True)
            (tmp_path / folder / part).symlink_to(real_data / "voc_samples" / part)
        for name, ids in lists.items():
            _write(tmp_path / folder / f"ImageSets/Main/{name}.txt", ids)
    results = _train(tmp_path, CONFIGS / "voc_ft.yaml", RANDOM)
    assert results["bbox"].keys() > {"AP", "AP50", "AP75", "AP-dog", "AP50-chair"}


def test_fruits_nuts_from_the_weights_of_the_quickstart(real_data, tmp_path):
    root = real_data / "fruits_nuts/data"
    source = "DATASETS.CUSTOM.fruits_nuts"
    options = [f"{source}.JSON", root / "trainval.json", f"{source}.IMAGES", root / "images"]
    results = _train(tmp_path, PROJECT / "projects/SmallSets/fruits_nuts.yaml", options)
    assert results["segm"].keys() == COCO_KEYS | {
        "APs", "APm", "APl", "AP-date", "AP-fig", "AP-hazelnut"
    }  # fmt: skip
    derived = json.loads((tmp_path / "run/derived_datasets.json").read_text())
    assert [len(set(part["images"])) for part in derived.values()] == [12, 6]
