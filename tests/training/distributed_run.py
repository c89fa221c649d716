"""A process of a small training run, for the tests of sharding: see `test_sharding.py`.

Arguments: a folder to load the state from or "-", a folder to save it to, and how many steps.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from localdit.training.optimizer import load_optimizer_state, optimizer_state
from localdit.training.processes import loss_divisor, make_accelerator, prepare
from localdit.training.sharding import (
    gather_shards,
    load_model_state,
    local,
    model_state,
    named_parameters,
)
from tests.tiny import tiny_components

SAMPLES = 6


def main(source, target, steps):
    accelerator = make_accelerator(batch_size=SAMPLES, gradient_clip=1.0)
    transformer = tiny_components(seed=int(source != "-"))["transformer"].train()
    model, optimizer = prepare(
        accelerator, transformer, torch.optim.AdamW(transformer.parameters(), lr=1e-3)
    )
    if source != "-":
        folder = Path(source)
        load_model_state(model, load_file(folder / "model.safetensors"))
        notes = json.loads((folder / "optimizer.json").read_text())
        load_optimizer_state(model, optimizer, load_file(folder / "optimizer.safetensors"), notes)
    norms = [train_step(accelerator, model, optimizer) for _ in range(steps)]

    weights = model_state(model)
    tensors, notes = optimizer_state(model, optimizer)
    shards = {name: 2 * local(parameter).detach() for name, parameter in named_parameters(model)}
    doubled = gather_shards(shards, model)
    assert bool(weights) == bool(tensors) == bool(doubled) == accelerator.is_main_process
    if accelerator.is_main_process:
        save_file(weights, Path(target) / "model.safetensors")
        save_file(doubled, Path(target) / "doubled.safetensors")
        save_file(tensors, Path(target) / "optimizer.safetensors")
        (Path(target) / "optimizer.json").write_text(json.dumps(notes))
        told = {
            "processes": accelerator.num_processes,
            "norms": norms,
            "kind": type(model).__name__,
        }
        (Path(target) / "told.json").write_text(json.dumps(told))
    accelerator.end_training()


def train_step(accelerator, model, optimizer):
    """A step of two batches whose samples are spread over the processes; the gradient's norm."""
    accelerator.gradient_accumulation_steps = 2
    generator = torch.Generator().manual_seed(1)
    rank, processes = accelerator.process_index, accelerator.num_processes
    for _ in range(2):
        latents = torch.randn(SAMPLES, 4, 8, 8, generator=generator)[rank::processes]
        text = torch.randn(SAMPLES, 5, 16, generator=generator)[rank::processes]
        timesteps = torch.arange(SAMPLES)[rank::processes] * 150.5
        conditions = {
            "resolution": torch.full((len(latents), 2), 520.0),
            "aspect_ratio": torch.full((len(latents), 1), 1.37),
        }
        with accelerator.accumulate(model):
            predicted = model(
                latents, text, timesteps, added_cond_kwargs=conditions, return_dict=False
            )[0]
            loss = (predicted - latents).square().mean((1, 2, 3)).sum() * processes / SAMPLES / 2
            accelerator.backward(loss * loss_divisor(accelerator))
    norm = accelerator.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return float(norm)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
