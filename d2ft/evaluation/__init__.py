"""Evaluators and the registry that chooses among them."""

from d2ft.evaluation.build import EVALUATOR_REGISTRY, build_evaluator, require_evaluator
from d2ft.evaluation.cityscapes import CityscapesInstanceEvaluator
from d2ft.evaluation.coco import CocoEvaluator

__all__ = [
    "EVALUATOR_REGISTRY",
    "CityscapesInstanceEvaluator",
    "CocoEvaluator",
    "build_evaluator",
    "require_evaluator",
]
