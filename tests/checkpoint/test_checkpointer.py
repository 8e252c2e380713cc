import json
import logging
import pickle
from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer, PeriodicCheckpointer
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from torch import nn

from d2ft.checkpoint.checkpointer import FinetuneCheckpointer, make_plain
from d2ft.checkpoint.head_remap import HeadInit
from d2ft.errors import UserError
from d2ft.files import sha256

CLASSES = ("car", "bus")


def tiny_detector(num_classes: int = 2) -> nn.Module:
    """Give linear layers the names of a Faster R-CNN's parts."""
    k = num_classes
    return nn.ModuleDict(
        {
            "backbone": nn.ModuleDict({"bottom_up": nn.ModuleDict({"stem": nn.Linear(2, 3)})}),
            "roi_heads": nn.ModuleDict(
                {
                    "box_head": nn.ModuleDict({"fc1": nn.Linear(3, 4)}),
                    "box_predictor": nn.ModuleDict(
                        {"cls_score": nn.Linear(4, k + 1), "bbox_pred": nn.Linear(4, 4 * k)}
                    ),
                }
            ),
        }
    )


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_equal(model: nn.Module, expected: dict[str, torch.Tensor]) -> None:
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def write_zoo_file(path: Path, model: nn.Module) -> str:
    arrays = {name: value.numpy() for name, value in model.state_dict().items()}
    path.write_bytes(pickle.dumps({"model": arrays, "__author__": "Detectron2 Model Zoo"}))
    return str(path)


class Stateful:
    def __init__(self, state):
        self.state = state

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


def mask_rcnn(num_classes: int, seed: int) -> nn.Module:
    cfg = get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.MASK_ON = True
    cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32], [64], [128], [256], [512]]
    cfg.MODEL.RPN.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
    cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p2", "p3", "p4", "p5"]
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = num_classes
    cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
    cfg.MODEL.ROI_BOX_HEAD.NUM_FC = 2
    cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION = 7
    cfg.MODEL.ROI_MASK_HEAD.NAME = "MaskRCNNConvUpsampleHead"
    cfg.MODEL.ROI_MASK_HEAD.NUM_CONV = 4
    torch.manual_seed(seed)
    return build_model(cfg)


@pytest.fixture(scope="module")
def zoo_load(tmp_path_factory):
    """Load an 80-class R50-FPN in the zoo's format into an 8-class one, once."""
    folder = tmp_path_factory.mktemp("zoo")
    source = mask_rcnn(80, seed=1)
    path = write_zoo_file(folder / "model_final_f10217.pkl", source)
    model = mask_rcnn(8, seed=2)
    before = values(model)
    FinetuneCheckpointer(model, report_dir=str(folder)).load(path)
    return source.state_dict(), before, model.state_dict(), path, folder / "load_report.json"


PREDICTORS = {
    f"roi_heads.{layer}.{kind}"
    for layer in ("box_predictor.cls_score", "box_predictor.bbox_pred", "mask_head.predictor")
    for kind in ("weight", "bias")
}


def test_coco_mask_rcnn_gives_every_tensor_but_the_six_predictors(zoo_load):
    source, before, after, _, _ = zoo_load

    for name, value in after.items():
        assert torch.equal(value, before[name] if name in PREDICTORS else source[name]), name


def test_report_of_the_coco_mask_rcnn_lists_exactly_the_six_predictors(zoo_load):
    source, _, after, path, report_file = zoo_load
    report = json.loads(report_file.read_text(encoding="utf-8"))

    assert {row["name"] for row in report["skipped"]} == PREDICTORS
    assert set(report["loaded"]) == set(after) - PREDICTORS
    assert (report["missing"], report["unexpected"], report["ignored"]) == ([], [], [])
    assert report["source"] == path
    assert report["sha256"] == sha256(path)
    for row in report["skipped"]:
        assert row["file_shape"] == list(source[row["name"]].shape)
        assert row["model_shape"] == list(after[row["name"]].shape)


def test_load_logs_the_table_for_the_number_of_classes(tmp_path, caplog):
    path = write_zoo_file(tmp_path / "coco.pkl", tiny_detector(80))
    caplog.set_level(logging.INFO, "d2ft")

    FinetuneCheckpointer(tiny_detector(), thing_classes=CLASSES).load(path)

    assert f"loaded 4 of 8 tensors from {path}" in caplog.text
    assert "the 4 final predictors were re-initialised for 2 classes: expected" in caplog.text


def test_refused_file_leaves_the_model_and_the_folder_untouched(tmp_path):
    other = tiny_detector()
    other["backbone"]["bottom_up"]["stem"] = nn.Linear(2, 5)
    path = write_zoo_file(tmp_path / "wide.pkl", other)
    model = tiny_detector()
    before = values(model)
    checkpointer = FinetuneCheckpointer(model, report_dir=str(tmp_path / "output"))

    with pytest.raises(UserError, match=r"wide\.pkl does not fit the model"):
        checkpointer.load(path)

    assert_equal(model, before)
    assert not (tmp_path / "output").exists()
    # The same checkpointer can load another file.
    checkpointer.load(write_zoo_file(tmp_path / "good.pkl", tiny_detector()))


def test_evaluation_refuses_a_file_without_its_predictors(tmp_path):
    path = write_zoo_file(tmp_path / "coco.pkl", tiny_detector(80))

    with pytest.raises(UserError, match=r"4 tensors.*model_final\.pth.*--resume"):
        FinetuneCheckpointer(tiny_detector(), every_tensor=True).load(path)


def test_empty_weights_train_from_scratch_and_evaluate_nothing(caplog):
    caplog.set_level(logging.INFO, "d2ft")
    assert FinetuneCheckpointer(tiny_detector()).load("") == {}
    assert "training starts from scratch" in caplog.text

    with pytest.raises(UserError, match=r"MODEL\.WEIGHTS is empty.*nothing to evaluate"):
        FinetuneCheckpointer(tiny_detector(), every_tensor=True).load("")


def test_missing_weights_are_named():
    with pytest.raises(UserError, match=r"MODEL\.WEIGHTS gone\.pth does not exist"):
        FinetuneCheckpointer(tiny_detector()).resume_or_load("gone.pth", resume=True)


def test_rows_of_other_classes_are_refused_before_the_model_is_touched(tmp_path):
    FinetuneCheckpointer(tiny_detector(), str(tmp_path), thing_classes=("car", "truck")).save("a")
    model = tiny_detector()
    before = values(model)

    with pytest.raises(UserError, match=r'row 1: "truck" in the file, "bus" in the training set'):
        FinetuneCheckpointer(model, thing_classes=CLASSES).load(str(tmp_path / "a.pth"))

    assert_equal(model, before)


def test_names_given_by_the_user_are_checked_for_a_file_that_says_none(tmp_path, caplog):
    path = write_zoo_file(tmp_path / "a.pkl", tiny_detector())

    with pytest.raises(UserError, match=r'row 0: "bus" in the file'):
        FinetuneCheckpointer(
            tiny_detector(), thing_classes=CLASSES, source_classes=("bus", "car")
        ).load(path)
    FinetuneCheckpointer(tiny_detector(), thing_classes=CLASSES).load(path)

    assert "its 2 class rows were matched by position" in caplog.text


REMAP = HeadInit(remap=True)


def score_rows(model: nn.Module) -> torch.Tensor:
    return model["roi_heads"]["box_predictor"]["cls_score"].weight


@pytest.mark.parametrize("names_from", ["file", "config"])
def test_remap_gives_each_class_the_rows_of_its_name(tmp_path, names_from, caplog):
    caplog.set_level(logging.INFO, "d2ft")
    source, model = tiny_detector(3), tiny_detector()
    fresh = values(model)
    known = {"thing_classes": ("van", "Bus", "cat")} if names_from == "file" else {}
    FinetuneCheckpointer(source, str(tmp_path), **known).save("a")

    FinetuneCheckpointer(
        model,
        thing_classes=CLASSES,
        source_classes=("van", "bus", "cat") if names_from == "config" else (),
        head_init=REMAP,
    ).load(str(tmp_path / "a.pth"))

    assert torch.equal(score_rows(model)[0], fresh["roi_heads.box_predictor.cls_score.weight"][0])
    assert torch.equal(score_rows(model)[1], score_rows(source)[1])
    assert torch.equal(score_rows(model)[2], score_rows(source)[3])
    assert "rows of 1 of 2 classes" in caplog.text


def test_map_with_an_unknown_class_is_refused_before_the_model_is_touched(tmp_path):
    FinetuneCheckpointer(tiny_detector(3), str(tmp_path), thing_classes=("a", "b", "c")).save("a")
    model = tiny_detector()
    before = values(model)
    head_init = HeadInit(remap=True, class_map={"bus": "d"})

    with pytest.raises(UserError, match=r'CLASS_MAP maps "bus" to "d".*a, b, c'):
        FinetuneCheckpointer(model, thing_classes=CLASSES, head_init=head_init).load(
            str(tmp_path / "a.pth")
        )

    assert_equal(model, before)


def test_resumed_checkpoint_is_never_remapped(tmp_path):
    # Its names come in another order than those of the training set, as after an edit of it.
    FinetuneCheckpointer(tiny_detector(), str(tmp_path), thing_classes=("bus", "car")).save("a")

    with pytest.raises(UserError, match=r'row 0: "bus" in the file') as refusal:
        FinetuneCheckpointer(
            tiny_detector(), str(tmp_path), thing_classes=CLASSES, head_init=REMAP
        ).resume_or_load("unused.pth", resume=True)
    assert "remap" not in str(refusal.value)


def test_evaluated_file_is_never_remapped(tmp_path):
    FinetuneCheckpointer(tiny_detector(3), str(tmp_path), thing_classes=("a", "b", "car")).save("a")

    with pytest.raises(UserError, match=r"no trained values for 4 tensors"):
        FinetuneCheckpointer(
            tiny_detector(), thing_classes=CLASSES, head_init=REMAP, every_tensor=True
        ).load(str(tmp_path / "a.pth"))


def test_caffe2_backbone_is_loaded_by_its_matched_names(tmp_path):
    path = tmp_path / "R-50.pkl"
    weight = np.full((3, 2), 7, dtype=np.float32)
    path.write_bytes(pickle.dumps({"stem_w": weight, "stem_b": np.zeros(3, np.float32)}, 2))
    model = tiny_detector()

    rest = FinetuneCheckpointer(model).load(str(path))

    stem = model["backbone"]["bottom_up"]["stem"]
    assert torch.equal(stem.weight, torch.from_numpy(weight))
    assert rest == {"__author__": "Caffe2"}


def test_saved_file_holds_plain_data_and_its_class_names(tmp_path):
    state = {"hooks": defaultdict(dict, best=np.float64(0.5)), "iteration": np.int64(9)}
    checkpointer = FinetuneCheckpointer(
        tiny_detector(),
        str(tmp_path),
        thing_classes=CLASSES,
        metadata={"pixel_format": "BGR"},
        trainer=Stateful(state),
    )
    checkpointer.save("model_0000009", iteration=9)

    content = torch.load(tmp_path / "model_0000009.pth", weights_only=True)
    assert content["d2ft"] == {"pixel_format": "BGR", "format": 1, "thing_classes": ["car", "bus"]}
    assert content["trainer"] == {"hooks": {"best": 0.5}, "iteration": 9}
    assert type(content["trainer"]["hooks"]) is dict
    assert content["iteration"] == 9


def test_plain_detectron2_loads_the_saved_file(tmp_path):
    model = tiny_detector()
    FinetuneCheckpointer(model, str(tmp_path), thing_classes=CLASSES).save("model_final")
    other = tiny_detector()

    rest = DetectionCheckpointer(other).load(str(tmp_path / "model_final.pth"))

    assert_equal(other, values(model))
    assert rest["d2ft"]["thing_classes"] == ["car", "bus"]


def test_state_of_a_real_optimizer_and_scheduler_comes_back(tmp_path):
    model = tiny_detector()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3])
    sum(parameter.sum() for parameter in model.parameters()).backward()
    optimizer.step()
    scheduler.step()
    parts = {"optimizer": optimizer, "scheduler": Stateful(scheduler.state_dict())}
    scheduler_state = dict(scheduler.state_dict())
    scheduler_state["milestones"] = dict(scheduler_state["milestones"])
    FinetuneCheckpointer(model, str(tmp_path), **parts).save("model_0000000", iteration=0)

    fresh = tiny_detector()
    restored = torch.optim.SGD(fresh.parameters(), lr=0.5, momentum=0.9)
    restored_scheduler = Stateful(None)
    rest = FinetuneCheckpointer(
        fresh, str(tmp_path), optimizer=restored, scheduler=restored_scheduler
    ).resume_or_load("", resume=True)

    assert rest["iteration"] == 0
    assert restored.param_groups[0]["lr"] == 0.1
    buffers = [state["momentum_buffer"] for state in restored.state.values()]
    assert all(torch.equal(buffer, torch.ones_like(buffer)) for buffer in buffers)
    assert restored_scheduler.state == scheduler_state


def test_resume_takes_the_last_checkpoint_and_needs_every_tensor_of_it(tmp_path):
    FinetuneCheckpointer(tiny_detector(3), str(tmp_path)).save("model_0000000")

    with pytest.raises(UserError, match=r"model_0000000\.pth has no trained values for 4 tensors"):
        FinetuneCheckpointer(tiny_detector(2), str(tmp_path)).resume_or_load("unused.pth")


def test_resume_keeps_the_report_of_the_first_weights_and_their_class_names(tmp_path, caplog):
    output = tmp_path / "output"
    output.mkdir()
    weights = write_zoo_file(tmp_path / "coco.pkl", tiny_detector(3))
    options = {
        "thing_classes": CLASSES,
        "source_classes": ("a", "b", "c"),
        "report_dir": str(output),
    }
    first = FinetuneCheckpointer(tiny_detector(), str(output), **options)
    first.resume_or_load(weights, resume=True)
    DetectionCheckpointer(first.model, str(output)).save("model_0000000")
    caplog.clear()

    FinetuneCheckpointer(tiny_detector(), str(output), **options).resume_or_load(weights)

    report = json.loads((output / "load_report.json").read_text(encoding="utf-8"))
    assert report["source"] == weights
    assert "matched by position" not in caplog.text


def test_last_checkpoint_that_is_gone_is_named(tmp_path):
    (tmp_path / "last_checkpoint").write_text("model_0000004.pth")

    with pytest.raises(UserError, match=r"last_checkpoint names 'model_0000004\.pth'"):
        FinetuneCheckpointer(tiny_detector(), str(tmp_path)).resume_or_load("", resume=True)


def test_best_model_does_not_become_the_one_to_resume_from(tmp_path):
    checkpointer = FinetuneCheckpointer(tiny_detector(), str(tmp_path))
    checkpointer.save("model_0000099")
    checkpointer.save("model_best")
    checkpointer.save("model_averaged", tag=False)

    assert Path(checkpointer.get_checkpoint_file()).name == "model_0000099.pth"
    assert (tmp_path / "model_best.pth").is_file()


def test_periodic_checkpointer_of_detectron2_keeps_the_newest(tmp_path):
    checkpointer = FinetuneCheckpointer(tiny_detector(), str(tmp_path))
    periodic = PeriodicCheckpointer(checkpointer, period=1, max_iter=3, max_to_keep=1)
    for iteration in range(3):
        periodic.step(iteration)

    assert sorted(path.name for path in tmp_path.glob("*.pth")) == [
        "model_0000002.pth",
        "model_final.pth",
    ]
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"


def test_save_that_fails_keeps_the_old_file_and_tag(tmp_path):
    checkpointer = FinetuneCheckpointer(tiny_detector(), str(tmp_path))
    checkpointer.save("model_0000000")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    with pytest.raises(TypeError, match=r"^results\.path\[1\] is a PosixPath"):
        checkpointer.save("model_0000000", results={"path": ["a", Path("b")]})

    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_process_that_does_not_save_writes_nothing(tmp_path):
    FinetuneCheckpointer(tiny_detector(), str(tmp_path), save_to_disk=False).save("model_final")

    assert list(tmp_path.iterdir()) == []


class Pair(NamedTuple):
    left: int
    right: np.float32


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (np.bool_(True), True),
        (np.str_("a"), "a"),
        (OrderedDict(a=[1, None]), {"a": [1, None]}),
        ({3: (1.5, "x")}, {3: (1.5, "x")}),
        (Pair(1, np.float32(2)), (1, 2.0)),
        (torch.Size([2, 3]), (2, 3)),
    ],
)
def test_subclasses_and_numpy_scalars_become_plain(value, plain):
    result = make_plain(value, "x")

    assert result == plain
    assert type(result) is type(plain)


@pytest.mark.parametrize(
    ("value", "where"),
    [
        (np.zeros(2), r"^x is a ndarray"),
        ({"a": {1, 2}}, r"^x\.a is a set"),
        ({(1, b"k"): 0}, r"^x, key \(1, b'k'\)\[1\] is a bytes"),
        ([0, {"f": print}], r"^x\[1\]\.f is a builtin_function_or_method"),
    ],
)
def test_value_that_needs_code_to_load_is_refused_with_its_path(value, where):
    with pytest.raises(TypeError, match=where):
        make_plain(value, "x")
