"""Evaluators and the registry that chooses among them."""

from d2ft.evaluation.build import (
    EVALUATOR_REGISTRY,
    build_evaluator,
    build_run_evaluator,
    require_evaluator,
)
from d2ft.evaluation.cityscapes import CityscapesInstanceEvaluator
from d2ft.evaluation.coco import CocoEvaluator
from d2ft.evaluation.kitti import KittiEvaluator
from d2ft.evaluation.pascal_voc import PascalVocEvaluator
from d2ft.evaluation.wider_face import WiderFaceEvaluator

__all__ = [
    "EVALUATOR_REGISTRY",
    "CityscapesInstanceEvaluator",
    "CocoEvaluator",
    "KittiEvaluator",
    "PascalVocEvaluator",
    "WiderFaceEvaluator",
    "build_evaluator",
    "build_run_evaluator",
    "require_evaluator",
]
