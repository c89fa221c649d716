"""Facts about a checkpoint file, a transformer folder or a pipeline folder, for `localdit info`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..checkpoint.layout import read_layout
from ..checkpoint.loading import empty_model, parameter_shapes
from ..checkpoint.reading import CheckpointFile, few
from ..config import Config
from ..models import LocalDiTTransformer2DModel
from ..models.conversion import inspect_checkpoint, transformer_folder
from ..sizes import pixels_per_latent

PARTS = ("tokenizer", "text_encoder", "vae", "scheduler", "transformer")
OF_RELEASED = {"window_size": 4, "num_heads": 16, "head_dim": 72}
Sections = dict[str, dict[str, Any]]


def contents_of(path: Path) -> Sections:
    """Return the facts about what is at a path: for each part, facts by name.

    Raises:
        FileNotFoundError: the folder holds no model.
        ValueError: a file is damaged, or holds no model.
    """
    if path.is_file():
        return {str(path): _of_file(path)}
    if (path / "model_index.json").is_file():
        return _of_pipeline(path)
    facts = {"kind": "transformer", **_of_transformer(path, Path(Config.vae))}
    return {str(path): facts | {"elsewhere": _elsewhere(transformer_folder(path)[1])}}


def attention_shape(path: Path | None) -> dict[str, int]:
    """Return window size, heads and channels per head of a model, by default the released one."""
    if path is None:
        return OF_RELEASED
    config = inspect_checkpoint(path).config if path.is_file() else transformer_folder(path)[1]
    return {
        "window_size": config["window_size"],
        "num_heads": config["num_attention_heads"],
        "head_dim": config["attention_head_dim"],
    }


def _of_file(path: Path) -> dict[str, Any]:
    file = CheckpointFile(path)
    if any(".lora_A." in name for name in file.infos):
        return _of_lora(file)
    report = inspect_checkpoint(path)
    dead = read_layout(file.infos, str(path)).dead
    facts: dict[str, Any] = {
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


def _of_lora(file: CheckpointFile) -> dict[str, Any]:
    down = {name: info.shape[0] for name, info in file.infos.items() if ".lora_A." in name}
    return {
        "kind": "LoRA",
        "bytes": file.path.stat().st_size,
        "rank": ", ".join(map(str, sorted(set(down.values())))),
        "parameters": sum(info.values for info in file.infos.values()),
        "changes": _by_kind(name.split(".lora_A.")[0] for name in down),
        "missing": "the model that it changes: give that as --model, and this file as --lora",
    }


def _of_pipeline(folder: Path) -> Sections:
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    parts = {name: value for name, value in index.items() if isinstance(value, list)}
    absent = [name for name in PARTS if not (parts.get(name) or [None])[0]]
    absent += [name for name in parts if name not in absent and not (folder / name).is_dir()]
    sections: Sections = {
        str(folder): {
            "kind": f"pipeline ({index.get('_class_name')})",
            "bytes": sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
            "missing": absent or "nothing",
        }
    }
    for name, (_, kind, *_) in sorted(parts.items()):
        if name in absent:
            continue
        if kind == LocalDiTTransformer2DModel.__name__:
            facts = _of_transformer(folder / name, folder)
        else:
            facts = _of_weights(_headers(folder / name))
        sections[name] = {"class": kind, **facts}
    return sections


def _of_transformer(folder: Path, autoencoder: Path) -> dict[str, Any]:
    folder, config = transformer_folder(folder)
    headers = _headers(folder)
    known = {name: value for name, value in config.items() if not name.startswith("_")}
    expected = parameter_shapes(empty_model(LocalDiTTransformer2DModel, known))
    dead = [name for name in headers if name not in expected]
    missing = [name for name in expected if name not in headers]
    facts = _shape(config, autoencoder) | _of_weights(headers)
    if not headers:
        return facts | {"missing": "all weights"}
    if dead:
        facts["dead"] = sum(headers[name][1] for name in dead)
        facts["dead tensors"] = _by_kind(dead)
    return facts | {"missing": few(missing) if missing else "nothing"}


def _headers(folder: Path) -> dict[str, tuple[str, int]]:
    """Return dtype and number of values of each tensor in the .safetensors files of a folder."""
    found: dict[str, tuple[str, int]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    tensor = file.get_slice(name)
                    values = 1
                    for side in tensor.get_shape():
                        values *= side
                    found[name] = (tensor.get_dtype(), values)
        except SafetensorError as error:
            raise ValueError(f"{path} is truncated or damaged ({error}).") from error
    return found


def _of_weights(headers: dict[str, tuple[str, int]]) -> dict[str, Any]:
    if not headers:
        return {}
    return {
        "dtype": ", ".join(sorted({dtype for dtype, _ in headers.values()})),
        "parameters": sum(values for _, values in headers.values()),
    }


def _shape(config: dict[str, Any], autoencoder: Path) -> dict[str, Any]:
    """Return the model in words."""
    side = config["sample_size"] * pixels_per_latent(autoencoder)
    kind = "with" if config["use_global"] else "without"
    return {
        "model": f"{config['num_layers']} layers of {config['num_attention_heads']} heads x "
        f"{config['attention_head_dim']} channels, windows of {config['window_size']} x "
        f"{config['window_size']} tokens, {kind} global context",
        "made for": f"{side} x {side} pixels, text of {config['caption_channels']} channels",
    }


def _elsewhere(config: dict[str, Any]) -> list[str]:
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
    counts: dict[str, int] = {}
    for name in names:
        kind = re.sub(r"(?<=transformer_blocks\.)\d+", "*", name)
        counts[kind] = counts.get(kind, 0) + 1
    return [f"{count} x {kind}" for kind, count in counts.items()]
