"""`localdit info`: a checkpoint, a folder or a PNG, and what this machine computes with."""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import INDEX, Config
from ..core.samplers import read_settings, suitable_samplers
from ..core.vocabulary import read_whole_words
from ..files import LORA_WEIGHTS, read_json
from ..parsing import Parser, UsageError, name_argument, one_line
from ..sizes import folder_with_part, pixels_per_latent
from . import arguments
from .arguments import usage_errors

if TYPE_CHECKING:
    import torch

    from ..checkpoint.reading import CheckpointFile

PLAIN = ("seed",)  # numbers without separators
PARTS = ("tokenizer", "text_encoder", "vae", "scheduler", "transformer")
OF_RELEASED = {"window_size": 4, "num_attention_heads": 16, "attention_head_dim": 72}
WHOLE_WORDS = "whole words; others are ignored, and named in a warning"
Facts = dict[str, Any]


def build_parser() -> Parser:
    """Return the parser."""
    parser = Parser(
        prog="localdit info",
        usage="%(prog)s [PATH] [options]",
        description="Describe a checkpoint file or a Diffusers folder: sizes, live (used) and dead "
        "(unused) parameters, what is missing. Then describe this machine: device, dtype, the "
        "implementation of window attention and why it is chosen. For a PNG, show the settings "
        "that generated it. With --verify, only check a folder that training wrote.",
    )
    parser.add_argument("path", metavar="PATH", type=name_argument, nargs="?",
        help="a checkpoint file, a Diffusers folder, a PNG, or 'box', the model that comes with "
        "LocalDiT")  # fmt: skip
    parser.add_argument("--verify", action="store_true",
        help="only compare the files of a training checkpoint, or of a run's folder 'final', with "
        "the SHA-256 sums in its manifest.json")  # fmt: skip
    arguments.add_facts(parser)
    parser.set_defaults(run=info)
    return parser


def info(args: argparse.Namespace) -> None:
    """Print the description."""
    sections: dict[str, Facts] = {}
    with usage_errors():
        path = Path(arguments.named_model(args.path)) if args.path else None
        if path is not None and not path.exists():
            raise FileNotFoundError(
                f"there is no {path}; expected a checkpoint, a Diffusers folder or a PNG"
            )
    picture = path is not None and path.suffix.lower() == ".png" and path.is_file()
    for name in ("device", "dtype"):
        if getattr(args, name) is not None and (args.verify or picture):
            raise UsageError(
                f"--{name} is for the description of this machine, which is not shown "
                f"{'with --verify' if args.verify else 'for a PNG'}; leave it out"
            )
    if args.verify:
        sections[str(path)] = verified(path)
    elif path is not None and picture:
        from ..images import read_metadata

        found = read_metadata(path)
        sections[str(path)] = found or {"settings": "none: not made by LocalDiT, or changed later"}
    else:
        if path is not None:
            sections |= contents_of(path)
            if sections[str(path)]["kind"] == "LoRA":  # it does not name its model
                path = None
        sections["machine"] = machine(args, path)
    print(json.dumps(sections, indent=1) if args.json else text(sections))


def verified(folder: Path | None) -> Facts:
    """Return the facts about a folder that agrees with its manifest."""
    from ..training.checkpointing import MANIFEST, DamagedCheckpoint, files_in, verify_checkpoint

    if folder is None or not (folder / MANIFEST).is_file():
        raise UsageError(
            f"{f'{folder} has no {MANIFEST}' if folder else 'PATH is missing'}; --verify expects "
            "a training checkpoint, or a run's folder 'final'"
        )
    try:
        manifest = verify_checkpoint(folder)
    except DamagedCheckpoint as error:
        raise DamagedCheckpoint(f"{folder}: {error}") from None
    facts: Facts = {
        "verified": f"{len(manifest.sums)} files agree with {MANIFEST}",
        "bytes": sum((folder / name).stat().st_size for name in manifest.sums),
        "step": manifest.step,
    }
    if links := sorted(path.name for path in folder.iterdir() if path.is_symlink()):
        facts["links, which are not verified"] = links
    if added := [name for name in files_in(folder) if name not in manifest.sums]:
        facts["added later, which resuming does not read"] = added
    return facts


# This machine


def machine(args: argparse.Namespace, path: Path | None) -> Facts:
    """Return the facts about this machine, for the model at a path or one of the released shape."""
    from ..machine import device_name, versions
    from ..utils import resolve_device, resolve_dtype

    with usage_errors():
        device = resolve_device(args.device)
        dtype = resolve_dtype(args.dtype, device)
    model = OF_RELEASED if path is None else _configuration(path)
    heads, head_dim = model["num_attention_heads"], model["attention_head_dim"]
    backend, why = window_attention_path(device, dtype, model["window_size"], heads, head_dim)
    chosen = {
        "cuda": "PyTorch finds a CUDA GPU",
        "mps": "PyTorch finds an Apple GPU and no CUDA GPU",
        "cpu": "PyTorch finds neither a CUDA nor an Apple GPU",
    }
    return {
        "device": str(device),
        "name": device_name(device),
        "chosen": "as requested" if args.device else chosen[device.type],
        "dtype": str(dtype).removeprefix("torch."),
        "window attention": backend,
        "because": why,
        "versions": versions(),
    }


def _configuration(path: Path) -> Facts:
    """Return the configuration of the transformer in a checkpoint file or a folder."""
    from ..models.conversion import inspect_checkpoint, transformer_folder

    return inspect_checkpoint(path).config if path.is_file() else transformer_folder(path)[1]


def window_attention_path(
    device: torch.device, dtype: torch.dtype, window_size: int, num_heads: int, head_dim: int
) -> tuple[str, str]:
    """Return the implementation of window attention that the backend "auto" chooses, and why.

    On a GPU that can run the Triton kernel, the kernel is tried, once per process.

    Returns:
        "triton" or "torch"; and the reason, in words.
    """
    import torch

    from ..models.backends import why_not_triton, why_not_trusted
    from ..models.windows import WindowGrid

    qkv = torch.empty(1, window_size**2, 3 * num_heads * head_dim, device=device, dtype=dtype)
    grid = WindowGrid(window_size, window_size, window_size)
    reason = why_not_triton(qkv, grid, num_heads)
    if reason is None and device.type == "cuda":
        reason = why_not_trusted(qkv.device, dtype, window_size, num_heads, head_dim)
    if reason is None and device.type == "cuda":
        return "triton", "it agrees with PyTorch's operations on this device"
    return "torch", f"the Triton kernel is not used: {reason or 'it needs a CUDA device'}"


# A checkpoint


def contents_of(path: Path) -> dict[str, Facts]:
    """Return the facts about what is at a path: for each part, facts by name."""
    if path.is_file():
        return {str(path): _of_file(path)}
    if (path / INDEX).is_file():
        return _of_pipeline(path)
    if (adapters := path / LORA_WEIGHTS).is_file():
        return {str(path): {"file": LORA_WEIGHTS, **_of_file(adapters)}}
    facts = {"kind": "transformer", **_of_transformer(path, Path(Config.vae))}
    return {str(path): facts | {"elsewhere": _elsewhere(_configuration(path))}}


def _of_file(path: Path) -> Facts:
    from ..checkpoint.layout import read_layout
    from ..checkpoint.reading import CheckpointFile
    from ..models.conversion import inspect_checkpoint

    file = CheckpointFile(path)
    if any(".lora_A." in name for name in file.infos):
        return _of_lora(file)
    report = inspect_checkpoint(path)
    dead = read_layout(file.infos, str(path)).dead
    facts: Facts = {
        "kind": f"checkpoint file ({'.pt' if report.kind == 'torch' else '.safetensors'})",
        "bytes": path.stat().st_size,
        "dtype": report.dtype,
        **_shape(report.config, Path(Config.vae)),
        "parameters": report.live_values + report.dead_values,
        "live": report.live_values,
        "dead": report.dead_values,
    }
    if dead:
        facts["dead tensors"] = _by_kind(dead)
    missing = []
    if report.folded_layers:
        missing.append(
            f"global context, in {len(report.folded_layers)} layers: it was never trained; it is "
            "replaced by its expected value, half of the local output"
        )
    if report.zeroed_layers:
        missing.append(f"relative position bias, in {len(report.zeroed_layers)} layers: zero")
    return facts | {"missing": missing or "nothing", "elsewhere": _elsewhere(report.config)}


def _of_lora(file: CheckpointFile) -> Facts:
    down = {name: info.shape[0] for name, info in file.infos.items() if ".lora_A." in name}
    return {
        "kind": "LoRA",
        "bytes": file.path.stat().st_size,
        "rank": ", ".join(map(str, sorted(set(down.values())))),
        "parameters": sum(info.values for info in file.infos.values()),
        "changes": _by_kind(name.split(".lora_A.")[0] for name in down),
        "missing": "the model that it changes: give that as --model, and this file as --lora",
    }


def _of_pipeline(folder: Path) -> dict[str, Facts]:
    from ..checkpoint.reading import OF_TRANSFORMERS, WEIGHTS, folder_files, open_files

    index = read_json(folder / INDEX)
    parts = {name: value for name, value in index.items() if isinstance(value, list)}
    absent = [name for name in PARTS if not (parts.get(name) or [None])[0]]
    places = {name: folder_with_part(folder, name) / name for name in parts}
    absent += [name for name in parts if name not in absent and not places[name].is_dir()]
    sections: dict[str, Facts] = {
        str(folder): {
            "kind": f"pipeline ({index.get('_class_name')})",
            "bytes": sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
            "missing": absent or "nothing",
            **asdict(read_settings(folder)),
            **({"vocabulary": WHOLE_WORDS} if read_whole_words(folder) else {}),
        }
    }
    for name, (_, kind, *_) in sorted(parts.items()):
        if name in absent:
            continue
        ours = kind == "LocalDiTTransformer2DModel"
        part = places[name]
        if ours:
            facts = _of_transformer(part, folder)
        else:
            weights = folder_files(part, names=(*WEIGHTS, *OF_TRANSFORMERS))
            facts = _of_weights(open_files(weights))
        if (settings := part / "scheduler_config.json").is_file():
            facts["samplers"] = ", ".join(suitable_samplers(read_json(settings))) or "none"
        sections[name] = {"class": kind, **facts}
    return sections


def _of_transformer(folder: Path, autoencoder: Path) -> Facts:
    from ..checkpoint.loading import empty_model, parameter_shapes
    from ..checkpoint.reading import few, folder_files, open_files
    from ..models import LocalDiTTransformer2DModel
    from ..models.configuration import public_arguments
    from ..models.conversion import transformer_folder

    folder, config = transformer_folder(folder)
    files = open_files(folder_files(folder))
    model = empty_model(LocalDiTTransformer2DModel, **public_arguments(config))
    expected = parameter_shapes(model)
    dead = [name for name in files if name not in expected]
    missing = [name for name in expected if name not in files]
    facts = _shape(model.config, autoencoder) | _of_weights(files)
    if not files:
        return facts | {"missing": "all weights"}
    if dead:
        facts["dead"] = sum(files[name].infos[name].values for name in dead)
        facts["dead tensors"] = _by_kind(dead)
    return facts | {"missing": few(missing) if missing else "nothing"}


def _of_weights(files: dict[str, CheckpointFile]) -> Facts:
    if not files:
        return {}
    infos = [file.infos[name] for name, file in files.items()]
    return {
        "dtype": ", ".join(sorted({str(info.dtype).removeprefix("torch.") for info in infos})),
        "parameters": sum(info.values for info in infos),
    }


def _shape(config: Facts, autoencoder: Path) -> Facts:
    """Return the model in words."""
    from ..models.configuration import count_layer_types

    side = config["sample_size"] * pixels_per_latent(autoencoder)
    kind = "with" if config["use_global"] else "without"
    kinds = f" ({count_layer_types(config['layer_types'])})" if config["layer_types"] else ""
    return {
        "model": f"{config['num_layers']} layers{kinds} of {config['num_attention_heads']} heads x "
        f"{config['attention_head_dim']} channels, windows of {config['window_size']} x "
        f"{config['window_size']} tokens, {kind} global context",
        "made for": f"{side} x {side} pixels, text of {config['caption_channels']} channels",
    }


def _elsewhere(config: Facts) -> list[str]:
    """Return the parts that a transformer comes without, and where to get them."""
    text, latents = config["caption_channels"], config["in_channels"]
    text_encoder = f"{Config.text_encoder}, or " if text == Config.caption_channels else ""
    vae = f"{Config.vae}, or " if latents == Config.in_channels else ""
    return [
        f"text encoder of {text} channels and its tokenizer: {text_encoder}--text-encoder",
        f"VAE of {latents} channels: {vae}--vae",
        f"scheduler: {Config.scheduler}, or --scheduler",
    ]


def _by_kind(names: Iterable[str]) -> list[str]:
    """Group names that differ only in the layer, with the number of them."""
    kinds = Counter(re.sub(r"(?<=transformer_blocks\.)\d+", "*", name) for name in names)
    return [f"{count} x {kind}" for kind, count in kinds.items()]


# Text


def text(sections: dict[str, Facts]) -> str:
    """Return the sections as text."""
    width = max(len(name) for section in sections.values() for name in section)
    lines: list[str] = []
    for title, section in sections.items():
        lines += ["", title]
        for name, value in section.items():
            values = (value or ["none"]) if isinstance(value, list) else [value]
            for number, one in enumerate(values):
                lines.append(
                    f"  {name if number == 0 else '':{width}}  {_shown(name, one)}".rstrip()
                )
    return "\n".join(map(one_line, lines[1:]))


def _shown(name: str, value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {one}" for key, one in value.items())
    counts = isinstance(value, int) and not isinstance(value, bool) and name not in PLAIN
    return f"{value:,}" if counts else str(value)
