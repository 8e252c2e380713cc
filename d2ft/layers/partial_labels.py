"""
Learn from images in which some classes were never labelled.

Where sets of different class lists are joined, an object of a class that an image's set does not
have carries no box there. At the last classifier such an image must not say "background, not that
class"; everywhere else, the RPN included, training is Detectron2's.

Shape shorthand in this module:

    N: images of the batch
    R: RoIs of all images
    K: classes without background, whose index is K
"""

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from detectron2.structures import Instances
from torch import nn


class PartiallyLabelledOutputLayers(FastRCNNOutputLayers):
    """
    Same as :class:`FastRCNNOutputLayers`, but background RoIs do not push unlabelled classes down.

    The parameters and what is predicted are the same.

    Attributes:
        labelled_classes: for each image of the batch the indices of its labelled classes, or None
            for all; set before the losses are computed.
    """

    labelled_classes: Sequence[Sequence[int] | None] = ()

    def losses(
        self, predictions: tuple[torch.Tensor, torch.Tensor], proposals: list[Instances]
    ) -> dict[str, torch.Tensor]:
        """
        Return the losses with the logits of unlabelled classes masked for background RoIs.

        Args:
            predictions: logits (R, K + 1) and box deltas.
            proposals: of N images, with ``gt_classes`` in [0, K].
        """
        logits, deltas = predictions
        masked = mask_unlabelled_logits(
            logits, [image.gt_classes for image in proposals], self.labelled_classes
        )
        return super().losses((masked, deltas), proposals)


def mask_unlabelled_logits(
    logits: torch.Tensor,
    gt_classes: Sequence[torch.Tensor],
    labelled_classes: Sequence[Sequence[int] | None],
) -> torch.Tensor:
    """
    Take the unlabelled classes of an image out of the scores of its background RoIs.

    Args:
        logits: (R, K + 1), background last.
        gt_classes: for each of N images its RoIs' classes in [0, K].
        labelled_classes: for each of N images the indices of its labelled classes, or None.

    Returns:
        (R, K + 1) logits; those taken out are so low that they have neither probability nor
        gradient, in softmax and in sigmoid cross entropy. Finite, because the latter multiplies
        them by 0.
    """
    background = logits.shape[1] - 1
    masks = []
    for classes, labelled in zip(gt_classes, labelled_classes, strict=True):
        unlabelled = torch.zeros(background + 1, dtype=torch.bool, device=logits.device)
        if labelled is not None:
            unlabelled[:background] = True
            unlabelled[list(labelled)] = False
        masks.append((classes == background)[:, None] & unlabelled)
    if not masks:
        return logits
    return logits.masked_fill(torch.cat(masks), torch.finfo(logits.dtype).min)


def mask_unlabelled_classes(model: nn.Module) -> int:
    """
    Let a model learn from inputs with the key ``labelled_classes``, in place.

    Args:
        model: takes a list of Detectron2's input dicts.

    Returns:
        The number of box predictors that learn so; each stage of a cascade has one. None is
        changed that is of a class of its own.
    """
    predictors: list[Any] = [m for m in model.modules() if type(m) is FastRCNNOutputLayers]
    for predictor in predictors:
        # The subclass adds no state: parameters and their names stay, and so do checkpoints.
        predictor.__class__ = PartiallyLabelledOutputLayers

    def note_labelled_classes(_: nn.Module, inputs: tuple[list[dict[str, Any]], ...]) -> None:
        for predictor in predictors:
            predictor.labelled_classes = [image.get("labelled_classes") for image in inputs[0]]

    if predictors:
        model.register_forward_pre_hook(note_labelled_classes)
    return len(predictors)
