"""The project that users copy, run on a miniature of the set that it reads."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.factories import PROJECT, SHORT_RUN, TINY_MODEL, write_coco_weights

FOLDER = PROJECT / "projects" / "CustomDataset"


@pytest.fixture
def balloons(tmp_path):
    """Write two images with an octagon each, as the VGG Image Annotator does, for both splits."""
    rng = np.random.default_rng(0)
    angles = np.arange(8) * np.pi / 4
    for split in ("train", "val"):
        folder = tmp_path / "balloon" / split
        folder.mkdir(parents=True)
        regions = {}
        for number in range(2):
            name = f"{number}.jpg"
            Image.fromarray(rng.integers(0, 255, (64, 96, 3), dtype=np.uint8)).save(folder / name)
            shape = {
                "name": "polygon",
                "all_points_x": [int(40 + 20 * np.cos(a)) for a in angles],
                "all_points_y": [int(30 + 20 * np.sin(a)) for a in angles],
            }
            region = {"shape_attributes": shape, "region_attributes": {}}
            regions[name] = {"filename": name, "size": 1, "regions": {"0": region}}
        (folder / "via_region_data.json").write_text(json.dumps(regions))
    return tmp_path


def test_the_script_is_short_enough_to_copy():
    assert len((FOLDER / "train_net.py").read_text().splitlines()) <= 60


def _train(datasets, tmp_path, *arguments):
    """Run the script of the project; return the folder of the run."""
    weights = write_coco_weights(tmp_path / "coco.pkl")
    run = tmp_path / "run"
    overrides = [*TINY_MODEL, *SHORT_RUN, "DATASETS.TRAIN", "('balloon_train',)"]
    overrides += ["MODEL.WEIGHTS", weights, "OUTPUT_DIR", run]
    command = ["--config-file", FOLDER / "custom.yaml", *arguments[:4], *overrides, *arguments[4:]]
    python_path = os.pathsep.join([str(PROJECT), os.environ.get("PYTHONPATH", "")])
    environment = {"DETECTRON2_DATASETS": str(datasets), "PYTHONPATH": python_path}
    result = subprocess.run(
        [sys.executable, "-W", "ignore", FOLDER / "train_net.py", *map(str, command)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return run


def test_a_set_registered_in_the_users_script_trains_and_evaluates(balloons, tmp_path):
    run = _train(balloons, tmp_path)
    results = json.loads((run / "results.json").read_text())
    assert set(results) == {"bbox", "segm"}
    assert json.loads((run / "preflight.json").read_text())["datasets"]["balloon_train"] == {
        "images": 2, "instances": 2, "classes": ["balloon"]
    }  # fmt: skip
    assert Path(run / "model_final.pth").is_file()


@pytest.mark.slow
@pytest.mark.ci
def test_it_is_registered_in_two_spawned_processes_with_workers(balloons, tmp_path):
    processes = ["--num-gpus", "2", "--dist-url", "auto"]
    run = _train(balloons, tmp_path, *processes, "DATALOADER.NUM_WORKERS", "4")
    assert set(json.loads((run / "results.json").read_text())) == {"bbox", "segm"}
