import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from d2ft.config import load_cfg, load_cfg_text
from d2ft.data import class_names, register_derived_datasets, register_instances
from d2ft.data.derived import describe_derived, is_partially_labelled
from d2ft.errors import UserError
from tests.data.test_wrappers import annotation, record

TRAIN = ["DATASETS.TRAIN", "('mine',)"]


@pytest.fixture(autouse=True)
def _sources():
    register_instances("pets", _load_pets, thing_classes=["cat", "dog"])
    register_instances("farm", _load_farm, thing_classes=["dog", "cow"])


def _load_pets():
    return [record(k, [annotation(0), annotation(1, iscrowd=k % 2)], "pets") for k in range(10)]


def _load_farm():
    return [record(k, [annotation(1)] if k else [], "farm") for k in range(4)]


def _register(text, opts=TRAIN):
    cfg = load_cfg_text("DATASETS:\n  DERIVED:\n" + text, "my.yaml", opts)
    register_derived_datasets(cfg)
    return cfg


def test_an_entry_of_every_key_is_worked_off_in_its_order():
    _register(
        """
    mine:
      REPEAT: 8
      BALANCE: 0.5
      SHOTS: 2
      FRACTION: 0.9
      DROP_EMPTY: True
      DROP_CROWD: True
      MIN_BOX_SIZE: 4
      MIN_IMAGE_SIZE: 10
      CLASSES: [animal, cow]
      RENAME: {cat: animal, dog: animal}
      SPLIT: train
      VAL_FRACTION: 0.3
      SEED: 3
      FROM: [pets, farm]
"""
    )
    assert class_names("mine") == ("animal", "cow")
    records = DatasetCatalog.get("mine")
    assert len(records) % 8 == 0
    categories = [a["category_id"] for r in records for a in r["annotations"]]
    assert set(categories) == {0, 1}
    assert all(count % 8 == 0 for count in map(categories.count, (0, 1)))


def test_train_and_val_of_one_set_make_the_whole():
    cfg = _register(
        """
    mine: {FROM: [pets], SPLIT: train, VAL_FRACTION: 0.3, SEED: 1}
    mine_val: {FROM: [pets], SPLIT: val, VAL_FRACTION: 0.3, SEED: 1}
""",
        [*TRAIN, "DATASETS.TEST", "('mine_val',)"],
    )
    parts = [DatasetCatalog.get(name) for name in ("mine", "mine_val")]
    assert [len(part) for part in parts] == [7, 3]
    described = describe_derived(cfg)
    assert described["mine"]["settings"]["mine"]["SEED"] == 1
    images = [image for name in described for image in described[name]["images"]]
    assert sorted(images) == sorted(r["file_name"] for r in _load_pets())


def test_keys_can_be_set_on_the_command_line():
    _register("    mine: {FROM: [pets], REPEAT: 8}", [*TRAIN, "DATASETS.DERIVED.mine.REPEAT", "3"])
    assert len(DatasetCatalog.get("mine")) == 30
    opts = [*TRAIN, "DATASETS.DERIVED.mine.FROM", "['pets', 'farm']"]
    register_derived_datasets(load_cfg(None, opts))
    assert class_names("mine") == ("cat", "dog", "cow")


def test_a_dumped_config_makes_the_same_set():
    cfg = _register("    mine: {FROM: [pets], RENAME: {'cat': 'big cat'}, FRACTION: 0.5}")
    again = load_cfg_text(cfg.dump(), "config.yaml")
    assert again == cfg
    before = DatasetCatalog.get("mine")
    register_derived_datasets(again)
    assert DatasetCatalog.get("mine") == before


def test_derived_sets_may_be_made_of_derived_ones():
    cfg = _register("    mine: {FROM: [some, farm]}\n    some: {FROM: [pets], FRACTION: 0.5}")
    assert len(DatasetCatalog.get("mine")) == 9
    assert is_partially_labelled("mine")
    assert not is_partially_labelled("some")
    assert list(describe_derived(cfg)["mine"]["settings"]) == ["mine", "some"]


def test_a_set_without_chance_is_not_written_down():
    assert describe_derived(_register("    mine: {FROM: [pets], REPEAT: 2}")) == {}


def test_a_set_that_nothing_asks_for_is_checked_but_not_registered():
    _register("    mine: {FROM: [pets]}\n    other: {FROM: [not_there]}")
    assert "other" not in DatasetCatalog


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("3", r"DATASETS.DERIVED.mine \(my.yaml:3\) is 3, not a group of keys"),
        ("{FORM: [pets]}", "no key DATASETS.DERIVED.mine.FORM; did you mean FROM"),
        ("{REPEAT: 2}", "names no source: set DATASETS.DERIVED.mine.FROM"),
        ("{FROM: pets}", r"mine.FROM \(my.yaml:3\) must be a list of dataset names, but is 'pets'"),
        ("{FROM: [pets], REPEAT: 2.5}", "REPEAT .* must be a whole number, but is 2.5"),
        ("{FROM: [pets], REPEAT: 0}", "DATASETS.DERIVED.mine: .* at least once; got 0"),
        ("{FROM: [pets], SPLIT: test, VAL_FRACTION: 0.1}", "must be train or val"),
        ("{FROM: [pets], SPLIT: val}", "needs both SPLIT .* and VAL_FRACTION"),
        ("{FROM: [pest]}", "'pest' is not registered. Did you mean 'pets'"),
        ("{FROM: [pets], CLASSES: [cow]}", "DATASETS.DERIVED.mine: class 'cow' cannot be chosen"),
        ("{FROM: [mine]}", "leads back to where it began: mine -> mine"),
    ],
)
def test_mistakes_in_an_entry_are_named(entry, message):
    with pytest.raises(UserError, match=message):
        _register(f"    mine: {entry}")


def test_the_name_of_another_set_is_not_taken_over():
    with pytest.raises(
        UserError, match="DERIVED.pets has the name of a dataset that is registered"
    ):
        _register("    pets: {FROM: [farm]}", ["DATASETS.TRAIN", "('pets',)"])


def test_a_test_set_does_not_show_images_twice():
    with pytest.raises(
        UserError, match="holds 'mine', which shows images more than once by REPEAT"
    ):
        _register("    mine: {FROM: [pets], REPEAT: 2}", ["DATASETS.TEST", "('mine',)"])


def test_a_set_that_loses_all_its_images_is_an_error():
    _register("    mine: {FROM: [pets], MIN_IMAGE_SIZE: 500}")
    with pytest.raises(UserError, match="DATASETS.DERIVED.mine leaves no image of pets"):
        DatasetCatalog.get("mine")


def test_derived_sets_are_evaluated_coco_style():
    _register("    mine: {FROM: [pets]}")
    assert MetadataCatalog.get("mine").evaluator_type == "coco"
