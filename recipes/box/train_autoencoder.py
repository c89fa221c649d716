"""Train the small autoencoder of the model in the box on drawn scenes.

    python recipes/box/train_autoencoder.py --output output/box/vae

Writes a folder with 16-bit weights for `diffusers.AutoencoderKL.from_pretrained`, and in it
`reconstructions.png`: held-out scenes above their reconstructions.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import torch
    from diffusers import AutoencoderKL

LATENT_CHANNELS = 4


@dataclass(frozen=True)
class Stage:
    """A stage of training: its end as a share of the steps, its crop size and batch size."""

    until: float
    crop: int
    batch_size: int


STAGES = (Stage(0.1, 32, 32), Stage(0.7, 64, 8), Stage(1.0, 128, 4))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="seed of scenes, weights and noise")
    parser.add_argument("--steps", type=int, default=4_000, help="optimizer steps")
    parser.add_argument("--scenes", type=int, default=6_000, help="number of training images")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--latent-noise", type=float, default=0.12, help="largest added noise, "
                        "in standard deviations of the latents")  # fmt: skip
    parser.add_argument("--kl-weight", type=float, default=1e-4, help="weight of the KL term")
    parser.add_argument("--ema", type=float, default=0.999, help="decay of the averaged weights")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--eval-every", type=int, default=500, help="steps between PSNR prints")
    return parser.parse_args()


def build_autoencoder() -> AutoencoderKL:
    """Build an autoencoder with 8x downsampling in four convolutional levels; 1.6M parameters."""
    import torch
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        block_out_channels=(16, 32, 64, 96),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=LATENT_CHANNELS,
        mid_block_add_attention=False,
        sample_size=128,
        scaling_factor=1.0,
    )
    with torch.no_grad():  # with much posterior noise, learning would start late
        vae.quant_conv.bias[LATENT_CHANNELS:] = -6.0
    return vae.to(memory_format=torch.channels_last)


def draw_pictures(count: int, seed: int, held_out: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return images (n, 128, 128, 3) as uint8, and one object centre (x, y) in pixels per image."""
    import numpy as np

    from localdit.scenes import draw_scene, sample_scenes

    scenes = list(sample_scenes(count, seed, held_out))
    pictures = np.stack([np.asarray(draw_scene(scene)) for scene in scenes])
    things = [scene.objects[i % len(scene.objects)] for i, scene in enumerate(scenes)]
    return pictures, np.array([(128 * thing.x, 128 * thing.y) for thing in things])


def to_tensor(pictures: np.ndarray) -> torch.Tensor:
    """Convert (b, h, w, 3) uint8 to (b, 3, h, w) in [-1, 1]."""
    import torch

    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1.0
    return pixels.contiguous(memory_format=torch.channels_last)


def random_crops(
    pictures: np.ndarray, centres: np.ndarray, stage: Stage, rng: np.random.Generator
) -> torch.Tensor:
    """Return a batch of crops that show (a part of) an object: (b, 3, crop, crop) in [-1, 1]."""
    import numpy as np

    chosen = rng.integers(len(pictures), size=stage.batch_size)
    room = pictures.shape[1] - stage.crop
    reach = stage.crop / 2 + 4
    corners = centres[chosen] - stage.crop / 2 + rng.uniform(-reach, reach, (len(chosen), 2))
    lefts_tops = np.clip(corners, 0, room).astype(int)
    crops = [
        pictures[i, top : top + stage.crop, left : left + stage.crop]
        for i, (left, top) in zip(chosen, lefts_tops, strict=True)
    ]
    return to_tensor(np.stack(crops))


def reconstruction_loss(predicted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return L1 + MSE + L1 of finite differences for sharp edges; (b, 3, h, w) each."""
    error = predicted - target
    across, down = error.diff(dim=3).abs().mean(), error.diff(dim=2).abs().mean()
    return error.abs().mean() + 2.0 * error.square().mean() + 0.5 * (across + down)


def training_loss(
    vae: AutoencoderKL, pixels: torch.Tensor, latent_noise: float, kl_weight: float
) -> torch.Tensor:
    import torch

    with torch.autocast("cpu", torch.bfloat16):
        posterior = vae.encode(pixels).latent_dist
        # Extra noise beyond the posterior's, so that small errors of a denoiser stay small.
        level = latent_noise * torch.rand(len(pixels), 1, 1, 1)
        spread = posterior.mean.detach().float().std(dim=(0, 2, 3), keepdim=True)
        latents = posterior.sample() + level * spread * torch.randn(posterior.mean.shape)
        decoded = vae.decode(latents).sample
    kl = 0.5 * (posterior.mean.float().square() + posterior.var.float() - 1.0)
    kl = kl - 0.5 * posterior.logvar.float()
    return reconstruction_loss(decoded.float(), pixels) + kl_weight * kl.mean()


def learning_rate(progress: float, peak: float) -> float:
    """Return the rate: warm-up over the first 1 %, then cosine to 0; `progress` in [0, 1]."""
    return peak * min(1.0, progress / 0.01 + 0.01) * 0.5 * (1.0 + math.cos(math.pi * progress))


def reconstruct(vae: AutoencoderKL, pixels: torch.Tensor) -> torch.Tensor:
    """Encode and decode (b, 3, h, w) without noise; clipped to [-1, 1]."""
    import torch

    with torch.no_grad():
        parts = [vae.decode(vae.encode(p).latent_dist.mode()).sample for p in pixels.split(16)]
    return torch.cat(parts).clamp(-1, 1)


def psnr(predicted: torch.Tensor, target: torch.Tensor) -> float:
    """Return the mean peak signal-to-noise ratio in dB; values in [-1, 1]."""
    mse = (predicted - target).square().mean(dim=(1, 2, 3)) / 4.0
    return float((-10.0 * mse.clamp_min(1e-10).log10()).mean())


def standardise_latents(vae: AutoencoderKL, pixels: torch.Tensor) -> None:
    """Fold the mean and deviation of each latent channel into the 1x1 convolutions around it.

    This is exact: the images stay the same, the latents get mean 0 and deviation 1.
    """
    import torch

    with torch.no_grad():
        latents = torch.cat([vae.encode(p).latent_dist.mode() for p in pixels.split(32)])
        mean, std = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
        into, out = vae.quant_conv, vae.post_quant_conv
        out.bias += out.weight[:, :, 0, 0] @ mean
        out.weight *= std.view(1, -1, 1, 1)
        into.weight[:LATENT_CHANNELS] /= std.view(-1, 1, 1, 1)
        into.bias[:LATENT_CHANNELS] = (into.bias[:LATENT_CHANNELS] - mean) / std
        into.bias[LATENT_CHANNELS:] -= 2.0 * std.log()


def save_comparison(path: Path, originals: torch.Tensor, decoded: torch.Tensor) -> None:
    """Save rows of originals above their reconstructions; (16, 3, 128, 128) each."""
    import torch
    from PIL import Image

    rows = [torch.cat(list(part), dim=2) for pair in zip(originals.split(8), decoded.split(8),
            strict=True) for part in pair]  # fmt: skip
    pixels = ((torch.cat(rows, dim=1) + 1.0) * 127.5).round().byte().permute(1, 2, 0)
    Image.fromarray(pixels.contiguous().numpy()).save(path)


def update_average(average: AutoencoderKL, vae: AutoencoderKL, decay: float) -> None:
    import torch

    with torch.no_grad():
        for slow, fast in zip(average.parameters(), vae.parameters(), strict=True):
            slow.lerp_(fast, 1.0 - decay)


def main() -> None:
    args = parse_args()

    import copy

    import numpy as np
    import torch

    started = time.perf_counter()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    pictures, centres = draw_pictures(args.scenes, args.seed, held_out=False)
    held_out = to_tensor(draw_pictures(128, args.seed, held_out=True)[0])
    vae = build_autoencoder()
    average = copy.deepcopy(vae)
    optimizer = torch.optim.AdamW(
        vae.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0, fused=True
    )
    print(f"{sum(p.numel() for p in vae.parameters()) / 1e6:.2f}M parameters", flush=True)

    for step in range(1, args.steps + 1):
        progress = (step - 1) / args.steps
        stage = next(s for s in STAGES if progress < s.until)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(progress, args.lr)
        pixels = random_crops(pictures, centres, stage, rng)
        loss = training_loss(vae, pixels, args.latent_noise, args.kl_weight)
        if not torch.isfinite(loss):
            raise RuntimeError(f"loss is {loss.item()} at step {step}")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        update_average(average, vae, min(args.ema, step / (step + 10)))
        if step % args.eval_every == 0:
            decibels = psnr(reconstruct(average, held_out[:32]), held_out[:32])
            minutes = (time.perf_counter() - started) / 60
            print(f"step {step} loss {loss.item():.4f} held-out PSNR {decibels:.2f} dB "
                  f"after {minutes:.1f} min", flush=True)  # fmt: skip
            average.save_pretrained(args.output.with_name(args.output.name + "_unfinished"))

    standardise_latents(average, to_tensor(pictures[:512]))
    average.half().save_pretrained(args.output)
    average.float()  # evaluate the weights rounded to 16 bits
    decoded = reconstruct(average, held_out)
    save_comparison(args.output / "reconstructions.png", held_out[:16], decoded[:16])
    print(f"held-out PSNR {psnr(decoded, held_out):.2f} dB, "
          f"{(time.perf_counter() - started) / 60:.1f} min in all")  # fmt: skip


if __name__ == "__main__":
    main()
