"""Build the training and test loaders of a config."""

import functools
import logging
import math
import signal
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import (
    DatasetFromList,
    build_detection_test_loader,
    build_detection_train_loader,
    get_detection_dataset_dicts,
)
from detectron2.data.build import worker_init_reset_seed
from detectron2.data.detection_utils import check_metadata_consistency
from detectron2.data.samplers import (
    RandomSubsetTrainingSampler,
    RepeatFactorTrainingSampler,
    TrainingSampler,
)
from detectron2.utils import comm
from tabulate import tabulate
from torch.utils.data import DataLoader, Sampler

from d2ft.data.bad_images import BadImages
from d2ft.data.catalog import class_names, open_index
from d2ft.data.columns import RecordColumns
from d2ft.data.image_cache import build_image_cache
from d2ft.data.mapper import FinetuneDatasetMapper
from d2ft.data.record_store import StoredRecords, columns_of
from d2ft.data.shared_list import SharedList
from d2ft.data.stream import SampleStream
from d2ft.errors import UserError

# How long a loader worker goes on after a SIGTERM: the step that it feeds has to end.
_WORKER_GRACE_SECONDS = 30

logger = logging.getLogger(__name__)

Mapper = Callable[[dict[str, Any]], Any]


def training_records(cfg: CfgNode, *, say: bool = True) -> Sequence[dict[str, Any]]:
    """
    Return the dataset dicts of DATASETS.TRAIN that remain after Detectron2's filters.

    Where all sets have an index, none is read here: the result reads each dict when asked for it.

    Args:
        cfg: DATASETS, DATALOADER and MODEL are read.
        say: print the number of instances by class, as Detectron2 does.
    """
    names = list(cfg.DATASETS.TRAIN)
    # Keypoints and proposals are in no index.
    if not (cfg.MODEL.KEYPOINT_ON or cfg.MODEL.LOAD_PROPOSALS):
        stored = [index for index in map(open_index, names) if index is not None]
        if stored and len(stored) == len(names):
            return _filter_stored(cfg, names, StoredRecords.join(stored), say=say)
    records: list[dict[str, Any]] = get_detection_dataset_dicts(
        names,
        filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
        min_keypoints=(
            cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if cfg.MODEL.KEYPOINT_ON else 0
        ),
        proposal_files=cfg.DATASETS.PROPOSAL_FILES_TRAIN if cfg.MODEL.LOAD_PROPOSALS else None,
        check_consistency=say,
    )
    return records


def _filter_stored(
    cfg: CfgNode, names: list[str], records: StoredRecords, *, say: bool
) -> StoredRecords:
    """Do what Detectron2's ``get_detection_dataset_dicts`` does, by the columns."""
    columns = records.columns()
    if cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS:
        keep = np.zeros(len(records), dtype=bool)
        keep[columns.image_of[~columns.is_crowd]] = True
        logger.info(
            "Left out %d of %d images: without annotations, or with crowd alone",
            len(keep) - keep.sum(),
            len(keep),
        )
        records, columns = records.where(keep), columns.where(keep)
    if not len(records):
        raise UserError(f"no image of {', '.join(names)} has an annotation to learn from")
    if say:
        check_metadata_consistency("thing_classes", names)
        classes = class_names(names[0])
        counts = np.bincount(columns.categories[~columns.is_crowd], minlength=len(classes))
        cells = [c for row in zip(classes, counts, strict=True) for c in row]
        cells += ["total", counts.sum()]
        rows = [cells[start : start + 6] for start in range(0, len(cells), 6)]
        table = tabulate(rows, headers=["class", "instances"] * min(3, len(classes) + 1))
        logger.info("Instances by class:\n%s", table)
    return records


def epoch_samples(cfg: CfgNode, columns: RecordColumns) -> int:
    """
    Return how many samples one pass over the training data has.

    Args:
        cfg: of which DATALOADER is read.
        columns: of what :func:`training_records` returns.
    """
    size = len(columns.file_names)
    if cfg.DATALOADER.SAMPLER_TRAIN == "RepeatFactorTrainingSampler":
        # The sampler rounds each factor up or down at random; their sum is what it comes to.
        return math.ceil(float(_repeat_factors(cfg, columns).sum()))
    if cfg.DATALOADER.SAMPLER_TRAIN == "RandomSubsetTrainingSampler":
        return max(1, int(size * cfg.DATALOADER.RANDOM_SUBSET_RATIO))
    return size


def build_train_loader(
    cfg: CfgNode, mapper: Mapper | None = None
) -> "DataLoader[list[dict[str, Any]]]":
    """
    Same as ``detectron2.data.build_detection_train_loader``, but its order can be resumed.

    The loader's ``dataset`` is a :class:`SampleStream`: set its ``start_iter`` before the first
    batch is taken. With SEED -1 all processes agree on a random seed.

    Args:
        cfg: DATASETS.TRAIN, SOLVER.IMS_PER_BATCH (over all processes), SEED and all of DATALOADER
            are read.
        mapper: dataset dict -> sample; by default ``FinetuneDatasetMapper(cfg, is_train=True)``,
            with the image cache if DATALOADER.IMAGE_CACHE_GB is above 0.
    """
    records = training_records(cfg)
    columns = columns_of(records)
    world_size = comm.get_world_size()
    stream = SampleStream(
        _indexable(records, world_size),
        mapper or _training_mapper(cfg, records),
        _sampler_builder(cfg, columns),
        batch_size=cfg.SOLVER.IMS_PER_BATCH // world_size,
        seed=cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed(),
        groups=_aspect_ratio_groups(columns) if cfg.DATALOADER.ASPECT_RATIO_GROUPING else None,
        rank=comm.get_rank(),
        world_size=world_size,
        bad_images=BadImages.of(cfg),
    )
    loader = build_detection_train_loader(
        stream,
        mapper=None,
        total_batch_size=cfg.SOLVER.IMS_PER_BATCH,
        # The stream has formed the groups already.
        aspect_ratio_grouping=False,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
    )
    # PyTorch draws a seed for the workers when the loader is first iterated. From the global
    # generator, that would change the first step of a resumed run.
    loader.generator = torch.Generator()
    loader.worker_init_fn = _start_worker
    return loader


def _indexable(
    records: Sequence[dict[str, Any]], world_size: int
) -> Sequence[dict[str, Any]] | DatasetFromList:
    """Return what gives a copy of a dict by its index, and costs a further process little."""
    if isinstance(records, StoredRecords):
        return records
    return DatasetFromList(records, copy=False, serialize=SharedList if world_size > 1 else True)


def _training_mapper(cfg: CfgNode, records: Sequence[dict[str, Any]]) -> FinetuneDatasetMapper:
    limit = cfg.DATALOADER.IMAGE_CACHE_GB
    cache = build_image_cache(records, cfg.INPUT.FORMAT, limit) if limit else None
    return FinetuneDatasetMapper(cfg, is_train=True, image_cache=cache)


def _start_worker(number: int) -> None:
    """
    Let the worker outlive signals that a scheduler or a terminal sends to all processes of a run.

    The training process needs data to end its step and save; it then ends the workers itself.
    """
    worker_init_reset_seed(number)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_WORKER_GRACE_SECONDS))


def build_test_loader(
    cfg: CfgNode, dataset_name: str, mapper: Mapper | None = None
) -> "DataLoader[list[dict[str, Any]]]":
    """Same as ``detectron2.data.build_detection_test_loader``; one image a batch, in order."""
    return build_detection_test_loader(
        cfg, dataset_name, mapper=mapper or FinetuneDatasetMapper(cfg, is_train=False)
    )


def _sampler_builder(cfg: CfgNode, columns: RecordColumns) -> Callable[[int], "Sampler[int]"]:
    name, size = cfg.DATALOADER.SAMPLER_TRAIN, len(columns.file_names)
    if name == "TrainingSampler":
        return functools.partial(_training_sampler, size)
    if name == "RepeatFactorTrainingSampler":
        return functools.partial(_repeat_factor_sampler, _repeat_factors(cfg, columns))
    if name == "RandomSubsetTrainingSampler":
        return functools.partial(_random_subset_sampler, size, cfg.DATALOADER.RANDOM_SUBSET_RATIO)
    raise UserError(
        f"DATALOADER.SAMPLER_TRAIN {name!r} has no resumable order; use TrainingSampler, "
        "RepeatFactorTrainingSampler or RandomSubsetTrainingSampler"
    )


def _repeat_factors(cfg: CfgNode, columns: RecordColumns) -> torch.Tensor:
    # It asks for the classes that an image has, and nothing else.
    pairs = np.unique(np.stack([columns.image_of, columns.categories], axis=1), axis=0)
    images: list[dict[str, Any]] = [{"annotations": []} for _ in columns.file_names]
    for image, category in pairs.tolist():
        images[image]["annotations"].append({"category_id": category})
    factors: torch.Tensor = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
        images, cfg.DATALOADER.REPEAT_THRESHOLD, sqrt=cfg.DATALOADER.REPEAT_SQRT
    )
    return factors


def _training_sampler(size: int, seed: int) -> "Sampler[int]":
    return TrainingSampler(size, seed=seed)


def _repeat_factor_sampler(factors: Any, seed: int) -> "Sampler[int]":
    return RepeatFactorTrainingSampler(factors, seed=seed)


def _random_subset_sampler(size: int, ratio: float, seed: int) -> "Sampler[int]":
    return RandomSubsetTrainingSampler(size, ratio, seed_shuffle=seed, seed_subset=seed)


def _aspect_ratio_groups(columns: RecordColumns) -> bytes:
    """Return 0 for landscape and 1 for portrait or square images, as Detectron2 groups them."""
    unknown = np.flatnonzero(np.isnan(columns.sizes).any(axis=1))
    if len(unknown):
        raise UserError(
            f"{columns.file_names[unknown[0]]} has no width and height, which "
            "DATALOADER.ASPECT_RATIO_GROUPING needs; add them or set it to False"
        )
    height, width = columns.sizes.T
    return (width <= height).astype(np.uint8).tobytes()
