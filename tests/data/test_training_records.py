import json
import logging

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, get_detection_dataset_dicts
from detectron2.data.samplers import RepeatFactorTrainingSampler

from d2ft.config import get_cfg
from d2ft.data import (
    build_train_loader,
    epoch_samples,
    register_coco_instances,
    register_instances,
    training_records,
)
from d2ft.data.catalog import open_records
from d2ft.data.record_store import StoredRecords, columns_of
from d2ft.errors import UserError

CLASSES = ["cat", "dog", "bird"]
NAMES = ("first", "second")


def _write(folder, name, seed, images=20):
    """Write a set with images that are empty or crowd alone, landscape and portrait."""
    generator = np.random.default_rng(seed)
    rows, number = [], 0
    for image in range(images):
        for _ in range(generator.integers(0, 4)):
            number += 1
            rows.append(
                {
                    "id": number,
                    "image_id": image,
                    "category_id": int(generator.choice(3, p=[0.8, 0.15, 0.05])),
                    "bbox": generator.integers(1, 9, 4).tolist(),
                    "iscrowd": int(generator.random() < 0.3),
                }
            )
    sizes = generator.integers(20, 40, (images, 2)).tolist()
    content = {
        "images": [
            {"id": i, "file_name": f"{name}_{i}.png", "height": h, "width": w}
            for i, (h, w) in enumerate(sizes)
        ],
        "annotations": rows,
        "categories": [{"id": i, "name": c} for i, c in enumerate(CLASSES)],
    }
    (folder / f"{name}.json").write_text(json.dumps(content))
    register_coco_instances(name, folder / f"{name}.json", folder, CLASSES)


@pytest.fixture
def cfg(tmp_path):
    for seed, name in enumerate(NAMES):
        _write(tmp_path, name, seed)
    cfg = get_cfg()
    cfg.DATASETS.TRAIN = NAMES
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.MODEL.MASK_ON = False
    cfg.SEED = 3
    return cfg


def _as_lists(cfg):
    """Register the same records as lists, under other names."""
    for name in NAMES:
        records = DatasetCatalog.get(name)
        register_instances(f"{name}_list", lambda r=records: r, thing_classes=CLASSES)
    cfg = cfg.clone()
    cfg.DATASETS.TRAIN = tuple(f"{name}_list" for name in NAMES)
    return cfg


@pytest.mark.parametrize("filters", [True, False])
def test_an_index_is_filtered_as_detectron2_filters_lists(cfg, filters):
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = filters
    records = training_records(cfg)
    assert isinstance(records, StoredRecords)
    expected = get_detection_dataset_dicts(list(NAMES), filter_empty=filters)
    assert list(records) == expected
    assert (len(expected) < 40) == filters


@pytest.mark.parametrize(
    "sampler", ["TrainingSampler", "RepeatFactorTrainingSampler", "RandomSubsetTrainingSampler"]
)
def test_an_index_gives_the_samples_of_a_list(cfg, sampler):
    cfg.DATALOADER.SAMPLER_TRAIN = sampler
    cfg.DATALOADER.REPEAT_THRESHOLD = 0.5
    cfg.DATALOADER.RANDOM_SUBSET_RATIO = 0.5
    lists = _as_lists(cfg)
    counts = [epoch_samples(c, columns_of(training_records(c))) for c in (cfg, lists)]
    assert counts[0] == counts[1]
    streams = [build_train_loader(c, mapper=lambda record: record).dataset for c in (cfg, lists)]
    assert isinstance(streams[0].dataset, StoredRecords)
    samples = [
        [s["file_name"] for s, _ in zip(iter(st), range(200), strict=False)] for st in streams
    ]
    assert samples[0] == samples[1]


def test_repeat_factors_are_those_of_detectron2(cfg):
    cfg.DATALOADER.SAMPLER_TRAIN = "RepeatFactorTrainingSampler"
    cfg.DATALOADER.REPEAT_THRESHOLD = 0.7
    records = training_records(cfg)
    factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
        list(records), 0.7, sqrt=True
    )
    sampler = build_train_loader(cfg, mapper=lambda r: r).dataset.build_sampler(0)
    expected = RepeatFactorTrainingSampler(factors, seed=0)
    assert sampler._int_part.equal(expected._int_part)
    assert sampler._frac_part.equal(expected._frac_part)


def test_the_instances_of_each_class_are_logged(cfg, caplog):
    caplog.set_level(logging.INFO, logger="d2ft")
    records = list(training_records(cfg))
    assert any("Left out" in line for line in caplog.messages)
    (table,) = (line for line in caplog.messages if "Instances by class" in line)
    for index, name in enumerate(CLASSES):
        count = sum(
            a["category_id"] == index and not a["iscrowd"]
            for r in records
            for a in r["annotations"]
        )
        assert f" {name} {count} " in f" {' '.join(table.split())} "


def test_keypoints_are_filtered_from_lists(cfg):
    cfg.MODEL.KEYPOINT_ON = True
    cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE = 0
    assert isinstance(training_records(cfg), list)


def test_an_index_that_holds_nothing_to_learn_from_is_refused(cfg, tmp_path):
    _write(tmp_path, "empty", 0, images=0)
    cfg.DATASETS.TRAIN = ("empty",)
    with pytest.raises(UserError, match="no image of empty has an annotation to learn from"):
        training_records(cfg)


def test_a_loader_that_took_the_place_of_ours_is_asked_instead(cfg):
    DatasetCatalog.remove("first")
    DatasetCatalog.register("first", lambda: [{"file_name": "other.png"}])
    assert open_records("first") == [{"file_name": "other.png"}]


def test_the_list_of_the_catalog_may_be_changed(cfg):
    DatasetCatalog.get("first")[0]["annotations"] = "changed"
    assert DatasetCatalog.get("first")[0]["annotations"] != "changed"
