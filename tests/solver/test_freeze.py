"""What learns, and how fast."""

import pytest
import torch
from detectron2.modeling import build_model

from d2ft.config import load_cfg, load_cfg_text
from d2ft.errors import UserError
from d2ft.solver import (
    Phases,
    build_optimizer,
    describe_parameters,
    freeze,
    set_trainable,
    trainable_names,
)
from d2ft.solver.param_depth import param_depth, select
from tests.conftest import PROJECT
from tests.factories import TINY_MODEL


def tiny_cfg():
    return load_cfg(PROJECT / "configs/_base_/models/mask_rcnn_r50_fpn.yaml", TINY_MODEL)


@pytest.fixture(scope="module")
def names():
    return [name for name, _ in build_model(tiny_cfg()).named_parameters()]


@pytest.mark.parametrize(
    ("pattern", "inside", "outside"),
    [
        ("res4", "backbone.bottom_up.res4.", "backbone.bottom_up.res5."),
        ("stem", "backbone.bottom_up.stem.", "backbone.bottom_up.res2."),
        ("fpn", "backbone.fpn_", "backbone.bottom_up."),
        ("backbone", "backbone.", "proposal_generator."),
        ("rpn", "proposal_generator.", "roi_heads."),
        ("box_head", "roi_heads.box_head.", "roi_heads.box_predictor."),
        ("mask_head", "roi_heads.mask_head.", "roi_heads.box_head."),
        ("mask_predictor", "roi_heads.mask_head.predictor.", "roi_heads.mask_head.mask_fcn1."),
        ("roi_heads.mask_head.mask_fcn?", "roi_heads.mask_head.mask_fcn", "roi_heads.mask_head.d"),
    ],
)
def test_a_name_means_its_part_of_the_model(names, pattern, inside, outside):
    chosen = select(names, [pattern])
    assert chosen == {name for name in names if name.startswith(inside)}
    assert not any(name.startswith(outside) for name in chosen)


def test_an_exclamation_mark_takes_a_part_out_again(names):
    chosen = select(names, ["*", "!box_predictor", "!mask_predictor"])
    assert {n for n in names if n not in chosen} == {n for n in names if "predictor" in n}


@pytest.mark.parametrize(
    ("pattern", "near"), [("box_haed", "box_head"), ("res7", "res5"), ("roi_head.*", "roi_heads")]
)
def test_a_pattern_that_means_nothing_is_refused_with_near_names(pattern, near):
    model = build_model(tiny_cfg())
    with pytest.raises(UserError, match=f"FINETUNE.FREEZE: .* means no part .*{near}"):
        freeze(model, [pattern], key="FINETUNE.FREEZE")


def test_freezing_everything_is_refused():
    with pytest.raises(UserError, match="leaves nothing of the model that learns"):
        freeze(build_model(tiny_cfg()), ["*"], key="FINETUNE.FREEZE")


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_frozen_values_stay_bit_equal_while_the_rest_learns(optimizer):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 4),
        torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1),
    )  # fmt: skip
    freeze(model, ["0", "1"], key="FINETUNE.FREEZE")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    text = f"SOLVER: {{OPTIMIZER: {optimizer}, BASE_LR: 0.1, WEIGHT_DECAY: 0.1}}"
    sgd = build_optimizer(load_cfg_text(text, "mine.yaml"), model)
    for _ in range(3):
        model.train()
        sgd.zero_grad()
        model(torch.randn(8, 4)).sum().backward()
        sgd.step()
    for name, value in model.state_dict().items():
        frozen = name.startswith(("0.", "1."))
        assert torch.equal(value, before[name]) == frozen, name


def test_a_phase_thaws_statistics_with_their_layer():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    trainable = trainable_names(model)
    sgd = build_optimizer(load_cfg_text("SOLVER: {BASE_LR: 0.1}", "mine.yaml"), model)
    set_trainable(model, trainable, ["1"], key="FINETUNE.PHASES")
    model.train()
    held = model[1].running_mean.clone()
    model(torch.randn(8, 2) + 3).sum().backward()
    sgd.step()
    assert torch.equal(model[1].running_mean, held)
    set_trainable(model, trainable, [], key="FINETUNE.PHASES")
    model.train()
    model(torch.randn(8, 2) + 3).sum().backward()
    sgd.step()
    assert not torch.equal(model[1].running_mean, held)


def test_phases_are_a_function_of_the_iteration():
    phases = Phases([{"ITERS": 2, "FREEZE": ["a"]}, {"ITERS": 3, "FREEZE": ["b", "c"]}])
    assert [phases.patterns(phases.number_at(i)) for i in range(7)] == [
        *[("a",)] * 2, *[("b", "c")] * 3, *[()] * 2,
    ]  # fmt: skip


def test_depth_grows_from_the_image_to_the_heads():
    deep = ["stem.conv1.weight", "res2.0.conv1.weight", "res5.2.conv3.weight"]
    assert [param_depth(f"backbone.bottom_up.{name}") for name in deep] == [0, 1, 4]
    assert param_depth("backbone.fpn_lateral2.weight") == 5
    assert param_depth("roi_heads.box_predictor.cls_score.bias") == 5


def test_the_rate_of_each_group_is_that_of_a_plain_reference():
    model = build_model(tiny_cfg())
    cfg = load_cfg_text(
        "SOLVER: {BASE_LR: 0.01}\n"
        "FINETUNE: {LAYER_DECAY: 0.5, LR_FACTORS: {box_predictor: 10, mask_head: 0.1}}",
        "mine.yaml",
    )
    optimizer = build_optimizer(cfg, model)
    rate = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        expected = 0.01
        for depth, stage in enumerate(["stem", "res2", "res3", "res4", "res5"]):
            if f".{stage}." in name:
                expected *= 0.5 ** (5 - depth)
        if "box_predictor" in name:
            expected *= 10
        if "mask_head" in name:
            expected *= 0.1
        assert rate[id(parameter)] == pytest.approx(expected, rel=1e-12), name


def test_a_factor_for_no_part_is_refused():
    cfg = load_cfg_text("FINETUNE: {LR_FACTORS: {box_predicter: 10}}", "mine.yaml")
    with pytest.raises(UserError, match=r"LR_FACTORS.box_predicter: .* did you mean box_predictor"):
        build_optimizer(cfg, build_model(tiny_cfg()))


def test_the_table_of_what_learns_counts_every_value_once():
    model = build_model(tiny_cfg())
    freeze(model, ["backbone"], key="FINETUNE.FREEZE")
    optimizer = build_optimizer(load_cfg_text("SOLVER: {BASE_LR: 0.01}", "mine.yaml"), model)
    table = describe_parameters(model, optimizer)
    total = sum(p.numel() for p in model.parameters())
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    last = table.splitlines()[-1].split()
    assert last == ["all", f"{total:,}", f"{learning:,}"]
    assert any(line.split()[0] == "fpn" and line.split()[-1] == "-" for line in table.splitlines())
