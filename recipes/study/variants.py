"""Write the configurations of the compared models, and measure the processor time of their steps.

    python recipes/study/variants.py --output output/study

Writes `variants/NAME.json` for `train.py --transformer-config`, and `costs.json`: for each variant
the median processor time of a training step in milliseconds, and the steps at which it is scored.
The variants take turns, so that a busy machine slows all of them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SIDE = 16  # latents, which are pixels
CAPTION = 128, 16  # channels and tokens of the text
WARM_UP = 2  # steps that are not counted
INTERVALS = 20  # checkpoints of a run


def variants(tokens: int) -> dict[str, dict[str, Any]]:
    """Return what distinguishes the configuration of each variant, for `tokens` tokens per side.

    A window is a quarter of the picture wide, a large one a half.
    """
    small, large = {"window_size": tokens // 4}, {"window_size": tokens // 2}
    return {
        "windows": small,
        "large-windows": large,
        "large-windows-alternating": large | {"shift_schedule": "alternating"},
        "global": small | {"use_global": True},
        "pooled": small | {"layer_types": "local_pooled"},
        "full-every-3rd": small | {"layer_types": "local local full"},
        "full": small | {"layer_types": "full"},
    }


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write into")
    parser.add_argument("--patch-size", type=int, default=1, help="side of a token in pixels")
    parser.add_argument("--layers", type=int, default=6, help="number of layers")
    parser.add_argument("--heads", type=int, default=2, help="number of attention heads")
    parser.add_argument("--head-dim", type=int, default=32, help="channels per head")
    parser.add_argument("--optimizer", choices=["adamw", "muon"], default="muon",
                        help="optimizer of the runs")  # fmt: skip
    parser.add_argument("--steps", type=int, default=2000, help="optimizer steps of a run")
    parser.add_argument("--batch-size", type=int, default=32, help="pictures per step")
    parser.add_argument("--turns", type=int, default=11, help="steps of each variant to measure")
    return parser.parse_args()


def stepper(config: dict[str, Any], batch_size: int, optimizer_name: str) -> Callable[[], None]:
    """Return a function that takes a step like `train.py`: loss, gradient, optimizer, average."""
    import torch
    from diffusers.training_utils import EMAModel

    from localdit.models import LocalDiTTransformer2DModel
    from localdit.training.optimizer import make_optimizer

    model = LocalDiTTransformer2DModel.from_config(config).train()
    optimizer = make_optimizer(model.named_parameters(), optimizer_name, 1e-4, 0.0)
    average = EMAModel(model.parameters())
    latents = torch.randn(batch_size, model.config.in_channels, SIDE, SIDE)
    channels, tokens = CAPTION
    text, mask = torch.randn(batch_size, tokens, channels), torch.ones(batch_size, tokens)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            timesteps = torch.randint(1000, (batch_size,))
            predicted = model(latents, text, timesteps, encoder_attention_mask=mask).sample
        (predicted.float() - latents).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.step(model.parameters())

    return step


def measure(steppers: dict[str, Callable[[], None]], turns: int) -> dict[str, float]:
    """Return the median processor time of each step in milliseconds."""
    times: dict[str, list[float]] = {name: [] for name in steppers}
    for _ in range(WARM_UP + turns):
        for name, step in steppers.items():
            started = time.process_time()
            step()
            times[name].append(1000 * (time.process_time() - started))
    return {name: statistics.median(own[WARM_UP:]) for name, own in times.items()}


def scored_steps(milliseconds: dict[str, float], steps: int) -> dict[str, dict[str, int]]:
    """Return the steps at which each variant is scored, by the kind of comparison.

    "steps" is the end of a run. "time" is the checkpoint nearest to the step up to which a variant
    takes the processor time of the cheapest one's whole run.
    """
    cheapest, interval = min(milliseconds.values()), steps // INTERVALS
    return {
        name: {"steps": steps, "time": round(INTERVALS * cheapest / own) * interval}
        for name, own in milliseconds.items()
    }


def main() -> None:
    args = parse_args()
    shape = {
        "num_attention_heads": args.heads, "attention_head_dim": args.head_dim,
        "num_layers": args.layers, "sample_size": SIDE, "patch_size": args.patch_size,
        "in_channels": 3, "out_channels": 3, "caption_channels": CAPTION[0],
    }  # fmt: skip
    tokens = SIDE // args.patch_size
    configs = {name: shape | own for name, own in variants(tokens).items()}
    folder = args.output / "variants"
    folder.mkdir(parents=True, exist_ok=True)
    for name, config in configs.items():
        (folder / f"{name}.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    steppers = {
        name: stepper(config, args.batch_size, args.optimizer) for name, config in configs.items()
    }
    costs = measure(steppers, args.turns)
    report = {"milliseconds": costs, "scored": scored_steps(costs, args.steps)}
    (args.output / "costs.json").write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    print("\n".join(f"{name:20} {cost:6.1f} ms per step" for name, cost in costs.items()))


if __name__ == "__main__":
    main()
