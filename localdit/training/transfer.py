"""Starting from the weights of another model: a LocalDiT of other latents, or a PixArt.

Only the patch embedding and the output layer know the channels of the latents and the side of a
patch. For the latents of another autoencoder these two are made new, and everything else is kept.
LiT (arXiv 2501.12976) and DC-Gen (arXiv 2509.25180) show that the rest carries over.

From a PixArt of the same width, the parts that both models share are copied by name: embeddings of
patches, time and size, the caption projection, cross-attention, feed-forward, modulation and
output. A LocalDiT with fewer or more blocks takes evenly spaced blocks of PixArt, including the
first and the last.

Self-attention of PixArt differs, so the resulting model needs training before it can draw:

- A LocalDiT normalises queries and keys in self-attention and cross-attention; PixArt does not. The
  scale of PixArt's logits depends on its inputs and can't be derived from its weights, so the norms
  start at ones.
- A LocalDiT has rotary positions, attends within windows, and adds the input of self-attention to
  its output.
- The relative position biases of windows start at zero.
- A global context starts without effect. Its values are zero, and those of the windows are doubled,
  because the layer takes the mean of both. Its other weights keep their initial values.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from localdit.checkpoint.layout import Route
from localdit.checkpoint.loading import empty_model, part_of
from localdit.checkpoint.reading import (
    WEIGHTS,
    CheckpointFile,
    few,
    folder_files,
    open_files,
    require_finite,
)
from localdit.core.latents import LatentFormat
from localdit.files import read_json
from localdit.models import LocalDiTTransformer2DModel
from localdit.models.attention import LocalDiTAttention
from localdit.models.configuration import public_arguments

# The parameters that depend on the latents: patch embedding and output layer.
LATENT_LAYERS = ("pos_embed.proj.", "proj_out.")
BLOCK = "transformer_blocks."
MARK = f"{BLOCK}0.attn1.to_q.weight"  # PixArt only: a LocalDiT has one tensor for q, k and v
# Parameters that only a LocalDiT has.
OURS = re.compile(r"\.norm_[qk]\.weight$|\.local_rel_pos_bias$|\.global_context\.")
# Tensors in some files beside the weights: positions, and the embedding of the empty caption.
BUFFERS = ("pos_embed.pos_embed", "caption_projection.y_embedding")


@dataclass(frozen=True)
class TransferReport:
    """A report on the weights that a model started from."""

    origin: str  # "PixArt" or "LocalDiT"
    source: Path  # its file or folder
    copied: tuple[str, ...]  # names of parameters
    fresh: tuple[str, ...]  # names of the other parameters of the new model
    unused: tuple[str, ...] = ()  # tensors that were not copied, apart from unused blocks
    blocks: tuple[int, ...] = ()  # the one that each was copied from, if their number differs
    num_source_blocks: int = 0
    notes: tuple[str, ...] = ()  # further lines

    def __str__(self) -> str:
        """Return a few lines to print before training."""
        # Names without the numbers of blocks, each once.
        kinds = dict.fromkeys(re.sub(r"^transformer_blocks\.\d+\.", "", n) for n in self.fresh)
        lines = [f"Started from {self.origin}, {self.source}"]
        if self.blocks:
            blocks = ", ".join(map(str, self.blocks))
            lines.append(f"  blocks: {blocks} of 0 to {self.num_source_blocks - 1}")
        lines += [
            f"  copied: {len(self.copied):,} parameters",
            f"  fresh: {len(self.fresh):,} parameters ({', '.join(kinds) or 'none'})",
        ]
        if self.unused:
            lines.append(f"  unused: {few(self.unused)}")
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])


@torch.no_grad()
def initialize_latent_layers(transformer: LocalDiTTransformer2DModel) -> None:
    """Initialise the patch embedding and the output layer in place.

    The patch embedding, a convolution that acts as a linear layer, is Xavier-uniform with zero
    bias. The output layer is zero, so the model first predicts zero.
    """
    patches = transformer.pos_embed.proj
    nn.init.xavier_uniform_(patches.weight.flatten(1))
    assert patches.bias is not None
    nn.init.zeros_(patches.bias)
    nn.init.zeros_(transformer.proj_out.weight)
    nn.init.zeros_(transformer.proj_out.bias)


def latent_shape(latents: LatentFormat, patch_size: int) -> dict[str, int]:
    """Return the arguments of a transformer that depend on its latents."""
    return {
        "in_channels": latents.channels,
        "out_channels": latents.channels,
        "patch_size": patch_size,
    }


def latent_note(config: Mapping[str, int], pixels_per_latent: int) -> str:
    """Return a line on the latents, tokens and windows of a transformer."""
    token = config["patch_size"] * pixels_per_latent
    window = config["window_size"] * token
    return (
        f"latents: {config['in_channels']} channels, {pixels_per_latent} x {pixels_per_latent} "
        f"pixels each; a token is {token} x {token} pixels, a window {window} x {window}"
    )


def start_from_other_latents(
    trained: LocalDiTTransformer2DModel,
    source: Path,
    latents: LatentFormat,
    patch_size: int,
    image_size: int,
    scale: float | None = None,
) -> tuple[LocalDiTTransformer2DModel, TransferReport]:
    """Return a LocalDiT for other latents, with all weights that do not depend on the latents.

    The new layers start as `initialize_latent_layers` says. Without a `scale`, a square picture of
    `image_size` spans the positions that one of the trained model's `sample_size` spanned:
    `interpolation_scale` is set to `(image_size / pixels per latent / patch_size) / positions`.

    Args:
        trained: a LocalDiT of other latents, on the CPU. Its tensors are shared, not copied.
        source: its file or folder, for the report.
        patch_size: side of the square of these latents that becomes a token.
        image_size: side in pixels, a multiple of the pixels per token.
        scale: `interpolation_scale` if it is known.
    """
    positions = trained.pos_embed.base_size / trained.pos_embed.interpolation_scale
    sample_size = image_size // latents.pixels_per_latent
    tokens = sample_size // patch_size
    scale = tokens / positions if scale is None else scale
    config = public_arguments(trained.config)
    config |= latent_shape(latents, patch_size) | {
        "sample_size": sample_size,
        "interpolation_scale": scale,
        "use_additional_conditions": trained.use_additional_conditions,
    }
    transformer = empty_model(LocalDiTTransformer2DModel, **config)
    for layer in (transformer.pos_embed.proj, transformer.proj_out):
        layer.to_empty(device="cpu")
    state = trained.state_dict()
    copied = tuple(name for name in state if not name.startswith(LATENT_LAYERS))
    fresh = tuple(name for name in state if name.startswith(LATENT_LAYERS))
    transformer.load_state_dict({name: state[name] for name in copied}, strict=False, assign=True)
    initialize_latent_layers(transformer)
    before = trained.config
    notes = (
        latent_note(transformer.config, latents.pixels_per_latent),
        f"before: {before.in_channels} channels, tokens of {before.patch_size} x "
        f"{before.patch_size} latents",
        f"positions: a picture of {image_size} x {image_size} pixels spans 0 to "
        f"{tokens / scale:g}, one of {before.sample_size} x {before.sample_size} latents spanned 0 "
        f"to {positions:g}: interpolation_scale is {scale:g}",
    )
    return transformer, TransferReport("LocalDiT", source, copied, fresh, fresh, notes=notes)


# From a PixArt


def is_pixart(source: Path) -> bool:
    """Return whether a file or folder holds a PixArt transformer with Diffusers' names."""
    paths = _weight_files(source)
    return bool(paths) and MARK in open_files(paths)


def start_from_pixart(
    transformer: LocalDiTTransformer2DModel, source: Path, new_latents: bool = False
) -> TransferReport:
    """Copy the weights of a PixArt into a new LocalDiT, in place.

    If PixArt also predicts a variance, that part is left out. If only the LocalDiT is conditioned
    on the picture's size, these embeddings start with an output of zero.

    Args:
        transformer: a LocalDiT of the same width and heads, and with `new_latents=False` of the
            same patch size and channels. Of its m blocks, block i comes from block
            `round(i * (n - 1) / (m - 1))` of PixArt's n.
        source: a Diffusers folder of the transformer or its pipeline, or a `.safetensors` or `.pt`
            file with Diffusers' names.
        new_latents: keep the patch embedding and the output layer of `transformer`, which is for
            other latents than the PixArt.
    """
    paths = _weight_files(source)
    if not paths:
        raise ValueError(
            f"{source} has no weights; expected {WEIGHTS[0]} in it, or in its folder transformer."
        )
    files = open_files(paths)
    if MARK not in files:
        raise ValueError(
            f"{source} is not a PixArt with Diffusers' names: it has no tensor {MARK}. Convert an "
            "original checkpoint with Diffusers first."
        )
    _require_same_heads(transformer, paths[0])
    num_source = 1 + max(_block_number(name) for name in files)
    blocks = spaced_blocks(num_source, len(transformer.transformer_blocks))
    routes = _find_routes(transformer, files, blocks, source, new_latents)
    unused = _unused(files, routes, blocks, source)
    _copy(transformer, files, routes)
    copied = {route.target for places in routes.values() for route in places}
    names = [name for name, _ in transformer.named_parameters()]
    fresh = tuple(name for name in names if name not in copied)
    _start_fresh(transformer, fresh)
    kept = tuple(name for name in names if name in copied)
    return TransferReport("PixArt", source, kept, fresh, tuple(unused), blocks, num_source)


def spaced_blocks(num_source: int, num_blocks: int) -> tuple[int, ...]:
    """Return `num_blocks` evenly spaced numbers of `num_source` blocks, with first and last."""
    gaps = max(1, num_blocks - 1)
    return tuple(round(i * (num_source - 1) / gaps) for i in range(num_blocks))


def _weight_files(source: Path) -> list[Path]:
    """Return the files with the weights: the source itself, or those in a Diffusers folder."""
    if not source.is_dir():
        return [source]
    return folder_files(source / "transformer") or folder_files(source)


def _require_same_heads(transformer: LocalDiTTransformer2DModel, path: Path) -> None:
    """Compare the numbers of heads, which no shape shows, if PixArt has a configuration."""
    if not (config := path.parent / "config.json").is_file():
        return
    heads = read_json(config).get("num_attention_heads")
    wanted = transformer.config.num_attention_heads
    if heads not in (None, wanted):
        raise ValueError(
            f"{path.parent} has {heads} attention heads, the LocalDiT has {wanted}. Give the "
            f"LocalDiT num_attention_heads={heads}."
        )


def _block_number(name: str) -> int:
    """Return the number of the block that a tensor belongs to; -1 if it belongs to none."""
    return int(name.split(".")[1]) if name.startswith(BLOCK) else -1


def _find_routes(
    transformer: LocalDiTTransformer2DModel,
    files: Mapping[str, CheckpointFile],
    blocks: tuple[int, ...],
    source: Path,
    new_latents: bool,
) -> dict[str, list[Route]]:
    """Return the destinations of each tensor of PixArt, after a check of names and shapes."""
    routes: dict[str, list[Route]] = {}
    missing, misshapen = [], []
    for target, parameter in transformer.named_parameters():
        if OURS.search(target) or (new_latents and target.startswith(LATENT_LAYERS)):
            continue
        for route in _routes_to(target, blocks):
            name = route.source
            if name not in files:
                missing.append(name)
                continue
            shape = files[name].infos[name].shape
            rows, *rest = part_of(parameter, route.target_part).shape
            with_variance = target.startswith("proj_out.") and shape == (2 * rows, *rest)
            if shape != (rows, *rest) and not with_variance:
                misshapen.append(f"{name} {shape} instead of {(rows, *rest)}")
            routes.setdefault(name, []).append(route)
    missing = [name for name in missing if not _of_size_embedders(name)]
    if missing or misshapen:
        problems = [f"without {few(missing)}"] * bool(missing)
        problems += [f"with {few(misshapen)}"] * bool(misshapen)
        raise ValueError(
            f"{source} does not fit: it comes {', and '.join(problems)}. Give the LocalDiT the "
            "width, patch size and caption channels of the PixArt; for the latents of another VAE, "
            "give --new-latents."
        )
    return routes


def _routes_to(target: str, blocks: tuple[int, ...]) -> list[Route]:
    """Return the routes of the tensors of PixArt that make up a parameter."""
    source = target
    if target.startswith(BLOCK):
        _, number, rest = target.split(".", 2)
        source = f"{BLOCK}{blocks[int(number)]}.{rest}"
    if ".attn1.to_qkv." not in target:
        return [Route(source, target)]
    return [
        Route(source.replace("to_qkv", f"to_{one}"), target, target_part=(part, 3))
        for part, one in enumerate("qkv")
    ]


def _of_size_embedders(name: str) -> bool:
    return "resolution_embedder" in name or "aspect_ratio_embedder" in name


def _unused(
    files: Iterable[str],
    routes: Mapping[str, list[Route]],
    blocks: tuple[int, ...],
    source: Path,
) -> list[str]:
    """Return the tensors without a destination, apart from unused blocks; refuse unknown ones."""
    rest = [name for name in files if name not in routes and _block_number(name) in (-1, *blocks)]
    known = (*BUFFERS, *LATENT_LAYERS)  # the latter are left out for other latents
    unknown = [n for n in rest if not n.startswith(known) and not _of_size_embedders(n)]
    if unknown:
        raise ValueError(
            f"{source} has tensors that a LocalDiT of this configuration lacks: {few(unknown)}."
        )
    return rest


@torch.no_grad()
def _copy(
    transformer: LocalDiTTransformer2DModel,
    files: Mapping[str, CheckpointFile],
    routes: Mapping[str, list[Route]],
) -> None:
    """Copy each tensor to its destinations."""
    parameters = dict(transformer.named_parameters())
    patches = transformer.config.patch_size**2
    for file in dict.fromkeys(files.values()):
        for name, tensor in file.tensors(name for name in file.infos if name in routes):
            require_finite(file.path, name, tensor)
            for route in routes[name]:
                destination = part_of(parameters[route.target], route.target_part)
                if len(tensor) == len(destination):
                    destination.copy_(tensor)
                else:  # for each pixel of a patch, rows of the noise, then of the variance
                    noise = tensor.unflatten(0, (patches, 2, -1))[:, 0]
                    destination.copy_(noise.flatten(0, 1))


@torch.no_grad()
def _start_fresh(transformer: LocalDiTTransformer2DModel, fresh: Iterable[str]) -> None:
    """Initialise the parameters that PixArt lacks, without effect where that is possible."""
    parameters = dict(transformer.named_parameters())
    for name in fresh:
        if name.endswith((".norm_q.weight", ".norm_k.weight")):
            parameters[name].fill_(1.0)
        elif name.endswith("rel_pos_bias") or (_of_size_embedders(name) and ".linear_2." in name):
            parameters[name].zero_()
    for module in transformer.modules():
        if isinstance(module, LocalDiTAttention) and module.global_context is not None:
            for of_windows, of_the_map in zip(
                module.to_qkv.parameters(),
                module.global_context.to_global_kv.parameters(),
                strict=True,
            ):
                of_windows.chunk(3)[2].mul_(2)
                of_the_map.chunk(2)[1].zero_()
