"""A process that trains two small models beside a frozen one: see `test_state.py`.

Arguments: a folder to restore the state from or "-", a folder to save it to, and how many steps.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from localdit.training.metrics import Metrics
from localdit.training.processes import Agreement, loss_divisor, make_accelerator, prepare
from localdit.training.sharding import named_parameters
from localdit.training.state import ExponentialMovingAverage, Progress, TrainedModel, TrainingState

SAMPLES = 4


def main(source, target, steps):
    accelerator = make_accelerator(batch_size=SAMPLES, gradient_clip=1.0)
    torch.manual_seed(int(source != "-"))
    models = {
        "transformer": trained(accelerator, nn.Linear(3, 5), decay=0.9),
        "critic": trained(accelerator, nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 1)), decay=0.5),
        "student": trained(accelerator, nn.Linear(3, 5), decay=None),
    }
    frozen = nn.Linear(3, 5).requires_grad_(False)
    nn.init.constant_(frozen.weight, 0.1), nn.init.zeros_(frozen.bias)
    state = TrainingState(models, accelerator.scaler, Metrics(accelerator.device), Progress())
    if source != "-":
        folder = Path(source)
        averages = load_file(folder / "averages.safetensors")
        state.restore(folder / "training", averages, accelerator.process_index)
    for _ in range(steps):
        train_step(accelerator, state, frozen)
    snapshot = state.snapshot(Agreement(accelerator), {"seed": 0})
    if accelerator.is_main_process:
        snapshot.write(Path(target) / "training")
        save_file(snapshot.averages, Path(target) / "averages.safetensors")
    accelerator.end_training()


def trained(accelerator, model, decay):
    module, optimizer = prepare(accelerator, model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    average = None
    if decay is not None:
        average = ExponentialMovingAverage(named_parameters(module), decay)
    return TrainedModel(module, optimizer, average)


def train_step(accelerator, state, frozen):
    """Take a step of all models; the samples follow from the number of the step."""
    modules = state.modules
    generator = torch.Generator().manual_seed(state.progress.step)
    rank, processes = accelerator.process_index, accelerator.num_processes
    x = torch.randn(SAMPLES, 3, generator=generator)[rank::processes]
    predicted = modules["transformer"](x)
    errors = (predicted - frozen(x)).square().mean(dim=1) + modules["critic"](predicted)[:, 0]
    errors = errors + (modules["student"](x) - predicted).square().mean(dim=1)
    loss = errors.sum() * processes / SAMPLES
    accelerator.backward(loss * loss_divisor(accelerator))
    accelerator.clip_grad_norm_(state.parameters(), 1.0)
    for model in state.models.values():
        model.optimizer.step()
        model.update_average()
        model.optimizer.zero_grad()
    state.progress.step += 1


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
