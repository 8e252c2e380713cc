"""Datasets that are known by name, at the places where Detectron2 users keep them."""

import os
from pathlib import Path

from d2ft.data.datasets.cityscapes import register_cityscapes_instances
from d2ft.data.datasets.kitti import register_kitti_instances
from d2ft.data.datasets.pascal_voc import register_voc_instances
from d2ft.data.datasets.wider_face import register_wider_face_instances

_VOC_SPLITS = {
    "2007": ("train", "val", "trainval", "test"),
    "2012": ("train", "val", "trainval"),
}


def register_builtin_datasets(root: str | os.PathLike[str] | None = None) -> None:
    """
    Register d2ft's built-in datasets; nothing is read until one of them is used.

    Names: ``{cityscapes_instance,kitti_2d,wider_face}_{train,val}``, ``voc2007_{train,val,trainval,test}``,
    ``voc2012_{train,val,trainval}``.

    Args:
        root: folder of the datasets; by default ``$DETECTRON2_DATASETS``, else ``datasets``, as
            in Detectron2: https://detectron2.readthedocs.io/tutorials/builtin_datasets.html
    """
    root = Path(root or os.environ.get("DETECTRON2_DATASETS") or "datasets").expanduser()
    cityscapes = root / "cityscapes"
    for split in ("train", "val"):
        register_cityscapes_instances(
            f"cityscapes_instance_{split}",
            cityscapes / "leftImg8bit" / split,
            cityscapes / "gtFine" / split,
        )
        register_kitti_instances(
            f"kitti_2d_{split}", root / "kitti", root / "kitti" / "ImageSets" / f"{split}.txt"
        )
        register_wider_face_instances(
            f"wider_face_{split}",
            root / "widerface" / f"WIDER_{split}" / "images",
            root / "widerface" / "wider_face_split" / f"wider_face_{split}_bbx_gt.txt",
        )
    for year, splits in _VOC_SPLITS.items():
        for split in splits:
            register_voc_instances(f"voc{year}_{split}", root / f"VOC{year}", split, year=int(year))
