"""Train a small AutoencoderDC on drawn scenes: that of the model in the box, or a compact one.

    python recipes/box/train_autoencoder.py --output output/box/vae
    python recipes/box/train_autoencoder.py --compression 32 --output output/compact/vae

Writes a folder with 16-bit weights for `from_pretrained` of `diffusers.AutoencoderDC`, and in it
`reconstructions.png`: held-out scenes above their reconstructions. `--pretrained` trains such a
folder further. With `--freeze-encoder`, the latents stay as they are, so a transformer that knows
them stays valid. `--generated-by` trains the decoder on that transformer's latents as well, for
captions of training scenes: it learns to draw a sharp scene from latents that are a little off.
`--full-resolution` adds a level of blocks to the decoder, at the resolution of the image.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch
    from diffusers import AutoencoderDC

    from localdit.scenes import Background, Scene

# Pixels per latent: channels of the latents, and of each level.
SHAPES = {16: (8, (16, 32, 64, 128, 128)), 32: (32, (16, 32, 64, 64, 128, 128))}
FULL_RESOLUTION_CHANNELS = 8  # of the level that `--full-resolution` adds


@dataclass(frozen=True)
class Stage:
    """A stage of training: its end and its crops as shares of steps and side, its batch size."""

    until: float
    crop: float
    batch_size: int


STAGES = (Stage(0.5, 0.25, 32), Stage(0.85, 0.5, 8), Stage(1.0, 1.0, 4))
GUIDANCE_SCALE = 2.0  # of the model in the box


@dataclass(frozen=True)
class Drawings:
    """Drawn scenes.

    Attributes:
        pixels: (n, side, side, 3) uint8.
        centres: of an object of each, (n, 2): x and y in pixels.
        latents: from which the decoder is to draw them, (n, c, h, w); None to encode them.
    """

    pixels: np.ndarray
    centres: np.ndarray
    latents: torch.Tensor | None = None


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--compression", type=int, choices=list(SHAPES), default=16,
                        help="pixels per latent, along the side")  # fmt: skip
    parser.add_argument("--pretrained", type=Path, metavar="FOLDER",
                        help="autoencoder to train further")  # fmt: skip
    parser.add_argument("--freeze-encoder", action="store_true", help="train only the decoder")
    parser.add_argument("--full-resolution", action="store_true", help="add a level of blocks at "
                        "full resolution to the decoder, if it has none")  # fmt: skip
    parser.add_argument("--generated-by", type=Path, metavar="FOLDER", help="pipeline that "
                        "generates the latents of every second batch")  # fmt: skip
    parser.add_argument("--generated", type=int, default=1_500, help="number of its images")
    parser.add_argument("--side", type=int, default=256, help="width and height in pixels, "
                        "a multiple of 128")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="seed of scenes, weights and noise")
    parser.add_argument("--steps", type=int, default=2_400, help="optimizer steps")
    parser.add_argument("--scenes", type=int, default=6_000, help="number of training images")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--latent-noise", type=float, default=0.2, help="largest added noise, "
                        "in standard deviations of the latents")  # fmt: skip
    parser.add_argument("--edge-weight", type=float, default=0.0,
                        help="how many times more errors at edges count")  # fmt: skip
    parser.add_argument("--whitening-weight", type=float, default=0.02, help="weight of "
                        "the latents' distance from uncorrelated ones")  # fmt: skip
    parser.add_argument("--ema", type=float, default=0.998, help="decay of the averaged weights")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--eval-every", type=int, default=200, help="steps between PSNR prints")
    args = parser.parse_args()
    if args.full_resolution and not args.pretrained:
        parser.error("--full-resolution needs an autoencoder to add the level to, as --pretrained")
    if args.generated_by and not (args.pretrained and args.freeze_encoder):
        parser.error("--generated-by needs the autoencoder of its latents, as --pretrained, and "
                     "--freeze-encoder")  # fmt: skip
    return args


def build_autoencoder(compression: int) -> AutoencoderDC:
    """Build an autoencoder without a posterior (DC-AE), whose first level has no blocks."""
    import torch
    from diffusers import AutoencoderDC

    latent_channels, channels = SHAPES[compression]
    levels = len(channels)
    blocks = ("ResBlock",) * levels
    if compression > 16:
        blocks = (*blocks[1:], "EfficientViTBlock")
    layers = (0,) + (1,) * (levels - 1)
    vae = AutoencoderDC(
        latent_channels=latent_channels,
        attention_head_dim=32,
        encoder_block_types=blocks,
        decoder_block_types=blocks,
        encoder_block_out_channels=channels,
        decoder_block_out_channels=channels,
        encoder_layers_per_block=layers,
        decoder_layers_per_block=layers,
        encoder_qkv_multiscales=((),) * levels,
        decoder_qkv_multiscales=((),) * levels,
        scaling_factor=1.0,
    )
    return vae.to(memory_format=torch.channels_last)


def with_full_resolution(vae: AutoencoderDC) -> AutoencoderDC:
    """Return an autoencoder with `vae`'s weights whose decoder has a block at full resolution.

    The new level, and the convolution that turns its channels into colours, start at random.
    """
    import torch
    from diffusers import AutoencoderDC

    layers, channels = vae.config.decoder_layers_per_block, vae.config.decoder_block_out_channels
    if layers[0]:
        return vae
    result = AutoencoderDC.from_config(
        vae.config,
        decoder_layers_per_block=(1, *layers[1:]),
        decoder_block_out_channels=(FULL_RESOLUTION_CHANNELS, *channels[1:]),
    )
    weights = result.state_dict()
    for name, weight in vae.state_dict().items():
        if name in weights and weight.shape == weights[name].shape:
            weights[name].copy_(weight)
    return result.to(memory_format=torch.channels_last)


def draw(scenes: list[Scene], side: int, latents: torch.Tensor | None = None) -> Drawings:
    """Draw scenes, of `side` x `side` pixels."""
    import numpy as np

    from localdit.scenes import draw_scene

    pixels = np.stack([np.asarray(draw_scene(scene, side)) for scene in scenes])
    things = [scene.objects[i % len(scene.objects)] for i, scene in enumerate(scenes)]
    centres = np.array([(side * thing.x, side * thing.y) for thing in things])
    return Drawings(pixels, centres, latents)


def on_grid(scene: Scene) -> tuple[Background, list[Any]]:
    """Return all that can differ between scenes on the grid."""
    from localdit.scenes.scene import GRID

    things = [(*one.look, round(one.x * GRID), round(one.y * GRID)) for one in scene.objects]
    return scene.background, sorted(things)


def generate(args: argparse.Namespace, batch_size: int = 10) -> list[Drawings]:
    """Generate latents for captions of training scenes; keep those that show them, if any do."""
    import numpy as np
    import torch

    from localdit import LocalDiTPipeline
    from localdit.scenes import describe, sample_scenes
    from localdit.scenes.recognition import reported_scene

    pipe = LocalDiTPipeline.from_pretrained(args.generated_by)
    pipe.set_progress_bar_config(disable=True)
    rng = np.random.default_rng([args.seed, 13])
    generator = torch.Generator().manual_seed(args.seed)
    scenes = list(sample_scenes(args.generated, args.seed + 3_000_003))
    shown, kept = [], []
    for start in range(0, len(scenes), batch_size):
        batch = scenes[start : start + batch_size]
        scaled = pipe(
            [describe(scene, rng).text for scene in batch], height=args.side, width=args.side,
            guidance_scale=GUIDANCE_SCALE, generator=generator, output_type="latent",
        ).images  # fmt: skip
        with torch.no_grad():
            decoded = pipe.latent_space.decode(scaled).clamp(-1, 1)
        pixels = ((decoded + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
        for scene, latents, picture in zip(batch, scaled, pixels, strict=True):
            seen = reported_scene(picture)
            if seen is not None and on_grid(seen) == on_grid(scene):
                shown.append(scene)
                kept.append(latents / pipe.vae.config.scaling_factor)
    print(f"{len(shown)} of {len(scenes)} generated images show their scene", flush=True)
    if not shown:
        return []
    return [draw(shown, args.side, torch.stack(kept))]


def to_tensor(pictures: np.ndarray) -> torch.Tensor:
    """Convert (b, h, w, 3) uint8 to (b, 3, h, w) in [-1, 1]."""
    import torch

    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1.0
    return pixels.contiguous(memory_format=torch.channels_last)


def random_crops(
    drawings: Drawings, stage: Stage, rng: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return a batch of crops that show (a part of) an object.

    They begin on the scenes' grid, as latents do.

    Returns:
        Pixels (b, 3, crop, crop) in [-1, 1], and their latents if the drawings have any.
    """
    import numpy as np
    import torch

    from localdit.scenes.scene import GRID

    side = drawings.pixels.shape[1]
    grid = GRID if drawings.latents is None else min(GRID, drawings.latents.shape[2])
    chosen = rng.integers(len(drawings.pixels), size=stage.batch_size)
    crop = round(stage.crop * side)
    reach = crop / 2 + 4
    corners = drawings.centres[chosen] - crop / 2 + rng.uniform(-reach, reach, (len(chosen), 2))
    cells = np.clip(np.round(corners * grid / side), 0, (side - crop) * grid // side).astype(int)

    def cut(pictures: Any, axis: int) -> list[Any]:
        cell = pictures[0].shape[axis] // grid
        size = round(stage.crop * pictures[0].shape[axis])
        before = (slice(None),) * axis
        return [
            pictures[i][(*before, slice(y, y + size), slice(x, x + size))]
            for i, (x, y) in zip(chosen, cells * cell, strict=True)
        ]

    pixels = to_tensor(np.stack(cut(drawings.pixels, 0)))
    return pixels, None if drawings.latents is None else torch.stack(cut(drawings.latents, 1))


def at_edges(pictures: torch.Tensor) -> torch.Tensor:
    """Return 1.0 for the pixels on both sides of an edge, else 0.0; (b, 1, h, w) of (b, 3, h, w).

    Neighbours differ by at least 0.02 there, more than in any gradient of a background.
    """
    import torch

    across = pictures.diff(dim=3).abs().amax(1, keepdim=True) >= 0.02
    down = pictures.diff(dim=2).abs().amax(1, keepdim=True) >= 0.02
    found = torch.zeros_like(pictures[:, :1])
    found[..., 1:][across] = found[..., :-1][across] = 1.0
    found[..., 1:, :][down] = found[..., :-1, :][down] = 1.0
    return found


def reconstruction_loss(
    predicted: torch.Tensor, target: torch.Tensor, progress: float, edge_weight: float
) -> torch.Tensor:
    """Return L1 + L1 of finite differences, and at first MSE; (b, 3, h, w) each.

    MSE finds the colours soon, but blurs an edge whose place is uncertain; L1 keeps it sharp. The
    L1 of pixels at edges counts `edge_weight` times more: they are few.
    """
    error, weight = predicted - target, 1.0 + edge_weight * at_edges(target)
    across = (error.diff(dim=3).abs() * weight[..., 1:]).mean()
    down = (error.diff(dim=2).abs() * weight[..., 1:, :]).mean()
    squared = 2.0 * (1.0 - progress) ** 2 * error.square().mean()
    return (error.abs() * weight).mean() + squared + 0.5 * (across + down)


def distance_from_white(latents: torch.Tensor) -> torch.Tensor:
    """Return the distance of the channels' second moments from the identity; (b, c, h, w)."""
    import torch

    rows = latents.float().transpose(0, 1).flatten(1)  # (c, b h w)
    moments = rows @ rows.T / rows.shape[1]
    return (moments - torch.eye(len(rows))).square().mean() + rows.mean(dim=1).square().mean()


def training_loss(
    vae: AutoencoderDC,
    pixels: torch.Tensor,
    generated: torch.Tensor | None,
    args: argparse.Namespace,
    progress: float,
) -> torch.Tensor:
    """Return the loss of reconstructed pixels, or of those decoded from generated latents."""
    import torch

    with torch.autocast("cpu", torch.bfloat16):
        if generated is not None:
            decoded = vae.decode(generated).sample
            return reconstruction_loss(decoded.float(), pixels, progress, args.edge_weight)
        latents = vae.encode(pixels).latent
        # Noise makes small errors of a denoiser small in the picture.
        level = args.latent_noise * torch.rand(len(pixels), 1, 1, 1)
        spread = latents.detach().float().std(dim=(0, 2, 3), keepdim=True)
        decoded = vae.decode(latents + level * spread * torch.randn(latents.shape)).sample
    loss = reconstruction_loss(decoded.float(), pixels, progress, args.edge_weight)
    if args.freeze_encoder:
        return loss
    return loss + args.whitening_weight * distance_from_white(latents)


def learning_rate(progress: float, peak: float) -> float:
    """Return the rate: warm-up over the first 1 %, then cosine to 0; `progress` in [0, 1]."""
    return peak * min(1.0, progress / 0.01 + 0.01) * 0.5 * (1.0 + math.cos(math.pi * progress))


def as_matrix(weight: torch.Tensor) -> torch.Tensor:
    """View the weight of a convolution, channels last, as (output channels, everything else)."""
    channels_last = weight.permute(0, 2, 3, 1) if weight.dim() == 4 else weight
    return channels_last.view(len(weight), -1)


class MuonWithAdamW:
    """Muon for the weights that are matrices with many inputs and outputs, AdamW for the rest.

    The convolutions to and from pixels and those of single channels are AdamW's. Both optimizers
    share the learning rate: Muon's update is scaled to the root mean square of AdamW's.
    """

    def __init__(self, parameters: list[torch.nn.Parameter], learning_rate: float) -> None:
        import torch

        self.weights = [p for p in parameters if p.dim() > 1 and len(p) > 3 and p[0].numel() > 27]
        chosen = {id(weight) for weight in self.weights}
        others = [parameter for parameter in parameters if id(parameter) not in chosen]
        self.matrices = [as_matrix(weight.detach()) for weight in self.weights]
        self.muon = torch.optim.Muon(
            self.matrices, lr=learning_rate, weight_decay=0, adjust_lr_fn="match_rms_adamw"
        )
        self.adamw = torch.optim.AdamW(
            others, lr=learning_rate, betas=(0.9, 0.99), weight_decay=0, fused=True
        )

    def step(self, learning_rate: float) -> None:
        """Take a step from the gradients, and clear them."""
        for weight, matrix in zip(self.weights, self.matrices, strict=True):
            matrix.grad = None if weight.grad is None else as_matrix(weight.grad)
            weight.grad = None
        for optimizer in (self.muon, self.adamw):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            optimizer.step()
            optimizer.zero_grad()


def reconstruct(vae: AutoencoderDC, pixels: torch.Tensor) -> torch.Tensor:
    """Encode and decode (b, 3, h, w) without noise; clipped to [-1, 1]."""
    import torch

    with torch.no_grad():
        parts = [vae.decode(vae.encode(p).latent).sample for p in pixels.split(16)]
    return torch.cat(parts).clamp(-1, 1)


def psnr(predicted: torch.Tensor, target: torch.Tensor) -> float:
    """Return the mean peak signal-to-noise ratio in dB; values in [-1, 1]."""
    mse = (predicted - target).square().mean(dim=(1, 2, 3)) / 4.0
    return float((-10.0 * mse.clamp_min(1e-10).log10()).mean())


def edge_contrast(predicted: torch.Tensor, target: torch.Tensor) -> float:
    """Return the inner product of the gradients, divided by the target's with itself."""
    pairs = [(predicted.diff(dim=dim), target.diff(dim=dim)) for dim in (2, 3)]
    shared = sum(float((shown * true).sum()) for shown, true in pairs)
    return shared / sum(float(true.square().sum()) for _, true in pairs)


def set_scale(vae: AutoencoderDC, pixels: torch.Tensor) -> None:
    """Set `scaling_factor` to 1 / the standard deviation of the latents."""
    import torch

    with torch.no_grad():
        latents = torch.cat([vae.encode(p).latent for p in pixels.split(32)])
    vae.register_to_config(scaling_factor=1.0 / latents.std().item())


def save_comparison(path: Path, originals: torch.Tensor, decoded: torch.Tensor) -> None:
    """Save rows of originals above their reconstructions; (16, 3, side, side) each."""
    import torch
    from PIL import Image

    rows = [torch.cat(list(part), dim=2) for pair in zip(originals.split(8), decoded.split(8),
            strict=True) for part in pair]  # fmt: skip
    pixels = ((torch.cat(rows, dim=1) + 1.0) * 127.5).round().byte().permute(1, 2, 0)
    Image.fromarray(pixels.contiguous().numpy()).save(path)


def update_average(average: AutoencoderDC, vae: AutoencoderDC, decay: float) -> None:
    import torch

    with torch.no_grad():
        for slow, fast in zip(average.parameters(), vae.parameters(), strict=True):
            slow.lerp_(fast, 1.0 - decay)


def main() -> None:
    args = parse_args()

    import copy

    import numpy as np
    import torch
    from diffusers import AutoencoderDC

    from localdit.scenes import sample_scenes

    started = time.perf_counter()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    drawings = [draw(list(sample_scenes(args.scenes, args.seed)), args.side)]
    held_out = to_tensor(draw(list(sample_scenes(128, args.seed, True)), args.side).pixels)
    if args.generated_by:
        drawings += generate(args)
    vae = build_autoencoder(args.compression)
    if args.pretrained:
        vae = AutoencoderDC.from_pretrained(args.pretrained).to(memory_format=torch.channels_last)
    if args.full_resolution:
        vae = with_full_resolution(vae)
    vae.encoder.requires_grad_(not args.freeze_encoder)
    average = copy.deepcopy(vae)
    trained = [parameter for parameter in vae.parameters() if parameter.requires_grad]
    optimizer = MuonWithAdamW(trained, args.lr)
    print(f"{sum(p.numel() for p in vae.parameters()) / 1e6:.2f}M parameters", flush=True)

    for step in range(1, args.steps + 1):
        progress = (step - 1) / args.steps
        stage = next(s for s in STAGES if progress < s.until)
        crops = random_crops(drawings[step % len(drawings)], stage, rng)
        # A pretrained autoencoder has found the colours: the squares would only blur its edges.
        loss = training_loss(vae, *crops, args, 1.0 if args.pretrained else progress)
        if not torch.isfinite(loss):
            raise RuntimeError(f"loss is {loss.item()} at step {step}")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step(learning_rate(progress, args.lr))
        update_average(average, vae, min(args.ema, step / (step + 10)))
        if step % args.eval_every == 0:
            decoded = reconstruct(average, held_out[:32])
            decibels = psnr(decoded, held_out[:32])
            contrast = edge_contrast(decoded, held_out[:32])
            minutes = (time.perf_counter() - started) / 60
            print(f"step {step} loss {loss.item():.4f} held-out PSNR {decibels:.2f} dB, "
                  f"contrast {contrast:.3f} after {minutes:.1f} min", flush=True)  # fmt: skip
            average.save_pretrained(args.output.with_name(args.output.name + "_unfinished"))

    if not args.freeze_encoder:
        set_scale(average, to_tensor(drawings[0].pixels[:512]))
    average.half().save_pretrained(args.output)
    average.float()  # evaluate the weights rounded to 16 bits
    decoded = reconstruct(average, held_out)
    save_comparison(args.output / "reconstructions.png", held_out[:16], decoded[:16])
    print(f"held-out PSNR {psnr(decoded, held_out):.2f} dB, "
          f"contrast across the edges {edge_contrast(decoded, held_out):.3f}, "
          f"{(time.perf_counter() - started) / 60:.1f} min in all")  # fmt: skip


if __name__ == "__main__":
    main()
