"""The command line of `train.py`: every option, its default and its check.

The defaults are those of `Config`. Nothing heavy is imported here, so `--help` answers at once.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Sequence
from pathlib import Path

from localdit.config import PIXEL_MULTIPLE, Config

DESCRIPTION = """Train a LocalDiT on captioned pictures.

    python train.py --data-root pictures --image-size 512 --batch-size 4
    accelerate launch train.py --data-root pictures --image-size 512 --batch-size 2
"""


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options as a flat namespace; ends the program with a message if one can't be right."""
    parser = argparse.ArgumentParser(description=DESCRIPTION, formatter_class=_HelpFormatter)
    defaults = Config()
    _add_data_options(parser.add_argument_group("data"), defaults)
    _add_model_options(parser.add_argument_group("models"), defaults)
    _add_objective_options(parser.add_argument_group("objective"))
    _add_optimisation_options(parser.add_argument_group("optimisation"), defaults)
    _add_output_options(parser.add_argument_group("output"), defaults)
    args = parser.parse_args(argv)
    if problem := _problem(args):
        parser.error(problem)
    return args


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Names the default of each option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        has_default = action.default not in (None, False, [], argparse.SUPPRESS)
        return (action.help or "") + (" (default: %(default)s)" if has_default else "")


def _add_data_options(group: argparse._ArgumentGroup, defaults: Config) -> None:
    add = group.add_argument
    add("--data-root", type=Path, required=True,
        help="folder of pictures, with a metadata.jsonl (file_name, text) in it or a .txt beside "
        "each")  # fmt: skip
    add("--image-size", type=int, default=512,
        help="side in pixels of the centre square that pictures are cut to: a multiple of "
        "16")  # fmt: skip
    add("--batch-size", type=int, default=defaults.batch_size,
        help="pictures per process and batch")  # fmt: skip
    add("--num-workers", type=int, default=defaults.num_workers,
        help="per process that trains, processes that read pictures")  # fmt: skip
    add("--max-caption-length", type=int, default=defaults.max_length,
        help="text tokens a caption is cut at")  # fmt: skip
    add("--token-dropout", type=float, default=defaults.token_dropout,
        help="share of captions replaced by the empty one, for the sake of "
        "guidance")  # fmt: skip
    add("--cache-latents", action="store_true",
        help="encode all pictures and captions into memory before training")  # fmt: skip


def _add_model_options(group: argparse._ArgumentGroup, defaults: Config) -> None:
    add = group.add_argument
    add("--transformer", type=Path,
        help="weights to start from: a Diffusers folder or a checkpoint file; without it, a new "
        "transformer is trained")  # fmt: skip
    add("--transformer-config", default="released",
        help="shape of a new transformer: released, tiny, or a JSON file")  # fmt: skip
    add("--pretrained", type=Path,
        help="pipeline folder that gives tokenizer, text encoder and VAE at once")  # fmt: skip
    add("--vae", default=defaults.vae, help="folder or hub name of the VAE")
    add("--text-encoder", default=defaults.text_encoder,
        help="folder or hub name of the T5 encoder")  # fmt: skip
    add("--tokenizer", help="folder or hub name of the tokenizer; without it, the text encoder's")


def _add_objective_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--prediction-type", choices=["epsilon", "v_prediction"], default="epsilon",
        help="what the model predicts: the noise, or the velocity")  # fmt: skip
    add("--timestep-sampling", choices=["uniform", "logit_normal"], default="uniform",
        help="how often which timesteps are trained")  # fmt: skip
    add("--min-snr-gamma", type=float,
        help="cap of the signal-to-noise ratio in the loss's weight; without it, no "
        "weighting")  # fmt: skip


def _add_optimisation_options(group: argparse._ArgumentGroup, defaults: Config) -> None:
    add = group.add_argument
    add("--max-train-steps", type=int, default=defaults.max_datasteps, help="optimizer steps")
    add("--learning-rate", type=float, default=defaults.learning_rate, help="peak, for AdamW")
    add("--lr-schedule", choices=["constant", "cosine"], default="constant",
        help="the learning rate after warm-up")  # fmt: skip
    add("--warmup-steps", type=int, default=0, help="steps of the learning rate's rise from 0")
    add("--weight-decay", type=float, default=defaults.weight_decay, help="of AdamW")
    add("--gradient-clip", type=float, default=defaults.gradient_clip,
        help="largest norm of the gradient")  # fmt: skip
    add("--gradient-accumulation-steps", type=int, default=1, help="batches per optimizer step")
    add("--gradient-checkpointing", action="store_true",
        help="recompute activations: less memory, more time")  # fmt: skip
    add("--mixed-precision", choices=["no", "fp16", "bf16"],
        help="precision of the forward pass; without it, as Accelerate is configured")  # fmt: skip
    add("--ema-decay", type=float, default=defaults.ema_beta,
        help="decay of the averaged weights, the ones that are saved")  # fmt: skip
    add("--seed", type=int, default=0, help="seed of weights, order, captions and noise")


def _add_output_options(group: argparse._ArgumentGroup, defaults: Config) -> None:
    add = group.add_argument
    add("--output", type=Path, default=Path("runs/train"), help="run folder, new or empty")
    add("--save-interval", type=int, default=defaults.save_checkpoint_interval,
        help="steps between checkpoints")  # fmt: skip
    add("--log-interval", type=int, default=50, help="steps between lines of metrics.jsonl")
    add("--validation-prompts", nargs="+", default=[], metavar="PROMPT",
        help="prompts to make pictures of on the way")  # fmt: skip
    add("--validation-interval", type=int, default=defaults.validation_interval,
        help="steps between these pictures")  # fmt: skip
    add("--use-wandb", action="store_true", help="log to Weights & Biases as well")


def _problem(args: argparse.Namespace) -> str | None:
    """What is wrong with the options, if something is."""
    positive = ["image_size", "batch_size", "max_caption_length", "max_train_steps",
                "learning_rate", "gradient_clip", "gradient_accumulation_steps", "save_interval",
                "log_interval", "validation_interval"]  # fmt: skip
    if args.min_snr_gamma is not None:
        positive.append("min_snr_gamma")
    for name in positive:
        if not getattr(args, name) > 0:
            return f"{_flag(name)} is {getattr(args, name)}; expected more than 0"
    for name in ("num_workers", "warmup_steps", "weight_decay", "seed"):
        if not getattr(args, name) >= 0:
            return f"{_flag(name)} is {getattr(args, name)}; expected at least 0"
    for name in ("token_dropout", "ema_decay"):
        if not 0 <= getattr(args, name) <= 1:
            return f"{_flag(name)} is {getattr(args, name)}; expected 0 to 1"
    if args.image_size % PIXEL_MULTIPLE:
        nearest = max(1, round(args.image_size / PIXEL_MULTIPLE)) * PIXEL_MULTIPLE
        return (
            f"--image-size is {args.image_size}; expected a multiple of {PIXEL_MULTIPLE}, "
            f"the nearest is {nearest}"
        )
    if args.transformer and not args.transformer.exists():
        return f"--transformer {args.transformer} does not exist"
    if args.pretrained and not args.pretrained.is_dir():
        return f"--pretrained {args.pretrained} is no folder"
    if args.use_wandb and importlib.util.find_spec("wandb") is None:
        return "--use-wandb needs wandb: pip install -r requirements-train.txt"
    return None


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
