"""The checks of a run, in the order in which a mistake would otherwise show."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict
from typing import Any

from detectron2.config import CfgNode

from d2ft.config import check_cfg
from d2ft.data.augmentation import check_augmentations
from d2ft.data.catalog import class_names
from d2ft.host import bridge_detectron2
from d2ft.preflight.check_dataset import check_datasets
from d2ft.preflight.check_weights import check_weights
from d2ft.preflight.inspect_dataset import refuse_errors

logger = logging.getLogger(__name__)


# What the checks of this run found in the process that started it.
_FOUND: ContextVar[dict[str, Any] | None] = ContextVar("found", default=None)


@contextmanager
def already_checked(found: dict[str, Any]) -> Iterator[None]:
    """Inside of the block, :func:`check_config_and_data` returns what it found just before."""
    token = _FOUND.set(found)
    try:
        yield
    finally:
        _FOUND.reset(token)


def check_config_and_data(
    cfg: CfgNode, *, world_size: int = 1, eval_only: bool = False
) -> dict[str, Any]:
    """
    Check what a trainer is built from: the config and the datasets that it names.

    Args:
        cfg: resolved; its datasets are registered.
        world_size: number of processes over all machines.
        eval_only: training sets are not needed.

    Returns:
        What was found, for ``preflight.json``: ``{"host": ..., "datasets": ..., "findings": ...}``.

    Raises:
        UserError: at the first check that fails.
    """
    found = _FOUND.get()
    if found is not None:
        return found
    # An evaluation shares out no batch.
    check_cfg(cfg, 1 if eval_only else world_size)
    if not eval_only:
        check_augmentations(cfg)
    datasets = check_datasets(cfg, eval_only=eval_only)
    findings = [finding for found in datasets.values() for finding in found.pop("findings")]
    refuse_errors(cfg, findings)
    for finding in findings:
        logger.warning("%s: %s; %s", finding.dataset, finding.message, finding.fix)
    return {
        "host": str(bridge_detectron2()),
        "datasets": datasets,
        "findings": [asdict(finding) for finding in findings],  # each names its dataset
    }


def run_preflight(
    cfg: CfgNode, *, world_size: int = 1, eval_only: bool = False, resume: bool = False
) -> dict[str, Any]:
    """
    Check config, datasets and weights, before any process is started or anything is written.

    Args:
        cfg: resolved; its datasets are registered.
        world_size: number of processes over all machines.
        eval_only: training sets are not needed, and the weights must fill the whole model.
        resume: the weights are those of the last checkpoint, if there is one.

    Returns:
        As :func:`check_config_and_data`, and ``"weights"``.

    Raises:
        UserError: at the first check that fails.
    """
    found = check_config_and_data(cfg, world_size=world_size, eval_only=eval_only)
    classes = class_names(next(iter(found["datasets"])))
    return {**found, "weights": check_weights(cfg, classes, eval_only=eval_only, resume=resume)}
