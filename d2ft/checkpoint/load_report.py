"""
Say what a checkpoint file gives to a model.

Everything here works on names and shapes: a model that exists on the meta device only is enough.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tabulate import tabulate

from d2ft.checkpoint.head_remap import ClassStart, RowLayout
from d2ft.files import atomic_write

Shape = tuple[int, ...]

# The layers with rows per class. Their shapes follow the dataset, so another shape in the file
# is what fine-tuning expects.
FINAL_PREDICTORS = re.compile(
    r"(roi_heads\.box_predictor(\.\d+)?\.(cls_score|bbox_pred)"  # a number: a stage of a cascade
    r"|roi_heads\.mask_head\.predictor"
    r"|head\.cls_score"  # RetinaNet; its boxes are the same for all classes
    r")\.(weight|bias)"
)

BOTTOM_UP = "backbone.bottom_up."

# Parts of a model as a reader of its paper knows them; the first prefix that fits counts.
_GROUPS: tuple[tuple[str, str], ...] = (
    (BOTTOM_UP, "backbone.bottom_up"),
    ("backbone.fpn_", "fpn"),
    ("backbone.top_block.", "fpn"),
    ("backbone.", "backbone"),
    ("proposal_generator.", "rpn"),
    ("roi_heads.box_head.", "box head"),
    ("roi_heads.res5.", "box head"),
    ("roi_heads.mask_head.", "mask head"),
    ("roi_heads.keypoint_head.", "keypoint head"),
    ("head.", "dense head"),
    ("", "other"),
)

# Tensors that Detectron2 takes from the config or does without, so that a file may differ.
_IGNORED: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"pixel_(mean|std)"), "set from MODEL.PIXEL_MEAN and PIXEL_STD"),
    (re.compile(r".*anchor_generator\.cell_anchors.*"), "computed from MODEL.ANCHOR_GENERATOR"),
    (re.compile(r".*num_batches_tracked"), "a counter that FrozenBN does without"),
)

# The final predictors of a Mask R-CNN.
# Detectron1 and the MSRA backbones folded them into weight and bias; the norm layers of a new model
# then start as the identity that these files mean.
_STATISTICS = re.compile(r".*\.running_(mean|var)")

_NAMES_SHOWN = 6


class SkippedTensor(NamedTuple):
    """A tensor that file and model both have, in different shapes."""

    name: str
    file_shape: Shape
    model_shape: Shape


class RemappedTensor(NamedTuple):
    """A tensor of the model whose class rows come from those of the file, by class name."""

    name: str
    file_shape: Shape
    model_shape: Shape
    layout: RowLayout


class IgnoredTensor(NamedTuple):
    """A tensor that only one side has, and that is no loss."""

    name: str
    reason: str


@dataclass(frozen=True)
class LoadReport:
    """
    What a checkpoint file gives to a model, tensor by tensor.

    ``loaded``, ``remapped``, ``skipped`` and ``missing`` together are the tensors of the model,
    apart from the ignored ones; each list is in the order of the model, ``unexpected`` in that of
    the file.

    Attributes:
        source: the file or URL as the user gave it.
        sha256: of the file, 64 hexadecimal digits; empty if it was not computed.
        loaded: names with equal shapes on both sides.
        skipped: the model keeps its own values, because the shapes differ.
        missing: the model keeps its own values, because the file does not have the name.
        unexpected: names in the file that the model does not have.
        ignored: differences that Detectron2 expects.
        backbone_only: the file is known to be an ImageNet backbone without heads.
        remapped: final predictors that get the file's class rows by name.
        classes: how each class of the model starts, if there are remapped tensors.
        notes: what the user may do about class rows, a sentence each.
    """

    source: str
    sha256: str
    loaded: tuple[str, ...]
    skipped: tuple[SkippedTensor, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    ignored: tuple[IgnoredTensor, ...]
    backbone_only: bool = False
    remapped: tuple[RemappedTensor, ...] = ()
    classes: tuple[ClassStart, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def not_loaded(self) -> tuple[str, ...]:
        """Names of the model's tensors that keep their own values."""
        return (*(tensor.name for tensor in self.skipped), *self.missing)

    @property
    def model_size(self) -> int:
        """Number of the model's tensors, without the ignored ones."""
        return len(self.loaded) + len(self.remapped) + len(self.not_loaded)

    @property
    def fresh_predictors(self) -> tuple[str, ...]:
        """Final predictors that keep their own values."""
        return tuple(name for name in self.not_loaded if is_final_predictor(name))

    @property
    def surprises(self) -> tuple[str, ...]:
        """Names that keep their own values although nothing in fine-tuning asks for it."""
        return tuple(
            name
            for name in self.not_loaded
            if not is_final_predictor(name)
            and not (self.backbone_only and not name.startswith(BOTTOM_UP))
        )

    @property
    def matches_classes_by_position(self) -> bool:
        """Whether the class rows of the file became the class rows of the model, in order."""
        # A class-agnostic box or mask predictor fits any number of classes; scores never do.
        return any(is_final_predictor(name) and ".cls_score." in name for name in self.loaded)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as what JSON can hold, counts first."""
        return {
            "source": self.source,
            "sha256": self.sha256,
            "backbone_only": self.backbone_only,
            "counts": {
                "model": self.model_size,
                "loaded": len(self.loaded),
                "remapped": len(self.remapped),
                "skipped": len(self.skipped),
                "missing": len(self.missing),
                "unexpected": len(self.unexpected),
                "ignored": len(self.ignored),
            },
            "notes": list(self.notes),
            "classes": [start._asdict() for start in self.classes],
            "remapped": [_shapes_as_dict(*tensor[:3]) for tensor in self.remapped],
            "skipped": [_shapes_as_dict(*tensor) for tensor in self.skipped],
            "missing": list(self.missing),
            "unexpected": list(self.unexpected),
            "ignored": [tensor._asdict() for tensor in self.ignored],
            "loaded": list(self.loaded),
        }

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write :meth:`to_dict` as JSON, whole or not at all; the folder is made if need be."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            json.dump(self.to_dict(), file, indent=1)
            file.write("\n")

    def format_table(self, num_classes: int) -> str:
        """
        Return the report as lines for a person.

        Args:
            num_classes: foreground classes of the model; 0 if they are not known.
        """
        parts = [
            f"loaded {len(self.loaded)} of {self.model_size} tensors from {self.source}",
            f"{self._format_groups()}\n",
        ]
        if self.classes:
            copied = sum(start.start == "copied" for start in self.classes)
            parts.append(
                f"the {len(self.remapped)} final predictors below start from the file's rows of "
                f"{copied} of {len(self.classes)} classes:\n{self._format_classes()}\n"
            )
        if self.skipped:
            rows = [(name, str(file), str(model)) for name, file, model in self.skipped]
            headers = ("skipped, the shapes differ", "in the file", "in the model")
            parts.append(f"{tabulate(rows, headers)}\n")
        if self.backbone_only:
            parts.append("backbone only: heads start fresh")
        elif self.fresh_predictors:
            classes = f" for {num_classes} classes" if num_classes else ""
            verdict = "" if self.surprises else ": expected"
            parts.append(
                f"the {len(self.fresh_predictors)} final predictors were re-initialised"
                f"{classes}{verdict}"
            )
        if self.surprises:
            parts.append(
                f"ATTENTION: {len(self.surprises)} tensors that are not final predictors were "
                f"NOT loaded and keep their random start: {shorten(self.surprises)}"
            )
        if self.unexpected:
            parts.append(
                f"{len(self.unexpected)} tensors of the file are not used by the model: "
                f"{shorten(self.unexpected)}"
            )
        for reason, count in Counter(tensor.reason for tensor in self.ignored).items():
            parts.append(f"ignored {count} ({reason})")
        parts.extend(self.notes)
        return "\n".join(parts).rstrip()

    def _format_groups(self) -> str:
        columns = {
            "loaded": self.loaded,
            "remapped": [tensor.name for tensor in self.remapped],
            "skipped": [tensor.name for tensor in self.skipped],
            "missing": self.missing,
        }
        if not self.remapped:
            del columns["remapped"]
        counts = [Counter(map(_group, names)) for names in columns.values()]
        order = [*dict.fromkeys(name for _, name in _GROUPS), "final predictors"]
        rows = [
            (group, *(count[group] for count in counts))
            for group in order
            if any(count[group] for count in counts)
        ]
        return tabulate(rows, headers=("part", *columns))

    def _format_classes(self) -> str:
        rows = [
            (name, f"{source} (row {row})" if source is not None else f"none: {start}")
            for name, source, row, start in self.classes
        ]
        tensors = "\n".join(
            f"{tensor.name}: {tensor.file_shape} -> {tensor.model_shape}"
            for tensor in self.remapped
        )
        return f"{tabulate(rows, headers=('class', 'class of the file'))}\n\n{tensors}"


def is_final_predictor(name: str) -> bool:
    """Whether a tensor of a Detectron2 model belongs to a layer with rows per class."""
    return FINAL_PREDICTORS.fullmatch(name) is not None


def compare_shapes(
    model: Mapping[str, Shape],
    file: Mapping[str, Shape],
    *,
    source: str,
    sha256: str = "",
    backbone_only: bool = False,
    class_rows: Mapping[str, RowLayout] | None = None,
    classes: Sequence[ClassStart] = (),
) -> LoadReport:
    """
    Tell which tensors of ``file`` can be loaded into ``model``: those of equal name and shape.

    A tensor whose class rows are carried over by name counts as remapped, whatever its shape.

    Args:
        model: shapes by name of the model's state dict.
        file: shapes by name of the checkpoint, its names already those of the model.
        source: the file or URL as the user gave it.
        sha256: of the file, if it is to be in the report.
        backbone_only: the file is known to be a backbone without heads.
        class_rows: tensors of both whose class rows are carried over by name.
        classes: how each class of the model starts then.
    """
    class_rows = class_rows or {}
    reasons = {name: _reason_to_ignore(name) for name in model.keys() ^ file.keys()}
    if not any(_STATISTICS.fullmatch(name) for name in file):
        for name in filter(_STATISTICS.fullmatch, reasons):
            reasons[name] = "the file has none: its norm layers have them folded in"
    return LoadReport(
        source=source,
        sha256=sha256,
        loaded=tuple(
            name for name in model if file.get(name) == model[name] and name not in class_rows
        ),
        skipped=tuple(
            SkippedTensor(name, file[name], model[name])
            for name in model
            if name in file and file[name] != model[name] and name not in class_rows
        ),
        missing=tuple(name for name in model if name not in file and not reasons[name]),
        unexpected=tuple(name for name in file if name not in model and not reasons[name]),
        ignored=tuple(
            IgnoredTensor(name, reasons[name]) for name in sorted(filter(reasons.get, reasons))
        ),
        backbone_only=backbone_only,
        remapped=tuple(
            RemappedTensor(name, file[name], model[name], layout)
            for name, layout in class_rows.items()
        ),
        classes=tuple(classes),
    )


def shorten(names: Sequence[str]) -> str:
    """Return the first six names, and how many more there are."""
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(names[:_NAMES_SHOWN]) + more


def _shapes_as_dict(name: str, file: Shape, model: Shape) -> dict[str, Any]:
    return {"name": name, "file_shape": list(file), "model_shape": list(model)}


def _reason_to_ignore(name: str) -> str:
    return next((reason for pattern, reason in _IGNORED if pattern.fullmatch(name)), "")


def _group(name: str) -> str:
    if is_final_predictor(name):
        return "final predictors"
    return next(group for prefix, group in _GROUPS if name.startswith(prefix))
