"""
Choose the evaluator of a dataset by its ``evaluator_type``.

Result keys, in percent. ``DatasetEvaluators`` asserts that no task comes from two evaluators:

    coco                 bbox, segm (if the model has masks): COCO's 12 numbers: AP, AP50, AP75,
                         AP of small, medium, large: APs, APm, APl; AR@1, AR@10, AR@100, ARs@100,
                         ARm@100, ARl@100; AP-<class>. 100 is TEST.DETECTIONS_PER_IMAGE
    cityscapes_instance  bbox: COCO box AP;  segm: official instance AP;  segm_coco: COCO mask AP
    kitti                bbox: AP (mean of the classes' moderate AP at 40 recalls), AP-<level>,
                         AP-<class>-<level>, and each with -R11 for 11 recalls
    wider_face           bbox: AP (the hard one), AP-easy, AP-medium, AP-hard by the official lists;
                         AP alone over all valid faces without them
    pascal_voc           bbox, segm: AP (0.5 to 0.95), AP50, AP75, AP-<class>, AP50-<class>

The headline metric of a task is always ``AP``.
"""

from collections.abc import Mapping

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators
from fvcore.common.registry import Registry

from d2ft.errors import UserError
from d2ft.evaluation.cityscapes import CityscapesInstanceEvaluator, require_official_classes
from d2ft.evaluation.coco import CocoEvaluator
from d2ft.evaluation.kitti import KittiEvaluator, require_kitti_classes
from d2ft.evaluation.pascal_voc import PascalVocEvaluator
from d2ft.evaluation.predictions import PredictionWriter, predictions_file
from d2ft.evaluation.progress import InferenceProgress
from d2ft.evaluation.wider_face import WiderFaceEvaluator

EVALUATOR_REGISTRY = Registry("EVALUATOR")
EVALUATOR_REGISTRY.__doc__ = """
Builders of evaluators by ``evaluator_type``: a function ``(cfg, dataset_name) ->
DatasetEvaluator`` whose name is the type.
"""


def build_evaluator(cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
    """
    Return the evaluator for ``dataset_name``.

    Raises:
        UserError: as :func:`require_evaluator`.
    """
    return EVALUATOR_REGISTRY.get(require_evaluator(dataset_name))(cfg, dataset_name)


def build_run_evaluator(cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
    """Return :func:`build_evaluator` with what keeps the predictions in OUTPUT_DIR, and a bar."""
    path = predictions_file(cfg.OUTPUT_DIR, dataset_name)
    return DatasetEvaluators(
        [
            InferenceProgress(dataset_name),
            PredictionWriter(dataset_name, path),
            build_evaluator(cfg, dataset_name),
        ]
    )


def require_evaluator(dataset_name: str) -> str:
    """
    Return the ``evaluator_type`` of a dataset, before any prediction is made.

    Raises:
        UserError: if it is not in :data:`EVALUATOR_REGISTRY`, or cannot judge the classes.
    """
    evaluator_type = MetadataCatalog.get(dataset_name).get("evaluator_type", "coco")
    known = sorted(name for name, _ in EVALUATOR_REGISTRY)
    if evaluator_type not in known:
        raise UserError(
            f"dataset {dataset_name!r} asks for the evaluator {evaluator_type!r}; known are "
            f"{', '.join(known)}. Register your own in d2ft.evaluation.EVALUATOR_REGISTRY"
        )
    if evaluator_type == "cityscapes_instance":
        require_official_classes(dataset_name)
    if evaluator_type == "kitti":
        require_kitti_classes(dataset_name)
    return str(evaluator_type)


@EVALUATOR_REGISTRY.register()
def coco(cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
    """COCO-style box and mask AP for any registered dataset."""
    return _coco_style(cfg, dataset_name)


@EVALUATOR_REGISTRY.register()
def cityscapes_instance(cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
    """Official Cityscapes instance AP, with COCO-style box and mask AP beside it."""
    coco_style = _coco_style(cfg, dataset_name, result_names={"segm": "segm_coco"})
    if not cfg.MODEL.MASK_ON:
        return coco_style
    return DatasetEvaluators([CityscapesInstanceEvaluator(dataset_name), coco_style])


@EVALUATOR_REGISTRY.register()
def kitti(cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
    """KITTI's official 2D box AP: easy, moderate, hard."""
    return KittiEvaluator(dataset_name)


@EVALUATOR_REGISTRY.register()
def wider_face(cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
    """WIDER FACE's official box AP: easy, medium, hard."""
    return WiderFaceEvaluator(dataset_name)


@EVALUATOR_REGISTRY.register()
def pascal_voc(cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
    """Pascal VOC's box AP, and mask AP for a model with masks."""
    return PascalVocEvaluator(dataset_name, ("bbox", "segm") if cfg.MODEL.MASK_ON else ("bbox",))


def _coco_style(
    cfg: CfgNode, dataset_name: str, result_names: Mapping[str, str] | None = None
) -> CocoEvaluator:
    limit = cfg.TEST.DETECTIONS_PER_IMAGE
    return CocoEvaluator(
        dataset_name,
        tasks=("bbox", "segm") if cfg.MODEL.MASK_ON else ("bbox",),
        # -1 is no limit to the model; COCO's own is 100.
        max_dets_per_image=limit if limit > 0 else None,
        result_names=result_names,
    )
