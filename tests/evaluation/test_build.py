import pytest
from detectron2.evaluation import DatasetEvaluators

from d2ft.config import get_cfg
from d2ft.data import register_builtin_datasets, register_instances
from d2ft.errors import UserError
from d2ft.evaluation import CocoEvaluator, build_evaluator
from tests.factories import write_cityscapes


def test_an_unknown_evaluator_type_is_answered_with_the_known_ones():
    register_instances("odd", list, thing_classes=["cat"], evaluator_type="panoptic")
    with pytest.raises(
        UserError, match="asks for the evaluator 'panoptic'; known are cityscapes_instance, coco"
    ):
        build_evaluator(get_cfg(), "odd")


def test_cityscapes_gets_its_official_metric_and_coco_style_ones(monkeypatch, tmp_path):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(write_cityscapes(tmp_path)))
    register_builtin_datasets()
    cfg = get_cfg()
    cfg.MODEL.MASK_ON = True
    assert isinstance(build_evaluator(cfg, "cityscapes_instance_val"), DatasetEvaluators)
    cfg.MODEL.MASK_ON = False
    assert type(build_evaluator(cfg, "cityscapes_instance_val")) is CocoEvaluator
