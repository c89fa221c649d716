"""The command line of `train.py`: every option, its default and its check.

The defaults are those of `Config`. Nothing heavy is imported here, so `--help` answers at once.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from localdit.config import Config
from localdit.parsing import Parser
from localdit.training.stages import STAGE_OPTIONS, make_stages, read_stages

DESCRIPTION = """Train a LocalDiT on captioned pictures.

    python train.py --data-root pictures --image-size 512 --batch-size 4
    accelerate launch train.py --data-root pictures --image-size 512 --batch-size 2
"""
FORMATS = ("auto", "folder", "metadata", "webdataset", "saved", "encoded")
EXTRAS = "pip install -r requirements-train.txt"


def parse_args(
    argv: Sequence[str] | None = None, parser: argparse.ArgumentParser | None = None
) -> argparse.Namespace:
    """The options as a flat namespace; ends the program with a message if one can't be right.

    `stages` is made a list of `Stage`, a single one where no file of stages was named.

    Args:
        argv: the options, by default those of the process.
        parser: what `make_parser` returned.
    """
    parser = parser or make_parser()
    args = parser.parse_args(argv)
    if args.num_workers is None:
        args.num_workers = min(Config().num_workers, os.cpu_count() or 1)
    try:
        _check(args)
        args.stages = _stages(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def make_parser(prog: str | None = None) -> Parser:
    """The parser of all options, in groups."""
    parser = Parser(prog=prog, description=DESCRIPTION, formatter_class=HelpFormatter)
    defaults = Config()
    data = parser.add_argument_group("data")
    add_data_options(data, defaults)
    _add_visit_options(data, defaults)
    models = parser.add_argument_group("models")
    _add_transformer_options(models)
    _add_method_options(models)
    _add_lora_options(models)
    add_encoder_options(models, defaults)
    _add_objective_options(parser.add_argument_group("objective"))
    _add_optimisation_options(parser.add_argument_group("optimisation"), defaults)
    _add_output_options(parser.add_argument_group("output"), defaults)
    return parser


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Names the default of each option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        has_default = action.default not in (None, False, [], argparse.SUPPRESS)
        return (action.help or "") + (" (default: %(default)s)" if has_default else "")


def add_data_options(group: argparse._ArgumentGroup, defaults: Config) -> None:
    """Where the data is and what sizes pictures are brought to; encoding ahead takes them too."""
    add = group.add_argument
    add("--data-root", required=True,
        help="folder of captioned pictures, WebDataset tars ('shards/{000..123}.tar'), a data set "
        "saved to disk, or a set encoded ahead")  # fmt: skip
    add("--data-format", choices=FORMATS, default="auto",
        help="what --data-root is, where it isn't told apart by itself")  # fmt: skip
    add("--image-size", type=int, default=512,
        help="side of a square picture in pixels: a multiple of the pixels per token, which are 16 "
        "with the released VAE")  # fmt: skip
    add("--crop", choices=["buckets", "center"], default="buckets",
        help="bring pictures to the nearest aspect ratio of about as many pixels, or cut all of "
        "them to the centre square")  # fmt: skip
    add("--max-aspect-ratio", type=float, default=2.0,
        help="longer over shorter side of a bucket, at most")  # fmt: skip
    add("--max-upscale", type=float, default=1.5,
        help="factor up to which a picture is enlarged; smaller ones are left out")  # fmt: skip
    add("--max-broken", type=float, default=0.1,
        help="share of broken samples above which nothing is done")  # fmt: skip
    add("--max-caption-length", type=int, default=defaults.max_length,
        help="text tokens a caption is cut at")  # fmt: skip
    add("--num-workers", type=int,
        help=f"per process, processes that read pictures; without it, {defaults.num_workers}, but "
        "no more than there are cores")  # fmt: skip


def _add_visit_options(group: argparse._ArgumentGroup, defaults: Config) -> None:
    add = group.add_argument
    add("--batch-size", type=int, default=defaults.batch_size,
        help="pictures per process and batch")  # fmt: skip
    add("--token-dropout", type=float, default=defaults.token_dropout,
        help="share of captions replaced by the empty one, for the sake of "
        "guidance")  # fmt: skip
    add("--horizontal-flip", type=float, default=0.0, help="share of pictures mirrored")
    add("--stages", type=Path,
        help="JSON list of stages, each an object that changes some of "
        f"{', '.join(name.replace('_', '-') for name in STAGE_OPTIONS)}")  # fmt: skip
    add("--dry-run", action="store_true",
        help="say what was found in the data, and stop")  # fmt: skip


def _add_transformer_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--transformer", type=Path,
        help="weights to start from: a Diffusers folder or a checkpoint file, of a LocalDiT or a "
        "PixArt; without it, a new transformer is trained")  # fmt: skip
    add("--transformer-config", default="released",
        help="shape of a new transformer, or of one that starts from a PixArt: released, tiny, or "
        "a JSON file")  # fmt: skip


def _add_method_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--method", choices=["fine-tuning", "knowledge-distillation"], default="fine-tuning",
        help="train on the noise that was added (fine-tuning, also from nothing), or on the "
        "prediction of --teacher")  # fmt: skip
    add("--teacher", type=Path,
        help="weights of the frozen LocalDiT for --method knowledge-distillation: a Diffusers "
        "folder or a checkpoint file")  # fmt: skip


def _add_lora_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--lora-rank", type=int,
        help="train low-rank adapters of this rank, and leave the weights of --transformer as "
        "they are; without it, all weights are trained")  # fmt: skip
    add("--lora-alpha", type=float,
        help="adapters are multiplied by alpha / rank; without it, alpha is the rank")  # fmt: skip
    add("--lora-target-modules", nargs="+", metavar="NAME",
        help="ends of the names of the linear layers that get adapters; without it, those of "
        "attention and of the feed-forward")  # fmt: skip
    add("--lora-dropout", type=float, default=0.0,
        help="probability of dropping a channel before an adapter")  # fmt: skip


def add_encoder_options(group: argparse._ArgumentGroup, defaults: Config) -> None:
    """Where VAE and text encoder come from; encoding ahead takes them too."""
    add = group.add_argument
    add("--pretrained", type=Path,
        help="pipeline folder that gives tokenizer, text encoder and VAE at once")  # fmt: skip
    add("--vae", default=defaults.vae, help="folder or hub name of the VAE")
    add("--text-encoder", default=defaults.text_encoder,
        help="folder or hub name of the T5 encoder")  # fmt: skip
    add("--tokenizer", help="folder or hub name of the tokenizer; without it, the text encoder's")


def _add_objective_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--prediction-type", choices=["epsilon", "v_prediction", "flow"], default="epsilon",
        help="what the model predicts: the noise, the velocity of diffusion, or that of flow "
        "matching")  # fmt: skip
    add("--timestep-sampling", choices=["uniform", "logit_normal"], default="uniform",
        help="how often which timesteps are trained")  # fmt: skip
    add("--min-snr-gamma", type=float,
        help="cap of the signal-to-noise ratio in the loss's weight; without it, no "
        "weighting")  # fmt: skip
    add("--flow-shift", type=float, default=1.0,
        help="of flow matching: how far timesteps are shifted towards noise, 3 for 1024 "
        "pixels")  # fmt: skip


def _add_optimisation_options(group: argparse._ArgumentGroup, defaults: Config) -> None:
    add = group.add_argument
    add("--max-train-steps", type=int, default=defaults.max_datasteps, help="optimizer steps")
    add("--learning-rate", type=float, default=defaults.learning_rate, help="peak, for AdamW")
    add("--lr-schedule", choices=["constant", "cosine"], default="constant",
        help="the learning rate after warm-up")  # fmt: skip
    add("--warmup-steps", type=int, default=0, help="steps of the learning rate's rise from 0")
    add("--optimizer", choices=["adamw", "adamw8bit"], default="adamw",
        help="AdamW, or bitsandbytes' of 8-bit state")  # fmt: skip
    add("--weight-decay", type=float, default=defaults.weight_decay, help="of AdamW")
    add("--gradient-clip", type=float, default=defaults.gradient_clip,
        help="largest norm of the gradient")  # fmt: skip
    add("--gradient-accumulation-steps", type=int, default=1, help="batches per optimizer step")
    add("--gradient-checkpointing", action="store_true",
        help="recompute activations: less memory, more time")  # fmt: skip
    add("--compile", action="store_true", help="compile the blocks with torch.compile")
    add("--mixed-precision", choices=["no", "fp16", "bf16"],
        help="precision of the forward pass; without it, as Accelerate is configured")  # fmt: skip
    add("--ema-decay", type=float, default=defaults.ema_beta,
        help="decay of the averaged weights, the ones that pictures are made with")  # fmt: skip
    add("--ema-on-cpu", action="store_true", help="keep the averaged weights in CPU memory")
    add("--max-skipped-steps", type=int, default=10,
        help="steps whose loss or gradient is not finite that are skipped before training "
        "stops")  # fmt: skip
    add("--seed", type=int, default=0, help="seed of weights, order, captions and noise")


def _add_output_options(group: argparse._ArgumentGroup, defaults: Config) -> None:
    add = group.add_argument
    add("--output", type=Path, default=Path("runs/train"), help="run folder")
    add("--resume", metavar="CHECKPOINT",
        help="go on from a checkpoint's folder, or with 'auto' from the newest sound one in "
        "--output, if there is one")  # fmt: skip
    add("--save-interval", type=int, default=defaults.save_checkpoint_interval,
        help="steps between checkpoints")  # fmt: skip
    add("--keep-checkpoints", type=int, default=2, help="how many of them are kept, at least 2")
    add("--log-interval", type=int, default=50, help="steps between lines of metrics.jsonl")
    add("--log-samples", action="store_true",
        help="write the ids of each step's samples to samples-RANK.jsonl")  # fmt: skip
    add("--validation-prompts", nargs="+", default=[], metavar="PROMPT",
        help="prompts to make pictures of on the way")  # fmt: skip
    add("--validation-guidance-scale", type=float, default=defaults.guidance_scale,
        help="guidance scale of these pictures")  # fmt: skip
    add("--validation-samples", type=int, default=0,
        help="samples kept out of training to measure the loss on")  # fmt: skip
    add("--validation-interval", type=int, default=defaults.validation_interval,
        help="steps between both")  # fmt: skip
    add("--use-wandb", action="store_true", help="log to Weights & Biases as well")
    add("--use-tensorboard", action="store_true", help="log to TensorBoard as well")


def _stages(args: argparse.Namespace) -> list[Any]:
    """The stages, each of them checked as the command line is."""
    changes = read_stages(args.stages) if args.stages else [{}]
    for number, change in enumerate(changes, start=1):
        for name, value in change.items():
            default = getattr(args, name)
            wanted = (int, float) if isinstance(default, float) else type(default)
            if not isinstance(value, wanted) or isinstance(value, bool):
                raise ValueError(
                    f"--stages, stage {number}: {name.replace('_', '-')} is {value!r}; expected "
                    f"such as {default!r}"
                )
        try:
            _check(argparse.Namespace(**(vars(args) | change)))
        except ValueError as error:
            raise ValueError(f"--stages, stage {number}: {error}") from None
    return make_stages(vars(args), changes)


def _check(args: argparse.Namespace) -> None:
    """Raise ValueError where the options can't be right."""
    check_data_options(vars(args))
    positive = ["batch_size", "max_train_steps", "learning_rate", "gradient_clip",
                "gradient_accumulation_steps", "save_interval", "log_interval",
                "validation_interval", "flow_shift"]  # fmt: skip
    if args.min_snr_gamma is not None:
        positive.append("min_snr_gamma")
    require_positive(vars(args), positive)
    for name in ("warmup_steps", "weight_decay", "seed", "validation_samples", "max_skipped_steps"):
        if not getattr(args, name) >= 0:
            raise ValueError(f"{_flag(name)} is {getattr(args, name)}; expected at least 0")
    require_shares(vars(args), ("token_dropout", "ema_decay", "horizontal_flip"))
    if args.keep_checkpoints < 2:
        raise ValueError(f"--keep-checkpoints is {args.keep_checkpoints}; expected at least 2")
    if args.lr_schedule not in ("constant", "cosine"):
        raise ValueError(f"--lr-schedule is {args.lr_schedule!r}; expected constant or cosine")
    if args.prediction_type == "flow" and args.min_snr_gamma is not None:
        raise ValueError("--min-snr-gamma is for epsilon and v_prediction, not for flow")
    if args.prediction_type != "flow" and args.flow_shift != 1:
        raise ValueError("--flow-shift is for --prediction-type flow")
    if args.transformer and not args.transformer.exists():
        raise ValueError(f"--transformer {args.transformer} does not exist")
    if (args.method == "knowledge-distillation") != (args.teacher is not None):
        raise ValueError("--method knowledge-distillation and --teacher go together: give both")
    if args.teacher and not args.teacher.exists():
        raise ValueError(f"--teacher {args.teacher} does not exist")
    _check_lora(args)
    for flag, package in (("use_wandb", "wandb"), ("use_tensorboard", "tensorboard")):
        if getattr(args, flag) and importlib.util.find_spec(package) is None:
            raise ValueError(f"{_flag(flag)} needs {package}: {EXTRAS}")
    if args.optimizer == "adamw8bit" and importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError("--optimizer adamw8bit needs bitsandbytes: pip install bitsandbytes")


def _check_lora(args: argparse.Namespace) -> None:
    """Raise ValueError where the options about adapters can't be right."""
    if args.lora_rank is None:
        for name in ("lora_alpha", "lora_target_modules", "lora_dropout"):
            if getattr(args, name):
                raise ValueError(f"{_flag(name)} is for adapters: give --lora-rank as well")
        return
    require_positive(vars(args), ("lora_rank",) if args.lora_alpha is None else
                     ("lora_rank", "lora_alpha"))  # fmt: skip
    require_shares(vars(args), ("lora_dropout",))
    if args.transformer is None:
        raise ValueError("--lora-rank adapts weights that are there: name them by --transformer")
    if importlib.util.find_spec("peft") is None:
        raise ValueError(f"--lora-rank needs peft: {EXTRAS}")


def check_data_options(options: Mapping[str, Any]) -> None:
    """Raise ValueError where the options about data and encoders can't be right."""
    require_positive(options, ("image_size", "max_caption_length", "max_upscale"))
    require_shares(options, ("max_broken",))
    if options["num_workers"] < 0:
        raise ValueError(f"--num-workers is {options['num_workers']}; expected at least 0")
    if not options["max_aspect_ratio"] >= 1:
        raise ValueError(f"--max-aspect-ratio is {options['max_aspect_ratio']}; expected 1 or more")
    if options["pretrained"] and not options["pretrained"].is_dir():
        raise ValueError(f"--pretrained {options['pretrained']} is no folder")


def check_image_size(size: int, multiple: int) -> None:
    """Raise ValueError if `--image-size` is not a multiple of a token's pixels."""
    if size % multiple:
        nearest = max(1, round(size / multiple)) * multiple
        raise ValueError(
            f"--image-size is {size}; expected a multiple of {multiple}, the nearest is {nearest}"
        )


def require_positive(options: Mapping[str, Any], names: Sequence[str]) -> None:
    """Raise ValueError unless these are more than 0."""
    for name in names:
        if not options[name] > 0:
            raise ValueError(f"{_flag(name)} is {options[name]}; expected more than 0")


def require_shares(options: Mapping[str, Any], names: Sequence[str]) -> None:
    """Raise ValueError unless these are from 0 to 1."""
    for name in names:
        if not 0 <= options[name] <= 1:
            raise ValueError(f"{_flag(name)} is {options[name]}; expected 0 to 1")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
