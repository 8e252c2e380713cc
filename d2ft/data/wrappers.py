"""
Shape datasets: join, rename, choose, filter, thin out and repeat lists of dataset dicts.

Pure functions of Detectron2's dataset dicts and class names. They return new lists, keep the order
of the images and change no dict that they were given. "Instance" means an annotation that is not
crowd (``iscrowd``) and not ``ignore``.

What depends on chance ranks the images by a hash of the seed with their id and file name, so that
the choice is the same whatever the order or the folder of the files, and a smaller share is a part
of a larger one. Nothing random is drawn.
"""

import hashlib
import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from detectron2.structures import BoxMode

from d2ft.errors import UserError

Record = dict[str, Any]
Records = list[Record]


def is_instance(annotation: dict[str, Any]) -> bool:
    """Tell whether an annotation is one to learn from: neither crowd nor ignore."""
    return not annotation.get("iscrowd", 0) and not annotation.get("ignore", 0)


def repeat(records: Records, times: int) -> Records:
    """
    Return the whole list ``times`` times, as MMDetection's RepeatDataset.

    Raises:
        UserError: if ``times`` is not a whole number of at least 1.
    """
    if type(times) is not int or times < 1:
        raise UserError(
            f"a dataset is repeated a whole number of times, at least once; got {times}"
        )
    return records * times


def balance_factors(records: Records, threshold: float) -> list[int]:
    """
    Return how often each image is to come, so that rare classes are seen more often.

    A class in a share f of the images has the factor max(1, sqrt(threshold / f)), an image the
    largest factor of its classes, rounded up; one without annotations comes once. The rule is
    LVIS' (https://arxiv.org/abs/1908.03195, appendix B.2), the rounding is that of MMDetection's
    ClassBalancedDataset
    (https://github.com/open-mmlab/mmengine/blob/v0.10.7/mmengine/dataset/dataset_wrapper.py);
    Detectron2's RepeatFactorTrainingSampler rounds up or down by chance in every epoch. Both count
    crowd annotations as well.

    Args:
        records: the images.
        threshold: share of the images, in (0, 1], below which a class counts as rare.

    Raises:
        UserError: if ``threshold`` is out of its range.
    """
    _check_share(threshold, "the threshold of a class balance")
    categories = [{a["category_id"] for a in r.get("annotations", ())} for r in records]
    images = Counter(category for present in categories for category in present)
    factors = {c: max(1.0, math.sqrt(threshold / (n / len(records)))) for c, n in images.items()}
    return [math.ceil(max((factors[c] for c in present), default=1.0)) for present in categories]


def balance(records: Records, threshold: float) -> Records:
    """Return each image as often as :func:`balance_factors` says, repetitions side by side."""
    factors = balance_factors(records, threshold)
    return [r for r, times in zip(records, factors, strict=True) for _ in range(times)]


def choose_share(records: Records, fraction: float, seed: int) -> Records:
    """
    Return round(fraction * images) of the images, at least one.

    Args:
        records: the images.
        fraction: in (0, 1].
        seed: any whole number.

    Raises:
        UserError: if ``fraction`` is out of its range.
    """
    _check_share(fraction, "the fraction of a dataset")
    chosen = set(_ranked(records, seed)[: max(1, round(fraction * len(records)))])
    return [record for index, record in enumerate(records) if index in chosen]


def split(records: Records, val_fraction: float, seed: int) -> tuple[Records, Records]:
    """
    Deal the images to a training and a validation part.

    Images of the same id and file name stay together only if they are one entry: split before
    repeating.

    Args:
        records: at least two images.
        val_fraction: the validation part gets round(val_fraction * images), but at least one and
            not all; in (0, 1).
        seed: any whole number; the same for both parts.

    Returns:
        The training part and the validation part.

    Raises:
        UserError: if ``val_fraction`` is out of its range or there is only one image.
    """
    if isinstance(val_fraction, bool) or not 0 < val_fraction < 1:
        raise UserError(f"the validation part is a share between 0 and 1, got {val_fraction}")
    if len(records) < 2:
        raise UserError(f"{len(records)} image cannot be split into training and validation")
    size = min(max(1, round(val_fraction * len(records))), len(records) - 1)
    val = set(_ranked(records, seed)[:size])
    return (
        [record for index, record in enumerate(records) if index not in val],
        [record for index, record in enumerate(records) if index in val],
    )


def choose_shots(records: Records, shots: int, seed: int) -> Records:
    """
    Keep ``shots`` instances of each class, or all where a class has fewer.

    Images are taken in the seeded order; those that give no instance are left out. As in few-shot
    benchmarks (https://github.com/ucbdrive/few-shot-object-detection), what else is in an image
    that was taken loses its label; crowd and ignore regions are kept.

    Raises:
        UserError: if ``shots`` is not a whole number of at least 1.
    """
    if type(shots) is not int or shots < 1:
        raise UserError(f"the shots per class are a whole number of at least 1, got {shots}")
    taken: Counter[int] = Counter()
    chosen: dict[int, Record] = {}
    for index in _ranked(records, seed):
        kept, useful = [], False
        for annotation in records[index].get("annotations", ()):
            if is_instance(annotation):
                if taken[annotation["category_id"]] >= shots:
                    continue
                taken[annotation["category_id"]] += 1
                useful = True
            kept.append(annotation)
        if useful:
            chosen[index] = {**records[index], "annotations": kept}
    return [chosen[index] for index in sorted(chosen)]


def drop_crowd(records: Records) -> Records:
    """Take the annotations that are crowd or ignore out; every image stays."""
    return _filter_annotations(records, is_instance)


def drop_small_boxes(records: Records, min_size: float) -> Records:
    """Take instances out whose box is narrower or lower than ``min_size`` pixels."""

    def is_large(annotation: dict[str, Any]) -> bool:
        if not is_instance(annotation):
            return True
        box = BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)
        return min(box[2] - box[0], box[3] - box[1]) >= min_size

    return _filter_annotations(records, is_large)


def drop_small_images(records: Records, min_size: int) -> Records:
    """Take images out that are narrower or lower than ``min_size`` pixels."""
    return [record for record in records if min(record["width"], record["height"]) >= min_size]


def drop_empty(records: Records) -> Records:
    """Take images without any instance out."""
    return [r for r in records if any(map(is_instance, r.get("annotations", ())))]


def _filter_annotations(records: Records, keep: Callable[[dict[str, Any]], bool]) -> Records:
    return [
        {**r, "annotations": [a for a in r["annotations"] if keep(a)]} if "annotations" in r else r
        for r in records
    ]


def _check_share(share: float, what: str) -> None:
    if isinstance(share, bool) or not 0 < share <= 1:
        raise UserError(f"{what} is above 0 and at most 1, got {share}")


def _ranked(records: Sequence[Record], seed: int) -> list[int]:
    """Return the indices in an order that the seed and the names of the images decide."""

    def rank(index: int) -> tuple[bytes, str, int]:
        record = records[index]
        file_name = record.get("file_name", "")
        name = f"{seed}\0{record.get('image_id', '')}\0{os.path.basename(file_name)}"
        # The whole name tells images of different folders apart; the index, repetitions.
        return hashlib.sha256(name.encode()).digest(), file_name, index

    return sorted(range(len(records)), key=rank)
