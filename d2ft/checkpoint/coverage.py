"""Refuse a file that gives a model too little, by names and shapes, before anything starts."""

from collections.abc import Sequence

from d2ft.checkpoint.load_report import BOTTOM_UP, LoadReport, shorten
from d2ft.errors import UserError


def check_coverage(report: LoadReport, *, every_tensor: bool) -> None:
    """
    Refuse a file that leaves a part of the model random which it should have filled.

    Args:
        report: what the file gives to the model.
        every_tensor: nothing may be left, as in evaluation and when a run is resumed. Otherwise
            the backbone's body has to be complete (models without a ``backbone.bottom_up``: at
            least half of all tensors, or the whole backbone if the file is one), and heads may
            start fresh.

    Raises:
        UserError: naming the file, the first tensors that it lacks, and the likely causes.
    """
    left = report.not_loaded
    names = (*report.loaded, *(tensor.name for tensor in report.remapped), *left)
    if any(name.startswith(BOTTOM_UP) for name in names):
        lacking = [name for name in left if name.startswith(BOTTOM_UP)]
    elif report.backbone_only:
        lacking = [name for name in left if name.startswith("backbone.")]
    else:
        lacking = list(left) if 2 * len(left) > len(names) else []
    if lacking:
        raise UserError(
            f"{report.source} does not fit the model: {len(lacking)} of the tensors "
            f"that it has to fill are not in it, or in another shape: {_describe(report, lacking)}. "
            "Likely the MODEL section of the config describes another architecture (depth, width, "
            "FPN or C4, norm layers) than the one that was trained, or the file comes from another "
            "framework."
        )
    if every_tensor and left:
        raise UserError(
            f"{report.source} has no trained values for {len(left)} tensors of the model: "
            f"{_describe(report, left)}. Evaluation and --resume need every tensor from the file. "
            "To evaluate a fine-tuned model, set MODEL.WEIGHTS <OUTPUT_DIR>/model_final.pth or "
            "give --resume; a run is resumed with the MODEL section it was started with."
        )


def _describe(report: LoadReport, names: Sequence[str]) -> str:
    shapes = {name: f"{name} (file {file}, model {model})" for name, file, model in report.skipped}
    return shorten([shapes.get(name, name) for name in names])
