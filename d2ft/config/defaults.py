"""The keys of the config: those that d2ft adds, with unit and reason, and what of unknown ones."""

import difflib
import logging
from collections.abc import Iterator
from typing import Any

from detectron2.config import CfgNode
from detectron2.config import get_cfg as get_detectron2_cfg

from d2ft.errors import UserError

logger = logging.getLogger(__name__)

# Keys that some builds of Detectron2 have and others lack, with the default of those that have
# them. A run's config.yaml lists every key of the Detectron2 that wrote it; one that is still at
# the default below means nothing to a build without it and may be dropped there.
HOST_ONLY_KEYS: dict[str, Any] = {
    # In the main branch of 2026-06, not in the builds of 2024-04:
    # https://github.com/facebookresearch/detectron2/blob/main/detectron2/config/defaults.py
    "FLOAT32_PRECISION": "",
}


def add_d2ft_config(cfg: CfgNode) -> None:
    """
    Add the keys of d2ft to a config of Detectron2, so that it reads our YAML files.

    A config that has them already is left as it is.
    """
    if "FINETUNE" in cfg:
        return

    # Iterations between two log lines. 20 is what Detectron2 writes into its code.
    cfg.LOG_PERIOD = 20

    # Share of the training set, in (0, 1], that SAMPLER_TRAIN RandomSubsetTrainingSampler draws
    # from. Detectron2 reads this key but never declares it, so no YAML could set it.
    cfg.DATALOADER.RANDOM_SUBSET_RATIO = 1.0

    # Whether a model on the CPU uses d2ft's RoIAlign and backward of the RPN, which give Detectron2's
    # results up to rounding in a fraction of the time, and its process keeps freed memory. Means
    # nothing on a GPU.
    cfg.MODEL.FAST_CPU = True

    # "SGD" or "AdamW". Detectron2 builds SGD only; small models fine-tune better with AdamW.
    cfg.SOLVER.OPTIMIZER = "SGD"

    cfg.FINETUNE = CfgNode()
    # Class names that MODEL.WEIGHTS was trained for, in the order of its head's rows. Needed only
    # where neither the file nor the table of known checkpoints tells them.
    cfg.FINETUNE.SOURCE_CLASSES = ()
    # What becomes of the class rows of MODEL.WEIGHTS (scores, boxes and masks of a class).
    # "skip": those of another number of classes are left out, and the final predictors start
    # fresh, as in Detectron2. "remap": each class gets the rows of the class of the same name.
    # Never applied to a checkpoint that --resume continues from, nor in evaluation.
    cfg.FINETUNE.HEAD_INIT = "skip"
    # Class of the training set -> class of the weights, where the names do not tell, such as
    # "rider: person". Names may hold spaces; other names still meet by themselves.
    cfg.FINETUNE.CLASS_MAP = CfgNode(new_allowed=True)
    # How "remap" starts a class that the weights do not know. "fresh": as the model was built;
    # "matched": normal, with mean and standard deviation of the weights' own class rows.
    cfg.FINETUNE.UNMATCHED = "fresh"
    _add_schedule_keys(cfg)
    _add_learning_keys(cfg)
    _add_safety_keys(cfg)
    _add_training_keys(cfg)
    _add_speed_keys(cfg)


def _add_schedule_keys(cfg: CfgNode) -> None:
    # In epochs: passes over DATASETS.TRAIN after filters, repeats and sampling. What is above 0
    # decides the key in iterations beside it; setting both is an error.
    cfg.SOLVER.EPOCHS = 0.0  # MAX_ITER
    cfg.SOLVER.STEPS_EPOCHS = ()  # STEPS
    cfg.SOLVER.WARMUP_EPOCHS = 0.0  # WARMUP_ITERS
    cfg.SOLVER.CHECKPOINT_EPOCHS = 0.0  # CHECKPOINT_PERIOD
    cfg.TEST.EVAL_EPOCHS = 0.0  # EVAL_PERIOD
    # The batch that BASE_LR and what is counted in iterations were made for; they are scaled
    # linearly to IMS_PER_BATCH. 0: they are taken as they stand.
    cfg.SOLVER.REFERENCE_BATCH = 0
    # Share of the run, in [0, 1), after which LR_SCHEDULER_NAME WarmupFlatCosineLR begins to fall.
    cfg.SOLVER.FLAT_RATIO = 0.75


def _add_learning_keys(cfg: CfgNode) -> None:
    # What does not learn: names (stem, res2 .. res5, backbone, fpn, rpn, box_head, box_predictor,
    # mask_head, mask_predictor, head) or patterns of module and parameter names with * and ?.
    # "!" before one takes it out again: ("*", "!*predictor*"). In Detectron2's words the backbone
    # holds the FPN. BACKBONE.FREEZE_AT holds as well.
    cfg.FINETUNE.FREEZE = ()
    # Phases at the beginning of the run, in order, each freezing more: a list of
    # {EPOCHS: 1, FREEZE: [backbone, rpn]}, or ITERS for EPOCHS. After them all of it learns.
    cfg.FINETUNE.PHASES = []
    # Learning rate of a layer, times this for each step towards the image: heads, FPN and RPN have
    # BASE_LR, res5 that times LAYER_DECAY, res4 times its square, and so on. 1: all have BASE_LR.
    cfg.FINETUNE.LAYER_DECAY = 1.0
    # Name or pattern as in FREEZE -> factor on the learning rate; the last that fits counts.
    cfg.FINETUNE.LR_FACTORS = CfgNode(new_allowed=True)

    _add_data_shape_keys(cfg)


def _add_data_shape_keys(cfg: CfgNode) -> None:
    # Datasets of one's own: name -> what d2ft/data/custom.py lists, as
    # "my_train: {FORMAT: coco, JSON: data/train.json, IMAGES: data/images}".
    cfg.DATASETS.CUSTOM = CfgNode(new_allowed=True)
    # Datasets made of others: name -> what d2ft/data/derived.py lists, as
    # "my_train: {FROM: [a, b], CLASSES: [cat, dog], FRACTION: 0.1, SEED: 0, REPEAT: 8}".
    cfg.DATASETS.DERIVED = CfgNode(new_allowed=True)
    # Augmentations of training in place of Detectron2's resize, crop and flip; empty keeps those.
    # Each is the name of a class in detectron2.data.transforms, or of an albumentations transform
    # with "albumentations." before it, or a list of that and a mapping of its arguments:
    # ["RandomFlip", ["RandomBrightness", {intensity_min: 0.9, intensity_max: 1.1}]].
    cfg.INPUT.AUGMENTATIONS = []
    # Training images that may be unreadable, or of another size than annotated, over a run. They
    # are replaced by others and listed at the end; one more, or any with 0, is an error.
    cfg.DATALOADER.MAX_BAD_IMAGES = 0


def _add_safety_keys(cfg: CfgNode) -> None:
    # Steps of the whole run that may be left out because their loss is NaN or infinite; the next
    # such loss ends the run with an error that names the images.
    cfg.SOLVER.MAX_SKIPPED_STEPS = 0


def _add_training_keys(cfg: CfgNode) -> None:
    # Number of parts that the batch of a process is split into, to need less memory: gradients are
    # those of the whole batch. Costs a forward pass more if the model has ROI heads.
    cfg.SOLVER.ACCUMULATE = 1
    # Of SOLVER.AMP.ENABLED: "float16" (GPU) or "bfloat16" (GPU and CPU).
    cfg.SOLVER.AMP.DTYPE = "float16"
    # Compile the backbone with torch.compile. Where that does not work, a warning says so.
    cfg.MODEL.COMPILE = False

    # Moving average of the weights, evaluated and saved beside them (metrics "ema/...", file
    # model_ema.pth). After update t it keeps min(DECAY, (1 + t) / (10 + t)) of itself.
    cfg.FINETUNE.EMA = CfgNode()
    cfg.FINETUNE.EMA.ENABLED = False
    cfg.FINETUNE.EMA.DECAY = 0.999

    # Losses on DATASETS.TEST at each evaluation: val/total_loss and val/<loss>.
    cfg.TEST.VALIDATION_LOSS = False

    # Metric whose best model is kept as model_best.pth, such as "segm/AP", "ema/segm/AP",
    # "val/total_loss", or "<dataset>/segm/AP" with several test sets. Empty: none is kept.
    cfg.FINETUNE.BEST = CfgNode()
    cfg.FINETUNE.BEST.METRIC = ""
    cfg.FINETUNE.BEST.MODE = "max"  # "min" for losses
    # End the run after this many evaluations in a row in which BEST.METRIC gained MIN_GAIN or less
    # over its best. 0: never.
    cfg.FINETUNE.EARLY_STOPPING = CfgNode()
    cfg.FINETUNE.EARLY_STOPPING.PATIENCE = 0
    cfg.FINETUNE.EARLY_STOPPING.MIN_GAIN = 0.0


def _add_speed_keys(cfg: CfgNode) -> None:
    # What resizes training images: "pil", to the bits of Detectron2, or "torch" in a third of the
    # time. Both by the same rule; of real Cityscapes frames at heights of 800 to 1024, "torch" had
    # 0.2 % of the values one grey level off and 4 in 10 million two, of COCO images 0.01 % one.
    # Test images are always resized by "pil".
    cfg.INPUT.RESIZE_TRAIN = "pil"
    # How many GB (10^9 bytes) of disk decoded training images may take, in the cache folder
    # ($D2FT_CACHE, else ~/.cache/d2ft): they are decoded once and mapped into memory from then on.
    # A frame of Cityscapes takes 6.3 MB, its training set 18.7 GB. 0: no cache.
    cfg.DATALOADER.IMAGE_CACHE_GB = 0.0


def get_cfg() -> CfgNode:
    """Return a copy of Detectron2's default config with the keys of d2ft."""
    cfg = get_detectron2_cfg()
    add_d2ft_config(cfg)
    return cfg


def get_value(cfg: CfgNode, key: str) -> Any:
    """
    Return the value of a key by its full name, such as "SOLVER.BASE_LR".

    Raises:
        KeyError: if there is none of this name.
    """
    node, rest = cfg, key
    while isinstance(node, CfgNode):
        if rest in node:  # also a class name with dots in it
            return node[rest]
        group, _, rest = rest.partition(".")
        node = node.get(group)
    raise KeyError(key)


def skip_or_refuse(key: str, value: Any, origin: str, cfg: CfgNode) -> None:
    """
    Return if a key that ``cfg`` lacks may be left out, which the log then says.

    That is a key which its project deprecated, as in Detectron2, or one of ``HOST_ONLY_KEYS`` at
    its default.

    Args:
        key: full name.
        value: what was to be set; a dict for a group of keys.
        origin: "<file>:<line>" or "command line", for the message.
        cfg: the whole config.

    Raises:
        UserError: for any other key; the message gives the nearest known one.
    """
    if cfg.key_is_deprecated(key):
        return
    if cfg.key_is_renamed(key):
        try:
            cfg.raise_key_rename_error(key)
        except KeyError as error:
            raise UserError(f"{origin}: {error.args[0]}") from error
    if key not in HOST_ONLY_KEYS:
        raise UserError(f"{origin}: there is no config key {key}{_hint(key, cfg)}")
    if value != HOST_ONLY_KEYS[key]:
        raise UserError(
            f"{origin}: {key} is {value!r}, but the installed Detectron2 lacks this key: "
            "install a build that has it, or take the line out"
        )
    logger.info(
        "%s: left out %s, which the installed Detectron2 lacks; it is at its default", origin, key
    )


def _hint(key: str, cfg: CfgNode) -> str:
    if key.rpartition(".")[2] == "_BASE_":
        return "; _BASE_ is for files, outside of all groups"
    wanted = key.upper()

    def likeness(known: str) -> tuple[float, float]:
        # A slip of the finger shows in the whole name, a wrong group in the last part alone.
        whole = difflib.SequenceMatcher(None, wanted, known).ratio()
        ends = wanted.rpartition(".")[2], known.rpartition(".")[2]
        return max(whole, difflib.SequenceMatcher(None, *ends).ratio()), whole

    nearest = max(_keys(cfg), key=likeness)
    if nearest == key:
        return "; in YAML, write each group and the key on a line of its own, without dots"
    if likeness(nearest)[0] >= 0.6:  # the cutoff of difflib.get_close_matches
        return f"; did you mean {nearest}?"
    return "; d2ft/config/defaults.py and Detectron2's own defaults.py list those that are"


def _keys(node: CfgNode, prefix: str = "") -> Iterator[str]:
    for name, value in node.items():
        yield prefix + name
        if isinstance(value, CfgNode):
            yield from _keys(value, f"{prefix}{name}.")
