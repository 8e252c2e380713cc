"""Build the training and test loaders of a config."""

import functools
import math
import signal
from collections.abc import Callable
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import (
    DatasetFromList,
    build_detection_test_loader,
    build_detection_train_loader,
    get_detection_dataset_dicts,
)
from detectron2.data.build import worker_init_reset_seed
from detectron2.data.samplers import (
    RandomSubsetTrainingSampler,
    RepeatFactorTrainingSampler,
    TrainingSampler,
)
from detectron2.utils import comm
from torch.utils.data import DataLoader, Sampler

from d2ft.data.bad_images import BadImages
from d2ft.data.image_cache import build_image_cache
from d2ft.data.mapper import FinetuneDatasetMapper
from d2ft.data.shared_list import SharedList
from d2ft.data.stream import SampleStream
from d2ft.errors import UserError

# How long a loader worker goes on after a SIGTERM: the step that it feeds has to end.
_WORKER_GRACE_SECONDS = 30

Mapper = Callable[[dict[str, Any]], Any]


def training_records(cfg: CfgNode, *, say: bool = True) -> list[dict[str, Any]]:
    """
    Return the dataset dicts of DATASETS.TRAIN that remain after Detectron2's filters.

    Args:
        cfg: DATASETS, DATALOADER and MODEL are read.
        say: let Detectron2 print its table of instances by class.
    """
    records: list[dict[str, Any]] = get_detection_dataset_dicts(
        list(cfg.DATASETS.TRAIN),
        filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
        min_keypoints=(
            cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if cfg.MODEL.KEYPOINT_ON else 0
        ),
        proposal_files=cfg.DATASETS.PROPOSAL_FILES_TRAIN if cfg.MODEL.LOAD_PROPOSALS else None,
        check_consistency=say,
    )
    return records


def epoch_samples(cfg: CfgNode, records: list[dict[str, Any]]) -> int:
    """
    Return how many samples one pass over the training data has.

    Args:
        cfg: of which DATALOADER is read.
        records: of :func:`training_records`.
    """
    if cfg.DATALOADER.SAMPLER_TRAIN == "RepeatFactorTrainingSampler":
        # The sampler rounds each factor up or down at random; their sum is what it comes to.
        return math.ceil(float(_repeat_factors(cfg, records).sum()))
    if cfg.DATALOADER.SAMPLER_TRAIN == "RandomSubsetTrainingSampler":
        return max(1, int(len(records) * cfg.DATALOADER.RANDOM_SUBSET_RATIO))
    return len(records)


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
    world_size = comm.get_world_size()
    stream = SampleStream(
        DatasetFromList(records, copy=False, serialize=SharedList if world_size > 1 else True),
        mapper or _training_mapper(cfg, records),
        _sampler_builder(cfg, records),
        batch_size=cfg.SOLVER.IMS_PER_BATCH // world_size,
        seed=cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed(),
        groups=_aspect_ratio_groups(records) if cfg.DATALOADER.ASPECT_RATIO_GROUPING else None,
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


def _training_mapper(cfg: CfgNode, records: list[dict[str, Any]]) -> FinetuneDatasetMapper:
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


def _sampler_builder(
    cfg: CfgNode, records: list[dict[str, Any]]
) -> Callable[[int], "Sampler[int]"]:
    name = cfg.DATALOADER.SAMPLER_TRAIN
    if name == "TrainingSampler":
        return functools.partial(_training_sampler, len(records))
    if name == "RepeatFactorTrainingSampler":
        return functools.partial(_repeat_factor_sampler, _repeat_factors(cfg, records))
    if name == "RandomSubsetTrainingSampler":
        return functools.partial(
            _random_subset_sampler, len(records), cfg.DATALOADER.RANDOM_SUBSET_RATIO
        )
    raise UserError(
        f"DATALOADER.SAMPLER_TRAIN {name!r} has no resumable order; use TrainingSampler, "
        "RepeatFactorTrainingSampler or RandomSubsetTrainingSampler"
    )


def _repeat_factors(cfg: CfgNode, records: list[dict[str, Any]]) -> torch.Tensor:
    factors: torch.Tensor = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
        records, cfg.DATALOADER.REPEAT_THRESHOLD, sqrt=cfg.DATALOADER.REPEAT_SQRT
    )
    return factors


def _training_sampler(size: int, seed: int) -> "Sampler[int]":
    return TrainingSampler(size, seed=seed)


def _repeat_factor_sampler(factors: Any, seed: int) -> "Sampler[int]":
    return RepeatFactorTrainingSampler(factors, seed=seed)


def _random_subset_sampler(size: int, ratio: float, seed: int) -> "Sampler[int]":
    return RandomSubsetTrainingSampler(size, ratio, seed_shuffle=seed, seed_subset=seed)


def _aspect_ratio_groups(records: list[dict[str, Any]]) -> list[int]:
    """Return 0 for landscape and 1 for portrait or square images, as Detectron2 groups them."""
    for record in records:
        if "width" not in record or "height" not in record:
            raise UserError(
                f"{record.get('file_name', 'a dataset dict')} has no width and height, which "
                "DATALOADER.ASPECT_RATIO_GROUPING needs; add them or set it to False"
            )
    return [0 if record["width"] > record["height"] else 1 for record in records]
