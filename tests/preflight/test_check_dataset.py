import numpy as np
import pytest
from detectron2.structures import BoxMode

from d2ft.config import get_cfg
from d2ft.data import register_instances
from d2ft.errors import UserError
from d2ft.preflight.check_dataset import check_datasets


def _record(*categories):
    annotations = [
        {"bbox": [0, 0, 9, 9], "bbox_mode": BoxMode.XYXY_ABS, "category_id": c, "iscrowd": 0}
        for c in categories
    ]
    return {
        "file_name": "a.png",
        "image_id": 1,
        "height": 9,
        "width": 9,
        "annotations": annotations,
    }


@pytest.fixture
def cfg():
    cfg = get_cfg()
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("train",), ("val",)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 2
    register_instances("train", lambda: [_record(0, 1, 1)], thing_classes=["cat", "dog"])
    register_instances("val", lambda: [_record(1), _record()], thing_classes=["cat", "dog"])
    return cfg


def test_what_was_found_is_counted(cfg):
    found = check_datasets(cfg, eval_only=False)
    counts = {"images": 1, "instances": 3, "classes": ["cat", "dog"]}
    assert found["train"].items() >= counts.items()
    assert found["val"]["images"] == 2


def test_the_number_of_classes_is_compared_with_the_data(cfg):
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 80
    with pytest.raises(
        UserError, match=r"NUM_CLASSES is 80 .*train has 2 classes \(cat, dog\); set"
    ):
        check_datasets(cfg, eval_only=False)


def test_retinanet_has_its_own_key(cfg):
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
    with pytest.raises(UserError, match=r"MODEL.RETINANET.NUM_CLASSES is 80 \(default\)"):
        check_datasets(cfg, eval_only=False)


@pytest.mark.parametrize(
    ("classes", "difference"),
    [
        (["cat", "cow"], "index 1: 'dog' and 'cow'"),
        (["dog", "cat"], "index 0: 'cat' and 'dog'"),
        (["cat"], "index 1: 'dog' and no class"),
    ],
)
def test_train_and_test_classes_that_differ_are_named(cfg, classes, difference):
    register_instances("val", lambda: [_record(0)], thing_classes=classes)
    with pytest.raises(UserError, match=difference):
        check_datasets(cfg, eval_only=False)


def test_a_category_beyond_the_classes_is_named(cfg):
    register_instances("train", lambda: [_record(0, 2)], thing_classes=["cat", "dog"])
    with pytest.raises(UserError, match=r"a.png has an annotation of category_id 2, .* 0 to 1"):
        check_datasets(cfg, eval_only=False)


def test_an_empty_dataset_is_an_error(cfg):
    register_instances("val", list, thing_classes=["cat", "dog"])
    with pytest.raises(UserError, match="dataset 'val' holds no image"):
        check_datasets(cfg, eval_only=False)


def test_nothing_to_train_on_is_an_error(cfg):
    cfg.DATASETS.TRAIN = ()
    with pytest.raises(UserError, match="DATASETS.TRAIN is empty"):
        check_datasets(cfg, eval_only=False)


def test_evaluation_does_not_need_the_training_set(cfg):
    cfg.DATASETS.TRAIN = ("not there",)
    assert list(check_datasets(cfg, eval_only=True)) == ["val"]
    cfg.DATASETS.TEST = ()
    with pytest.raises(UserError, match="nothing to evaluate"):
        check_datasets(cfg, eval_only=True)


def test_an_unknown_dataset_is_named(cfg):
    cfg.DATASETS.TRAIN = ("trian",)
    with pytest.raises(UserError, match=r"'trian' is not registered. Did you mean 'train'\?"):
        check_datasets(cfg, eval_only=False)


def test_a_dataset_whose_files_are_missing_is_named(cfg):
    def read():
        raise FileNotFoundError(2, "No such file or directory", "labels.json")

    register_instances("train", read, thing_classes=["cat", "dog"])
    with pytest.raises(UserError, match="dataset 'train' cannot be loaded: .*labels.json"):
        check_datasets(cfg, eval_only=False)


def test_an_annotation_without_a_category_is_named(cfg):
    record = _record(0)
    del record["annotations"][0]["category_id"]
    register_instances("train", lambda: [record], thing_classes=["cat", "dog"])
    with pytest.raises(UserError, match="a.png has an annotation of category_id None"):
        check_datasets(cfg, eval_only=False)


def test_a_training_set_without_instances_is_an_error(cfg):
    crowd = _record(0)
    crowd["annotations"][0]["iscrowd"] = 1
    register_instances("train", lambda: [_record(), crowd], thing_classes=["cat", "dog"])
    with pytest.raises(UserError, match="none of its 2 images has an instance to learn from"):
        check_datasets(cfg, eval_only=False)


def test_a_mask_model_needs_segmentations(cfg):
    cfg.MODEL.MASK_ON = True
    with pytest.raises(UserError, match="without a segmentation: .* set MODEL.MASK_ON to False"):
        check_datasets(cfg, eval_only=False)


def test_bitmaps_need_the_mask_format_of_bitmaps(cfg):
    cfg.MODEL.MASK_ON = True
    record = _record(0)
    record["annotations"][0]["segmentation"] = {"size": [9, 9], "counts": "a"}
    for name in ("train", "val"):
        register_instances(name, lambda: [record], thing_classes=["cat", "dog"])
    with pytest.raises(UserError, match="is a bitmap: set INPUT.MASK_FORMAT to bitmask"):
        check_datasets(cfg, eval_only=False)
    cfg.INPUT.MASK_FORMAT = "bitmask"
    check_datasets(cfg, eval_only=False)


def test_an_unknown_evaluator_is_refused_before_training(cfg):
    register_instances(
        "val", lambda: [_record(1)], thing_classes=["cat", "dog"], evaluator_type="panoptic"
    )
    with pytest.raises(UserError, match="asks for the evaluator 'panoptic'"):
        check_datasets(cfg, eval_only=False)


def test_a_loader_that_gives_no_list_is_refused(cfg):
    register_instances("train", lambda: iter([_record(0)]), thing_classes=["cat", "dog"])
    with pytest.raises(UserError, match="gives a list_iterator instead of a list"):
        check_datasets(cfg, eval_only=False)


def test_coco_annotations_that_are_missing_are_named(cfg, tmp_path):
    from detectron2.data.datasets import register_coco_instances

    register_coco_instances("coco_like", {}, str(tmp_path / "none.json"), str(tmp_path))
    cfg.DATASETS.TRAIN = ("coco_like",)
    with pytest.raises(UserError, match="'coco_like' cannot be loaded: .*none.json"):
        check_datasets(cfg, eval_only=False)


def test_a_mask_that_is_an_array_is_a_bitmap(cfg):
    def with_array():
        record = _record(0)
        record["annotations"][0]["segmentation"] = np.ones((9, 9), np.uint8)
        return [record]

    for name in ("train", "val"):
        register_instances(name, with_array, thing_classes=["cat", "dog"])
    cfg.MODEL.MASK_ON = True
    cfg.INPUT.MASK_FORMAT = "polygon"
    with pytest.raises(UserError, match="a.png .* is a bitmap: set INPUT.MASK_FORMAT to bitmask"):
        check_datasets(cfg, eval_only=False)
    cfg.INPUT.MASK_FORMAT = "bitmask"
    check_datasets(cfg, eval_only=False)
