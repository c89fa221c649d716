import importlib.metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from localdit.core.diffusion import Objective
from localdit.models import LocalDiTTransformer2DModel
from localdit.training.methods.fine_tuning import FineTuning
from localdit.training.optimizer import load_optimizer_state, make_optimizer, optimizer_state
from localdit.training.options import parse_args
from localdit.training.run_folder import changed_options
from localdit.training.setup import make_state

MUON = ["--data-root", "x", "--optimizer", "muon"]
needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="needs PyTorch 2.9")
BLOCK = "transformer_blocks.0."


def transformer():
    """Return a transformer of one block with a global context."""
    torch.manual_seed(0)
    return LocalDiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=1, sample_size=16,
        caption_channels=16, use_global=True,
    )  # fmt: skip


def take_steps(named, optimizer, steps):
    """Take steps with gradients that follow from the step and the weights."""
    generator = torch.Generator().manual_seed(steps)
    for _ in range(steps):
        for _, parameter in named:
            parameter.grad = parameter.detach() + torch.randn(parameter.shape, generator=generator)
        optimizer.step()


def muon_of(model):
    return make_optimizer(model.named_parameters(), "muon", 1e-2, 0.1)


@needs_muon
def test_matrices_of_the_blocks_are_moved_one_by_one_and_the_rest_by_adamw():
    """Compare with one optimizer of PyTorch for each part of each parameter."""
    model = transformer()
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    packed = {"attn1.to_qkv": 3, "attn1.global_context.to_global_kv": 2}
    single = ["attn1.to_out.0", "attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0",
              "ff.net.0.proj", "ff.net.2"]  # fmt: skip
    features = "attn1.global_context.query_feat_extract"
    single += [f"{features}.{i}.conv.2.fc.{j}" for i in (0, 1) for j in (0, 2)]
    numbers = packed | dict.fromkeys(single, 1)
    take_steps(list(model.named_parameters()), muon_of(model), 3)

    parts = {
        name: [
            torch.nn.Parameter(part)
            for part in weight.chunk(numbers.get(name[len(BLOCK) : -len(".weight")], 1))
        ]
        for name, weight in expected.items()
    }
    generator = torch.Generator().manual_seed(3)
    optimizers = []
    for name, group in parts.items():
        if name.endswith(".weight") and name[len(BLOCK) : -len(".weight")] in numbers:
            kind, more = torch.optim.Muon, {"adjust_lr_fn": "match_rms_adamw"}
        else:
            kind, more = torch.optim.AdamW, {"fused": True}
        optimizers.append(kind(group, lr=1e-2, weight_decay=0.1, **more))
    for _ in range(3):
        for name, group in parts.items():
            noise = torch.randn(expected[name].shape, generator=generator)
            for part, drawn in zip(group, noise.chunk(len(group)), strict=True):
                part.grad = part.detach() + drawn
        for optimizer in optimizers:
            optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, torch.cat(parts[name])), name


@needs_muon
def test_one_learning_rate_gives_updates_of_about_the_size_of_adamw():
    """Its root mean square is 0.2 to 0.4 in training (Liu et al., 2025, section 2.2)."""
    model = transformer()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = make_optimizer(model.named_parameters(), "muon", 1e-2, 0.0)
    take_steps(list(model.named_parameters()), optimizer, 1)
    for name in ("attn1.to_qkv", "ff.net.2"):
        name = f"{BLOCK}{name}.weight"
        update = (dict(model.named_parameters())[name] - before[name]).square().mean().sqrt() / 1e-2
        assert 0.15 < update < 0.25, name


@needs_muon
def test_a_loaded_state_continues_to_the_same_bits_and_follows_the_learning_rate():
    first, second = transformer(), transformer()
    optimizer, other = muon_of(first), muon_of(second)
    take_steps(list(first.named_parameters()), optimizer, 2)
    second.load_state_dict(first.state_dict())
    load_optimizer_state(second, other, *optimizer_state(first, optimizer))
    for model, each in ((first, optimizer), (second, other)):
        for group in each.param_groups:
            group["lr"] = 3e-3
        take_steps(list(model.named_parameters()), each, 2)
    weights = first.state_dict()
    for name, tensor in second.state_dict().items():
        assert torch.equal(tensor, weights[name]), name
    for group in other.param_groups:
        group["lr"] = 0.0
    take_steps(list(second.named_parameters()), other, 1)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in second.state_dict().items())


@needs_muon
def test_a_gradient_that_overflows_in_float16_moves_nothing():
    model = transformer()
    optimizer, scaler = muon_of(model), torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(()))  # makes the scale, 8
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for overflow in (torch.inf, 8.0):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 8.0)
        model.proj_out.bias.grad[0] = overflow
        scaler.step(optimizer)
        scaler.update(8.0)
        if overflow == torch.inf:
            assert not optimizer.state
            assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert optimizer.state.keys() == set(model.parameters())
    momentum = optimizer.state[model.transformer_blocks[0].ff.net[2].weight]["momentum_buffer"]
    assert torch.allclose(momentum, torch.tensor(0.05))  # (1 - 0.95) of the unscaled gradient


@needs_muon
def test_a_model_without_blocks_is_adamw_s():
    model = torch.nn.Linear(4, 3)
    assert type(make_optimizer(model.named_parameters(), "muon", 1e-2, 0.1)) is torch.optim.AdamW


@needs_muon
@pytest.mark.parametrize("engine", ["FSDP", "DEEPSPEED"])
def test_engines_that_split_matrices_are_refused(engine):
    args = parse_args(MUON)
    accelerator = SimpleNamespace(distributed_type=engine, mixed_precision="no")
    with pytest.raises(ValueError, match="--optimizer muon needs whole matrices"):
        make_state(args, FineTuning(transformer(), Objective(), adapters=False), accelerator)


def test_a_run_keeps_its_optimizer():
    before = vars(parse_args(["--data-root", "x"]))
    now = before | {"optimizer": "muon"}
    with pytest.raises(ValueError, match="of a run with --optimizer adamw, not with --optimizer"):
        changed_options(Path("checkpoint-2"), before, now)


def test_an_older_pytorch_and_adapters_are_refused(capsys, monkeypatch, tmp_path):
    pytest.importorskip("peft")
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.8.1+cpu")
    with pytest.raises(SystemExit):
        parse_args(MUON)
    assert "--optimizer muon needs PyTorch 2.9, this is 2.8.1+cpu" in capsys.readouterr().err
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.10.0")
    with pytest.raises(SystemExit):
        parse_args([*MUON, "--lora-rank", "4", "--transformer", str(tmp_path)])
    assert "--optimizer muon is for whole matrices, and --lora-rank" in capsys.readouterr().err
