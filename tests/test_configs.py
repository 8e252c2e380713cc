from pathlib import Path

import pytest
import yaml
from detectron2.config import get_cfg as get_detectron2_cfg

from d2ft.config import add_d2ft_config, check_cfg, load_cfg
from d2ft.config.defaults import get_value
from d2ft.solver import resolve_schedule
from tests.factories import zoo_config_file

ROOT = Path(__file__).parents[1]
FILES = sorted([*ROOT.glob("configs/**/*.yaml"), *ROOT.glob("projects/**/*.yaml")])
ENTRY_FILES = [path for path in FILES if "_base_" not in path.parts]
# It shows the tutorial's five parts whole, with what it inherits.
SHOWS_ALL = ROOT / "configs" / "cityscapes_ft.yaml"


def name(path):
    return str(path.relative_to(ROOT))


def leaves(tree, prefix=""):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key


@pytest.mark.parametrize("path", FILES, ids=name)
def test_file_loads_and_freezes(path):
    cfg = load_cfg(path)
    cfg.freeze()
    assert cfg.is_frozen()


@pytest.mark.parametrize("path", FILES, ids=name)
def test_file_is_safe_yaml_of_version_2(path):
    assert yaml.safe_load(path.read_text())["VERSION"] == 2


@pytest.mark.parametrize("path", ENTRY_FILES, ids=name)
def test_entry_file_passes_the_check(path):
    check_cfg(load_cfg(path))


@pytest.mark.parametrize("path", ENTRY_FILES, ids=name)
def test_entry_file_begins_with_its_command(path):
    first = path.read_text().splitlines()[0]
    assert first.startswith("# python ")
    assert f"--config-file {name(path)}" in first


# A schedule takes the place of another one, so it says all of its keys.
CHANGES_ONLY = [path for path in FILES if path != SHOWS_ALL and path.parent.name != "schedules"]


@pytest.mark.parametrize("path", CHANGES_ONLY, ids=name)
def test_no_key_equals_what_the_file_inherits(path, tmp_path):
    tree = yaml.safe_load(path.read_text())
    bases = tree.pop("_BASE_", [])
    bases = [bases] if isinstance(bases, str) else bases
    inherited = tmp_path / "inherited.yaml"
    base_tree = {"_BASE_": [str(path.parent / base) for base in bases]} if bases else {}
    inherited.write_text(yaml.safe_dump(base_tree))
    before, after = load_cfg(inherited), load_cfg(path)
    del tree["VERSION"]  # every file says it, so that Detectron2 need not guess
    same = [key for key in leaves(tree) if _value(before, key) == get_value(after, key)]
    assert same == []


def _value(cfg, key):
    try:
        return get_value(cfg, key)
    except KeyError:  # in a group that takes new keys
        return None


@pytest.mark.parametrize("path", FILES, ids=name)
def test_plain_detectron2_reads_the_same(path):
    cfg = get_detectron2_cfg()
    add_d2ft_config(cfg)
    cfg.merge_from_file(str(path), allow_unsafe=False)
    assert cfg == load_cfg(path)


def test_model_base_is_the_model_of_the_zoo():
    theirs = load_cfg(zoo_config_file("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml"))
    ours = load_cfg(ROOT / "configs/_base_/models/mask_rcnn_r50_fpn.yaml")
    theirs.MODEL.WEIGHTS = ours.MODEL.WEIGHTS
    assert ours.MODEL == theirs.MODEL


def test_cityscapes_changes_only_head_settings_of_the_zoo_model():
    theirs = load_cfg(zoo_config_file("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml")).MODEL
    ours = load_cfg(SHOWS_ALL).MODEL
    theirs.WEIGHTS = ours.WEIGHTS
    theirs.ROI_HEADS.NUM_CLASSES = 8
    theirs.ROI_BOX_HEAD.SMOOTH_L1_BETA = 1.0
    assert ours == theirs


def test_cityscapes_schedule_is_the_arithmetic_in_its_comment():
    cfg = load_cfg(SHOWS_ALL)
    (train,) = cfg.DATASETS.TRAIN
    assert cfg.DATASETS.DERIVED[train].REPEAT == 8
    solver = resolve_schedule(cfg, 2965 * 8).SOLVER
    assert (solver.MAX_ITER, solver.STEPS, solver.CHECKPOINT_PERIOD) == (23720, (20755,), 2965)


def test_the_schedule_of_the_paper_takes_the_place_of_the_one_in_epochs():
    cfg = load_cfg(ROOT / "configs/cityscapes_ft_4k.yaml")
    assert resolve_schedule(cfg, 2965 * 8) == resolve_schedule(cfg, 1)
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS) == (4000, (3000,))
