"""Datasets, their registration and the loaders."""

from d2ft.host import require_detectron2

require_detectron2()

from d2ft.data.builtin import register_builtin_datasets  # noqa: E402
from d2ft.data.catalog import class_names, register_instances  # noqa: E402
from d2ft.data.datasets.cityscapes import (  # noqa: E402
    load_cityscapes_instances,
    register_cityscapes_instances,
)
from d2ft.data.loader import (  # noqa: E402
    build_test_loader,
    build_train_loader,
    epoch_samples,
    training_records,
)
from d2ft.data.records import check_same_records, describe_records  # noqa: E402

__all__ = [
    "build_test_loader",
    "build_train_loader",
    "check_same_records",
    "class_names",
    "describe_records",
    "epoch_samples",
    "load_cityscapes_instances",
    "register_builtin_datasets",
    "register_cityscapes_instances",
    "register_instances",
    "training_records",
]
