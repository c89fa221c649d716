"""The options of `train.py` as a run takes them: parsed, completed and checked.

Nothing heavy is imported here, so mistakes are reported at once.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from localdit.config import INDEX, Config
from localdit.core.samplers import read_settings
from localdit.errors import FieldError
from localdit.parsing import name_argument
from localdit.sizes import pipeline_around
from localdit.training.parser import (
    DISTIL,
    DISTIL_OPTIONS,
    LATE_OPTIONS,
    LEARNING_OPTIONS,
    PICTURE_OPTIONS,
    make_parser,
)
from localdit.training.shutdown import process_rank
from localdit.training.stages import STAGE_OPTIONS, Stage, read_stages

# The numbers that options of training and of encoding may have: in words, as a test, and for which.
LIMITS: dict[str, tuple[Callable[[Any], bool], tuple[str, ...]]] = {
    "more than 0": (lambda value: value > 0, (
        "image_size", "max_caption_length", "max_upscale", "batch_size", "max_train_steps",
        "learning_rate", "gradient_clip", "gradient_accumulation_steps", "save_interval",
        "log_interval", "validation_interval", "flow_shift", "min_snr_gamma", "lora_rank",
        "lora_alpha", "window_size", "patch_size", "samples_per_shard", "new_latents",
        "student_steps",
    )),
    "at least 0": (lambda value: value >= 0, (
        "num_workers", "warmup_steps", "weight_decay", "validation_samples", "max_skipped_steps",
        "teacher_guidance_scale", "alignment_weight", "repa_weight",
        "validation_guidance_scale",
    )),
    "at least 0 and less than 1": (lambda value: 0 <= value < 1, (
        "contrastive_weight", "token_routing", "lora_dropout",
    )),
    "0 to 1": (lambda value: 0 <= value <= 1, (
        "max_broken", "max_crop", "token_dropout", "ema_decay", "horizontal_flip",
    )),
    # NumPy takes seeds below 2**32, and each process adds its number.
    "0 to 4,000,000,000": (lambda value: 0 <= value <= 4_000_000_000, ("seed",)),
    "1 to 1,000": (lambda value: 1 <= value <= 1000, ("teacher_steps",)),  # all timesteps
    "1 or more": (lambda value: value >= 1, ("max_aspect_ratio",)),
    "at least 2": (lambda value: value >= 2, ("keep_checkpoints",)),
}  # fmt: skip
# The options for which infinity means no limit. All other numbers are finite.
UNLIMITED = ("gradient_clip", "max_upscale", "max_aspect_ratio", "min_snr_gamma")
EXTRAS = "pip install -r requirements-train.txt"


def parse_args(
    argv: Sequence[str] | None = None, parser: argparse.ArgumentParser | None = None
) -> argparse.Namespace:
    """Return the options; an invalid one ends the program with a message.

    `stages` becomes a list of `Stage`, a single one if no file of stages was named. Options of
    `LATE_OPTIONS` that are not given stay None until `set_defaults`.

    Args:
        argv: the words of the command line, by default those of the process.
        parser: the result of `make_parser`.
    """
    parser = parser or make_parser()
    args = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(LATE_OPTIONS)))
    args.transformer, args.teacher = map(_transformer_in, (args.transformer, args.teacher))
    if not (args.transformer or args.teacher or args.resume):  # no weights say another one
        args.prediction_type = args.prediction_type or "epsilon"
    if args.method == DISTIL:
        args.transformer = args.transformer or args.teacher  # the student starts as its teacher
        for name, default in DISTIL_OPTIONS.items():
            if getattr(args, name) is None:
                setattr(args, name, default)
    if args.lora_rank is not None and args.lora_alpha is None:
        args.lora_alpha = args.lora_rank
    if args.num_workers is None:
        args.num_workers = min(Config().num_workers, os.cpu_count() or 1)
    try:
        _check(args)
        if args.method == DISTIL and args.teacher_guidance_scale is None:
            args.teacher_guidance_scale = guidance_beside(args.teacher)
        args.stages = _stages(args)
        if args.use_wandb and not args.dry_run and process_rank() == "0":
            _log_in_to_wandb()
    except (FieldError, ValueError) as error:
        parser.error(str(error))
    return args


def guidance_beside(transformer: Path) -> float:
    """Return the guidance scale that suits a transformer, as the folder of its pipeline says."""
    return read_settings(pipeline_around(transformer)).guidance_scale


def _transformer_in(source: Path | None) -> Path | None:
    """Return the folder of the transformer if `source` is that of a pipeline, else `source`."""
    if source is not None and (source / INDEX).is_file():
        return source / "transformer"
    return source


def given(args: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """Return the options that are given, of those that may be None, by name."""
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def set_defaults(args: argparse.Namespace) -> None:
    """Give their defaults to the options of `LATE_OPTIONS` that are not given."""
    vars(args).update(LATE_OPTIONS | given(args, LATE_OPTIONS))


def _stages(args: argparse.Namespace) -> list[Stage]:
    """Return the stages, each checked like the command line, whose options they take or change."""
    stages: list[Stage] = []
    for index, change in enumerate(read_stages(args.stages) if args.stages else [{}]):
        place = f"--stages, stage {index + 1}: " if args.stages else ""
        for name, value in change.items():
            default = getattr(args, name)
            wanted = (int, float) if isinstance(default, float) else type(default)
            if not isinstance(value, wanted) or isinstance(value, bool):
                raise ValueError(
                    f"{place}{name.replace('_', '-')} is {value!r}; expected a value such as "
                    f"{default!r}"
                )
        options = vars(args) | change
        try:
            options["data_root"] = name_argument(options["data_root"])
            _check(argparse.Namespace(**options))
            if args.contrastive_weight and options["batch_size"] < 2:
                raise ValueError(
                    f"--contrastive-weight needs another sample in each batch, but --batch-size is "
                    f"{options['batch_size']}; expected at least 2"
                )
        except argparse.ArgumentTypeError as error:
            raise ValueError(f"{place}data-root: {error}") from None
        except ValueError as error:
            raise ValueError(f"{place}{error}") from None
        values = {name: options[name] for name in STAGE_OPTIONS}
        stages.append(Stage(index, stages[-1].end if stages else 0, **values))
    return stages


def _check(args: argparse.Namespace) -> None:
    """Raise ValueError if an option is invalid."""
    check_limits(vars(args))
    if args.lr_schedule not in ("constant", "cosine"):
        raise ValueError(f"--lr-schedule is {args.lr_schedule!r}; expected constant or cosine")
    if args.prediction_type is not None:
        check_objective(args)
    if args.transformer and not args.transformer.exists():
        raise ValueError(f"--transformer {args.transformer} does not exist")
    if args.resume not in (None, "auto") and not Path(args.resume).is_dir():
        raise ValueError(f"--resume {args.resume} does not exist, or is not a folder")
    if args.method == "fine-tuning" and args.teacher is not None:
        raise ValueError(
            "--teacher is for --method knowledge-distillation and distil: give one of these "
            "methods, or leave --teacher out"
        )
    if args.method != "fine-tuning" and args.teacher is None:
        raise ValueError(f"--method {args.method} and --teacher go together: give both")
    for name in DISTIL_OPTIONS:
        if args.method != DISTIL and getattr(args, name) is not None:
            raise ValueError(f"{flag(name)} is for --method {DISTIL}: leave it out")
    for name, default in LEARNING_OPTIONS.items():
        if args.method != "fine-tuning" and getattr(args, name) != default:
            raise ValueError(f"{flag(name)} is for --method fine-tuning: leave it out")
    for detail, name in (
        ("alignment_blocks", "alignment_weight"),
        ("routing_blocks", "token_routing"),
        ("repa_encoder", "repa_weight"),
        ("repa_block", "repa_weight"),
    ):
        if getattr(args, detail) is not None and not getattr(args, name):
            raise ValueError(f"{flag(detail)} is for {flag(name)}: give both")
    if args.repa_weight and args.repa_encoder is None:
        raise ValueError(
            "--repa-weight needs an image encoder, such as DINOv2: name its folder with "
            "--repa-encoder"
        )
    if args.repa_encoder is not None and not args.repa_encoder.is_dir():
        raise ValueError(f"--repa-encoder {args.repa_encoder} is not a folder")
    if args.method == DISTIL and args.validation_guidance_scale is not None:
        raise ValueError(
            "--validation-guidance-scale is not for --method distil, whose result is not guided: "
            "leave it out"
        )
    if args.validation_guidance_scale is not None and not args.validation_prompts:
        raise ValueError(
            "--validation-guidance-scale is for the pictures of --validation-prompts: give both"
        )
    if args.method == DISTIL and args.min_snr_gamma is not None:
        raise ValueError(
            "--min-snr-gamma is not for --method distil, whose losses are not weighted: leave it "
            "out"
        )
    if args.distillation == "trajectory" and args.timestep_sampling != "uniform":
        raise ValueError(
            "--timestep-sampling is not for --distillation trajectory, which trains at the steps "
            "of the student: leave it out"
        )
    if args.method == DISTIL and args.teacher_steps < args.student_steps:
        raise ValueError(
            f"--teacher-steps is {args.teacher_steps}; expected at least --student-steps, which is "
            f"{args.student_steps}"
        )
    if args.teacher and not args.teacher.exists():
        raise ValueError(f"--teacher {args.teacher} does not exist")
    if args.new_latents is not None and args.transformer is None:
        raise ValueError(
            "--new-latents adapts existing weights: name them with --transformer; the patch size "
            "of a new transformer is set in --transformer-config"
        )
    _check_lora(args)
    for name, package in (("use_wandb", "wandb"), ("use_tensorboard", "tensorboard")):
        if getattr(args, name) and importlib.util.find_spec(package) is None:
            raise ValueError(f"{flag(name)} needs {package}: {EXTRAS}")
    if args.optimizer == "adamw8bit" and importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError("--optimizer adamw8bit needs bitsandbytes: pip install bitsandbytes")
    if args.optimizer == "muon":
        _check_muon(args)


def _check_muon(args: argparse.Namespace) -> None:
    """Raise ValueError if Muon is missing, or has no whole matrices to move."""
    version = importlib.metadata.version("torch")
    if tuple(map(int, version.split(".")[:2])) < (2, 9):
        raise ValueError(
            f"--optimizer muon needs PyTorch 2.9, this is {version}: update it, or choose adamw"
        )
    if args.lora_rank is not None:
        raise ValueError(
            "--optimizer muon is for whole matrices, and --lora-rank trains their factors: leave "
            "out one of them"
        )


def _log_in_to_wandb() -> None:
    """Log in to Weights & Biases, which asks for a key if there is none and a terminal to ask on.

    In offline mode, nothing is asked and no network is needed.
    """
    import wandb

    try:
        wandb.login()
    except Exception as error:  # of wandb, or of what it uses for the network
        raise ValueError(
            f"--use-wandb can't log in: {' '.join(str(error).split()).rstrip('.')}; run `wandb "
            "login`, set WANDB_API_KEY, or set WANDB_MODE=offline to upload the run later"
        ) from error


def check_objective(args: argparse.Namespace) -> None:
    """Raise ValueError if an option about the objective is for another prediction type."""
    if args.prediction_type == "flow" and args.min_snr_gamma is not None:
        raise ValueError("--min-snr-gamma is for epsilon and v_prediction, not for flow")
    if args.prediction_type != "flow" and args.flow_shift not in (None, 1):
        raise ValueError("--flow-shift is for --prediction-type flow")


def _check_lora(args: argparse.Namespace) -> None:
    """Raise ValueError if an option about adapters is invalid."""
    if args.lora_rank is None:
        for name in ("lora_alpha", "lora_target_modules", "lora_dropout"):
            if getattr(args, name):
                raise ValueError(f"{flag(name)} is for adapters: also give --lora-rank")
        return
    if args.transformer is None:
        raise ValueError("--lora-rank adapts existing weights: name them with --transformer")
    if args.new_latents is not None:
        raise ValueError(
            "--new-latents makes layers that must be trained, and --lora-rank freezes all layers: "
            "leave out one of them"
        )
    if importlib.util.find_spec("peft") is None:
        raise ValueError(f"--lora-rank needs peft: {EXTRAS}")


def check_limits(options: Mapping[str, Any]) -> None:
    """Raise ValueError if an option of training or encoding, as far as it is given, is invalid."""
    for expected, (holds, names) in LIMITS.items():
        for name in names:
            value = options.get(name)
            if value is None:
                continue
            finite = isinstance(value, int) or math.isfinite(value) or name in UNLIMITED
            if not (finite and holds(value)):
                more = "" if finite else " and finite"
                raise ValueError(f"{flag(name)} is {value}; expected {expected}{more}")
    longest = options["max_aspect_ratio"]
    if options["crop"] == "center" and longest not in (None, PICTURE_OPTIONS["max_aspect_ratio"]):
        raise ValueError(
            f"--max-aspect-ratio is {longest}, but --crop center has only the square: leave out "
            "one of them"
        )
    if options["pretrained"] and not options["pretrained"].is_dir():
        raise ValueError(f"--pretrained {options['pretrained']} is not a folder")


def check_image_size(size: int, multiple: int) -> None:
    """Raise ValueError if `--image-size` is not a multiple of the pixels per token."""
    if size % multiple:
        nearest = max(1, round(size / multiple)) * multiple
        raise ValueError(
            f"--image-size is {size}; expected a multiple of {multiple}, the nearest is {nearest}"
        )


def flag(name: str) -> str:
    """Return the name of an option on the command line."""
    return "--" + name.replace("_", "-")
