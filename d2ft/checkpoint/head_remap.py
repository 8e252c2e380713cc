"""
Carry the class rows of a trained detection head over to another list of classes.

Shape shorthand in this module:

    S, T: number of source / target classes, without background
    K: S or T
    R: rows per class: 1 for scores and masks, 4 for class-specific boxes (5 if they are rotated),
       the number of anchors for RetinaNet's scores
    C: input channels of the layer
"""

import difflib
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from d2ft.errors import UserError
from d2ft.labels import CLASS_ALIASES, fold_class_name

_NAMES_SHOWN = 100


class RowLayout(NamedTuple):
    """
    How the class rows of a layer lie.

    Attributes:
        rows_per_class: the values that R may have; empty for any.
        background: there is one row more than the classes have, the last one.
        anchor_major: row ``a * K + k`` is anchor ``a`` of class ``k``; otherwise row ``k * R + r``
            is row ``r`` of class ``k``.
    """

    rows_per_class: tuple[int, ...] = (1,)
    background: bool = False
    anchor_major: bool = False

    def count_rows_per_class(self, rows: int, num_classes: int) -> int | None:
        """Return R of a layer with this many rows, or None if they are not those of K classes."""
        count, rest = divmod(rows - self.background, num_classes)
        fits = not rest and (count in self.rows_per_class or (count and not self.rows_per_class))
        return count if fits else None


# Detectron2's layers with rows per class:
# https://github.com/facebookresearch/detectron2/blob/v0.6/detectron2/modeling/roi_heads/fast_rcnn.py
# (the background row is there with USE_SIGMOID_CE as well, unused),
# .../roi_heads/mask_head.py and .../meta_arch/retinanet.py. The stages of a cascade have a number;
# their boxes are the same for all classes, which CascadeROIHeads asserts.
_LAYOUTS: tuple[tuple[re.Pattern[str], RowLayout], ...] = (
    (
        re.compile(r"roi_heads\.box_predictor(\.\d+)?\.cls_score\.(weight|bias)"),
        RowLayout(background=True),
    ),
    (
        re.compile(r"roi_heads\.box_predictor\.bbox_pred\.(weight|bias)"),
        RowLayout(rows_per_class=(4, 5)),
    ),
    (re.compile(r"roi_heads\.mask_head\.predictor\.(weight|bias)"), RowLayout()),
    (
        re.compile(r"head\.cls_score\.(weight|bias)"),
        RowLayout(rows_per_class=(), anchor_major=True),
    ),
)


class ClassStart(NamedTuple):
    """
    How one class of the model starts.

    Attributes:
        name: of the class of the training set.
        source: the class of the weights that its rows come from; None if there is none.
        source_row: index of ``source`` in the weights.
        start: "copied", or what :attr:`HeadInit.unmatched` says.
    """

    name: str
    source: str | None
    source_row: int | None
    start: str


@dataclass(frozen=True)
class HeadInit:
    """
    How the class rows of a model start.

    Attributes:
        remap: carry rows over by class name; False loads what has the same shape and no more.
        class_map: target class -> source class, over what the names say.
        unmatched: "fresh" or "matched", as in :func:`remap_class_rows`.
        seed: of the "matched" rows; the same in all processes of a run.
    """

    remap: bool = False
    class_map: Mapping[str, str] = field(default_factory=dict)
    unmatched: str = "fresh"
    seed: int = 0


def find_sources(
    source_classes: Sequence[str],
    target_classes: Sequence[str],
    class_map: Mapping[str, str] | None = None,
    aliases: Mapping[str, str] = CLASS_ALIASES,
) -> tuple[tuple[int, ...], ...]:
    """
    Return for each target class the rows of the source classes that it may be.

    Classes meet by name, never by position: first by the name alone, case and separators folded;
    only if no source has it, through ``aliases``. So "pedestrian" is "pedestrian" where a source
    has both that and "person".

    Args:
        source_classes: S names, in the row order of the source.
        target_classes: T names.
        class_map: target -> source, for targets whose own name does not count then.
        aliases: other spelling -> canonical name.

    Returns:
        T tuples of indices into ``source_classes``: empty if there is none, several if the names
        do not tell which.

    Raises:
        UserError: if ``class_map`` names a class that is not there, listing those that are.
    """
    canonical = {fold_class_name(old): fold_class_name(new) for old, new in aliases.items()}
    by_name: dict[str, list[int]] = defaultdict(list)
    by_meaning: dict[str, list[int]] = defaultdict(list)
    for row, name in enumerate(source_classes):
        folded = fold_class_name(name)
        by_name[folded].append(row)
        by_meaning[canonical.get(folded, folded)].append(row)

    def rows_of(name: str) -> tuple[int, ...]:
        folded = fold_class_name(name)
        return tuple(by_name.get(folded) or by_meaning.get(canonical.get(folded, folded)) or ())

    mapped = {}
    for target, source in (class_map or {}).items():
        if fold_class_name(target) not in map(fold_class_name, target_classes):
            raise UserError(
                f'FINETUNE.CLASS_MAP: "{target}" is no class of the training set'
                f"{_candidates(target, target_classes)}"
            )
        if not rows_of(source):
            raise UserError(
                f'FINETUNE.CLASS_MAP maps "{target}" to "{source}", which is no class of the '
                f"weights{_candidates(source, source_classes)}"
            )
        mapped[fold_class_name(target)] = source
    return tuple(rows_of(mapped.get(fold_class_name(name), name)) for name in target_classes)


def match_classes(
    source_classes: Sequence[str],
    target_classes: Sequence[str],
    class_map: Mapping[str, str] | None = None,
    aliases: Mapping[str, str] = CLASS_ALIASES,
) -> tuple[int | None, ...]:
    """
    Same as :func:`find_sources`, but each target has one source row or None.

    Raises:
        UserError: as :func:`find_sources`; also if the names of a target fit several sources,
            listing them.
    """
    found = find_sources(source_classes, target_classes, class_map, aliases)
    for target, rows in zip(target_classes, found, strict=True):
        if len(rows) > 1:
            candidates = ", ".join(f'"{source_classes[row]}" (row {row})' for row in rows)
            raise UserError(
                f'class "{target}" of the training set may be any of {len(rows)} classes of the '
                f"weights: {candidates}. Say which under FINETUNE.CLASS_MAP, as in "
                f'"{target}: {source_classes[rows[0]]}".'
            )
    return tuple(rows[0] if rows else None for rows in found)


def find_class_rows(
    source_shapes: Mapping[str, tuple[int, ...]],
    target_shapes: Mapping[str, tuple[int, ...]],
    num_source: int,
    num_target: int,
) -> dict[str, RowLayout]:
    """
    Return the tensors whose class rows can be carried over, with their layout.

    Left out is what does not have R rows for each class on both sides, with the same R and C:
    also boxes or masks that are the same for all classes, which load whole. (With a single class
    on both sides the two cannot be told apart, and count as rows of the class.)

    Args:
        source_shapes: of the file, by the model's names.
        target_shapes: of the model.
        num_source: S.
        num_target: T.
    """
    layouts = {}
    for name, target in target_shapes.items():
        source, layout = source_shapes.get(name), _layout(name)
        if source is None or layout is None or source[1:] != target[1:]:
            continue
        counts = (
            layout.count_rows_per_class(source[0], num_source),
            layout.count_rows_per_class(target[0], num_target),
        )
        if counts[0] is not None and counts[0] == counts[1]:
            layouts[name] = layout
    return layouts


def find_misfit(shapes: Mapping[str, tuple[int, ...]], num_classes: int) -> str:
    """Return the first layer of scores whose rows are not those of so many classes, or ""."""
    for name, shape in shapes.items():
        layout = _layout(name) if ".cls_score." in name else None
        if layout and layout.count_rows_per_class(shape[0], num_classes) is None:
            return name
    return ""


def remap_class_rows(
    rows: torch.Tensor,
    source_rows: Sequence[int | None],
    *,
    num_source: int,
    init: torch.Tensor,
    layout: RowLayout,
    unmatched: str = "fresh",
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """
    Give each target class the head rows that were trained for its source class.

    The background row comes from ``rows`` as well.

    Args:
        rows: (S*R, C, ...) weight or (S*R,) bias, with one row more if ``layout`` has a
            background; a tensor that :func:`find_class_rows` returned.
        source_rows: for each of T target classes its source class, or None; see
            :func:`match_classes`.
        num_source: S.
        init: (T*R, C, ...) freshly initialised parameter; not changed.
        layout: of both.
        unmatched: how a class without a source starts. "fresh": with its rows of ``init``;
            "matched": normal, with the mean and the standard deviation over all values of
            the class rows in ``rows``, as the original Detectron started Cityscapes models:
            https://github.com/facebookresearch/Detectron/blob/main/tools/convert_coco_model_to_cityscapes.py
        generator: on the CPU, for the "matched" rows.

    Returns:
        The (T*R, C, ...) parameter, with the device and dtype of ``init``.
    """
    rows = rows.detach().to(init)
    result = init.detach().clone()
    source = _by_class(rows, layout, num_source)
    target = _by_class(result, layout, len(source_rows))
    # Not the unbiased estimate: a single value has a deviation of 0, not NaN.
    std, mean = torch.std_mean(source.float(), correction=0)
    for index, row in enumerate(source_rows):
        if row is not None:
            target[index] = source[row]
        elif unmatched == "matched":
            noise = torch.randn(target[index].shape, generator=generator)
            target[index] = noise.to(std) * std + mean
    if layout.background:
        result[-1] = rows[-1]
    return result


def _by_class(param: torch.Tensor, layout: RowLayout, num_classes: int) -> torch.Tensor:
    """Return the (K, R, C, ...) view of a parameter's class rows."""
    param = param[:-1] if layout.background else param
    if layout.anchor_major:
        return param.unflatten(0, (-1, num_classes)).transpose(0, 1)
    return param.unflatten(0, (num_classes, -1))


def _layout(name: str) -> RowLayout | None:
    return next((layout for pattern, layout in _LAYOUTS if pattern.fullmatch(name)), None)


def _candidates(name: str, classes: Sequence[str]) -> str:
    folded = {fold_class_name(known): known for known in classes}
    near = difflib.get_close_matches(fold_class_name(name), folded, n=1)
    hint = f'; did you mean "{folded[near[0]]}"?' if near else "."
    more = f" and {len(classes) - _NAMES_SHOWN} more" if len(classes) > _NAMES_SHOWN else ""
    return f"{hint} Its classes: {', '.join(classes[:_NAMES_SHOWN])}{more}."
