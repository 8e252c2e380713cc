"""Datasets, their registration and the loaders."""

from d2ft.host import require_detectron2

require_detectron2()

from d2ft.data.builtin import register_builtin_datasets  # noqa: E402
from d2ft.data.catalog import class_names, register_instances  # noqa: E402
from d2ft.data.datasets.cityscapes import (  # noqa: E402
    load_cityscapes_instances,
    register_cityscapes_instances,
)
from d2ft.data.datasets.coco import load_coco_instances, register_coco_instances  # noqa: E402
from d2ft.data.datasets.kitti import (  # noqa: E402
    load_kitti_instances,
    register_kitti_instances,
    write_kitti_split,
)
from d2ft.data.datasets.pascal_voc import (  # noqa: E402
    load_voc_instances,
    register_voc_instances,
)
from d2ft.data.datasets.wider_face import (  # noqa: E402
    load_wider_face_instances,
    register_wider_face_instances,
)
from d2ft.data.declared import register_declared_datasets, resolve_from_data  # noqa: E402
from d2ft.data.derived import register_derived_datasets  # noqa: E402
from d2ft.data.loader import (  # noqa: E402
    build_test_loader,
    build_train_loader,
    epoch_samples,
    training_records,
)
from d2ft.data.records import check_same_records, describe_columns  # noqa: E402

__all__ = [
    "build_test_loader",
    "build_train_loader",
    "check_same_records",
    "class_names",
    "describe_columns",
    "epoch_samples",
    "load_cityscapes_instances",
    "load_coco_instances",
    "load_kitti_instances",
    "load_voc_instances",
    "load_wider_face_instances",
    "register_builtin_datasets",
    "register_cityscapes_instances",
    "register_coco_instances",
    "register_declared_datasets",
    "register_derived_datasets",
    "register_instances",
    "register_kitti_instances",
    "register_voc_instances",
    "register_wider_face_instances",
    "resolve_from_data",
    "training_records",
    "write_kitti_split",
]
