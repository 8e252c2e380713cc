"""What is asked of all dataset dicts at once, as arrays: N images with R annotations."""

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from detectron2.structures import BoxMode

from d2ft.errors import UserError
from d2ft.structures.mask_window import Array

# Those that can be in pixels without an angle; the second is the one to convert.
_BOX_MODES = (BoxMode.XYXY_ABS, BoxMode.XYWH_ABS)

NO_MASK, POLYGONS, BITMAP = range(3)


@dataclass(frozen=True)
class RecordColumns:
    """
    The columns of dataset dicts; annotations are in the order of their images.

    Attributes:
        file_names: N paths.
        image_ids: N ids; the path where a record has none.
        sizes: (N, 2) float64 height and width in pixels as the records state them, else NaN.
        boxes: (R, 4) float64 x0, y0, x1, y1 in pixels.
        categories: (R,) int64 ``category_id``, -1 where it is no whole number.
        image_of: (R,) int64 index of the image.
        is_crowd: (R,) bool, ``iscrowd``.
        is_ignored: (R,) bool, ``ignore``.
        mask_kind: (R,) uint8, NO_MASK, POLYGONS or BITMAP.
    """

    file_names: list[str]
    image_ids: list[Any]
    sizes: Array
    boxes: Array
    categories: Array
    image_of: Array
    is_crowd: Array
    is_ignored: Array
    mask_kind: Array

    def where(self, keep: Array) -> "RecordColumns":
        """Return the columns of those images for which ``keep``, (N,) bool, is true."""
        rows = keep[self.image_of]
        number = np.cumsum(keep) - 1
        return RecordColumns(
            file_names=[name for name, kept in zip(self.file_names, keep, strict=True) if kept],
            image_ids=[
                image_id for image_id, kept in zip(self.image_ids, keep, strict=True) if kept
            ],
            sizes=self.sizes[keep],
            boxes=self.boxes[rows],
            categories=self.categories[rows],
            image_of=number[self.image_of[rows]],
            is_crowd=self.is_crowd[rows],
            is_ignored=self.is_ignored[rows],
            mask_kind=self.mask_kind[rows],
        )


def join_columns(parts: Sequence[RecordColumns]) -> RecordColumns:
    """Return the columns of the parts, one after the other; there is at least one."""
    if len(parts) == 1:
        return parts[0]
    starts = np.cumsum([0, *(len(part.file_names) for part in parts)])
    arrays = {
        name: np.concatenate([getattr(part, name) for part in parts])
        for name in ("sizes", "boxes", "categories", "is_crowd", "is_ignored", "mask_kind")
    }
    return RecordColumns(
        file_names=[name for part in parts for name in part.file_names],
        image_ids=[image_id for part in parts for image_id in part.image_ids],
        image_of=np.concatenate([p.image_of + s for p, s in zip(parts, starts, strict=False)]),
        **arrays,
    )


def build_columns(records: Iterable[dict[str, Any]]) -> RecordColumns:
    """
    Return the columns of dataset dicts.

    Raises:
        UserError: if a record lacks its file name, or an annotation a box of four numbers.
    """
    # Growing arrays: five million annotations would be as many tuples.
    boxes, sizes = array("d"), array("d")
    modes, crowd, ignored, kinds = array("b"), array("b"), array("b"), array("b")
    categories, image_of = array("q"), array("q")
    file_names: list[str] = []
    image_ids: list[Any] = []
    unknown = float("nan")
    for index, record in enumerate(records):
        file_name = record.get("file_name")
        if not isinstance(file_name, str):
            raise UserError(f"record {index} has no file_name")
        file_names.append(file_name)
        image_ids.append(record.get("image_id", file_name))
        for key in ("height", "width"):
            length = record.get(key)
            sizes.append(unknown if length is None else length)
        for annotation in record.get("annotations", ()):
            try:
                x, y, z, w = map(float, annotation["bbox"])
                modes.append(_BOX_MODES.index(annotation["bbox_mode"]))
            except (KeyError, TypeError, ValueError) as error:
                raise UserError(
                    f"{file_name} has an annotation without a bbox of four numbers in pixels and its "
                    f"bbox_mode ({error!r}): {str(annotation)[:200]}"
                ) from error
            boxes.extend((x, y, z, w))
            category = annotation.get("category_id")
            is_number = isinstance(category, (int, np.integer))
            categories.append(int(category) if is_number else -1)
            image_of.append(index)
            crowd.append(bool(annotation.get("iscrowd", 0)))
            ignored.append(bool(annotation.get("ignore", 0)))
            kinds.append(_mask_kind(annotation.get("segmentation")))
    corners = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    is_xywh = np.array(modes, dtype=bool)
    corners[is_xywh, 2:] += corners[is_xywh, :2]
    return RecordColumns(
        file_names=file_names,
        image_ids=image_ids,
        sizes=np.array(sizes, dtype=np.float64).reshape(-1, 2),
        boxes=corners,
        categories=np.array(categories, dtype=np.int64),
        image_of=np.array(image_of, dtype=np.int64),
        is_crowd=np.array(crowd, dtype=bool),
        is_ignored=np.array(ignored, dtype=bool),
        mask_kind=np.array(kinds, dtype=np.uint8),
    )


def _mask_kind(segmentation: Any) -> int:
    if isinstance(segmentation, dict):
        return BITMAP if segmentation else NO_MASK
    if isinstance(segmentation, np.ndarray):
        return BITMAP
    return POLYGONS if segmentation else NO_MASK
