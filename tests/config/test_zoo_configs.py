"""Configs of Detectron2's zoo as bases."""

import pytest
from detectron2.config import get_cfg as get_detectron2_cfg

from d2ft.checkpoint.zoo import source_classes
from d2ft.config import load_cfg, who_set
from d2ft.config.zoo_configs import zoo_root
from d2ft.errors import UserError
from d2ft.labels import COCO_CLASSES
from d2ft.solver import resolve_schedule

ROOT = zoo_root()
NAMES = [] if ROOT is None else sorted(p.relative_to(ROOT).as_posix() for p in ROOT.rglob("*.yaml"))
COCO = [n for n in NAMES if n.startswith(("COCO-Detection/", "COCO-InstanceSegmentation/"))]
# In the zoo's folder, but never published.
COCO = [n for n in COCO if not n.endswith("_giou.yaml")]

pytestmark = pytest.mark.skipif(ROOT is None, reason="this Detectron2 ships no configs")


@pytest.fixture
def write(tmp_path):
    def write(base, text=""):
        path = tmp_path / "mine.yaml"
        path.write_text(f"_BASE_: {base}\n{text}VERSION: 2\n")
        return path

    return write


@pytest.mark.parametrize("name", COCO)
def test_every_model_of_the_zoo_is_a_base_in_one_line(write, name):
    cfg = load_cfg(write(f"zoo://{name}", "MODEL: {ROI_HEADS: {NUM_CLASSES: 8}}\n"))
    theirs = get_detectron2_cfg()
    theirs.merge_from_file(str(ROOT / name), allow_unsafe=True)
    assert cfg.MODEL.WEIGHTS != theirs.MODEL.WEIGHTS, "the trained ones, not ImageNet's"
    assert source_classes(cfg.MODEL.WEIGHTS) == COCO_CLASSES
    theirs.MODEL.WEIGHTS, theirs.MODEL.ROI_HEADS.NUM_CLASSES = cfg.MODEL.WEIGHTS, 8
    assert {key: cfg.MODEL[key] for key in theirs.MODEL} == dict(theirs.MODEL)


def test_weights_that_the_file_sets_win(write):
    name = "COCO-InstanceSegmentation/mask_rcnn_R_101_FPN_3x.yaml"
    cfg = load_cfg(write(f"[zoo://{name}]", "MODEL: {WEIGHTS: mine.pth}\n"))
    assert cfg.MODEL.WEIGHTS == "mine.pth"
    assert who_set(cfg, "MODEL.RESNETS.DEPTH").startswith(f"zoo://{name}:")


def test_a_base_of_the_zoo_that_was_never_trained_keeps_its_weights(write):
    cfg = load_cfg(write("zoo://Cityscapes/mask_rcnn_R_50_FPN.yaml"))
    theirs = load_cfg(write("zoo://COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x_giou.yaml"))
    assert "Cityscapes" in cfg.MODEL.WEIGHTS
    assert theirs.MODEL.WEIGHTS == "detectron2://ImageNetPretrained/MSRA/R-50.pkl"


def test_epochs_take_the_place_of_the_schedule_of_the_zoo(write):
    name = "COCO-Detection/retinanet_R_50_FPN_3x.yaml"
    cfg = load_cfg(write(f"zoo://{name}", "SOLVER: {EPOCHS: 2, STEPS_EPOCHS: [1]}\n"))
    resolved = resolve_schedule(cfg, 160)
    assert (resolved.SOLVER.MAX_ITER, resolved.SOLVER.STEPS) == (20, (10,))


def test_a_name_that_is_not_in_the_zoo_is_refused_with_the_nearest(write):
    path = write("zoo://COCO-InstanceSegmentation/mask_rcnn_R101_FPN_3x.yaml")
    with pytest.raises(UserError, match=r"mine.yaml:1: .* did you mean .*mask_rcnn_R_101_FPN_3x"):
        load_cfg(path)


def test_other_code_stays_refused_even_beside_the_zoo(write):
    path = write("zoo://Base-RetinaNet.yaml", "OUTPUT_DIR: !!python/object/apply:eval ['1']\n")
    with pytest.raises(UserError, match=r"mine.yaml:2: .*runs no code"):
        load_cfg(path)
