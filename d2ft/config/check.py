"""Check what can be wrong in a config alone, before data or weights are looked at."""

import itertools
import logging
import math
from collections.abc import Iterator

from detectron2.config import CfgNode

from d2ft.config.defaults import get_value
from d2ft.config.io import who_set
from d2ft.errors import UserError

logger = logging.getLogger(__name__)

# key -> the values that are supported.
_CHOICES: dict[str, tuple[str, ...]] = {
    "INPUT.MASK_FORMAT": ("polygon", "bitmask"),
    "INPUT.RESIZE_TRAIN": ("pil", "torch"),
    "INPUT.RANDOM_FLIP": ("horizontal", "vertical", "none"),
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": ("choice", "range"),
    # Detectron2's Weighted* samplers draw from a state that no resumed run can return to.
    "DATALOADER.SAMPLER_TRAIN": (
        "TrainingSampler",
        "RepeatFactorTrainingSampler",
        "RandomSubsetTrainingSampler",
    ),
    "SOLVER.OPTIMIZER": ("SGD", "AdamW"),
    "SOLVER.LR_SCHEDULER_NAME": (
        "WarmupMultiStepLR",
        "WarmupCosineLR",
        "WarmupStepWithFixedGammaLR",
        "WarmupLinearLR",
        "WarmupFlatCosineLR",
    ),
    "FINETUNE.HEAD_INIT": ("skip", "remap"),
    "FINETUNE.UNMATCHED": ("fresh", "matched"),
    "FINETUNE.BEST.MODE": ("max", "min"),
    "SOLVER.AMP.DTYPE": ("float16", "bfloat16"),
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": ("value", "norm", "full_model"),
}

# A string here would be read letter by letter.
_NAME_LISTS = (
    "DATASETS.TRAIN",
    "DATASETS.TEST",
    "DATASETS.PROPOSAL_FILES_TRAIN",
    "DATASETS.PROPOSAL_FILES_TEST",
    "FINETUNE.SOURCE_CLASSES",
    "FINETUNE.FREEZE",
)

# key -> smallest value. Where it is 0, that switches the thing off; the others divide by it.
_WHOLE_NUMBERS = {
    "SOLVER.IMS_PER_BATCH": 1,
    "SOLVER.MAX_ITER": 1,
    "SOLVER.CHECKPOINT_PERIOD": 1,
    "TEST.EVAL_PERIOD": 0,
    "LOG_PERIOD": 1,
    "SOLVER.MAX_SKIPPED_STEPS": 0,
    "DATALOADER.NUM_WORKERS": 0,
    "DATALOADER.MAX_BAD_IMAGES": 0,
    "SOLVER.REFERENCE_BATCH": 0,
    "SOLVER.ACCUMULATE": 1,
    "FINETUNE.EARLY_STOPPING.PATIENCE": 0,
}

# key -> smallest and largest value. The keys in epochs switch themselves off by 0.
_NUMBERS = {
    "SOLVER.EPOCHS": (0.0, math.inf),
    "SOLVER.WARMUP_EPOCHS": (0.0, math.inf),
    "SOLVER.CHECKPOINT_EPOCHS": (0.0, math.inf),
    "TEST.EVAL_EPOCHS": (0.0, math.inf),
    "SOLVER.FLAT_RATIO": (0.0, 1.0),
    "FINETUNE.LAYER_DECAY": (0.0, 1.0),
    "FINETUNE.EMA.DECAY": (0.0, 1.0),
    "FINETUNE.EARLY_STOPPING.MIN_GAIN": (0.0, math.inf),
}

# INPUT.FORMAT -> channels of an image. Other modes of Pillow are possible and not judged.
_CHANNELS = {"BGR": 3, "RGB": 3, "YUV-BT.601": 3, "L": 1}

_PHASE_KEYS = ({"EPOCHS", "FREEZE"}, {"ITERS", "FREEZE"})

_Findings = Iterator[tuple[str, str]]


def check_cfg(cfg: CfgNode, world_size: int = 1) -> None:
    """
    Refuse a config that cannot train or evaluate whatever the data and weights are.

    Args:
        cfg: a config with the keys of :func:`~d2ft.config.add_d2ft_config`; not changed.
        world_size: number of processes that share SOLVER.IMS_PER_BATCH.

    Raises:
        UserError: one, listing every finding with its key and who set it.
    """
    if cfg.TEST.AUG.ENABLED:
        # As in Detectron2, whose train_net.py has it outside of its trainer.
        origin = who_set(cfg, "TEST.AUG.ENABLED")
        logger.warning(
            "TEST.AUG.ENABLED (%s) has no effect: it is for trainers that read it", origin
        )
    findings = [
        *_check_choices(cfg),
        *_check_name_lists(cfg),
        *_check_class_map(cfg),
        *_check_whole_numbers(cfg),
        *_check_numbers(cfg),
        *_check_phases(cfg),
        *_check_batch(cfg, world_size),
        *_check_best(cfg),
        *_check_learning_rate(cfg),
        *_check_subset_ratio(cfg),
        *_check_pixels(cfg),
    ]
    if findings:
        lines = [f"{key} ({who_set(cfg, key)}) {problem}" for key, problem in findings]
        count = "1 mistake" if len(lines) == 1 else f"{len(lines)} mistakes"
        raise UserError("\n  ".join([f"the config has {count}:", *lines]))


def _check_choices(cfg: CfgNode) -> _Findings:
    for key, choices in _CHOICES.items():
        value = get_value(cfg, key)
        if value not in choices:
            yield key, f"is {value!r}; it may be {', '.join(choices)}"


def _check_name_lists(cfg: CfgNode) -> _Findings:
    for key in _NAME_LISTS:
        value = get_value(cfg, key)
        if isinstance(value, str):
            yield key, f'is the string {value!r}, not a tuple of names; write ("{value}",)'
        elif not isinstance(value, (tuple, list)) or not all(isinstance(v, str) for v in value):
            yield key, f'is {value!r}, not a tuple of names such as ("name",)'


def _check_class_map(cfg: CfgNode) -> _Findings:
    for target, source in cfg.FINETUNE.CLASS_MAP.items():
        # YAML reads a class that is named by digits as a number.
        if type(source) not in (str, int):
            yield (
                f"FINETUNE.CLASS_MAP.{target}",
                f"is {source!r}; it must be the name of a class of MODEL.WEIGHTS",
            )


def _check_whole_numbers(cfg: CfgNode) -> _Findings:
    for key, smallest in _WHOLE_NUMBERS.items():
        value = get_value(cfg, key)
        if type(value) is not int or value < smallest:
            yield key, f"is {value!r}; it must be a whole number of at least {smallest}"


def _check_numbers(cfg: CfgNode) -> _Findings:
    for key, (smallest, largest) in _NUMBERS.items():
        value = get_value(cfg, key)
        if not isinstance(value, (int, float)) or not smallest <= value <= largest:
            yield key, f"is {value!r}; it must be from {smallest:g} to {largest:g}"


def _check_phases(cfg: CfgNode) -> _Findings:
    for number, phase in enumerate(cfg.FINETUNE.PHASES, start=1):
        good = "a mapping such as {EPOCHS: 1, FREEZE: [backbone, rpn]}, or with ITERS"
        if not isinstance(phase, dict) or set(phase) not in _PHASE_KEYS:
            yield "FINETUNE.PHASES", f"has {phase!r} as number {number}; it must be {good}"
            continue
        length = phase.get("EPOCHS", phase.get("ITERS"))
        if not isinstance(length, (int, float)) or not length > 0:
            yield "FINETUNE.PHASES", f"has a length of {length!r} in number {number}: {good}"
        patterns = phase["FREEZE"]
        if not isinstance(patterns, (list, tuple)) or not all(isinstance(p, str) for p in patterns):
            yield "FINETUNE.PHASES", f"has FREEZE {patterns!r} in number {number}: {good}"


def _check_batch(cfg: CfgNode, world_size: int) -> _Findings:
    batch = cfg.SOLVER.IMS_PER_BATCH
    # With a reference, Detectron2 scales the batch from that number of processes to ours.
    processes = cfg.SOLVER.REFERENCE_WORLD_SIZE or world_size
    if isinstance(batch, int) and batch > 0 and batch % processes:
        yield (
            "SOLVER.IMS_PER_BATCH",
            f"is {batch}, which {processes} processes cannot share equally; "
            f"use a multiple of {processes}",
        )
        return
    parts = cfg.SOLVER.ACCUMULATE
    if all(type(n) is int and n > 0 for n in (batch, parts)) and batch // processes % parts:
        yield (
            "SOLVER.ACCUMULATE",
            f"is {parts}, but the {batch // processes} images of a process cannot be split into "
            "that many equal parts",
        )


def _check_best(cfg: CfgNode) -> _Findings:
    metric = cfg.FINETUNE.BEST.METRIC
    if cfg.FINETUNE.EARLY_STOPPING.PATIENCE and not metric:
        yield "FINETUNE.BEST.METRIC", "is empty, but FINETUNE.EARLY_STOPPING needs it"
    if metric and not cfg.DATASETS.TEST:
        yield "FINETUNE.BEST.METRIC", f"is {metric!r}, but DATASETS.TEST is empty"
    if metric.startswith("ema/") and not cfg.FINETUNE.EMA.ENABLED:
        yield "FINETUNE.BEST.METRIC", f"is {metric!r}, which needs FINETUNE.EMA.ENABLED True"
    if "val/" in metric and not cfg.TEST.VALIDATION_LOSS:
        yield "FINETUNE.BEST.METRIC", f"is {metric!r}, which needs TEST.VALIDATION_LOSS True"


def _check_learning_rate(cfg: CfgNode) -> _Findings:
    rate = cfg.SOLVER.BASE_LR
    if not isinstance(rate, (int, float)) or not rate > 0:
        yield "SOLVER.BASE_LR", f"is {rate!r}; it must be above 0"

    # The other schedules do not read STEPS.
    if cfg.SOLVER.LR_SCHEDULER_NAME != "WarmupMultiStepLR":
        return
    steps = cfg.SOLVER.STEPS
    if not isinstance(steps, (tuple, list)) or not all(type(step) is int for step in steps):
        yield "SOLVER.STEPS", f"is {steps!r}; it must be a tuple of iterations such as (20755,)"
    elif any(later <= earlier for earlier, later in itertools.pairwise(steps)):
        yield "SOLVER.STEPS", f"is {tuple(steps)}; each iteration must be above the one before it"
    elif isinstance(cfg.SOLVER.MAX_ITER, int) and any(s > cfg.SOLVER.MAX_ITER for s in steps):
        logger.warning(
            "SOLVER.STEPS (%s) is %s: what lies beyond SOLVER.MAX_ITER %d (%s) has no effect",
            who_set(cfg, "SOLVER.STEPS"),
            tuple(steps),
            cfg.SOLVER.MAX_ITER,
            who_set(cfg, "SOLVER.MAX_ITER"),
        )


def _check_subset_ratio(cfg: CfgNode) -> _Findings:
    ratio = cfg.DATALOADER.RANDOM_SUBSET_RATIO
    if not isinstance(ratio, (int, float)) or not 0 < ratio <= 1:
        yield "DATALOADER.RANDOM_SUBSET_RATIO", f"is {ratio!r}; it must be in (0, 1]"


def _check_pixels(cfg: CfgNode) -> _Findings:
    mean, std = cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD
    if len(std) != len(mean):
        yield "MODEL.PIXEL_STD", f"has {len(std)} values, but MODEL.PIXEL_MEAN has {len(mean)}"
    channels = _CHANNELS.get(cfg.INPUT.FORMAT, len(mean))
    if len(mean) != channels:
        yield (
            "MODEL.PIXEL_MEAN",
            f"has {len(mean)} values, but INPUT.FORMAT {cfg.INPUT.FORMAT} "
            f"({who_set(cfg, 'INPUT.FORMAT')}) needs {channels}, one for each channel",
        )
