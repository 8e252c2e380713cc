import pytest

from d2ft.config import check_cfg, get_cfg, load_cfg
from d2ft.errors import UserError


def test_defaults_have_no_mistake():
    check_cfg(get_cfg())


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("DATASETS.TRAIN", ("my_set"), r'is the string .my_set., .* write \("my_set",\)'),
        ("DATASETS.TEST", ("my_set"), r'is the string .my_set., .* write \("my_set",\)'),
        ("DATASETS.PROPOSAL_FILES_TRAIN", "a.pkl", r'write \("a\.pkl",\)'),
        ("DATASETS.PROPOSAL_FILES_TEST", "a.pkl", r'write \("a\.pkl",\)'),
        ("FINETUNE.SOURCE_CLASSES", "car", r'write \("car",\)'),
        ("DATASETS.TEST", (1,), "not a tuple of names such as"),
        ("DATASETS.TEST", None, "not a tuple of names such as"),
        ("SOLVER.IMS_PER_BATCH", 0, "is 0; it must be a whole number of at least 1"),
        ("SOLVER.IMS_PER_BATCH", "8", "is '8'; it must be a whole number of at least 1"),
        ("SOLVER.MAX_ITER", 0, "at least 1"),
        ("SOLVER.CHECKPOINT_PERIOD", 0, "at least 1"),
        ("LOG_PERIOD", 0, "at least 1"),
        ("TEST.EVAL_PERIOD", -1, "at least 0"),
        ("DATALOADER.NUM_WORKERS", -1, "at least 0"),
        ("SOLVER.BASE_LR", 0.0, "is 0.0; it must be above 0"),
        ("SOLVER.BASE_LR", float("nan"), "it must be above 0"),
        ("SOLVER.BASE_LR", None, "it must be above 0"),
        ("SOLVER.STEPS", (20, 10), r"is \(20, 10\); each iteration must be above the one before"),
        ("SOLVER.STEPS", (10, 10), "each iteration must be above"),
        ("SOLVER.STEPS", ("10",), "must be a tuple of iterations such as"),
        ("SOLVER.OPTIMIZER", "Adam", "is 'Adam'; it may be SGD, AdamW"),
        ("FINETUNE.HEAD_INIT", "copy", "is 'copy'; it may be skip, remap"),
        ("FINETUNE.UNMATCHED", "zero", "is 'zero'; it may be fresh, matched"),
        ("FINETUNE.CLASS_MAP.rider", None, "is None; it must be the name of a class of MODEL.WEI"),
        ("INPUT.MASK_FORMAT", "rle", "is 'rle'; it may be polygon, bitmask"),
        ("INPUT.RANDOM_FLIP", "both", "it may be horizontal, vertical, none"),
        ("INPUT.MIN_SIZE_TRAIN_SAMPLING", "value", "it may be choice, range"),
        ("DATALOADER.SAMPLER_TRAIN", "WeightedTrainingSampler", "it may be TrainingSampler, Rep"),
        (
            "DATALOADER.SAMPLER_TRAIN",
            "WeightedCategoryTrainingSampler",
            "is 'WeightedCategoryTrainingSampler'; it may be",
        ),
        ("DATALOADER.RANDOM_SUBSET_RATIO", 0.0, r"must be in \(0, 1\]"),
        ("MODEL.PIXEL_STD", [1.0], "has 1 values, but MODEL.PIXEL_MEAN has 3"),
    ],
)
def test_mistake_set_in_python_is_told_with_its_key(key, value, message):
    cfg = get_cfg()
    *groups, name = key.split(".")
    node = cfg
    for group in groups:
        node = node[group]
    node[name] = value
    with pytest.raises(UserError, match=rf"{key} \(set in Python\) .*{message}"):
        check_cfg(cfg)


def test_image_format_and_pixel_mean_must_agree():
    opts = ["INPUT.FORMAT", "L"]
    with pytest.raises(
        UserError,
        match=r"PIXEL_MEAN \(default\) has 3 values, but INPUT\.FORMAT L \(command line\) needs 1",
    ):
        check_cfg(load_cfg(None, opts))
    check_cfg(load_cfg(None, [*opts, "MODEL.PIXEL_MEAN", "[100.0]", "MODEL.PIXEL_STD", "[50.0]"]))


def test_batch_must_be_shared_equally_by_the_processes():
    cfg = load_cfg(None, ["SOLVER.IMS_PER_BATCH", "8"])
    check_cfg(cfg, world_size=4)
    with pytest.raises(UserError, match="is 8, which 3 processes cannot share equally; use a mult"):
        check_cfg(cfg, world_size=3)


def test_batch_that_detectron2_scales_is_judged_by_its_reference():
    cfg = load_cfg(None, ["SOLVER.IMS_PER_BATCH", "8", "SOLVER.REFERENCE_WORLD_SIZE", "4"])
    check_cfg(cfg, world_size=3)


def test_steps_of_a_schedule_without_steps_are_not_judged():
    check_cfg(
        load_cfg(None, ["SOLVER.STEPS", "(2, 1)", "SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR"])
    )


def test_step_beyond_the_end_is_a_warning_that_tells_who_set_both(caplog):
    check_cfg(load_cfg(None, ["SOLVER.MAX_ITER", "100"]))
    assert (
        "SOLVER.STEPS (default) is (30000,): what lies beyond SOLVER.MAX_ITER 100 (command line) "
        "has no effect" in caplog.text
    )


def test_all_mistakes_are_listed_at_once():
    cfg = load_cfg(None, ["SOLVER.IMS_PER_BATCH", "0", "SOLVER.OPTIMIZER", "LARS"])
    cfg.DATASETS.TEST = "my_set"
    with pytest.raises(UserError) as caught:
        check_cfg(cfg)
    head, *findings = str(caught.value).splitlines()
    assert head == "the config has 3 mistakes:"
    assert {line.split(" is ")[0] for line in findings} == {
        "  SOLVER.IMS_PER_BATCH (command line)",
        "  SOLVER.OPTIMIZER (command line)",
        "  DATASETS.TEST (set in Python)",
    }


def test_mistake_in_the_class_map_is_told_with_the_class(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("FINETUNE:\n  CLASS_MAP:\n    st. bernard: null\n    traffic light: tl\n")
    with pytest.raises(
        UserError, match=r"1 mistake.*\n.*CLASS_MAP\.st\. bernard \(\S+a\.yaml:3\) is None"
    ):
        check_cfg(load_cfg(path))
