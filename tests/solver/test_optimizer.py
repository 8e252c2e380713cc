import pytest
import torch

from d2ft.config import get_cfg
from d2ft.errors import UserError
from d2ft.solver import build_optimizer


@pytest.fixture
def model():
    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4))


@pytest.mark.parametrize(("name", "kind"), [("SGD", torch.optim.SGD), ("AdamW", torch.optim.AdamW)])
def test_the_optimizer_has_the_rates_and_decays_of_the_config(model, name, kind):
    cfg = get_cfg()
    cfg.SOLVER.OPTIMIZER = name
    cfg.SOLVER.BASE_LR = 0.03
    cfg.SOLVER.WEIGHT_DECAY = 0.2
    optimizer = build_optimizer(cfg, model)
    assert isinstance(optimizer, kind)
    assert {group["lr"] for group in optimizer.param_groups} == {0.03}
    # The norm layer has no decay: WEIGHT_DECAY_NORM is 0 by default.
    norm = {id(p) for p in model[1].parameters()}
    for group in optimizer.param_groups:
        expected = 0.0 if {id(p) for p in group["params"]} & norm else 0.2
        assert group["weight_decay"] == expected


def test_adamw_clips_gradients_as_the_config_says(model):
    cfg = get_cfg()
    cfg.SOLVER.OPTIMIZER = "AdamW"
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = 0.5
    optimizer = build_optimizer(cfg, model)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    optimizer.step()
    assert all(parameter.grad.abs().max() == 0.5 for parameter in model.parameters())


def test_an_unknown_optimizer_is_refused(model):
    cfg = get_cfg()
    cfg.SOLVER.OPTIMIZER = "Adam"
    with pytest.raises(UserError, match="'Adam' is not known; use SGD or AdamW"):
        build_optimizer(cfg, model)


def test_full_model_clips_the_norm_of_all_gradients_together():
    cfg = get_cfg()
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = "full_model"
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = 0.5
    model = torch.nn.Linear(3, 2)
    optimizer = build_optimizer(cfg, model)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    optimizer.step()
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    torch.testing.assert_close(norm, torch.tensor(0.5))
