"""
Ground truth and predictions of many images, without pixels: what an evaluator reads.

Predictions are made by damaging the ground truth, so that every metric has something to count:
shifted, of another class, twice, missing, invented, with equal scores. Both are in the forms of
https://cocodataset.org/#format-data and #format-results.
"""

from typing import Any

import numpy as np
import pycocotools.mask as mask_util

IMAGE_SIZE = (480, 640)  # (height, width)


def make_scored_scenes(
    num_images: int,
    *,
    seed: int,
    num_classes: int = 80,
    objects: tuple[int, int] = (0, 14),
    false_positives: int = 6,
    masks: bool = True,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """
    Return a COCO dataset and predictions on it, the same for the same arguments.

    One object in twenty is a crowd, one image in ten has no objects, and scores have two digits,
    so that many are equal.

    Args:
        num_images: images, of 640x480, with the ids 1 to ``num_images``.
        seed: of NumPy's generator.
        num_classes: categories, with the ids 1 to ``num_classes``.
        objects: smallest and largest number of objects in an image.
        false_positives: largest number of invented predictions in an image.
        masks: give both an elliptic mask as a run-length code.

    Returns:
        ``{"images", "annotations", "categories"}`` and the list of results.
    """
    generator = np.random.default_rng(seed)
    dataset: dict[str, Any] = {
        "info": {},
        "images": [
            {"id": i, "file_name": f"{i}.jpg", "height": IMAGE_SIZE[0], "width": IMAGE_SIZE[1]}
            for i in range(1, num_images + 1)
        ],
        "annotations": [],
        "categories": [{"id": i, "name": f"class {i}"} for i in range(1, num_classes + 1)],
    }
    results: list[dict[str, Any]] = []
    for image in dataset["images"]:
        count = int(generator.integers(objects[0], objects[1] + 1))
        truth = [] if generator.random() < 0.1 else _draw_boxes(generator, count)
        for box in truth:
            category = int(generator.integers(1, num_classes + 1))
            annotation = {
                "id": len(dataset["annotations"]) + 1,
                "image_id": image["id"],
                "category_id": category,
                "bbox": box,
                "area": box[2] * box[3],
                "iscrowd": int(generator.random() < 0.05),
            }
            if masks:
                annotation["segmentation"] = _ellipse(box)
                annotation["area"] = float(mask_util.area(annotation["segmentation"]))
            dataset["annotations"].append(annotation)
            # Sometimes missed, mostly found once, sometimes twice.
            for _ in range(int(generator.choice([0, 1, 1, 1, 2]))):
                found = category
                if generator.random() < 0.1:
                    found = int(generator.integers(1, num_classes + 1))
                results.append(_result(image["id"], found, _shift(generator, box), generator))
        for box in _draw_boxes(generator, int(generator.integers(0, false_positives + 1))):
            category = int(generator.integers(1, num_classes + 1))
            results.append(_result(image["id"], category, box, generator))
    if masks:
        for result in results:
            result["segmentation"] = _ellipse(result["bbox"])
    return dataset, results


def _draw_boxes(generator: np.random.Generator, count: int) -> list[list[float]]:
    """Return XYWH boxes inside the image, from a few pixels to most of it."""
    height, width = IMAGE_SIZE
    sizes = np.exp(generator.uniform(np.log(4), np.log(400), (count, 2)))
    corners = generator.random((count, 2)) * np.maximum([width, height] - sizes, 1)
    sizes = np.minimum(sizes, [width, height] - corners)
    return [[float(v) for v in row] for row in np.hstack([corners, sizes]).round(2)]


def _shift(generator: np.random.Generator, box: list[float]) -> list[float]:
    height, width = IMAGE_SIZE
    x0, y0, w, h = box
    spread = float(generator.choice([0.0, 0.03, 0.1, 0.3]))
    dx0, dy0, dx1, dy1 = generator.normal(0, spread, 4)
    left = float(np.clip(x0 + dx0 * w, 0, width - 1))
    top = float(np.clip(y0 + dy0 * h, 0, height - 1))
    right = float(np.clip(x0 + w + dx1 * w, left + 1, width))
    bottom = float(np.clip(y0 + h + dy1 * h, top + 1, height))
    return [round(v, 2) for v in (left, top, right - left, bottom - top)]


def _result(
    image_id: int, category: int, box: list[float], generator: np.random.Generator
) -> dict[str, Any]:
    return {
        "image_id": image_id,
        "category_id": category,
        "bbox": box,
        "score": round(float(generator.random()), 2),
    }


def _ellipse(box: list[float]) -> dict[str, Any]:
    """Return the mask of the ellipse in a box as a compressed run-length code."""
    height, width = IMAGE_SIZE
    x, y, w, h = box
    angles = np.linspace(0, 2 * np.pi, 12, endpoint=False)
    polygon = np.stack(
        [x + w / 2 + w / 2 * np.cos(angles), y + h / 2 + h / 2 * np.sin(angles)], axis=1
    )
    code = mask_util.frPyObjects([polygon.ravel().tolist()], height, width)[0]
    return {"size": code["size"], "counts": code["counts"].decode()}
