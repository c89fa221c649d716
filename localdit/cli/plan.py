"""From the options of a command to a job, checked before anything heavy is loaded."""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ..config import (
    INDEX,
    Config,
    config_field,
    inference_settings,
    part_source,
    with_settings,
)
from ..core.samplers import SamplingSettings, check_levels, check_sampler, read_settings
from ..core.vocabulary import read_whole_words
from ..errors import FieldValueError, Setting
from ..files import decode_text, is_hub_name, read_json, user_path
from ..parsing import say
from ..sizes import check_size, proportional_size, read_sizes
from .arguments import CONFIG_SETTINGS, named_model, usage_errors
from .output import Output, plan_output

Task = Literal["t2i", "i2i"]
MAX_PROMPT_FILE = 50_000_000  # bytes
MAX_PICTURES = 100_000  # of a command that draws


@dataclass(frozen=True)
class Preset:
    """Prompts that suit a model, where the command gives none."""

    t2i: list[str]
    i2i: list[str]


PHOTOGRAPHS = Preset(
    t2i=[
        "a photo of a wooden boat on a calm mountain lake at sunrise, mist over the water",
        "a close-up photo of a red fox in fresh snow, soft winter light, highly detailed",
        "a street of old stone houses after the rain, warm lamps, evening, wide angle",
    ],
    i2i=["an oil painting of a boat on a lake, thick brush strokes, warm colours"],
)
SCENES = Preset(
    t2i=[
        "a large yellow sun above a small red house and a small orange tree "
        "on green ground under a blue sky",
        "a large yellow sun above a small white boat on a gradient from blue to turquoise",
        "a small white cross in the centre of a purple background",
        "two large pink hearts side by side on green and white stripes",
    ],
    i2i=[
        "a large yellow moon above a small purple house and a small red tree "
        "on white ground under a turquoise sky"
    ],
)


@dataclass(frozen=True)
class Choice:
    """The model that a command uses."""

    config: Config
    preset: Preset
    loras: dict[str, float]  # their weights by path or hub name
    device: str | None  # as the option gives it
    dtype: str | None  # as the option gives it
    # Whether an option or the Config names the model, rather than the box being used because the
    # released weights are missing
    named: bool

    @property
    def checkpoint(self) -> Path:
        """The checkpoint file or folder."""
        return user_path(self.config.ckpt_path)

    @property
    def boxed(self) -> str | None:
        """The model in the box is "model", its student "student"; any other model is None."""
        from ..utils import BOX, FEW_STEPS

        return {BOX: "model", BOX / FEW_STEPS: "student"}.get(self.checkpoint.resolve())

    @property
    def name(self) -> str:
        """The model's name in the settings that a picture carries."""
        return f"the {self.boxed} in the box" if self.boxed else str(self.config.ckpt_path)

    @property
    def changes(self) -> dict[str, Any]:
        """The settings that replace a part of the model or change its text, such as another VAE."""
        config = self.config
        found: dict[str, Any] = {}
        for name in ("text_encoder", "vae", "scheduler"):
            source = part_source(config, name, self.checkpoint)
            if source != part_source(Config(), name, self.checkpoint):
                found[name] = str(source)
        for name in ("text_encoder_quantization", "max_length"):
            if getattr(config, name) != getattr(Config, name):
                found[name] = getattr(config, name)
        return found


@dataclass(frozen=True)
class Job:
    """The pictures that a command draws."""

    model: Choice  # the model, with the settings of the drawing
    prompts: list[str]  # one per picture
    negative_prompt: str
    seed: int
    output: Output
    grid: bool
    image: Path | None  # a picture to start from
    mask: Path | None  # the parts of it to repaint
    padding_mask_crop: int | None  # see `LocalDiTInpaintPipeline`


def plan(
    args: argparse.Namespace, stem: str, *, config: Config | None = None, task: Task | None = None
) -> Job:
    """Check a command that draws, and return its job. The output folder is created.

    Args:
        stem: the beginning of the names of pictures in a folder.
        config: the user's settings, the model's architecture among them; without it the
            architecture is read from the checkpoint.
        task: the task whose default prompts are drawn if the options give none.
    """
    from ..images import prepare_output_folder

    options = vars(args)
    image, mask = options.get("image"), options.get("mask")
    with usage_errors():
        model = choose_model(args, config)
        preset = model.preset
        prompts = _prompts(args, getattr(preset, task) if task else [])
        check_num_images(args.num_images, len(prompts), MAX_PICTURES)
        if not 0 <= args.seed < 2**63:
            raise ValueError(f"--seed is {args.seed}; expected at least 0 and less than 2**63")
        padding = options.get("padding_mask_crop")
        if padding is not None and padding < 0:
            raise ValueError(f"--padding-mask-crop is {padding}; expected at least 0")
        image_size = _check_pictures(image, mask)
        count = len(prompts) * args.num_images
        output = plan_output(args.output, stem, count, grid=args.grid, overwrite=args.overwrite)
        model = check_model(model, described=config is not None)
        size = fit_size(
            model.config,
            (args.height, args.width),
            image_size if config is None else None,
            own=config,
        )
        prepare_output_folder(output.folder)
    report_fallback(model)
    return Job(
        model=replace(model, config=with_settings(model.config, size)),
        prompts=[prompt for prompt in prompts for _ in range(args.num_images)],
        negative_prompt=args.negative_prompt or "",
        seed=args.seed,
        output=output,
        grid=args.grid,
        image=image,
        mask=mask,
        padding_mask_crop=padding,
    )


# The model


def choose_model(
    args: argparse.Namespace, config: Config | None = None, few_steps: bool = False
) -> Choice:
    """Return the model that the options or a Config name, or else the one in the box.

    With `few_steps`, the one in the box is the student.

    The settings that its folder names replace those that the Config leaves at their defaults. The
    model, its LoRAs and its local parts are looked for; nothing heavy is imported.
    """
    from ..core.parts import PARTS
    from ..utils import model_in_the_box

    config = config or Config()
    given = vars(args)
    settings = {name: given[name] for name in CONFIG_SETTINGS if given.get(name) is not None}
    named = True
    if args.model is not None:
        settings["ckpt_path"] = named_model(args.model)
    elif config.ckpt_path == Config.ckpt_path and not Path(config.ckpt_path).exists():
        settings["ckpt_path"] = model_in_the_box(few_steps)
        named = False
    checkpoint = user_path(settings.get("ckpt_path", config.ckpt_path))
    if "ckpt_path" in settings and (checkpoint / INDEX).is_file():
        # The parts that the Config names are those of its own checkpoint.
        own = {part.field: getattr(type(config), part.field) for part in PARTS.values()}
        settings = own | settings
    preset = SCENES if read_whole_words(checkpoint) else PHOTOGRAPHS
    config = with_settings(config, _untouched(config, checkpoint) | settings)
    _check_files(config)
    return Choice(config, preset, _loras(args), args.device, args.dtype, named)


def _untouched(config: Config, checkpoint: Path) -> dict[str, Any]:
    """Return the settings of a pipeline's folder that the Config leaves at their defaults."""
    own, given = asdict(read_settings(checkpoint)), inference_settings(config)
    default = asdict(SamplingSettings())
    return {name: own[name] for name in own if given[name] == default[name]}


def check_model(choice: Choice, described: bool = False) -> Choice:
    """Check device, dtype and LoRAs; return the choice with its checkpoint file's architecture.

    With `described`, the Config has the architecture, and `load_model` compares the file with it.
    This imports PyTorch, which takes seconds.
    """
    from ..utils import check_options, contradictions, resolve_device, resolve_dtype

    device = resolve_device(choice.device)
    resolve_dtype(choice.dtype, device)
    check_options(choice.config, device)
    for name in choice.loras:
        from ..pipelines.lora import check_source

        try:
            check_source(name)
        except (OSError, ValueError) as error:
            raise ValueError(f"--lora: {error}") from error
    if described or not choice.checkpoint.is_file():
        return choice
    changes = contradictions(choice.config, choice.checkpoint)
    return replace(choice, config=replace(choice.config, **changes))


def report_fallback(choice: Choice) -> None:
    """Say so if the model in the box is used because the released weights are missing."""
    from ..utils import DOWNLOAD_COMMAND

    if not choice.named:
        student = choice.boxed == "student"
        used = "the student of the small model" if student else "the small model"
        say(
            f"The released weights are not in {Config.ckpt_path} (to download them: "
            f"{DOWNLOAD_COMMAND}); using {used} in the box.",
            "stderr",
        )


def _check_files(config: Config) -> None:
    """Look for the model and the local parts that the Config names.

    Sampler and steps must suit the scheduler.
    """
    from ..core.parts import PARTS, locate, scheduler_config
    from ..utils import find_checkpoint

    checkpoint = find_checkpoint(config.ckpt_path)
    whole = (checkpoint / INDEX).is_file()
    named = read_json(checkpoint / INDEX) if whole else {}
    for name, part in PARTS.items():
        source = part_source(config, part.field, checkpoint)
        if source == checkpoint and named.get(name) == [None, None]:
            raise FieldValueError(
                "{checkpoint} was saved without its {name}, which is needed: {advice}",
                checkpoint=checkpoint,
                name=name.replace("_", " "),
                advice=Setting(part.field, "FOLDER", f"set Config({part.field}='FOLDER')"),
            )
        if not is_hub_name(source):
            locate(part, source)
    source = part_source(config, "scheduler", checkpoint)
    if is_hub_name(source):
        return
    found = scheduler_config(locate(PARTS["scheduler"], source))
    steps = inference_settings(config)["num_inference_steps"]
    if config.sampler is not None:
        check_sampler(config.sampler, found, steps)
    check_levels(found, steps, config.sampler)


def _loras(args: argparse.Namespace) -> dict[str, float]:
    """Return the LoRAs with their weights."""
    if not args.lora and not args.lora_scale:
        return {}
    scales = args.lora_scale or [1.0] * len(args.lora)
    if len(scales) != len(args.lora):
        raise ValueError(
            f"--lora-scale is given {len(scales)} times for {len(args.lora)} LoRAs; expected "
            "one per LoRA, or none"
        )
    for scale in scales:
        if not math.isfinite(scale):
            raise ValueError(f"--lora-scale is {scale}; expected a finite number")
    if importlib.util.find_spec("peft") is None:
        raise ImportError('--lora needs peft: pip install "localdit[lora]"')
    places: set[Path] = set()
    for name in args.lora:
        if (place := Path(name).resolve()) in places:
            raise ValueError(
                f"--lora: {name} is given twice; expected each LoRA once: for more of it, raise "
                "its --lora-scale"
            )
        places.add(place)
    return dict(zip(args.lora, scales, strict=True))


# The size of pictures


def fit_size(
    config: Config,
    size: tuple[int | None, int | None] = (None, None),
    image_size: tuple[int, int] | None = None,
    own: Config | None = None,
) -> dict[str, int]:
    """Return the height and the width that pictures are drawn in.

    A side that the command does not give is that of the model's native square. With a picture to
    follow, the size has its proportions and as many pixels.

    Args:
        config: names the model and has its architecture.
        size: height and width that the command gives.
        image_size: (width, height) of a picture whose proportions are kept.
        own: a user's Config. If it describes the model, its sides replace the native ones.
    """
    sizes = read_sizes(user_path(config.ckpt_path), config)
    height, width = size
    if image_size is not None:
        height, width = proportional_size(
            image_size, sizes.side**2, sizes.pixels_per_token, height, width
        )
    default = sizes.side, sizes.side
    if own is not None and own.sample_size == sizes.sample_size:
        default = own.height, own.width
    fitted = {"height": height or default[0], "width": width or default[1]}
    for name, value in fitted.items():
        check_size(config_field(name), value, sizes.pixels_per_token)
    return fitted


# Prompts and pictures


def _prompts(args: argparse.Namespace, default: Sequence[str]) -> list[str]:
    """Return the prompts of the command line or of the file, or the default ones."""
    from ..core.text import check_prompts

    check_prompts(args.negative_prompt or "", "--negative-prompt")
    if args.prompt and args.prompt_file:
        raise ValueError("prompts and --prompt-file are both given; expected one of them")
    given = _read_prompts(args.prompt_file) if args.prompt_file else args.prompt
    if not given and not default:
        raise ValueError('there is no prompt; give one in quotes, such as "a red circle"')
    return check_prompts(list(given or default))


def check_num_images(num_images: int, prompts: int, most: int) -> None:
    """Refuse a number of pictures per prompt that is less than 1, or too large for the prompts."""
    if num_images < 1:
        raise ValueError(f"--num-images is {num_images}; expected at least 1")
    if (count := num_images * prompts) > most:
        raise ValueError(
            f"the prompts and --num-images ask for {count:,} pictures; expected at most {most:,}: "
            "lower --num-images, or give fewer prompts"
        )


def _read_prompts(path: Path) -> list[str]:
    """Return the lines of a file, or of standard input, that are not empty."""
    if str(path) == "-":
        if sys.stdin is None:
            raise ValueError("--prompt-file is -, but standard input is closed")
        name = "standard input"
        given: bytes | str = getattr(sys.stdin, "buffer", sys.stdin).read(MAX_PROMPT_FILE + 1)
    else:
        with path.open("rb") as file:
            name, given = str(path), file.read(MAX_PROMPT_FILE + 1)
    if len(given) > MAX_PROMPT_FILE:
        raise ValueError(
            f"{name} has more than {MAX_PROMPT_FILE:,} bytes; expected one prompt per line"
        )
    text = given if isinstance(given, str) else decode_text(given, name)
    prompts = [line.strip() for line in text.split("\n") if line.strip()]
    if not prompts:
        raise ValueError(f"{name} is empty; expected one prompt per line")
    return prompts


def _check_pictures(image: Path | None, mask: Path | None) -> tuple[int, int] | None:
    """Read the picture and its mask, and return the picture's (width, height)."""
    from ..images import load_image, load_mask

    if image is None:
        return None
    size = load_image(image).size
    if mask is not None:
        load_mask(mask, size)
    return size
