"""What a pipeline has beside the transformer: looked for, and loaded."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

from .sources import SCHEDULER, TEXT_ENCODER, TOKENIZER, VAE, fetching, locate

if TYPE_CHECKING:
    import torch

    from .config import Config

PARTS = {
    "scheduler": SCHEDULER,
    "vae": VAE,
    "tokenizer": TOKENIZER,
    "text_encoder": TEXT_ENCODER,
}


def locate_parts(
    config: Config, absent: Collection[str] = PARTS, local_files_only: bool = False
) -> dict[str, dict[str, Any]]:
    """Make sure that the parts that `config` names are there, and say where.

    Args:
        config: names them.
        absent: those that are needed, of `PARTS`.
        local_files_only: take files of the hub from the cache, and fetch nothing.

    Returns:
        Arguments of `from_pretrained` for each.
    """
    return {
        name: locate(part, getattr(config, part.field), local_files_only=local_files_only)
        for name, part in PARTS.items()
        if name in absent
    }


def load_parts(
    config: Config,
    where: Mapping[str, dict[str, Any]],
    device: torch.device,
    dtype: torch.dtype | None,
) -> dict[str, Any]:
    """Load the parts that `locate_parts` found; the largest comes last."""
    from diffusers import AutoencoderKL, DPMSolverMultistepScheduler
    from transformers import AutoTokenizer

    loaders: dict[str, Callable[[dict[str, Any]], Any]] = {
        "scheduler": lambda at: DPMSolverMultistepScheduler.from_pretrained(**at),
        "vae": lambda at: AutoencoderKL.from_pretrained(**at, torch_dtype=dtype),
        "tokenizer": lambda at: AutoTokenizer.from_pretrained(**at),
        "text_encoder": lambda at: load_text_encoder(config, at, device, dtype),
    }
    parts = {}
    for name, load in loaders.items():
        if name in where:
            with fetching(PARTS[name], getattr(config, PARTS[name].field)):
                parts[name] = load(where[name])
    return parts


def load_text_encoder(
    config: Config, where: dict[str, Any], device: torch.device, dtype: torch.dtype | None
) -> Any:
    """Load the text encoder from where it is, quantized if `config` says so."""
    from transformers import BitsAndBytesConfig, T5EncoderModel

    options: dict[str, Any] = {}
    if config.text_encoder_quantization == "8bit":
        options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    elif config.text_encoder_quantization == "4bit":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    if options:
        options["device_map"] = {"": device}
    return T5EncoderModel.from_pretrained(**where, torch_dtype=dtype, **options)
