"""Validation: losses on held-out samples, and pictures of fixed prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict

import torch
from PIL import Image

from localdit.core.encoders import Encoders
from localdit.models import LocalDiTTransformer2DModel
from localdit.pipelines import LocalDiTPipeline
from localdit.training.data.buckets import Size
from localdit.training.data.order import stable_hash
from localdit.training.methods import Inputs, Sampling

# Of a model, inputs, noise (B, C, h, w) and positions of the timesteps (B,); they are (B,).
Errors = Callable[[torch.nn.Module, Inputs, torch.Tensor, torch.Tensor], torch.Tensor]


@torch.no_grad()
def validation_losses(
    model: torch.nn.Module,
    errors: Errors,
    batches: Iterable[tuple[Size, Sequence[str], Inputs]],
    sizes: Sequence[Size],
    name: str = "model",
    num_bins: int = 4,
    seed: int = 0,
    reduce: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> dict[str, float]:
    """Return the mean errors of a model, by size and by amount of noise.

    The timesteps are divided into bins of equal length. Each sample is evaluated once per bin, with
    a timestep and noise that depend only on the seed, the sample and the bin. So losses of
    different steps, models and runs are comparable. Errors are not weighted by the objective.

    Args:
        model: the model, or its average. It is in evaluation mode during the call.
        errors: the errors of a batch, such as `Method.validation_errors`.
        batches: the held-out samples of this process, on the model's device: their size in
            pixels, their ids, which determine their noise, and the inputs. With sharded parameters,
            each process must have the same number of batches.
        sizes: all possible sizes, the same in every process.
        name: name of the model in the result, "model" or "ema".
        seed: seed of timesteps and noise.
        reduce: sums a tensor over all processes, for example
            `functools.partial(accelerator.reduce, reduction="sum")`; None for one process.

    Returns:
        `validation/{name}/loss`, the mean over samples and bins; `validation/{name}/{bin}` and
        `validation/{name}/{height}x{width}/{bin or "loss"}`. The name of a bin consists of its
        ends in [0, 1], for example "0.25-0.50". Sizes without samples are left out.
    """
    # Sums of errors; the last column counts the samples.
    sums = torch.zeros(len(sizes), num_bins + 1, dtype=torch.float64)
    was_training = model.training
    model.eval()
    try:
        for size, ids, inputs in batches:
            row = sums[list(sizes).index(size)]
            assert inputs.weights is not None
            weights = inputs.weights.cpu()
            row[-1] += weights.sum()
            for number in range(num_bins):
                found = _errors(model, errors, ids, inputs, number, num_bins, seed)
                row[number] += torch.where(weights > 0, found * weights, 0).sum()
    finally:
        model.train(was_training)
    if reduce is not None:
        device = next(model.parameters()).device
        sums = reduce(sums.to(device, torch.float32)).to("cpu", torch.float64)
    return _named(sums, sizes, f"validation/{name}")


def _errors(
    model: torch.nn.Module,
    errors: Errors,
    ids: Sequence[str],
    inputs: Inputs,
    number: int,
    num_bins: int,
    seed: int,
) -> torch.Tensor:
    """Return the errors of a batch in one bin, `(B,)` on the CPU."""
    latents = inputs.latents
    noise, positions = [], []
    for sample in ids:
        generator = torch.Generator().manual_seed(stable_hash(seed, number, sample))
        position = (number + torch.rand(1, generator=generator).item()) / num_bins
        positions.append(min(position, 1 - 2**-24))  # the highest below 1 in float32
        noise.append(torch.randn(latents.shape[1:], generator=generator))
    return errors(
        model,
        inputs,
        torch.stack(noise).to(latents.device),
        torch.tensor(positions, device=latents.device),
    ).cpu()


def _named(sums: torch.Tensor, sizes: Sequence[Size], prefix: str) -> dict[str, float]:
    """Return means by name, from sums `(sizes, bins + 1)` with counts in the last column."""
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


class PromptPictures:
    """Draws the same prompts from the same noise each time. The processes share the prompts.

    The prompts are encoded once, so the text encoder is not needed afterwards.

    Args:
        prompts: the prompts of all processes.
        encoders: encode the prompts of this process, and decode latents.
        max_length: number of text tokens after which prompts are cut.
        seed: picture i starts from noise of `seed + i`.
        sampling: the scheduler, and the settings of the pipeline.
        whole_words: the text encoder understands only whole words; a warning names others.
        rank, num_processes: this process draws the prompts `rank`, `rank + num_processes`, ...
    """

    def __init__(
        self,
        prompts: list[str],
        encoders: Encoders,
        max_length: int,
        seed: int,
        sampling: Sampling,
        whole_words: bool = False,
        rank: int = 0,
        num_processes: int = 1,
    ) -> None:
        self.indices = list(range(len(prompts)))[rank::num_processes]
        self.seed = seed
        self.sampling = sampling
        self.vae = encoders.vae
        self.embeddings = []
        pipeline = LocalDiTPipeline(
            *encoders,
            transformer=None,  # type: ignore[arg-type]
            scheduler=None,
            whole_words=whole_words,
        )
        with torch.no_grad():
            for index in self.indices:
                embeddings = pipeline.encode_prompt(
                    prompts[index],
                    device=encoders.text_encoder.device,
                    max_sequence_length=max_length,
                )
                self.embeddings.append(embeddings)

    def draw(
        self, transformer: LocalDiTTransformer2DModel, size: int
    ) -> list[tuple[int, Image.Image]]:
        """Draw this process's pictures of `size` x `size` pixels, each with its prompt's number."""
        self.vae.to(transformer.device)
        pipeline = LocalDiTPipeline(None, None, self.vae, transformer, self.sampling.scheduler)
        pipeline.set_progress_bar_config(disable=True)
        pictures = []
        for index, (text, mask, negative, negative_mask) in zip(
            self.indices, self.embeddings, strict=True
        ):
            output = pipeline(
                prompt_embeds=text,
                prompt_attention_mask=mask,
                negative_prompt_embeds=negative,
                negative_prompt_attention_mask=negative_mask,
                height=size,
                width=size,
                **asdict(self.sampling.settings),
                generator=torch.Generator("cpu").manual_seed(self.seed + index),
                return_dict=False,
            )
            pictures.append((index, output[0][0]))
        return pictures
