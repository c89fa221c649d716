"""Time and memory of a training step, beside diffusers' PixArt of equal depth and width.

    python benchmarks/training_step.py --pixels 512 1024 --layers 2 --dtype float32 bfloat16

A step is forward and backward pass of random latents and text, and AdamW. Steps of the two models
take turns in one process, after two each that are not counted; each model's peak memory is taken in
a process of its own. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import platform
import resource
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

MODELS = ("LocalDiT", "PixArt")
WARM_UP = 2  # steps; the second is the first with all of AdamW's state in memory
HEADS, HEAD_DIM, TEXT_CHANNELS = 16, 72, 4096


def main() -> None:
    """Measure every case and print the table."""
    args = parse_args()
    if args.memory_of:
        print(peak_memory(args.memory_of, args.pixels[0], args.dtype[0], args))
        return
    cases = [(pixels, dtype) for dtype in args.dtype for pixels in args.pixels]
    # First, while this process is small: a child counts its parent's size as its own at first.
    memory = {
        (*case, model): memory_in_own_process(model, *case, args)
        for case in cases
        for model in MODELS
    }
    print(describe(args))
    print()
    print(
        "| pixels | precision | LocalDiT, s | PixArt, s | PixArt : LocalDiT | "
        "LocalDiT, GiB | PixArt, GiB |"
    )
    print("|---|---|---|---|---|---|---|")
    for pixels, dtype in cases:
        times = alternating_times(pixels, dtype, args)
        ratios = [pixart / localdit for localdit, pixart in zip(*times.values(), strict=True)]
        cells = [
            f"{pixels} x {pixels}",
            dtype,
            *(f"{statistics.median(times[model]):.3f}" for model in MODELS),
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
            *(f"{memory[pixels, dtype, model] / 2**30:.2f}" for model in MODELS),
        ]
        print(f"| {' | '.join(cells)} |", flush=True)


def parse_args() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description="Time and memory of a training step.")
    add = parser.add_argument
    add("--pixels", type=int, nargs="+", default=[512], help="side of the square pictures")
    add("--layers", type=int, default=2, help="blocks, of 16 heads of 72 channels")
    add("--dtype", nargs="+", choices=["float32", "bfloat16"], default=["float32"],
        help="bfloat16 is mixed: weights and AdamW stay in float32")  # fmt: skip
    add("--batch-size", type=int, default=1)
    add("--text-tokens", type=int, default=120)
    add("--repeats", type=int, default=5, help="steps of each model that count")
    add("--device", default="cpu", help="cpu or cuda")
    add("--memory-of", choices=MODELS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    for name in ("layers", "batch_size", "text_tokens", "repeats"):
        if getattr(args, name) < 1:
            parser.error(
                f"--{name.replace('_', '-')} is {getattr(args, name)}; expected at least 1"
            )
    if any(pixels < 16 or pixels % 16 for pixels in args.pixels):
        parser.error("--pixels expects multiples of 16")
    return args


def make_step(model: str, pixels: int, dtype: str, args: argparse.Namespace) -> Callable[[], None]:
    """A training step of a new model, to be called again and again."""
    import torch

    device = torch.device(args.device)
    torch.manual_seed(0)
    transformer = make_model(model, pixels, args.layers).to(device).train()
    optimizer = torch.optim.AdamW(transformer.parameters(), lr=1e-5, fused=True)
    shape = (args.batch_size, 4, pixels // 8, pixels // 8)
    latents, noise = torch.randn(2, *shape, device=device)
    text = torch.randn(args.batch_size, args.text_tokens, TEXT_CHANNELS, device=device)
    mask = torch.ones(args.batch_size, args.text_tokens, device=device)
    timesteps = torch.randint(1000, (args.batch_size,), device=device)
    kernels = attention_kernels(model, device, dtype)

    def step() -> None:
        with kernels(), torch.autocast(device.type, torch.bfloat16, dtype == "bfloat16"):
            prediction = transformer(
                latents,
                encoder_hidden_states=text,
                encoder_attention_mask=mask,
                timestep=timesteps,
                added_cond_kwargs={"resolution": None, "aspect_ratio": None},
                return_dict=False,
            )[0]
            loss = (prediction.float() - noise).square().mean()
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return step


def model_classes() -> dict[str, Any]:
    """The class of each model."""
    from diffusers import PixArtTransformer2DModel

    from localdit.models import LocalDiTTransformer2DModel

    return {"LocalDiT": LocalDiTTransformer2DModel, "PixArt": PixArtTransformer2DModel}


def make_model(model: str, pixels: int, layers: int) -> Any:
    """A model of random weights; both of the same width and depth, without size conditions."""
    return model_classes()[model](
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        cross_attention_dim=HEADS * HEAD_DIM,
        caption_channels=TEXT_CHANNELS,
        out_channels=4,
        num_layers=layers,
        sample_size=pixels // 8,
        use_additional_conditions=False,
    )


def attention_kernels(
    model: str, device: Any, dtype: str
) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """For LocalDiT the kernels that train.py chooses, for PixArt PyTorch's own choice."""
    from torch.nn.attention import sdpa_kernel

    from localdit.training.components import attention_kernels

    if model == "PixArt":
        return contextlib.nullcontext
    precision = "bf16" if dtype == "bfloat16" else "no"
    return lambda: sdpa_kernel(attention_kernels(device, precision))


def alternating_times(pixels: int, dtype: str, args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of the steps of each model, taken in turns."""
    steps = {model: make_step(model, pixels, dtype, args) for model in MODELS}
    times: dict[str, list[float]] = {model: [] for model in MODELS}
    for repeat in range(WARM_UP + args.repeats):
        for model, step in steps.items():
            start = time.perf_counter()
            step()
            if repeat >= WARM_UP:
                times[model].append(time.perf_counter() - start)
    return times


def peak_memory(model: str, pixels: int, dtype: str, args: argparse.Namespace) -> int:
    """Bytes at the peak of training: of the device, or of the process beyond its imports."""
    import torch

    model_classes()
    attention_kernels(model, torch.device(args.device), dtype)  # and what it imports
    baseline = resident_bytes()
    step = make_step(model, pixels, dtype, args)
    for _ in range(WARM_UP):
        step()
    if args.device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    return resident_bytes() - baseline


def resident_bytes() -> int:
    """The most memory that this process ever held."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def memory_in_own_process(model: str, pixels: int, dtype: str, args: argparse.Namespace) -> int:
    """`peak_memory` as a process of its own measures it."""
    options = {
        "memory-of": model,
        "pixels": pixels,
        "dtype": dtype,
        "layers": args.layers,
        "batch-size": args.batch_size,
        "text-tokens": args.text_tokens,
        "device": args.device,
    }
    command = [sys.executable, __file__]
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return int(result.stdout.split()[-1])


def describe(args: argparse.Namespace) -> str:
    """What was measured, where, when and how."""
    import diffusers
    import torch

    command = shlex.join(["python", *sys.argv])
    if args.device.startswith("cuda"):
        machine = torch.cuda.get_device_name(args.device)
    else:
        machine = f"{torch.get_num_threads()} threads of {processor()}"
    return (
        f"Layers of {HEADS} x {HEAD_DIM} channels: {args.layers}; batches of {args.batch_size}, "
        f"{args.text_tokens} text tokens; medians of {args.repeats} steps each, taken in turns, "
        "and of their ratios, with the lowest and highest.\n"
        f"{machine}; torch {torch.__version__}, diffusers {diffusers.__version__}; "
        f"{datetime.date.today()}; `{command}`."
    )


def processor() -> str:
    """The processor's name."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
