"""From a command that draws to a job, checked before anything heavy is loaded."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..config import Config
from .options import BOX_NAME, OF_CONFIG, named_model
from .parsing import UsageError
from .presets import PHOTOGRAPHS, SCENES, Preset
from .saving import Output, plan_output

PIXELS_PER_LATENT = 8  # along a side


@dataclass(frozen=True)
class Job:
    """What a command asks for.

    Attributes:
        config: the settings.
        preset: what suits the model.
        prompts: one for each picture.
        output: where pictures go.
        loras: LoRAs and their weights.
        size: height and width, where the command gives them.
        image: a picture to start from.
        mask: which parts of it to repaint.
        padding_mask_crop: see `LocalDiTInpaintPipeline`.
        keeps_proportions: whether pictures have the proportions of `image`.
    """

    config: Config
    preset: Preset
    prompts: list[str]
    negative_prompt: str
    seed: int
    output: Output
    grid: bool
    device: str | None
    dtype: str | None
    loras: dict[str, float]
    size: tuple[int | None, int | None]
    image: Path | None = None
    mask: Path | None = None
    padding_mask_crop: int | None = None
    keeps_proportions: bool = False


def plan(
    args: argparse.Namespace,
    stem: str,
    *,
    config: Config | None = None,
    own_prompts: Callable[[Preset], Sequence[str]] | None = None,
) -> Job:
    """Check what is asked for.

    Args:
        args: the parsed options.
        stem: what names of pictures begin with.
        config: the settings that the command line does not change, the model's architecture among
            them; without it the architecture is read off the checkpoint.
        own_prompts: what to draw where the command says nothing.

    Raises:
        UsageError: if it can't be done.
    """
    try:
        return _plan(args, stem, config, own_prompts)
    except (TypeError, ValueError, OSError, ImportError) as error:
        raise UsageError(str(error)) from error


def _plan(
    args: argparse.Namespace,
    stem: str,
    config: Config | None,
    own_prompts: Callable[[Preset], Sequence[str]] | None,
) -> Job:
    settings, preset = _configure(config or Config(), args)
    checkpoint = _check_model(settings)
    prompts = _prompts(args, list(own_prompts(preset)) if own_prompts else [])
    negative = preset.negative_prompt if args.negative_prompt is None else args.negative_prompt
    _check_numbers(args)
    image, mask = getattr(args, "image", None), getattr(args, "mask", None)
    _check_pictures(image, mask)
    loras = _loras(args)
    output = plan_output(
        args.output,
        stem,
        len(prompts) * args.num_images,
        grid=args.grid,
        overwrite=args.overwrite,
    )
    _check_machine(settings, args)
    if config is None and checkpoint.is_file():
        settings = _as_the_file_tells(settings, checkpoint, args)
    output.prepare()
    if args.ckpt_path is None and settings.ckpt_path != (config or Config()).ckpt_path:
        _say_that_the_box_is_used()
    return Job(
        config=settings,
        preset=preset,
        prompts=[prompt for prompt in prompts for _ in range(args.num_images)],
        negative_prompt=negative,
        seed=args.seed,
        output=output,
        grid=args.grid,
        device=args.device,
        dtype=args.dtype,
        loras=loras,
        size=(args.height, args.width),
        image=image,
        mask=mask,
        padding_mask_crop=getattr(args, "padding_mask_crop", None),
        keeps_proportions=config is None and image is not None,
    )


def _configure(config: Config, args: argparse.Namespace) -> tuple[Config, Preset]:
    """The settings with the command line's changes, and the preset that goes with the model."""
    from ..utils import BOX

    given = {name: getattr(args, name, None) for name in OF_CONFIG}
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    released = config.ckpt_path == Config.ckpt_path
    if "ckpt_path" in changes:
        changes["ckpt_path"] = named_model(changes["ckpt_path"])
    elif released and not Path(config.ckpt_path).exists():
        changes["ckpt_path"] = named_model(BOX_NAME)
    checkpoint = Path(changes.get("ckpt_path", config.ckpt_path))
    preset = SCENES if checkpoint.resolve() == BOX else PHOTOGRAPHS
    return replace(config, **(preset.config | changes)), preset


def _as_the_file_tells(config: Config, checkpoint: Path, args: argparse.Namespace) -> Config:
    """The settings with the architecture of a checkpoint file, and its model's own size."""
    from ..utils import contradictions

    changes = contradictions(config, checkpoint)
    if "sample_size" in changes:
        side = changes["sample_size"] * PIXELS_PER_LATENT
        changes |= {"height": args.height or side, "width": args.width or side}
    return replace(config, **changes)


def _say_that_the_box_is_used() -> None:
    from ..utils import DOWNLOAD_COMMAND

    print(
        f"The released weights are not in {Config.ckpt_path} (to fetch them: {DOWNLOAD_COMMAND}); "
        "using the small model in the box.",
        file=sys.stderr,
    )


def _check_model(config: Config) -> Path:
    """Look for the model, and for the parts that it comes without if they are to be here."""
    from ..core.parts import PARTS
    from ..sources import is_hub_name, locate
    from ..utils import find_checkpoint

    checkpoint = find_checkpoint(config.ckpt_path)
    if not (checkpoint / "model_index.json").is_file():
        for part in PARTS.values():
            source = getattr(config, part.field)
            if not is_hub_name(source):
                locate(part, source)
    return checkpoint


def _prompts(args: argparse.Namespace, otherwise: list[str]) -> list[str]:
    """The prompts of the command line or the file, or those that are drawn otherwise."""
    from ..core.text import check_prompts

    check_prompts(args.negative_prompt or "", "--negative-prompt")
    if args.prompt and args.prompt_file:
        raise ValueError("prompts and --prompt-file are both given; expected one of them")
    given = _read_prompts(args.prompt_file) if args.prompt_file else args.prompt
    if not given and not otherwise:
        raise ValueError('there is no prompt; give one in quotes, as "a red circle"')
    return check_prompts(given or otherwise)


def _read_prompts(path: Path) -> list[str]:
    """The lines of a file, or of standard input, that are not empty."""
    try:
        text = sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text; expected one prompt a line") from error
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"{path} is empty; expected one prompt a line")
    return prompts


def _check_numbers(args: argparse.Namespace) -> None:
    if args.num_images < 1:
        raise ValueError(f"--num-images is {args.num_images}; expected at least 1")
    if not 0 <= args.seed < 2**63:
        raise ValueError(f"--seed is {args.seed}; expected at least 0 and less than 2**63")


def _check_machine(config: Config, args: argparse.Namespace) -> None:
    """Refuse a device that is not there, and what it can't do; the first check to take seconds."""
    from ..utils import check_options, resolve_device, resolve_dtype

    device = resolve_device(args.device)
    resolve_dtype(args.dtype, device)
    check_options(config, device)


def _loras(args: argparse.Namespace) -> dict[str, float]:
    """The LoRAs that are asked for, with their weights."""
    if not args.lora and not args.lora_scale:
        return {}
    scales = args.lora_scale or [1.0] * len(args.lora)
    if len(scales) != len(args.lora):
        raise ValueError(
            f"--lora-scale is given {len(scales)} times for {len(args.lora)} LoRAs; expected one "
            "each, or none"
        )
    if importlib.util.find_spec("peft") is None:
        raise ImportError('--lora needs peft: pip install "localdit[lora]"')
    for name in args.lora:
        if not Path(name).exists() and name.count("/") != 1:
            raise FileNotFoundError(f"--lora: there is no {name}; expected a file or a folder")
    return dict(zip(args.lora, scales, strict=True))


def _check_pictures(image: Path | None, mask: Path | None) -> None:
    from ..images import load_image, load_mask

    if image is None:
        return
    size = load_image(image).size
    if mask is not None:
        load_mask(mask, size)
