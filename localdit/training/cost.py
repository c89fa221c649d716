"""The cost of a stage before it starts: memory of each device, operations, and time."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from localdit.core.conditions import size_conditions
from localdit.core.diffusion import Objective
from localdit.core.latents import LatentFormat
from localdit.models import LocalDiTTransformer2DModel
from localdit.models.configuration import resolve_layer_types
from localdit.training import initialization
from localdit.training.data.buckets import Size
from localdit.training.methods import Inputs, method_class, predict
from localdit.training.methods.repa import FEATURES, LatentFeatures, image_encoder_config
from localdit.training.optimizer import make_optimizer
from localdit.training.post_hoc_ema import SIGMA_RELS
from localdit.training.reporting import read_metrics
from localdit.training.results import TARGETS, add_adapters, in_any_block, layers_called
from localdit.training.sharding import trained_parameters
from localdit.training.stages import Stage
from localdit.training.state import TRANSFORMER

FLOAT32 = 4  # bytes: weights, gradients and averages
MOMENT_BYTES = {"adamw": 8, "adamw8bit": 2, "muon": 8}  # of both moments of a trained value
META = torch.device("meta")


def cost_report(
    args: argparse.Namespace,
    stage: Stage,
    size: Size,
    text_width: int,
    latents: LatentFormat,
    num_processes: int,
    sharded: bool,
    mixed_precision: str,
) -> str:
    """Describe the memory, the operations and the time of a stage in lines of text.

    Memory is that of one process. Activations are what the backward pass needs; they are derived
    from passes of models with no block and one block on the CPU, for captions of the greatest
    length. Not counted are the results that a step frees at once, the autoencoder, the text
    encoder, the activations of terms beside the transformer, and libraries.

    Args:
        size: height and width of its largest pictures, in pixels.
        text_width: channels of the text.
        latents: the latents to train on.
        num_processes: processes of the run.
        sharded: whether the processes share weights, gradients, optimizer and averages (FSDP2).
        mixed_precision: "no", "fp16" or "bf16".
    """
    shape = initialization.transformer_config(args, text_width, latents)
    with META:
        transformer = LocalDiTTransformer2DModel(**shape)
        frozen: dict[str, torch.nn.Module] = {}
        if args.teacher is not None:
            source = {"transformer": args.teacher, "new_latents": None}
            config = initialization.transformer_config(argparse.Namespace(**vars(args) | source))
            frozen["teacher"] = LocalDiTTransformer2DModel(**config)
        if args.repa_weight:
            from transformers import AutoModel

            encoder = AutoModel.from_config(image_encoder_config(args.repa_encoder))
            frozen[FEATURES] = LatentFeatures(None, encoder)
    inputs = _inputs(args, stage, size, latents.pixels_per_latent, transformer)
    weights = _size(transformer)
    if args.lora_rank is not None:
        add_adapters(transformer, args)
    trained = sum(parameter.numel() for _, parameter in trained_parameters(transformer))
    kind = method_class(args)
    method = kind(
        transformer,
        Objective(args.prediction_type or "epsilon"),
        args.lora_rank is not None,
        frozen,
        **kind.settings(args, transformer.config.num_layers),
    )
    shared = num_processes if sharded else 1
    beside = sum(_size(model) for name, model in method.trained.items() if name != TRANSFORMER)
    averages = 0 if args.ema_on_cpu else 1 + len(SIGMA_RELS) * bool(args.post_hoc_ema)
    memory = {
        "weights": (weights + (trained if args.lora_rank else 0) + beside) * FLOAT32 / shared,
        **{f"frozen {name}": _size(model) * FLOAT32 for name, model in frozen.items()},
        "gradients": (trained + beside) * FLOAT32 / shared,
        "optimizer": sum(_optimizer_bytes(one, args) for one in method.trained.values()) / shared,
        "averages": averages * trained * FLOAT32 / shared,
        "activations": activation_bytes(
            args, shape, inputs.repeated(method.repeats), mixed_precision
        ),
    }
    parts = ", ".join(f"{name} {_memory(value)}" for name, value in memory.items() if value)
    batch = stage.global_batch(num_processes)
    flops = method.step_flops(inputs) * batch // stage.batch_size
    return "\n".join(
        [
            f"Transformer: {weights:,} weights, {trained:,} trained values",
            f"Memory of each device: about {_memory(sum(memory.values()))} ({parts}), for {size} "
            f"pixels, {stage.batch_size:,} pictures a batch",
            f"Computation: {flops:.3g} floating-point operations a step of {batch:,} pictures, "
            f"{flops * stage.max_train_steps:.3g} in {stage.max_train_steps:,} steps",
            _duration(args.output / "metrics.jsonl", batch * stage.max_train_steps),
        ]
    )


def _size(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _optimizer_bytes(model: torch.nn.Module, args: argparse.Namespace) -> int:
    """Return the bytes of a model's optimizer state: of a matrix, Muon has one moment, not two."""
    optimizer = make_optimizer(
        trained_parameters(model), args.optimizer, args.learning_rate, args.weight_decay
    )
    return sum(
        parameter.numel() * (FLOAT32 if "matrices" in group else MOMENT_BYTES[args.optimizer])
        for group in optimizer.param_groups
        for parameter in group["params"]
    )


def activation_bytes(
    args: argparse.Namespace, shape: dict[str, Any], inputs: Inputs, mixed_precision: str
) -> int:
    """Return the bytes that a step keeps from the forward pass for the backward pass.

    They grow linearly with the pictures of a batch, and with the layers of each type. So passes of
    one picture and two, with no layer and one, give them for any model.
    """
    rows = len(inputs.latents)
    with META:
        transformer = LocalDiTTransformer2DModel(**shape)
    config = transformer.config
    if args.lora_target_modules:  # some may name the number of a block
        names = (n for t in args.lora_target_modules for n in layers_called(transformer, t))
        args = _with_targets(args, sorted({in_any_block(name) for name in names}))

    def measured(layer_types: list[str], checkpointing: bool = False) -> float:
        few = shape | {
            "num_layers": len(layer_types),
            "layer_types": layer_types,
            "use_global": "local_global" in layer_types,
        }
        one, two = (
            saved_bytes(args, few, inputs, n, mixed_precision, checkpointing) for n in (1, 2)
        )
        return one + (two - one) * (rows - 1)

    outside = measured([])
    types = resolve_layer_types(config.layer_types, config.num_layers, config.use_global)
    counts = Counter(types)
    layers = {one: measured([one]) - outside for one in counts}
    if not args.gradient_checkpointing:
        return round(outside + sum(layers[one] * count for one, count in counts.items()))
    kept = {one: measured([one], checkpointing=True) - outside for one in counts}
    recomputed = max(layers.values(), default=0)  # one layer at a time
    return round(outside + recomputed + sum(kept[one] * count for one, count in counts.items()))


def saved_bytes(
    args: argparse.Namespace,
    shape: dict[str, Any],
    inputs: Inputs,
    rows: int,
    mixed_precision: str,
    checkpointing: bool,
) -> int:
    """Return the bytes that a forward pass saves for the backward pass, weights left out."""
    transformer = LocalDiTTransformer2DModel(**shape)
    pass_on = False  # whether frozen layers only pass a gradient on to others
    if args.lora_rank is not None and shape["num_layers"]:
        targets = [t for t in args.lora_target_modules or TARGETS if layers_called(transformer, t)]
        pass_on = not targets
        if pass_on:
            transformer.requires_grad_(False)
        else:
            add_adapters(transformer, _with_targets(args, targets))
    if checkpointing:
        transformer.enable_gradient_checkpointing()
    weights = {parameter.untyped_storage().data_ptr() for parameter in transformer.parameters()}
    saved: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    given = Inputs(
        torch.zeros(rows, *inputs.latents.shape[1:], requires_grad=pass_on),
        torch.zeros(rows, *inputs.text.shape[1:]),
        torch.ones(rows, *inputs.text_mask.shape[1:]),
        {
            name: None if value is None else torch.ones_like(value, device="cpu")
            for name, value in inputs.conditions.items()
        },
    )
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=mixed_precision != "no"),  # 16 bits, as fp16
        sdpa_kernel(SDPBackend.FLASH_ATTENTION),  # as on a GPU
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
    ):
        # The prediction keeps the saved tensors alive, so no two of them have the same address.
        prediction = predict(transformer, given.latents, given, torch.zeros(rows))
    assert prediction.requires_grad
    return sum(size for address, size in saved.items() if address not in weights)


def _with_targets(args: argparse.Namespace, targets: list[str]) -> argparse.Namespace:
    return argparse.Namespace(**vars(args) | {"lora_target_modules": targets})


def _inputs(
    args: argparse.Namespace,
    stage: Stage,
    size: Size,
    pixels_per_latent: int,
    transformer: LocalDiTTransformer2DModel,
) -> Inputs:
    """Return inputs without values, as large as a batch of the stage can be."""
    config, rows = transformer.config, stage.batch_size
    width = config.caption_channels or transformer.inner_dim
    height, across = (side // pixels_per_latent for side in size)
    return Inputs(
        torch.empty(rows, config.in_channels, height, across, device=META),
        torch.empty(rows, args.max_caption_length, width, device=META),
        torch.empty(rows, args.max_caption_length, device=META),
        size_conditions(transformer.use_additional_conditions, *size, META),
    )


def _duration(metrics: Path, pictures: int) -> str:
    """Describe the time for a number of pictures, at the pace of a run that logged its metrics."""
    lines = read_metrics(metrics) if metrics.is_file() else []
    paces = [line["images_per_second"] for line in lines if line.get("images_per_second")]
    if not paces:
        return (
            f"Time: unknown without a measured pace. Train a few steps into {metrics.parent}, and "
            "ask again."
        )
    days = pictures / paces[-1] / 86400
    return f"Time: {days:.2g} days at {paces[-1]:.3g} pictures per second, as {metrics} measured"


def _memory(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.2f} MiB"
