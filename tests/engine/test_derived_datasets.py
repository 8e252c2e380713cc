"""Runs on datasets that the config makes of others."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog

from d2ft.config import load_cfg
from d2ft.data import build_train_loader, class_names, register_builtin_datasets
from d2ft.data.wrappers import is_instance
from d2ft.engine import FinetuneTrainer
from d2ft.errors import UserError
from tests.factories import PROJECT

UNION = [
    "DATASETS.DERIVED.cars.FROM", "['cityscapes_instance_train']",
    "DATASETS.DERIVED.cars.CLASSES", "['rider', 'car']",
    "DATASETS.DERIVED.people.FROM", "['cityscapes_instance_train']",
    "DATASETS.DERIVED.people.CLASSES", "['person', 'rider']",
    "DATASETS.DERIVED.union.FROM", "['cars', 'people']",
    "DATASETS.TRAIN", "('union',)",
    "DATASETS.TEST", "()",
    "MODEL.ROI_HEADS.NUM_CLASSES", "3",
]  # fmt: skip


@pytest.fixture
def union_cfg(overrides):
    return load_cfg(PROJECT / "configs/cityscapes_ft.yaml", [*overrides, *UNION])


def test_a_union_of_different_classes_trains_with_the_targets_of_each_set(union_cfg):
    trainer = FinetuneTrainer(union_cfg)
    assert class_names("union") == ("rider", "car", "person")
    expected = {
        (record["file_name"], tuple(record["labelled_classes"])): Counter(
            a["category_id"] for a in record["annotations"] if is_instance(a)
        )
        for record in DatasetCatalog.get("union")
    }
    assert {labelled for _, labelled in expected} == {(0, 1), (0, 2)}
    batches = iter(build_train_loader(trainer.cfg))
    seen = set()
    for sample in (sample for _ in range(16) for sample in next(batches)):
        key = sample["file_name"], tuple(sample["labelled_classes"])
        found = Counter(sample["instances"].gt_classes.tolist())
        assert set(found) <= set(key[1])
        assert found <= expected[key]  # what is too small after resizing is left out
        seen.add(key[1])
    assert len(seen) == 2
    trainer.resume_or_load()
    trainer.train()
    assert (Path(union_cfg.OUTPUT_DIR) / "model_final.pth").is_file()
    lines = (Path(union_cfg.OUTPUT_DIR) / "metrics.json").read_text().splitlines()
    assert all(torch.isfinite(torch.tensor(json.loads(line)["total_loss"])) for line in lines)


def test_models_without_such_a_classifier_refuse_a_union(union_cfg):
    union_cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
    union_cfg.MODEL.BACKBONE.NAME = "build_retinanet_resnet_fpn_backbone"
    union_cfg.MODEL.RESNETS.OUT_FEATURES = ["res3", "res4", "res5"]
    union_cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
    union_cfg.MODEL.RETINANET.NUM_CLASSES, union_cfg.MODEL.MASK_ON = 3, False
    union_cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32], [64], [128], [256], [512]]
    with pytest.raises(
        UserError, match="'union' joins sets of different classes.*RetinaNet has none"
    ):
        FinetuneTrainer(union_cfg)


def test_a_run_writes_down_what_chance_chose(overrides):
    options = ["DATASETS.DERIVED.some.FROM", "['cityscapes_instance_train']"]
    options += ["DATASETS.DERIVED.some.FRACTION", "0.5", "DATASETS.DERIVED.some.SEED", "7"]
    options += ["DATASETS.TRAIN", "('some',)", "DATASETS.TEST", "()", "SOLVER.MAX_ITER", "1"]
    cfg = load_cfg(PROJECT / "configs/cityscapes_ft.yaml", [*overrides, *options])
    trainer = FinetuneTrainer(cfg)
    trainer.resume_or_load()
    trainer.train()
    written = json.loads((Path(cfg.OUTPUT_DIR) / "derived_datasets.json").read_text())
    assert written["some"]["settings"]["some"]["SEED"] == 7
    assert written["some"]["images"] == [r["file_name"] for r in DatasetCatalog.get("some")]
    assert len(written["some"]["images"]) == 2


def test_a_bad_image_in_a_run_is_listed_at_its_end(
    datasets, overrides, monkeypatch, tmp_path, caplog
):
    shutil.copytree(datasets, tmp_path / "copy")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "copy"))
    register_builtin_datasets()
    options = ["DATASETS.TEST", "()", "DATALOADER.MAX_BAD_IMAGES", "1"]
    cfg = load_cfg(PROJECT / "configs/cityscapes_ft.yaml", [*overrides, *options])
    trainer = FinetuneTrainer(cfg)
    trainer.resume_or_load()
    # After the data was checked, as on a disk that fails.
    bad = next((tmp_path / "copy/cityscapes/leftImg8bit/train").glob("*/*.png"))
    bad.write_bytes(b"")
    with caplog.at_level("WARNING", logger="d2ft"):
        trainer.train()
    assert "Left out of training for being bad" in caplog.text
    assert str(bad) in caplog.text
