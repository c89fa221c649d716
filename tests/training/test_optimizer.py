import copy
import json

import pytest
import torch
from diffusers.optimization import get_scheduler
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from localdit.training.optimizer import (
    learning_rate,
    load_optimizer_state,
    make_optimizer,
    optimizer_state,
    require_splittable,
)


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


def quadratic(name, steps, width=4096):
    """Return weights after steps from 0 .. 1 towards zero, one for each learning rate."""
    weight = torch.nn.Parameter(torch.linspace(0, 1, width))
    optimizer = make_optimizer([("weight", weight)], name, 1.0, 0.1, (0.8, 0.95))
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


def test_eight_bits_are_close():
    pytest.importorskip("bitsandbytes")
    found, exact = quadratic("adamw8bit", 5), quadratic("adamw", 5)
    moved = (exact - torch.linspace(0, 1, 4096)).abs().mean()
    assert (found - exact).abs().mean() < 0.1 * moved


def model_and_optimizer(lr=1e-2, fused=None, steps=0, betas=(0.8, 0.9)):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    groups = [{"params": model[0].parameters()}, {"params": model[1].parameters(), "lr": lr / 2}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=betas, fused=fused)
    take_steps(model, optimizer, steps)
    return model, optimizer


def take_steps(model, optimizer, steps):
    for _ in range(steps):
        model(torch.ones(1, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def saved(model, optimizer):
    """Return the state as it comes from a file."""
    tensors, notes = optimizer_state(model, optimizer)
    return tensors, json.loads(json.dumps(notes))


def test_entries_go_by_parameter_name():
    tensors, notes = saved(*model_and_optimizer(steps=3))
    assert tensors["0.weight.exp_avg"].shape == (4, 3)
    assert tensors["1.bias.step"] == 3
    assert len(tensors) == 4 * 3
    assert [group["params"] for group in notes["groups"]] == [
        ["0.weight", "0.bias"],
        ["1.weight", "1.bias"],
    ]
    assert [group["settings"]["lr"] for group in notes["groups"]] == [1e-2, 5e-3]


def test_a_loaded_optimizer_continues_to_the_same_bits():
    model, optimizer = model_and_optimizer(steps=3)
    state, weights = saved(model, optimizer), {k: v.clone() for k, v in model.state_dict().items()}
    take_steps(model, optimizer, 2)

    again, other = model_and_optimizer(lr=1.0, betas=(0.1, 0.2))
    again.load_state_dict(weights)
    load_optimizer_state(again, other, *state)
    assert not any(
        torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True)
    )
    take_steps(again, other, 2)
    assert all(
        torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True)
    )
    assert other.param_groups[0]["betas"] == (0.8, 0.9)


def test_the_state_is_a_copy_both_ways():
    model, optimizer = model_and_optimizer(steps=1)
    tensors, notes = saved(model, optimizer)
    before = {key: value.clone() for key, value in tensors.items()}
    take_steps(model, optimizer, 1)
    load_optimizer_state(model, optimizer, tensors, notes)
    take_steps(model, optimizer, 1)
    assert all(torch.equal(before[key], tensors[key]) for key in before)


def test_an_optimizer_that_took_no_step_has_no_tensors():
    tensors, notes = saved(*model_and_optimizer())
    assert tensors == {}
    model, optimizer = model_and_optimizer(steps=1)
    load_optimizer_state(model, optimizer, tensors, notes)
    assert not optimizer.state


def test_settings_of_the_engine_are_kept():
    state = saved(*model_and_optimizer(fused=True, steps=1))
    model, optimizer = model_and_optimizer(fused=False)
    load_optimizer_state(model, optimizer, *state)
    assert optimizer.param_groups[0]["fused"] is False


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "muon"])
def test_a_new_weight_decay_takes_effect_in_all_groups(name):
    if name == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    if name == "muon" and not hasattr(torch.optim, "Muon"):
        pytest.skip("PyTorch is too old")

    def made(decay):
        torch.manual_seed(0)
        model = nn.ModuleDict({"transformer_blocks": nn.Linear(3, 4), "head": nn.Linear(4, 2)})
        model.forward = nn.Sequential(*model.values()).forward
        return model, make_optimizer(model.named_parameters(), name, 1e-2, decay)

    trained = {}
    for before, after in ((0.0, 0.5), (0.5, 0.5), (0.0, 0.0)):
        first, second = made(before), made(after)
        take_steps(*first, 1)
        load_optimizer_state(*second, *saved(*first))
        take_steps(*second, 1)
        trained[before, after] = second[0].state_dict()
    for key, tensor in trained[0.0, 0.5].items():
        assert torch.equal(tensor, trained[0.5, 0.5][key])
        assert not torch.equal(tensor, trained[0.0, 0.0][key])


def test_other_groups_are_refused():
    tensors, notes = saved(*model_and_optimizer(steps=1))
    model, _ = model_and_optimizer()
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match=r"groups of \[2, 2\] parameters, this one of \[4\]"):
        load_optimizer_state(model, optimizer, tensors, notes)


def test_the_parameters_of_another_model_are_refused():
    model, _ = model_and_optimizer()
    _, optimizer = model_and_optimizer()
    with pytest.raises(ValueError, match="parameters that are not the model's"):
        optimizer_state(model, optimizer)


def test_entries_of_unknown_parameters_are_refused():
    model, optimizer = model_and_optimizer(steps=1)
    tensors, notes = saved(model, optimizer)
    tensors["2.weight.exp_avg"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"the optimizer has no parameter '2.weight'"):
        load_optimizer_state(model, optimizer, tensors, notes)


def test_eight_bit_states_are_kept_as_they_are():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    model = nn.Linear(128, 128)
    optimizer = bitsandbytes.optim.AdamW8bit(model.parameters())
    model(torch.ones(1, 128)).sum().backward()
    optimizer.step()
    tensors, notes = saved(model, optimizer)
    assert tensors["weight.state1"].dtype == torch.uint8
    assert notes["values"]["weight"] == {"step": 1}

    other = bitsandbytes.optim.AdamW8bit(model.parameters())
    load_optimizer_state(model, other, tensors, notes)
    again, _ = saved(model, other)
    assert all(torch.equal(tensors[key], again[key]) for key in tensors | again)


def test_entries_for_blocks_of_a_shard_are_refused(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        mesh = init_device_mesh("cpu", (1,))
        parameter = distribute_tensor(torch.zeros(4, 3), mesh, [Shard(0)])
        require_splittable("w", "exp_avg", parameter, parameter)
        require_splittable("w", "step", torch.tensor(1.0), parameter)
        with pytest.raises(ValueError, match=r"absmax1 of w has shape \(2,\)"):
            require_splittable("w", "absmax1", torch.zeros(2), parameter)
    finally:
        torch.distributed.destroy_process_group()
