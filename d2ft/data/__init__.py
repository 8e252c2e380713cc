"""Datasets, their registration and the loaders."""

from d2ft.data.builtin import register_builtin_datasets
from d2ft.data.catalog import class_names, register_instances
from d2ft.data.datasets.cityscapes import (
    load_cityscapes_instances,
    register_cityscapes_instances,
)
from d2ft.data.loader import build_test_loader, build_train_loader

__all__ = [
    "build_test_loader",
    "build_train_loader",
    "class_names",
    "load_cityscapes_instances",
    "register_builtin_datasets",
    "register_cityscapes_instances",
    "register_instances",
]
