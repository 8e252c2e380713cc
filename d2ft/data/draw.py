"""Draw the annotations of dataset dicts, or what the training mapper makes of them."""

from collections.abc import Callable
from typing import Any

import numpy as np
from detectron2.data.catalog import Metadata
from detectron2.data.detection_utils import convert_image_to_rgb, read_image
from detectron2.structures import BoxMode
from detectron2.utils.colormap import colormap
from detectron2.utils.visualizer import Visualizer

Picture = np.ndarray[Any, np.dtype[np.uint8]]

_LEFT_OUT = (0.75, 0.75, 0.75)


def draw_annotations(record: dict[str, Any], metadata: Metadata) -> Picture:
    """
    Draw a dataset dict: instances in colour, crowd and ignore regions grey with dashed boxes.

    Args:
        record: in Detectron2's format; its image is read.
        metadata: with ``thing_classes``.

    Returns:
        (H, W, 3) uint8 RGB.

    Raises:
        OSError: or another of :data:`d2ft.preflight.image_files.UNREADABLE`.
    """
    visualizer = Visualizer(read_image(record["file_name"], "RGB"), metadata)
    names = metadata.thing_classes
    annotations = record.get("annotations", [])
    left_out = [a for a in annotations if a.get("iscrowd", 0) or a.get("ignore", 0)]
    instances = [a for a in annotations if a not in left_out]
    with_masks = all(annotation.get("segmentation") for annotation in instances)
    visualizer.overlay_instances(
        boxes=_boxes(instances),
        masks=[a["segmentation"] for a in instances] if instances and with_masks else None,
        labels=[names[a["category_id"]] for a in instances],
        assigned_colors=_colours(len(instances)),
    )
    # A region that is ignored for several classes comes once for each.
    words: dict[tuple[float, ...], str] = {}
    for annotation, box in zip(left_out, _boxes(left_out).tolist(), strict=True):
        crowd = f"{names[annotation['category_id']]} (crowd)"
        words[tuple(box)] = "ignore" if annotation.get("ignore", 0) else crowd
    for place, word in words.items():
        visualizer.draw_box(place, edge_color=_LEFT_OUT, line_style="--")
        visualizer.draw_text(word, place[:2], color=_LEFT_OUT, horizontal_alignment="left")
    return visualizer.get_output().get_image()


def draw_mapped(
    record: dict[str, Any],
    metadata: Metadata,
    mapper: Callable[[dict[str, Any]], Any],
    image_format: str,
) -> Picture:
    """
    Draw what a training mapper makes of a dataset dict: the augmented image and its targets.

    Args:
        record: in Detectron2's format.
        metadata: with ``thing_classes``.
        mapper: of training; draws from the global random generators.
        image_format: INPUT.FORMAT, the order of the channels that the mapper gives.

    Returns:
        (H, W, 3) uint8 RGB.

    Raises:
        OSError: or another of :data:`d2ft.preflight.image_files.UNREADABLE`.
    """
    sample = mapper(record)
    image = sample["image"].permute(1, 2, 0).numpy()
    visualizer = Visualizer(convert_image_to_rgb(image, image_format), metadata)
    targets = sample["instances"]
    masks = targets.gt_masks if targets.has("gt_masks") else None
    visualizer.overlay_instances(
        boxes=targets.gt_boxes,
        masks=getattr(masks, "tensor", masks),  # bitmaps; polygons are taken as they are
        labels=[metadata.thing_classes[category] for category in targets.gt_classes],
        assigned_colors=_colours(len(targets)),
    )
    return visualizer.get_output().get_image()


def _boxes(annotations: list[dict[str, Any]]) -> np.ndarray[Any, np.dtype[np.float64]]:
    boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations]
    return np.array(boxes, dtype=np.float64).reshape(-1, 4)


def _colours(number: int) -> list[Any]:
    # Not Detectron2's random ones: the same data gives the same picture.
    table = colormap(rgb=True, maximum=1)
    return [table[i % len(table)] for i in range(number)]
