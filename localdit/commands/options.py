"""The options that commands share: one name, one meaning, one help text for each.

Nothing heavy is imported here, so `--help` answers at once.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from .. import __version__

BOX_NAME = "box"

# Options that set a field of the Config; errors speak of the option.
OF_CONFIG = {
    "ckpt_path": "--model",
    "text_encoder": "--text-encoder",
    "vae": "--vae",
    "scheduler": "--scheduler",
    "offload": "--offload",
    "text_encoder_quantization": "--text-encoder-quantization",
    "denoising_steps": "--steps",
    "denoising_strength": "--strength",
    "guidance_scale": "--guidance-scale",
    "height": "--height",
    "width": "--width",
    "batch_size": "--batch-size",
}
CALLED = {
    **{f"set Config({name}='/path": f"give {option} '/path" for name, option in OF_CONFIG.items()},
    "/path/to/that/folder')": "/path/to/that/folder'",
    **{f"Config.{name}": option for name, option in OF_CONFIG.items()},
    "device is '": "--device is '",
}


def add_prompts(parser: argparse.ArgumentParser) -> None:
    """Prompts as arguments, or from a file."""
    add = parser.add_argument
    add("prompt", nargs="*", metavar="PROMPT", help="what to show, in quotes; several make several")
    _add_prompt_file(parser)


def add_prompt_options(parser: argparse.ArgumentParser) -> None:
    """Prompts as options, for the scripts, which have prompts of their own."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--prompt", action="append", help="what to show; may be repeated")
    _add_prompt_file(group)


def _add_prompt_file(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--prompt-file",
        metavar="FILE",
        type=Path,
        help="a text file with one prompt a line; - reads standard input",
    )


def add_strength(parser: argparse.ArgumentParser, default: float | None = None) -> None:
    """How much to change what was given; by default as the Config says."""
    parser.add_argument(
        "--strength",
        dest="denoising_strength",
        metavar="0..1",
        type=float,
        default=default,
        help="how much to change: 0 keeps, 1 forgets what was there (default: "
        f"{0.8 if default is None else default})",
    )


def add_drawing(parser: argparse.ArgumentParser, size: str) -> None:
    """How pictures are drawn, where they go, and by which model.

    Args:
        size: the pictures' size where none is given, in words.
    """
    add = parser.add_argument_group("drawing").add_argument
    add("--negative-prompt", metavar="TEXT", help="what to steer away from, in all pictures")
    add("--seed", metavar="N", type=int, default=0, help="picture i is of seed N + i (default: 0)")
    add("--steps", dest="denoising_steps", metavar="N", type=int, help="denoising (default: 20)")
    add("--guidance-scale", metavar="G", type=float,
        help="weight of the prompt; at 1 or less, no guidance (default: 7, with the model in the "
        "box 2)")  # fmt: skip
    add("--height", metavar="PIXELS", type=int, help=f"a multiple of 16 (default: {size})")
    add("--width", metavar="PIXELS", type=int, help="likewise")
    add("--num-images", metavar="N", type=int, default=1, help="of each prompt (default: 1)")
    add("--batch-size", metavar="N", type=int, help="made at once (default: 1)")
    _add_output(parser)
    add_model(parser)
    add_debug(parser)


def _add_output(parser: argparse.ArgumentParser) -> None:
    """Where pictures go."""
    add = parser.add_argument_group("pictures").add_argument
    add("-o", "--output", metavar="PATH", type=Path, default=Path("output"),
        help="FILE.png: the picture, or of several FILE_000.png and so on; else a folder, where "
        "numbers go on (default: output)")  # fmt: skip
    add("--overwrite", action="store_true", help="replace FILE.png if it is there")
    add("--grid", action="store_true", help="put all pictures on one sheet, too")


def add_model(parser: argparse.ArgumentParser) -> None:
    """The model, its parts, and what they run on."""
    group = parser.add_argument_group("model")
    add = group.add_argument
    add("--model", dest="ckpt_path", metavar="PATH",
        help="a checkpoint file, a Diffusers folder, or 'box', the small model that comes with "
        "LocalDiT (default: output/LocalDiT-1024.pt if it is there, else box)")  # fmt: skip
    add("--lora", metavar="PATH", action="append", default=[],
        help="a LoRA for the model: a file, a folder or a hub name; may be repeated")  # fmt: skip
    add("--lora-scale", metavar="W", type=float, action="append", default=[],
        help="its weight, one for each LoRA (default: 1)")  # fmt: skip
    add("--text-encoder", metavar="FOLDER", help="for a model without one: folder or hub name")
    add("--vae", metavar="FOLDER", help="likewise")
    add("--scheduler", metavar="FOLDER", help="likewise")
    add("--text-encoder-quantization", choices=["8bit", "4bit"], help="needs bitsandbytes")
    add("--offload", choices=["model", "sequential"], help="parts wait in CPU memory")
    add_machine(group)


def add_machine(group: argparse._ActionsContainer) -> None:
    """What to compute on, and in what."""
    add = group.add_argument
    add("--device", help="cuda, mps or cpu (default: the first that there is)")
    add("--dtype", choices=["float32", "bfloat16", "float16"],
        help="of the weights (default: half precision on a GPU, float32 elsewhere)")  # fmt: skip


def add_debug(parser: argparse.ArgumentParser) -> None:
    """What every command has."""
    add = parser.add_argument
    add("--debug", action="store_true", help="show where an error came from")
    add("--version", action="version", version=f"LocalDiT {__version__}", help="the version")


def named_model(name: str) -> str | Path:
    """The path that `--model` means: 'box' is the model in the box, unless there is such a file."""
    from ..utils import model_in_the_box

    return model_in_the_box() if name == BOX_NAME and not Path(name).exists() else name
