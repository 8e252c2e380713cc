import types

import torch

from d2ft.engine.hooks.ema import EMAHook


def test_the_average_is_its_formula_after_100_steps():
    model = torch.nn.Linear(3, 2)
    hook = EMAHook(0.9)
    hook.trainer = types.SimpleNamespace(model=model)
    hook.before_train()
    expected = {name: p.detach().double() for name, p in model.named_parameters()}
    for step in range(1, 101):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        hook.after_step()
        decay = min(0.9, (1 + step) / (10 + step))
        for name, p in model.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * p.detach().double()
    average = hook.state_dict()["average"]
    for name, value in expected.items():
        # float32 against float64 over 100 steps
        torch.testing.assert_close(average[name].double(), value, rtol=1e-5, atol=1e-5)


def test_the_model_has_the_average_for_a_block_and_its_own_weights_after_it():
    model = torch.nn.Linear(3, 2)
    hook = EMAHook(0.9)
    hook.trainer = types.SimpleNamespace(model=model)
    hook.before_train()
    start = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.add_(1)
    moved = model.weight.detach().clone()
    with hook.applied():
        assert torch.equal(model.weight, start)
    assert torch.equal(model.weight, moved)
