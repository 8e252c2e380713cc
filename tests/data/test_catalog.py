import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from d2ft.data import class_names, register_builtin_datasets, register_instances
from d2ft.data.catalog import require_registered, unregister
from d2ft.errors import UserError


def _no_records():
    return []


def test_registering_twice_replaces_the_first_entry():
    register_instances("my_set", _no_records, thing_classes=["cat"])
    register_instances("my_set", lambda: [{}], thing_classes=["cat", "dog"])
    assert DatasetCatalog.get("my_set") == [{}]
    assert class_names("my_set") == ("cat", "dog")


def test_a_name_of_detectron2_is_not_taken_over():
    with pytest.raises(UserError, match="'coco_2017_train' is already registered by Detectron2"):
        register_instances("coco_2017_train", _no_records, thing_classes=["cat"])


def test_unregistering_leaves_the_names_of_others_alone():
    unregister("coco_2017_train")
    assert "coco_2017_train" in DatasetCatalog


def test_a_class_that_comes_twice_is_named():
    with pytest.raises(UserError, match="'cat' twice"):
        register_instances("my_set", _no_records, thing_classes=["cat", "dog", "cat"])


@pytest.mark.parametrize("classes", ["cat", [1, 2]])
def test_class_names_that_are_not_a_list_of_strings_are_refused(classes):
    with pytest.raises(UserError, match="thing_classes is a list of class names"):
        register_instances("my_set", _no_records, thing_classes=classes)


def test_an_empty_list_of_classes_is_refused():
    with pytest.raises(UserError, match="thing_classes is empty"):
        register_instances("my_set", _no_records, thing_classes=[])


def test_a_name_that_is_not_a_string_is_refused():
    with pytest.raises(UserError, match="a dataset name is a string that is not empty, got 3"):
        register_instances(3, _no_records, thing_classes=["cat"])


def test_a_mistyped_name_is_answered_with_the_nearest_and_makes_no_entry():
    register_builtin_datasets()
    with pytest.raises(UserError, match="Did you mean 'cityscapes_instance_train'"):
        require_registered("cityscape_instance_train")
    assert "cityscape_instance_train" not in MetadataCatalog.list()


def test_detectron2s_name_of_cityscapes_is_answered_with_ours():
    register_builtin_datasets()
    with pytest.raises(UserError, match="use 'cityscapes_instance_train'"):
        require_registered("cityscapes_fine_instance_seg_train")


def test_a_dataset_without_class_names_is_refused():
    DatasetCatalog.register("bare", _no_records)
    with pytest.raises(UserError, match="'bare' has no class names"):
        class_names("bare")


def test_builtin_names_follow_the_datasets_folder_of_detectron2(monkeypatch, tmp_path):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    register_builtin_datasets()
    metadata = MetadataCatalog.get("cityscapes_instance_val")
    assert metadata.gt_dir == str(tmp_path / "cityscapes" / "gtFine" / "val")
    assert metadata.evaluator_type == "cityscapes_instance"
