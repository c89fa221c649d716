import copy
import sys

import pytest
import torch
from diffusers.optimization import get_scheduler

from localdit.training.optimizer import learning_rate, make_optimizer


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
@pytest.mark.parametrize("warmup_steps", [0, 1, 7, 40])
def test_learning_rates_are_those_of_diffusers(schedule, warmup_steps):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    reference = get_scheduler(name, optimizer, num_warmup_steps=warmup_steps, num_training_steps=40)
    for step in range(40):
        expected = reference.get_last_lr()[0]
        given = learning_rate(step, 40, 3e-4, warmup_steps, schedule)
        assert given == pytest.approx(expected, rel=1e-9, abs=1e-15), step
        optimizer.step()
        reference.step()


def test_learning_rate_stays_at_the_end_of_the_cosine():
    assert learning_rate(100, 100, 1.0, 10, "cosine") == 0
    assert learning_rate(250, 100, 1.0, 10, "cosine") == 0


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="expected constant or cosine"):
        learning_rate(0, 1, 1.0, 0, "linear")
    with pytest.raises(ValueError, match="expected adamw or adamw8bit"):
        make_optimizer([torch.nn.Parameter(torch.zeros(1))], "sgd", 1e-3, 0.0)


def quadratic(name, steps, width=4096):
    """Weights after steps towards zero from 0 .. 1, with a learning rate set before each step."""
    weight = torch.nn.Parameter(torch.linspace(0, 1, width))
    optimizer = make_optimizer([weight], name, 1.0, 0.1, (0.8, 0.95))
    for _ in range(steps):
        optimizer.param_groups[0]["lr"] = 0.01
        weight.grad = weight.detach().clone()
        optimizer.step()
    return weight.detach()


def test_adamw_follows_the_formula():
    weight = torch.linspace(0, 1, 4096)
    first, second = torch.zeros(4096), torch.zeros(4096)
    for step in range(1, 6):
        gradient = copy.copy(weight)
        first = 0.8 * first + 0.2 * gradient
        second = 0.95 * second + 0.05 * gradient**2
        update = (first / (1 - 0.8**step)) / ((second / (1 - 0.95**step)).sqrt() + 1e-8)
        weight = weight - 0.01 * (update + 0.1 * weight)
    torch.testing.assert_close(quadratic("adamw", 5), weight, rtol=1e-4, atol=1e-6)


def test_eight_bits_come_close():
    pytest.importorskip("bitsandbytes")
    found, exact = quadratic("adamw8bit", 5), quadratic("adamw", 5)
    moved = (exact - torch.linspace(0, 1, 4096)).abs().mean()
    assert (found - exact).abs().mean() < 0.1 * moved


def test_missing_bitsandbytes_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ModuleNotFoundError, match="pip install bitsandbytes"):
        make_optimizer([torch.nn.Parameter(torch.zeros(1))], "adamw8bit", 1e-3, 0.0)
