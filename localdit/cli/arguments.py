"""The options that commands share: one name, one meaning and one help text for each.

Nothing heavy is imported here, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..core.samplers import SAMPLERS
from ..errors import Vocabulary, wording
from ..parsing import UsageError, name_argument, output_argument, path_argument, text_argument
from ..version import __version__

BOX_NAME = "box"
STUDENT_NAME = "box-few-steps"

# Settings of a `Config` that options give, by their standard names.
CONFIG_SETTINGS = (
    "text_encoder", "vae", "scheduler", "offload", "text_encoder_quantization", "batch_size",
    "num_inference_steps", "strength", "guidance_scale", "height", "width", "sampler",
)  # fmt: skip
OTHER_OPTIONS = ("device", "dtype", "global_context", "overwrite", "seed")

# The command line's names of fields, for errors.
COMMAND_LINE = Vocabulary(
    {"ckpt_path": "--model", "torch_dtype": "--dtype"}
    | {name: f"--{name.replace('_', '-')}" for name in (*CONFIG_SETTINGS, *OTHER_OPTIONS)},
    advice="give {name} {value}",
)


@contextmanager
def usage_errors() -> Iterator[None]:
    """Turn errors of a check into a `UsageError` that names the options."""
    try:
        yield
    except (TypeError, ValueError, OSError, ImportError) as error:
        raise UsageError(wording(error, COMMAND_LINE)) from error


def add_prompts(parser: argparse.ArgumentParser) -> None:
    """Add prompts as positional arguments, and as a file."""
    parser.add_argument(
        "prompt",
        nargs="*",
        metavar="PROMPT",
        type=text_argument,
        help="what the picture shows, in quotes; several prompts make several pictures",
    )
    _add_prompt_file(parser)


def add_prompt_options(parser: argparse.ArgumentParser) -> None:
    """Add prompts as options, for the scripts, which have default prompts."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--prompt", action="append", type=text_argument,
        help="what the picture shows; may be repeated")  # fmt: skip
    _add_prompt_file(group)


def _add_prompt_file(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--prompt-file",
        metavar="FILE",
        type=path_argument,
        help="a text file (UTF-8) with one prompt per line; - reads standard input",
    )


def add_strength(parser: argparse.ArgumentParser, default: float | None = None) -> None:
    """Add `--strength`; without a default, that of the Config holds."""
    parser.add_argument(
        "--strength",
        metavar="0..1",
        type=float,
        default=default,
        help="how much to change: 0 keeps the picture, 1 ignores it (default: "
        f"{0.8 if default is None else default})",
    )


def add_drawing(parser: argparse.ArgumentParser, size: str) -> None:
    """Add the options of drawing, output and model; `size` is the default size, in words."""
    add_sampling(parser, size)
    add = parser.add_argument_group("pictures").add_argument
    add("-o", "--output", metavar="PATH", type=output_argument, default=Path("output"),
        help="FILE.png, or a folder in which pictures are numbered; several pictures become "
        "FILE_000.png, FILE_001.png and so on (default: output)")  # fmt: skip
    add("--overwrite", action="store_true", help="replace FILE.png if it exists; not for folders")
    add("--grid", action="store_true", help="also save one sheet with all pictures")
    add_model(parser)
    add_debug(parser)


def add_sampling(parser: argparse.ArgumentParser, size: str, num_images: int = 1) -> None:
    """Add the settings of sampling; `size` is the default size, in words."""
    add = parser.add_argument_group("drawing").add_argument
    add("--negative-prompt", metavar="TEXT", type=text_argument,
        help="what the pictures should not show (default: nothing)")  # fmt: skip
    add("--seed", metavar="N", type=int, default=0,
        help="seed of the first picture; the next has N + 1, and so on (default: 0)")  # fmt: skip
    add("--num-inference-steps", "--steps", metavar="N", type=int,
        help="number of denoising steps (default: the number in the model's folder, else "
        "20)")  # fmt: skip
    add("--guidance-scale", metavar="G", type=float,
        help="weight of the prompt; 1 or less turns guidance off (default: the value in the "
        "model's folder, else 7)")  # fmt: skip
    add("--sampler", metavar="NAME",
        help=f"one of {', '.join(SAMPLERS)} (default: the model's own)")  # fmt: skip
    for side in ("height", "width"):
        add(f"--{side}", metavar="PIXELS", type=int,
            help=f"{side} in pixels, a multiple of the VAE's pixels per latent times the "
            f"transformer's patch size, such as 16 or 32 (default: {size})")  # fmt: skip
    add("--num-images", metavar="N", type=int, default=num_images,
        help=f"number of pictures per prompt (default: {num_images})")  # fmt: skip
    add("--batch-size", metavar="N", type=int,
        help="number of pictures that are generated at once (default: 1)")  # fmt: skip


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the model, its parts, and where they run."""
    group = parser.add_argument_group("model")
    add = group.add_argument
    add("--model", metavar="PATH", type=name_argument,
        help="a checkpoint file, a Diffusers folder, 'box' for the small model that comes with "
        "LocalDiT, or 'box-few-steps' for its student, which takes 4 unguided steps (default: "
        "output/LocalDiT-1024.pt if it exists, else box, or box-few-steps for the "
        "demo)")  # fmt: skip
    add("--lora", metavar="PATH", type=name_argument, action="append", default=[],
        help="a LoRA for the model: a file, a folder or a hub name; may be repeated")  # fmt: skip
    add("--lora-scale", metavar="W", type=float, action="append", default=[],
        help="weight of a LoRA; give one per LoRA, in the same order (default: 1)")  # fmt: skip
    for part in ("text encoder", "VAE", "scheduler"):
        add(f"--{part.lower().replace(' ', '-')}", metavar="FOLDER", type=name_argument,
            help=f"folder or hub name of the {part}, instead of the model's own")  # fmt: skip
    add("--text-encoder-quantization", choices=["8bit", "4bit"],
        help="quantize the text encoder; needs bitsandbytes")  # fmt: skip
    add("--offload", choices=["model", "sequential"],
        help="keep idle parts of the model in CPU memory, which saves GPU memory")  # fmt: skip
    add_machine(group)


def add_machine(group: argparse._ActionsContainer) -> None:
    """Add the device and the dtype."""
    add = group.add_argument
    add("--device", help="cuda, mps or cpu (default: the first of them that is available)")
    add("--dtype", choices=["float32", "bfloat16", "float16"],
        help="dtype of the weights (default: half precision on a GPU, else float32)")  # fmt: skip


def add_facts(parser: argparse.ArgumentParser) -> None:
    """Add the options of the commands that print facts about this machine."""
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_machine(parser)
    add_debug(parser)


def add_debug(parser: argparse.ArgumentParser) -> None:
    """Add the options of every command."""
    add = parser.add_argument
    add("--debug", action="store_true", help="show the traceback of an error")
    add("--version", action="version", version=f"LocalDiT {__version__}",
        help="show the version")  # fmt: skip


def named_model(name: str) -> str | Path:
    """Return the path that `--model` names.

    'box' is the model in the box and 'box-few-steps' its student, unless there is a file or folder
    of that name.
    """
    from ..utils import model_in_the_box

    if name not in (BOX_NAME, STUDENT_NAME) or Path(name).exists():
        return name
    return model_in_the_box(few_steps=name == STUDENT_NAME)
