import runpy
import sys

import numpy as np
import pytest
from detectron2.data import DatasetMapper, MetadataCatalog
from PIL import Image

from d2ft.config import load_cfg
from d2ft.data import register_builtin_datasets
from d2ft.data.draw import draw_annotations, draw_mapped
from d2ft.preflight.check_dataset import load_records
from tests.factories import PROJECT, SHORT_RUN, write_cityscapes

NAME = "cityscapes_instance_train"


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(write_cityscapes(tmp_path, train=3)))
    register_builtin_datasets()
    return tmp_path


def run_tool(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["visualize_data.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(PROJECT / "tools/visualize_data.py"), run_name="__main__")
    return stop.value.code


def test_crowd_regions_are_drawn_otherwise_than_instances(root):
    record = load_records(NAME)[0]
    metadata = MetadataCatalog.get(NAME)
    drawn = draw_annotations(record, metadata)
    assert drawn.shape == (64, 128, 3)
    assert np.array_equal(drawn, draw_annotations(record, metadata))
    record["annotations"] = [{**a, "iscrowd": 1} for a in record["annotations"]]
    assert not np.array_equal(drawn, draw_annotations(record, metadata))


def test_a_region_that_is_ignored_for_several_classes_is_drawn_once(root):
    record, metadata = load_records(NAME)[0], MetadataCatalog.get(NAME)
    region = {**record["annotations"][0], "ignore": 1, "iscrowd": 1}
    pictures = [
        draw_annotations(
            {**record, "annotations": [{**region, "category_id": c} for c in range(number)]},
            metadata,
        )
        for number in (1, 3)
    ]
    assert np.array_equal(*pictures)


@pytest.mark.parametrize("masks", [True, False])
def test_what_the_mapper_makes_is_drawn_at_its_size(root, masks):
    cfg = load_cfg(
        PROJECT / "configs/cityscapes_ft.yaml",
        [*SHORT_RUN, "INPUT.MIN_SIZE_TRAIN", "(96, 96)", "MODEL.MASK_ON", masks],
    )
    record, metadata = load_records(NAME)[0], MetadataCatalog.get(NAME)
    drawn = draw_mapped(record, metadata, DatasetMapper(cfg, is_train=True), cfg.INPUT.FORMAT)
    assert drawn.shape == (96, 192, 3)


def test_an_image_without_annotations_is_drawn_as_it_is(root):
    record = {**load_records(NAME)[0], "annotations": []}
    drawn = draw_annotations(record, MetadataCatalog.get(NAME))
    assert drawn.shape == (64, 128, 3)


def test_tool_draws_and_names_what_it_skips(root, monkeypatch, capsys):
    records = load_records(NAME)
    bad = records[1]["file_name"]
    with open(bad, "r+b") as file:
        file.truncate(2000)
    monkeypatch.setattr("detectron2.data.DatasetCatalog.get", lambda name: records)
    config = PROJECT / "configs/cityscapes_ft.yaml"

    code = run_tool(monkeypatch, NAME, "--config-file", config, "--output-dir", root / "drawn")

    assert code == 3
    assert f"skipped {bad}: " in capsys.readouterr().err
    drawn = sorted((root / "drawn" / NAME).iterdir())
    assert [path.name[:7] for path in drawn] == ["000000_", "000002_"]
    assert Image.open(drawn[0]).size == (128, 64)

    arguments = [NAME, "--config-file", config, "--mapped", "--num", 1, "--seed", 2]
    assert run_tool(monkeypatch, *arguments, "--output-dir", root / "once") in (0, 3)
