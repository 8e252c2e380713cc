"""Names of parts of a detector, and how deep a parameter lies, read from parameter names alone."""

import difflib
import fnmatch
from collections.abc import Iterable, Sequence

# Short name -> patterns of Detectron2's module names, with FPN, without, and for C4 models.
PARTS: dict[str, tuple[str, ...]] = {
    "stem": ("backbone.bottom_up.stem", "backbone.stem"),
    **{
        f"res{i}": (f"backbone.bottom_up.res{i}", f"backbone.res{i}", f"roi_heads.res{i}")
        for i in range(2, 6)
    },
    "backbone": ("backbone",),
    "fpn": ("backbone.fpn_*", "backbone.top_block"),
    "rpn": ("proposal_generator",),
    "box_head": ("roi_heads.box_head",),
    "box_predictor": ("roi_heads.box_predictor",),
    "mask_head": ("roi_heads.mask_head",),
    "mask_predictor": ("roi_heads.mask_head.predictor",),
    "head": ("head",),  # RetinaNet
}

# From the image to the classes. What is none of these (FPN, RPN, heads) lies one deeper.
_STAGES = ("stem", "res2", "res3", "res4", "res5")
MAX_DEPTH = len(_STAGES)


def is_match(name: str, pattern: str) -> bool:
    """
    Tell whether a parameter or module name is one that a pattern means.

    Args:
        name: such as "backbone.bottom_up.res2.0.conv1.weight".
        pattern: a key of :data:`PARTS`, or a name with ``*`` and ``?``; what lies inside of a
            module that it names is meant as well.
    """
    return any(
        fnmatch.fnmatchcase(name, known) or fnmatch.fnmatchcase(name, f"{known}.*")
        for known in PARTS.get(pattern, (pattern,))
    )


def select(names: Sequence[str], patterns: Iterable[str]) -> set[str]:
    """
    Return the names that the patterns mean, taken in order: "!" before one takes names out again.

    Raises:
        LookupError: if a pattern means none of ``names``; the message lists near ones.
    """
    chosen: set[str] = set()
    for pattern in patterns:
        matching = {name for name in names if is_match(name, pattern.removeprefix("!"))}
        if not matching:
            raise LookupError(f"{pattern!r} means no part of the model{_hint(pattern, names)}")
        chosen = chosen - matching if pattern.startswith("!") else chosen | matching
    return chosen


def param_depth(name: str) -> int:
    """Return 0 for the stem up to 4 for res5, and ``MAX_DEPTH`` for what comes after them."""
    for depth, stage in enumerate(_STAGES):
        if is_match(name, stage):
            return depth
    return MAX_DEPTH


def _hint(pattern: str, names: Sequence[str]) -> str:
    present = [part for part in PARTS if any(is_match(name, part) for name in names)]
    modules = {name.rpartition(".")[0] for name in names}
    modules |= {module.rpartition(".")[0] for module in modules}
    known = [*present, *sorted(modules - {""})]
    near = difflib.get_close_matches(pattern.strip("!*."), known, n=3, cutoff=0.4)
    if near:
        return f"; did you mean {' or '.join(near)}?"
    return f"; its parts are {', '.join(present)}"
