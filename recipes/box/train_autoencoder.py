"""Train the small autoencoder of the model in the box, or a compact one, on drawn scenes.

    python recipes/box/train_autoencoder.py --output output/box/vae
    python recipes/box/train_autoencoder.py --kind dc --side 256 --output output/compact/vae

Writes a folder with 16-bit weights for `from_pretrained` of `diffusers.AutoencoderKL`, or of
`AutoencoderDC` (32 pixels per latent), and in it `reconstructions.png`: held-out scenes above their
reconstructions.
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
    from diffusers import AutoencoderDC, AutoencoderKL

    Autoencoder = AutoencoderKL | AutoencoderDC

LATENT_CHANNELS = 4
COMPACT_CHANNELS = 32


@dataclass(frozen=True)
class Stage:
    """A stage of training: its end and its crops as shares of steps and side, its batch size."""

    until: float
    crop: float
    batch_size: int


STAGES = (Stage(0.1, 0.25, 32), Stage(0.7, 0.5, 8), Stage(1.0, 1.0, 4))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--kind", choices=["kl", "dc"], default="kl",
                        help="AutoencoderKL with 8 pixels per latent and 4 channels, or "
                        "AutoencoderDC with 32 pixels and 32 channels")  # fmt: skip
    parser.add_argument("--side", type=int, default=128, help="width and height in pixels, "
                        "a multiple of 128")  # fmt: skip
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


def build_compact_autoencoder() -> AutoencoderDC:
    """Build an autoencoder with 32x downsampling in six levels, without a posterior (DC-AE)."""
    import torch
    from diffusers import AutoencoderDC

    blocks = ("ResBlock",) * 5 + ("EfficientViTBlock",)
    channels = (16, 32, 64, 64, 128, 128)
    vae = AutoencoderDC(
        latent_channels=COMPACT_CHANNELS,
        attention_head_dim=32,
        encoder_block_types=blocks,
        decoder_block_types=blocks,
        encoder_block_out_channels=channels,
        decoder_block_out_channels=channels,
        encoder_layers_per_block=(0, 1, 1, 1, 1, 1),
        decoder_layers_per_block=(0, 1, 1, 1, 1, 1),
        encoder_qkv_multiscales=((),) * 6,
        decoder_qkv_multiscales=((),) * 6,
        scaling_factor=1.0,
    )
    return vae.to(memory_format=torch.channels_last)


def draw_pictures(
    count: int, seed: int, held_out: bool, side: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return images (n, side, side, 3) as uint8, and an object's centre (x, y) in pixels each."""
    import numpy as np

    from localdit.scenes import draw_scene, sample_scenes

    scenes = list(sample_scenes(count, seed, held_out))
    pictures = np.stack([np.asarray(draw_scene(scene, side)) for scene in scenes])
    things = [scene.objects[i % len(scene.objects)] for i, scene in enumerate(scenes)]
    return pictures, np.array([(side * thing.x, side * thing.y) for thing in things])


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
    crop = round(stage.crop * pictures.shape[1])
    room = pictures.shape[1] - crop
    reach = crop / 2 + 4
    corners = centres[chosen] - crop / 2 + rng.uniform(-reach, reach, (len(chosen), 2))
    lefts_tops = np.clip(corners, 0, room).astype(int)
    crops = [
        pictures[i, top : top + crop, left : left + crop]
        for i, (left, top) in zip(chosen, lefts_tops, strict=True)
    ]
    return to_tensor(np.stack(crops))


def reconstruction_loss(predicted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return L1 + MSE + L1 of finite differences for sharp edges; (b, 3, h, w) each."""
    error = predicted - target
    across, down = error.diff(dim=3).abs().mean(), error.diff(dim=2).abs().mean()
    return error.abs().mean() + 2.0 * error.square().mean() + 0.5 * (across + down)


def training_loss(
    vae: Autoencoder, pixels: torch.Tensor, latent_noise: float, kl_weight: float
) -> torch.Tensor:
    import torch

    with torch.autocast("cpu", torch.bfloat16):
        encoded = vae.encode(pixels)
        posterior = getattr(encoded, "latent_dist", None)
        mean = encoded.latent if posterior is None else posterior.mean
        # Extra noise beyond the posterior's, so that small errors of a denoiser stay small.
        level = latent_noise * torch.rand(len(pixels), 1, 1, 1)
        spread = mean.detach().float().std(dim=(0, 2, 3), keepdim=True)
        latents = mean if posterior is None else posterior.sample()
        decoded = vae.decode(latents + level * spread * torch.randn(mean.shape)).sample
    loss = reconstruction_loss(decoded.float(), pixels)
    if posterior is None:
        return loss
    kl = 0.5 * (posterior.mean.float().square() + posterior.var.float() - 1.0)
    kl = kl - 0.5 * posterior.logvar.float()
    return loss + kl_weight * kl.mean()


def learning_rate(progress: float, peak: float) -> float:
    """Return the rate: warm-up over the first 1 %, then cosine to 0; `progress` in [0, 1]."""
    return peak * min(1.0, progress / 0.01 + 0.01) * 0.5 * (1.0 + math.cos(math.pi * progress))


def encode(vae: Autoencoder, pixels: torch.Tensor) -> torch.Tensor:
    """Encode (b, 3, h, w) without noise."""
    encoded = vae.encode(pixels)
    return encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latent


def reconstruct(vae: Autoencoder, pixels: torch.Tensor) -> torch.Tensor:
    """Encode and decode (b, 3, h, w) without noise; clipped to [-1, 1]."""
    import torch

    with torch.no_grad():
        parts = [vae.decode(encode(vae, p)).sample for p in pixels.split(16)]
    return torch.cat(parts).clamp(-1, 1)


def psnr(predicted: torch.Tensor, target: torch.Tensor) -> float:
    """Return the mean peak signal-to-noise ratio in dB; values in [-1, 1]."""
    mse = (predicted - target).square().mean(dim=(1, 2, 3)) / 4.0
    return float((-10.0 * mse.clamp_min(1e-10).log10()).mean())


def standardise_latents(vae: Autoencoder, pixels: torch.Tensor) -> None:
    """Fold the mean and deviation of each latent channel into the 1x1 convolutions around it.

    This is exact: the images stay the same, the latents get mean 0 and deviation 1. An
    AutoencoderDC has no such convolutions; its `scaling_factor` is set to 1 / deviation instead.
    """
    import torch

    with torch.no_grad():
        latents = torch.cat([encode(vae, p) for p in pixels.split(32)])
        if not hasattr(vae, "quant_conv"):
            vae.register_to_config(scaling_factor=1.0 / latents.std().item())
            return
        mean, std = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
        into, out = vae.quant_conv, vae.post_quant_conv
        out.bias += out.weight[:, :, 0, 0] @ mean
        out.weight *= std.view(1, -1, 1, 1)
        into.weight[:LATENT_CHANNELS] /= std.view(-1, 1, 1, 1)
        into.bias[:LATENT_CHANNELS] = (into.bias[:LATENT_CHANNELS] - mean) / std
        into.bias[LATENT_CHANNELS:] -= 2.0 * std.log()


def save_comparison(path: Path, originals: torch.Tensor, decoded: torch.Tensor) -> None:
    """Save rows of originals above their reconstructions; (16, 3, side, side) each."""
    import torch
    from PIL import Image

    rows = [torch.cat(list(part), dim=2) for pair in zip(originals.split(8), decoded.split(8),
            strict=True) for part in pair]  # fmt: skip
    pixels = ((torch.cat(rows, dim=1) + 1.0) * 127.5).round().byte().permute(1, 2, 0)
    Image.fromarray(pixels.contiguous().numpy()).save(path)


def update_average(average: Autoencoder, vae: Autoencoder, decay: float) -> None:
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
    pictures, centres = draw_pictures(args.scenes, args.seed, False, args.side)
    held_out = to_tensor(draw_pictures(128, args.seed, True, args.side)[0])
    vae = build_autoencoder() if args.kind == "kl" else build_compact_autoencoder()
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
