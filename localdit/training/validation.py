"""The loss on samples held out from training, always with the same noise."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from localdit.training.data.buckets import Size
from localdit.training.data.order import stable_hash
from localdit.training.objective import Objective, denoising_errors


@dataclass
class ValidationBatch:
    """Encoded samples of one size.

    Attributes:
        size: of the pictures, in pixels.
        ids: (B,) of the samples: their noise follows from them.
        latents: (B, C, h, w).
        text, text_mask: (B, L, channels) and (B, L), 1 for tokens that are there.
        size_conditions: `added_cond_kwargs` of the model, None for a model without.
        weights: (B,) 1 for samples, 0 for placeholders; None for ones.
    """

    size: Size
    ids: Sequence[str]
    latents: torch.Tensor
    text: torch.Tensor
    text_mask: torch.Tensor
    size_conditions: dict[str, torch.Tensor] | None = None
    weights: torch.Tensor | None = None


@torch.no_grad()
def validation_losses(
    model: torch.nn.Module,
    objective: Objective,
    batches: Iterable[ValidationBatch],
    sizes: Sequence[Size],
    name: str = "model",
    num_bins: int = 4,
    seed: int = 0,
    reduce: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> dict[str, float]:
    """The mean squared errors of a model, by size and by how much noise there was.

    The timesteps are divided into bins of equal length. Each sample is seen once in each, at a
    timestep and with noise that follow from the seed, the sample and the bin: so losses of
    different steps, models and runs compare. Errors are not weighted by the objective.

    Args:
        model: the model, or its average; put into evaluation mode meanwhile.
        objective: what it learns to predict.
        batches: the held-out samples of this process, on the model's device. Where parameters are
            sharded over processes, each process has to bring as many batches.
        sizes: all that may come, the same in every process.
        name: what the losses are called by, "model" or "ema".
        num_bins: number of bins.
        seed: of timesteps and noise.
        reduce: sums a tensor over all processes, for example
            `functools.partial(accelerator.reduce, reduction="sum")`; None for one process.

    Returns:
        `validation/{name}/loss`, the mean over samples and bins; `validation/{name}/{bin}` and
        `validation/{name}/{height}x{width}/{bin or "loss"}`, a bin called by its ends in [0, 1],
        for example "0.25-0.50". Sizes without samples are left out.
    """
    sums = torch.zeros(len(sizes), num_bins + 1, dtype=torch.float64)  # the last: how many samples
    was_training = model.training
    model.eval()
    try:
        for batch in batches:
            row = sums[list(sizes).index(batch.size)]
            weights = torch.ones(len(batch.ids)) if batch.weights is None else batch.weights.cpu()
            row[-1] += weights.sum()
            for number in range(num_bins):
                errors = _errors(model, objective, batch, number, num_bins, seed)
                row[number] += torch.where(weights > 0, errors * weights, 0).sum()
    finally:
        model.train(was_training)
    if reduce is not None:
        device = next(model.parameters()).device
        sums = reduce(sums.to(device, torch.float32)).to("cpu", torch.float64)
    return _named(sums, sizes, f"validation/{name}")


def _errors(
    model: torch.nn.Module,
    objective: Objective,
    batch: ValidationBatch,
    number: int,
    num_bins: int,
    seed: int,
) -> torch.Tensor:
    """The errors of a batch in one bin, `(B,)` on the CPU."""
    noise, positions = [], []
    for sample in batch.ids:
        generator = torch.Generator().manual_seed(stable_hash(seed, number, sample))
        position = (number + torch.rand(1, generator=generator).item()) / num_bins
        positions.append(min(position, 1 - 2**-24))  # the highest below 1 in float32
        noise.append(torch.randn(batch.latents.shape[1:], generator=generator))
    device = batch.latents.device
    latents, drawn = batch.latents.float(), torch.stack(noise).to(device)
    timesteps = objective.timesteps(torch.tensor(positions, device=device))
    prediction = model(
        objective.add_noise(latents, drawn, timesteps),
        encoder_hidden_states=batch.text,
        encoder_attention_mask=batch.text_mask,
        timestep=timesteps,
        added_cond_kwargs=batch.size_conditions,
        return_dict=False,
    )[0]
    return denoising_errors(prediction, objective.target(latents, drawn, timesteps)).cpu()


def _named(sums: torch.Tensor, sizes: Sequence[Size], prefix: str) -> dict[str, float]:
    """Means by name, of sums `(sizes, bins + 1)` whose last column has the numbers of samples."""
    num_bins = sums.shape[1] - 1
    ends = [f"{n / num_bins:.2f}-{(n + 1) / num_bins:.2f}" for n in range(num_bins)]
    rows = {prefix: sums.sum(dim=0)}
    rows |= {
        f"{prefix}/{size.height}x{size.width}": row for size, row in zip(sizes, sums, strict=True)
    }
    losses = {}
    for start, row in rows.items():
        if row[-1] > 0:
            means = row[:-1] / row[-1]
            losses[f"{start}/loss"] = means.mean().item()
            losses |= {f"{start}/{end}": mean.item() for end, mean in zip(ends, means, strict=True)}
    return losses
