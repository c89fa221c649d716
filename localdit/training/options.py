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
    parser = _parser()
    args = parser.parse_args(argv)
    problem = _problem(args)
    if problem:
        parser.error(problem)
    return args


def _parser() -> argparse.ArgumentParser:
    config = Config()
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    # Data
    add("--data-root", type=Path, required=True, help="folder of pictures: with a metadata.jsonl (file_name, text) in it, or a .txt beside each")  # fmt: skip
    add("--image-size", type=int, default=512, help="side in pixels of the square the pictures are scaled and cropped to, a multiple of 16 (default: %(default)s)")  # fmt: skip
    add("--batch-size", type=int, default=config.batch_size, help="pictures per step and process (default: %(default)s)")  # fmt: skip
    add("--num-workers", type=int, default=config.num_workers, help="processes that read pictures, for each process that trains (default: %(default)s)")  # fmt: skip
    add("--max-caption-length", type=int, default=config.max_length, help="text tokens a caption is cut at (default: %(default)s)")  # fmt: skip
    add("--token-dropout", type=float, default=config.token_dropout, help="share of captions replaced by the empty one, for classifier-free guidance (default: %(default)s)")  # fmt: skip
    add("--cache-latents", action="store_true", help="encode every picture and caption once, into memory, before training")  # fmt: skip
    # Model
    add("--transformer", type=Path, help="weights to start from: a Diffusers folder or a checkpoint file (default: a new transformer)")  # fmt: skip
    add("--transformer-config", default="released", help="shape of a new transformer: released, tiny, or a JSON file (default: %(default)s)")  # fmt: skip
    add("--pretrained", type=Path, help="pipeline folder that gives tokenizer, text encoder and VAE at once")  # fmt: skip
    add("--vae", default=config.vae, help="folder or hub name of the VAE (default: %(default)s)")
    add("--text-encoder", default=config.text_encoder, help="folder or hub name of the T5 encoder (default: %(default)s)")  # fmt: skip
    add("--tokenizer", help="folder or hub name of the tokenizer (default: that of the text encoder)")  # fmt: skip
    # Objective
    add("--prediction-type", choices=["epsilon", "v_prediction"], default="epsilon", help="what the model predicts: the noise, or the velocity (default: %(default)s)")  # fmt: skip
    add("--timestep-sampling", choices=["uniform", "logit_normal"], default="uniform", help="which timesteps are trained how often (default: %(default)s)")  # fmt: skip
    add("--min-snr-gamma", type=float, help="cap of the signal-to-noise ratio in the loss weight (default: no weighting)")  # fmt: skip
    # Optimisation
    add("--max-train-steps", type=int, default=config.max_datasteps, help="optimizer steps (default: %(default)s)")  # fmt: skip
    add("--learning-rate", type=float, default=config.learning_rate, help="peak learning rate of AdamW (default: %(default)s)")  # fmt: skip
    add("--lr-schedule", choices=["constant", "cosine"], default="constant", help="the learning rate after warm-up (default: %(default)s)")  # fmt: skip
    add("--warmup-steps", type=int, default=0, help="steps over which the learning rate rises from 0 (default: %(default)s)")  # fmt: skip
    add("--weight-decay", type=float, default=config.weight_decay, help="AdamW's weight decay (default: %(default)s)")  # fmt: skip
    add("--gradient-clip", type=float, default=config.gradient_clip, help="largest norm of the gradient (default: %(default)s)")  # fmt: skip
    add("--gradient-accumulation-steps", type=int, default=1, help="batches per optimizer step (default: %(default)s)")  # fmt: skip
    add("--gradient-checkpointing", action="store_true", help="recompute activations: less memory, more time")  # fmt: skip
    add("--mixed-precision", choices=["no", "fp16", "bf16"], help="precision of the forward pass (default: Accelerate's setting)")  # fmt: skip
    add("--ema-decay", type=float, default=config.ema_beta, help="decay of the averaged weights, which are the ones saved; warmed up (default: %(default)s)")  # fmt: skip
    add("--seed", type=int, default=0, help="seed of weights, order, captions and noise (default: %(default)s)")  # fmt: skip
    # Output
    add("--output", type=Path, default=Path("runs/train"), help="run folder, new or empty (default: %(default)s)")  # fmt: skip
    add("--save-interval", type=int, default=config.save_checkpoint_interval, help="steps between checkpoints (default: %(default)s)")  # fmt: skip
    add("--log-interval", type=int, default=50, help="steps between lines of metrics.jsonl (default: %(default)s)")  # fmt: skip
    add("--validation-prompts", nargs="+", default=[], metavar="PROMPT", help="prompts to make pictures of")  # fmt: skip
    add("--validation-interval", type=int, default=config.validation_interval, help="steps between these pictures (default: %(default)s)")  # fmt: skip
    add("--use-wandb", action="store_true", help="log to Weights & Biases as well")
    return parser


def _problem(args: argparse.Namespace) -> str | None:
    """What is wrong with the options, if something is."""
    for name in ("image_size", "batch_size", "max_caption_length", "max_train_steps",
                 "gradient_accumulation_steps", "save_interval", "log_interval",
                 "validation_interval", "learning_rate", "gradient_clip"):  # fmt: skip
        if not getattr(args, name) > 0:
            return f"{_flag(name)} is {getattr(args, name)}; expected more than 0"
    for name in ("num_workers", "warmup_steps", "weight_decay", "seed"):
        if not getattr(args, name) >= 0:
            return f"{_flag(name)} is {getattr(args, name)}; expected at least 0"
    for name in ("token_dropout", "ema_decay"):
        if not 0 <= getattr(args, name) <= 1:
            return f"{_flag(name)} is {getattr(args, name)}; expected 0 to 1"
    if args.min_snr_gamma is not None and not args.min_snr_gamma > 0:
        return f"--min-snr-gamma is {args.min_snr_gamma}; expected more than 0"
    if args.image_size % PIXEL_MULTIPLE:
        nearest = max(PIXEL_MULTIPLE, round(args.image_size / PIXEL_MULTIPLE) * PIXEL_MULTIPLE)
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
