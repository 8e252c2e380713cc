"""
Find what is wrong in the annotations of datasets: plain functions of arrays.

Shape shorthand in this module:

    N: number of images    R: number of annotations    K: number of classes
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

# Coordinates are written with few digits, so that much past the edge is rounding.
_EDGE_TOLERANCE = 1.0  # pixels
# LVIS calls a class in fewer than 10 training images rare: https://arxiv.org/abs/1908.03195
_RARE = 10
_NAMED_EXAMPLES = 3

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Finding:
    """
    Something about a dataset that its owner should know.

    Attributes:
        level: "error" stops a run or makes its figures wrong, "warning" costs accuracy or hints
            at a mistake, "note" is for information.
        code: names the kind, such as "file-missing".
        dataset: its name, or two of them with " / " between.
        message: what and where, with a few examples.
        fix: what to do.
    """

    level: str
    code: str
    dataset: str
    message: str
    fix: str


@dataclass(frozen=True)
class DatasetTable:
    """
    The annotations of a dataset as arrays.

    Attributes:
        name: of the dataset.
        classes: K names in the order of ``categories``.
        is_test: whether the dataset is evaluated, where an image must come once.
        file_names: N paths.
        image_ids: N ids.
        sizes: (N, 2) height and width in pixels as the records state them, NaN where they do not.
        boxes: (R, 4) x0, y0, x1, y1 in pixels.
        categories: (R,) index into ``classes``; may be out of range.
        image_of: (R,) index of the image.
        is_target: (R,) False for crowd and ignore regions, which are never learned.
    """

    name: str
    classes: tuple[str, ...]
    is_test: bool
    file_names: list[str]
    image_ids: list[Any]
    sizes: Array
    boxes: Array
    categories: Array
    image_of: Array
    is_target: Array

    def counts(self) -> Array:
        """Return (K,) the number of instances of each class, without crowd and ignore regions."""
        own = self.categories[self.is_target]
        known = np.isin(own, np.arange(len(self.classes)))
        return np.bincount(own[known], minlength=len(self.classes))


def named(items: Iterable[str]) -> str:
    """Return a few of the items, and how many are left out."""
    items = list(items)
    more = len(items) - _NAMED_EXAMPLES
    shown = ", ".join(items[:_NAMED_EXAMPLES])
    return f"{shown} and {more} more" if more > 0 else shown


def find_bad_boxes(table: DatasetTable) -> list[Finding]:
    """Find boxes that are not numbers, have no area, or leave their image."""
    boxes = table.boxes
    finite = np.asarray(np.isfinite(boxes).all(axis=1))
    x0, y0, x1, y1 = np.where(finite[:, None], boxes, 0.0).T
    height, width = table.sizes[table.image_of].T
    inverted = finite & ((x1 < x0) | (y1 < y0))
    flat = finite & ~inverted & ((x1 == x0) | (y1 == y0))
    solid = finite & ~inverted & ~flat
    # A comparison with NaN, a size that is not known, is False.
    outside = solid & ((x1 <= 0) | (y1 <= 0) | (x0 >= width) | (y0 >= height))
    over = np.maximum.reduce([-x0, -y0, x1 - width, y1 - height])
    beyond = solid & ~outside & (over > _EDGE_TOLERANCE)
    found = (
        ("error", "box-not-finite", ~finite, "have a coordinate that is not a finite number",
         "correct or remove them: one makes the loss NaN"),
        ("error", "box-inverted", inverted, "end before they begin",
         "correct them; a width or height below 0 often means that XYXY was read as XYWH or "
         "the other way round (bbox_mode)"),
        ("warning", "box-flat", flat, "have no area",
         "correct or remove them; training drops them"),
        ("warning", "box-outside", outside, "lie outside of their image",
         "correct or remove them; training drops them"),
        ("warning", "box-beyond-edge", beyond,
         f"reach more than {_EDGE_TOLERANCE:.0f} pixel past the edge of their image",
         "clip them in the annotations, because evaluation counts them as they are; if many do, "
         "the bbox_mode or the image sizes are wrong"),
    )  # fmt: skip
    return [
        Finding(
            level,
            code,
            table.name,
            f"{_count(which.sum(), 'box', 'boxes')} of {len(boxes)} {what}: "
            f"{named(_describe_box(table, row) for row in np.flatnonzero(which))}",
            fix,
        )
        for level, code, which, what, fix in found
        if which.any()
    ]


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def _describe_box(table: DatasetTable, row: np.intp) -> str:
    coordinates = ", ".join(f"{value:.6g}" for value in table.boxes[row])
    return f"({coordinates}) in {table.file_names[table.image_of[row]]}"


def find_bad_classes(table: DatasetTable) -> list[Finding]:
    """Find class numbers out of range, classes without an instance, and rare ones."""
    found = []
    known = (table.categories >= 0) & (table.categories < len(table.classes))
    if not known.all():
        numbers = sorted({int(number) for number in table.categories[~known]})
        files = (table.file_names[i] for i in np.unique(table.image_of[~known]))
        found.append(
            Finding(
                "error",
                "class-unknown",
                table.name,
                f"{_count((~known).sum(), 'annotation has', 'annotations have')} the category_id "
                f"{named(map(str, numbers))}: {named(files)}",
                f"number the classes from 0 to {len(table.classes) - 1}, in the order of "
                "thing_classes",
            )
        )
    counts = table.counts()
    empty = [table.classes[i] for i in np.flatnonzero(counts == 0)]
    if empty:
        found.append(
            Finding(
                "warning",
                "class-empty",
                table.name,
                f"{_count(len(empty), 'class has', 'classes have')} no instance: {named(empty)}",
                "add images of them; their AP does not count in the mean"
                if table.is_test
                else "add images of them or leave them out: the model cannot learn them",
            )
        )
    rare = [i for i in np.argsort(counts) if 0 < counts[i] < _RARE]
    if rare and not table.is_test:
        listed = named(f"{table.classes[i]} ({counts[i]})" for i in rare)
        found.append(
            Finding(
                "warning",
                "class-rare",
                table.name,
                f"{_count(len(rare), 'class has', 'classes have')} fewer than {_RARE} instances, "
                f"the largest {counts.max()}: {listed}",
                "add images of them, or show those they have more often: "
                "DATALOADER.SAMPLER_TRAIN RepeatFactorTrainingSampler",
            )
        )
    return found


def find_repeated_images(table: DatasetTable) -> list[Finding]:
    """
    Find ids that several images share, and in a test set images that come more than once.

    In a training set a repeated image is how it is shown more often.
    """
    files_of: dict[Any, list[str]] = defaultdict(list)
    for image_id, file_name in zip(table.image_ids, table.file_names, strict=True):
        files_of[image_id].append(file_name)
    found = []
    shared = {i: names for i, names in files_of.items() if len(set(names)) > 1}
    if shared:
        listed = named(f"{i!r}: {named(sorted(set(names)))}" for i, names in shared.items())
        found.append(
            Finding(
                "error" if table.is_test else "warning",
                "image-id-shared",
                table.name,
                f"{_count(len(shared), 'image id belongs', 'image ids belong')} to several "
                f"files: {listed}",
                "give each image an id of its own: evaluation puts the detections of one id "
                "into one image",
            )
        )
    repeated = [i for i, names in files_of.items() if len(names) > len(set(names))]
    if repeated and table.is_test:
        found.append(
            Finding(
                "error",
                "image-repeated",
                table.name,
                f"{_count(len(repeated), 'image comes', 'images come')} more than once: "
                f"{named(repr(i) for i in repeated)}",
                "list each image once in a test set",
            )
        )
    return found


def compare_classes(train: DatasetTable, test: DatasetTable) -> list[Finding]:
    """Find classes whose names or places differ, and those that are evaluated but not taught."""
    pair = f"{train.name} / {test.name}"
    if train.classes != test.classes:
        only = [sorted(set(a.classes) - set(b.classes)) for a, b in ((train, test), (test, train))]
        parts = [
            f"only {table.name} has {named(names)}"
            for table, names in zip((train, test), only, strict=True)
            if names
        ]
        return [
            Finding(
                "error",
                "classes-differ",
                pair,
                "; ".join(parts) or "the same classes are in another order",
                "give both sets the same classes in the same order",
            )
        ]
    untaught = np.flatnonzero((train.counts() == 0) & (test.counts() > 0))
    if not len(untaught):
        return []
    return [
        Finding(
            "warning",
            "class-untaught",
            pair,
            f"{_count(len(untaught), 'class is', 'classes are')} evaluated but never seen in "
            f"training: {named(train.classes[i] for i in untaught)}",
            "move images of them to the training set; they cost AP at the moment",
        )
    ]


def resized_lengths(table: DatasetTable, min_size: int, max_size: int) -> Array:
    """
    Return the root of each box's area in pixels after the resizing of an evaluation.

    Same rule as Detectron2's ``ResizeShortestEdge``: the short side becomes ``min_size``, unless
    the long side would pass ``max_size``.

    Args:
        table: of R annotations.
        min_size: INPUT.MIN_SIZE_TEST; 0 means no resizing.
        max_size: INPUT.MAX_SIZE_TEST.

    Returns:
        One value for each instance with an area in an image of known size; no crowd.
    """
    height, width = table.sizes[table.image_of].T
    x0, y0, x1, y1 = table.boxes.T
    use = table.is_target & (x1 > x0) & (y1 > y0) & np.isfinite(height) & np.isfinite(width)
    short = np.minimum(height, width)[use]
    long = np.maximum(height, width)[use]
    scale = np.minimum(min_size / short, max_size / long) if min_size else np.ones(len(short))
    return np.sqrt((x1 - x0) * (y1 - y0))[use] * scale


def find_unfit_sizes(
    name: str, lengths: Array, anchors: Sequence[float], iou: float
) -> list[Finding]:
    """
    Find instances that no anchor can reach because of their size.

    A square of side a inside one of side s overlaps it by (a / s)^2 at best, so below an IoU of
    ``iou`` it is background to that anchor; such an instance is learned only through its single
    best anchor.

    Args:
        name: of the dataset.
        lengths: from :func:`resized_lengths`.
        anchors: sides of the square anchors in pixels.
        iou: below which an anchor is background.
    """
    if not len(lengths) or not len(anchors):
        return []
    reach = np.sqrt(iou)
    found = []
    for word, code, share in (
        ("small", "instances-small", np.mean(lengths < min(anchors) * reach)),
        ("large", "instances-large", np.mean(lengths > max(anchors) / reach)),
    ):
        if share > 0.1:
            bound = min(anchors) if word == "small" else max(anchors)
            found.append(
                Finding(
                    "warning",
                    code,
                    name,
                    f"{share:.0%} of the instances are too {word} for the {word}est anchor of "
                    f"{bound:g} pixels (median side after resizing: {np.median(lengths):.0f})",
                    f"{'raise' if word == 'small' else 'lower'} INPUT.MIN_SIZE_TRAIN and "
                    "MIN_SIZE_TEST, or change MODEL.ANCHOR_GENERATOR.SIZES",
                )
            )
    return found
