import json
import pickle
from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from d2ft.config import load_cfg, load_cfg_text, who_set
from d2ft.data import (
    class_names,
    register_builtin_datasets,
    register_declared_datasets,
    resolve_from_data,
)
from d2ft.errors import UserError
from tests.factories import PROJECT, write_cityscapes, write_coco

COCO = "{FORMAT: coco, JSON: data/train.json, IMAGES: data/images}"
TRAIN = ["DATASETS.TRAIN", "('mine',)", "DATASETS.TEST", "()"]


@pytest.fixture(autouse=True)
def _data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_coco(tmp_path / "data")


def _register(entry, opts=TRAIN):
    cfg = load_cfg_text(f"DATASETS:\n  CUSTOM:\n    mine: {entry}", "my.yaml", opts)
    register_declared_datasets(cfg)
    return cfg


def _with_config(opts=()):
    cfg = load_cfg(PROJECT / "configs/custom_ft.yaml", opts)
    register_declared_datasets(cfg)
    return resolve_from_data(cfg)


def _rewrite(change):
    path = Path("data/train.json")
    content = json.loads(path.read_text())
    for annotation in content["annotations"]:
        change(annotation)
    path.write_text(json.dumps(content))


def test_a_set_in_yaml_is_registered_with_its_classes_and_paths_from_the_working_directory(
    tmp_path, monkeypatch
):
    _register(COCO)
    assert class_names("mine") == ("cat", "dog")
    assert MetadataCatalog.get("mine").evaluator_type == "coco"
    monkeypatch.chdir("/")
    records = DatasetCatalog.get("mine")
    assert {record["file_name"] for record in records} == {
        str(path) for path in (tmp_path / "data/images").iterdir() if "train" in path.name
    }


def test_the_command_line_changes_an_entry_and_adds_one(tmp_path):
    (tmp_path / "data").rename(tmp_path / "moved")
    key = "DATASETS.CUSTOM.mine"
    moved = [f"{key}.JSON", "moved/train.json", f"{key}.IMAGES", "moved/images"]
    _register(COCO, [*TRAIN, *moved])
    assert len(DatasetCatalog.get("mine")) == 4
    register_declared_datasets(load_cfg(None, [*TRAIN, f"{key}.FORMAT", "coco", *moved]))


def test_registering_again_replaces_and_only_sets_in_use_are_read():
    cfg = _register(COCO)
    register_declared_datasets(pickle.loads(pickle.dumps(cfg)))
    unused = "DATASETS.CUSTOM.unused"
    opts = [f"{unused}.FORMAT", "coco", f"{unused}.JSON", "no.json", f"{unused}.IMAGES", "no"]
    _register(COCO, [*TRAIN, *opts])
    assert "unused" not in DatasetCatalog


def test_derived_sets_may_be_made_of_custom_ones():
    key = "DATASETS.DERIVED.half"
    opts = [f"{key}.FROM", "['mine']", f"{key}.FRACTION", "0.5", "DATASETS.TRAIN", "('half',)"]
    cfg = _register(COCO, [*opts, "DATASETS.TEST", "()"])
    assert len(DatasetCatalog.get("half")) == 2
    assert resolve_from_data(cfg).MODEL.ROI_HEADS.NUM_CLASSES == 2


def test_the_format_decides_the_evaluator(tmp_path):
    write_cityscapes(tmp_path)
    _register(
        "{FORMAT: cityscapes, IMAGES: cityscapes/leftImg8bit/val, LABELS: cityscapes/gtFine/val}"
    )
    assert MetadataCatalog.get("mine").evaluator_type == "cityscapes_instance"
    assert len(DatasetCatalog.get("mine")) == 2


@pytest.mark.parametrize(
    ("classes", "evaluator_type"),
    [("[Car]", "kitti"), ("[Tram, Car]", "kitti"), ("[Tram]", "coco")],
)
def test_the_official_ap_of_kitti_judges_its_own_classes_alone(classes, evaluator_type):
    _register(f"{{FORMAT: kitti, ROOT: data, CLASSES: {classes}}}")
    assert MetadataCatalog.get("mine").evaluator_type == evaluator_type


def test_faces_are_judged_by_the_official_lists_where_the_entry_has_them():
    faces = "FORMAT: wider_face, IMAGES: data, ANNOTATIONS: data/train.json"
    _register(f"{{{faces}, GROUND_TRUTH: data}}")
    assert MetadataCatalog.get("mine").evaluator_type == "wider_face"
    assert MetadataCatalog.get("mine").ground_truth_dir == str(Path("data").absolute())
    with pytest.raises(UserError, match="GROUND_TRUTH .*there is no folder nowhere"):
        _register(f"{{{faces}, GROUND_TRUTH: nowhere}}")


def test_voc_takes_its_classes_from_the_entry_or_the_files(tmp_path):
    root = tmp_path / "VOC"
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (root / folder).mkdir(parents=True)
    (root / "ImageSets/Main/2007.txt").write_text("one\n")
    (root / "JPEGImages/one.png").write_bytes((tmp_path / "data/images/val_0.png").read_bytes())
    box = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>"
    (root / "Annotations/one.xml").write_text(
        f"<annotation><object><name>dog</name>{box}</object></annotation>"
    )
    cfg = _register("{FORMAT: voc, ROOT: VOC, SPLIT: 2007, CLASSES: [cat, dog]}")
    assert [a["category_id"] for a in DatasetCatalog.get("mine")[0]["annotations"]] == [1]
    assert resolve_from_data(cfg).MODEL.ROI_HEADS.NUM_CLASSES == 2
    cfg = _register("{FORMAT: voc, ROOT: VOC, SPLIT: 2007}")
    assert class_names("mine") == ("dog",)
    assert resolve_from_data(cfg).MODEL.ROI_HEADS.NUM_CLASSES == 1


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("3", r"CUSTOM.mine \(my.yaml:3\) is 3, not a group of keys"),
        ("{JSON: data/train.json}", r"CUSTOM.mine has no FORMAT; known are .*coco"),
        ("{FORMAT: coc}", r"CUSTOM.mine.FORMAT \(my.yaml:3\) is 'coc'; did you mean coco\?"),
        ("{FORMAT: yolo9}", "is 'yolo9'; known are .*coco.*kitti"),
        ("{FORMAT: [coco]}", r"FORMAT .* is \['coco'\]; did you mean coco"),
        ("{FORMAT: coco, JSON: data/train.json}", r"mine \(my.yaml:3\) lacks IMAGES: FORMAT coco"),
        (
            "{FORMAT: coco, JSON: data/train.json, IMAGE: data/images}",
            r"no key DATASETS.CUSTOM.mine.IMAGE \(my.yaml:3\) with FORMAT coco; did you mean IMAGES",
        ),
        ("{FORMAT: coco, JSON: {a: 1}, IMAGES: x}", "mine.JSON must be a path, but is"),
        ("{FORMAT: kitti, ROOT: data, CLASSES: Car}", "CLASSES .* must be a list of class names"),
        (
            "{FORMAT: coco, JSON: data/trian.json, IMAGES: data/images}",
            r"mine.JSON \(my.yaml:3\): there is no file data/trian.json, which is /.*trian.json",
        ),
        (
            "{FORMAT: coco, JSON: data/train.json, IMAGES: data/train.json}",
            "there is no folder data/train.json",
        ),
        ("{FORMAT: kitti, ROOT: data, CLASSES: [Car, Car]}", "CUSTOM.mine: .*'Car' twice"),
    ],
)
def test_a_wrong_entry_is_answered_with_its_place_and_what_would_do(entry, message):
    with pytest.raises(UserError, match=message):
        _register(entry)


def test_names_that_are_no_names_are_refused():
    with pytest.raises(UserError, match="my.yaml:3: YAML reads the key as 2007; put it in quotes"):
        load_cfg_text(f"DATASETS:\n  CUSTOM:\n    2007: {COCO}", "my.yaml")
    cfg = load_cfg_text(f"DATASETS:\n  CUSTOM:\n    a.b: {COCO}", "my.yaml")
    with pytest.raises(UserError, match="holds the name 'a.b': a name is a string .*without dots"):
        register_declared_datasets(cfg)
    cfg = _register(COCO)
    cfg.DATASETS.CUSTOM[7] = cfg.DATASETS.CUSTOM.mine
    with pytest.raises(UserError, match="holds the name 7: a name is a string"):
        register_declared_datasets(cfg)
    register_builtin_datasets()
    taken = load_cfg_text(
        f"DATASETS:\n  CUSTOM:\n    cityscapes_instance_val: {COCO}", "my.yaml",
        ["DATASETS.TEST", "('cityscapes_instance_val',)"],
    )  # fmt: skip
    with pytest.raises(
        UserError, match="cityscapes_instance_val has the name of a dataset that is"
    ):
        register_declared_datasets(taken)


def test_the_model_follows_from_the_data_and_says_so(caplog):
    with caplog.at_level("INFO", logger="d2ft"):
        cfg = _with_config()
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 2
    assert (cfg.MODEL.MASK_ON, cfg.INPUT.MASK_FORMAT) == (True, "polygon")
    assert who_set(cfg, "MODEL.ROI_HEADS.NUM_CLASSES") == "the data of my_train"
    said = [r.getMessage() for r in caplog.records if r.name == "d2ft.data.declared"]
    assert said == [
        "MODEL.ROI_HEADS.NUM_CLASSES is 2, not 80 (default), after my_train: its classes are cat, dog"
    ]
    caplog.clear()
    with caplog.at_level("INFO", logger="d2ft"):
        assert resolve_from_data(cfg) == cfg
    assert "after my_train" not in caplog.text


def test_data_without_masks_trains_boxes_alone(caplog):
    _rewrite(lambda annotation: annotation.pop("segmentation"))
    with caplog.at_level("INFO", logger="d2ft"):
        cfg = _with_config()
    assert not cfg.MODEL.MASK_ON
    assert "MODEL.MASK_ON is False, not True" in caplog.text
    assert "none of its annotations has a mask" in caplog.text


def test_bitmaps_need_the_format_of_bitmaps():
    rle = {"size": [64, 96], "counts": [96, 640, 5408]}
    _rewrite(lambda annotation: annotation.update(segmentation=rle))
    assert _with_config().INPUT.MASK_FORMAT == "bitmask"


def test_what_the_user_set_is_kept(tmp_path):
    key = "MODEL.ROI_HEADS.NUM_CLASSES"
    assert _with_config([key, "80"]).MODEL.ROI_HEADS.NUM_CLASSES == 80
    path = tmp_path / "mine.yaml"
    path.write_text(
        f"_BASE_: {PROJECT}/configs/custom_ft.yaml\nINPUT: {{MASK_FORMAT: bitmask}}\n"
        "MODEL: {ROI_HEADS: {NUM_CLASSES: 7}}"
    )
    cfg = load_cfg(path)
    register_declared_datasets(cfg)
    resolved = resolve_from_data(cfg)
    assert (resolved.MODEL.ROI_HEADS.NUM_CLASSES, resolved.INPUT.MASK_FORMAT) == (7, "bitmask")
    cfg = load_cfg(PROJECT / "configs/custom_ft.yaml")
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 5
    assert resolve_from_data(cfg).MODEL.ROI_HEADS.NUM_CLASSES == 5


def test_what_a_base_set_is_replaced(tmp_path):
    (tmp_path / "_base_").mkdir()
    (tmp_path / "_base_/model.yaml").write_text(
        "MODEL: {MASK_ON: False, ROI_HEADS: {NUM_CLASSES: 9}}"
    )
    (tmp_path / "mine.yaml").write_text(
        f"_BASE_: [{PROJECT}/configs/custom_ft.yaml, _base_/model.yaml]"
    )
    cfg = load_cfg(tmp_path / "mine.yaml")
    register_declared_datasets(cfg)
    resolved = resolve_from_data(cfg)
    assert resolved.MODEL.ROI_HEADS.NUM_CLASSES == 2
    assert not resolved.MODEL.MASK_ON  # a model without a mask head was chosen


def test_an_evaluation_asks_its_test_set_and_needs_no_training_set():
    Path("data/train.json").unlink()
    cfg = load_cfg(PROJECT / "configs/custom_ft.yaml")
    register_declared_datasets(cfg, cfg.DATASETS.TEST)
    assert resolve_from_data(cfg, eval_only=True).MODEL.ROI_HEADS.NUM_CLASSES == 2
    with pytest.raises(UserError, match="my_train.JSON .*there is no file data/train.json"):
        register_declared_datasets(cfg)


def test_other_training_sets_leave_the_config_alone(tmp_path):
    cfg = load_cfg(PROJECT / "configs/cityscapes_ft.yaml")
    assert resolve_from_data(cfg) is cfg
