"""The training losses, measured on the test sets."""

import copy
import logging
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from detectron2.data import DatasetMapper, build_detection_test_loader
from detectron2.data.detection_utils import build_augmentation
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.data import DataLoader

from d2ft.data.stream import seed_generators, seeded_generators
from d2ft.engine.hooks.evaluated import EvaluatedHook
from d2ft.engine.model import named_losses, unwrapped
from d2ft.progress import open_bar

logger = logging.getLogger(__name__)

Loader = DataLoader[list[dict[str, Any]]]


def build_validation_loader(cfg: Any, dataset_name: str) -> Loader:
    """Return the images of a test set, resized as in the test, with their annotations."""
    augmentations = build_augmentation(cfg, is_train=False)
    mapper = DatasetMapper(cfg, is_train=True, augmentations=augmentations, recompute_boxes=False)
    loader: Loader = build_detection_test_loader(cfg, dataset_name, mapper=mapper)
    return loader


class ValidationLoss(EvaluatedHook):
    """
    Stores ``val/total_loss`` and ``val/<loss>``, the mean over the images of a test set.

    With several test sets the name of the set is before it. Detectors sample anchors and proposals
    for their losses: here with a seed for each image, the same at every evaluation. Losses are
    computed by a copy of the model with norms and dropout as in the test, with other random
    generators and another ``EventStorage``: training goes on as if nothing had been.
    """

    def __init__(self, period: int, loaders: Mapping[str, Callable[[], Loader]]) -> None:
        """
        Take the data.

        Args:
            period: as for :class:`EvaluatedHook`.
            loaders: name of a test set -> function that builds its loader.
        """
        super().__init__(period)
        self._loaders = dict(loaders)

    def evaluated(self) -> None:
        """Measure and store the losses on every test set."""
        for name, build in self._loaders.items():
            prefix = f"{name}/val/" if len(self._loaders) > 1 else "val/"
            losses = mean_losses(self.trainer.model, build)
            logger.info(
                "Validation loss on %s: %s",
                name,
                ", ".join(f"{loss} {value:.4f}" for loss, value in losses.items()),
            )
            metrics = {prefix + loss: value for loss, value in losses.items()}
            self.trainer.storage.put_scalars(**metrics, smoothing_hint=False)


@torch.no_grad()
def mean_losses(model: torch.nn.Module, build_loader: Callable[[], Loader]) -> dict[str, float]:
    """
    Return each loss and ``total_loss``, averaged over the images of all processes.

    Args:
        model: is not changed, nor are the random generators.
        build_loader: gives a loader of this process's share of the images, with annotations.
    """
    model = unwrapped(model)
    # Without the hooks that watch the training.
    twin = copy.deepcopy(model, {id(model._forward_hooks): OrderedDict()})
    twin.train()
    for module in twin.modules():
        if isinstance(module, (_BatchNorm, _DropoutNd)):
            module.eval()
    sums: defaultdict[str, float] = defaultdict(float)
    images = 0
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with EventStorage(), seeded_generators(0), torch.random.fork_rng(devices):
        for batch in open_bar(build_loader(), desc="Validation loss", unit="batch", leave=False):
            seed_generators(0, images)
            for name, value in named_losses(twin(batch)).items():
                sums[name] += value.item() * len(batch)
            images += len(batch)
    gathered = comm.all_gather((dict(sums), images))
    # A process whose share is empty has no names.
    names = dict.fromkeys(name for part, _ in gathered for name in part)
    count = max(1, sum(part_images for _, part_images in gathered))
    means = {name: sum(part.get(name, 0.0) for part, _ in gathered) / count for name in names}
    return {"total_loss": sum(means.values()), **means}
