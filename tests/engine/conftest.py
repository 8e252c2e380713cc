import pytest

from d2ft.config import load_cfg
from d2ft.data import register_builtin_datasets
from tests.factories import (
    PROJECT,
    SHORT_RUN,
    TINY_MODEL,
    write_cityscapes,
    write_coco_weights,
)


@pytest.fixture(scope="session")
def datasets(tmp_path_factory):
    return write_cityscapes(tmp_path_factory.mktemp("datasets"))


@pytest.fixture(scope="session")
def coco_weights(tmp_path_factory):
    return write_coco_weights(tmp_path_factory.mktemp("weights") / "coco.pkl")


@pytest.fixture
def overrides(datasets, coco_weights, monkeypatch, tmp_path):
    """Return overrides that make ``configs/cityscapes_ft.yaml`` a run of four steps."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(datasets))
    register_builtin_datasets()
    output = ["OUTPUT_DIR", str(tmp_path / "run")]
    return [*TINY_MODEL, *SHORT_RUN, "MODEL.WEIGHTS", str(coco_weights), *output]


@pytest.fixture
def short_cfg(overrides):
    return load_cfg(PROJECT / "configs/cityscapes_ft.yaml", overrides)
