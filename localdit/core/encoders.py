"""The frozen encoders of training: located, loaded and fingerprinted."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import FieldError, Vocabulary
from .latents import LatentSpace
from .parts import (
    ENCODERS,
    PARTS,
    load_text_encoder,
    load_tokenizer,
    load_vae,
    locate,
    names_folder,
    text_encoder_class,
    vae_config,
)
from .text import TextSpace, text_width
from .vocabulary import read_whole_words

if TYPE_CHECKING:
    import torch


class Encoders(NamedTuple):
    """The frozen models that turn captions and pictures into the transformer's inputs."""

    tokenizer: Any
    text_encoder: Any
    vae: Any

    @property
    def latents(self) -> LatentSpace:
        """The latent space of the autoencoder."""
        return LatentSpace(self.vae)

    @property
    def text(self) -> TextSpace:
        """The text space of tokenizer and text encoder."""
        return TextSpace(self.tokenizer, self.text_encoder)

    def to(self, device: torch.device | str) -> None:
        """Move both models."""
        self.text_encoder.to(device)
        self.vae.to(device)

    def fingerprints(self) -> dict[str, str]:
        """Return the SHA-256 of tokenizer, text encoder and autoencoder, in hexadecimal.

        The text encoder's weights are rounded to bfloat16 first: that is how a GPU holds them, and
        a fingerprint must not depend on the device.
        """
        import torch

        return {
            "tokenizer": tokenizer_fingerprint(self.tokenizer),
            "text_encoder": weights_fingerprint(self.text_encoder, torch.bfloat16),
            "vae": weights_fingerprint(self.vae, torch.float32),
        }


def load_encoders(sources: Mapping[str, str], text_dtype: torch.dtype) -> Encoders:
    """Load tokenizer, text encoder and autoencoder, frozen, for training.

    Args:
        sources: folder or hub name of each of `ENCODERS`.
        text_dtype: dtype of the text encoder. The autoencoder is loaded in float32, since SDXL's
            needs its range.
    """
    import torch

    where = {name: locate_encoder(name, sources[name]) for name in ENCODERS}
    encoders = Encoders(
        load_tokenizer(where["tokenizer"]),
        load_text_encoder(where["text_encoder"], text_dtype),
        load_vae(where["vae"], torch.float32),
    )
    encoders.text_encoder.eval().requires_grad_(False)
    encoders.vae.eval().requires_grad_(False).to(memory_format=torch.channels_last)
    return encoders


def locate_encoder(name: str, source: str) -> dict[str, Any]:
    """Return where one of `ENCODERS` is, as arguments of `from_pretrained`."""
    part = PARTS[name]
    try:
        return locate(part, source)
    except FieldError as error:
        options = {part.field: f"--{name.replace('_', '-')}"}
        raise OSError(error.worded(Vocabulary(options, "give {name} {value}"))) from error


def encoder_folders(sources: Mapping[str, str]) -> dict[str, Path]:
    """Return the folders of tokenizer, text encoder and autoencoder on this machine."""
    from huggingface_hub import hf_hub_download

    folders = {}
    for name in ENCODERS:
        where, part = locate_encoder(name, sources[name]), PARTS[name]
        folder = Path(where["pretrained_model_name_or_path"]) / where["subfolder"]
        if not folder.is_dir():
            subfolder = where["subfolder"] or None
            folder = Path(hf_hub_download(sources[name], part.config, subfolder=subfolder)).parent
        folders[name] = folder.resolve()
    return folders


def encoder_classes(sources: Mapping[str, str]) -> dict[str, list[str]]:
    """Return library and class of each of `ENCODERS`, as a pipeline's `model_index.json` has it."""
    where = {name: locate_encoder(name, sources[name]) for name in ENCODERS}
    tokenizer = load_tokenizer(where["tokenizer"])
    return {
        "tokenizer": ["transformers", type(tokenizer).__name__],
        "text_encoder": ["transformers", text_encoder_class(where["text_encoder"]).__name__],
        "vae": ["diffusers", vae_config(where["vae"]).get("_class_name", "AutoencoderKL")],
    }


def text_encoder_whole_words(sources: Mapping[str, str]) -> bool:
    """Return whether the pipeline that a text encoder is from says that it knows whole words alone.

    The encoders of a trained pipeline are links: where it says nothing, their own pipeline counts.
    """
    where = locate_encoder("text_encoder", sources["text_encoder"])
    folder = Path(where["pretrained_model_name_or_path"], where["subfolder"])
    said = read_whole_words(folder.absolute().parent)
    return bool(read_whole_words(folder.resolve().parent) if said is None else said)


@names_folder
def text_encoder_width(where: Mapping[str, Any]) -> int:
    """Return the channels of a text encoder's states; no weights are read."""
    from transformers import AutoConfig

    return text_width(AutoConfig.from_pretrained(**where, trust_remote_code=False).to_dict())


def weights_fingerprint(model: torch.nn.Module, dtype: torch.dtype) -> str:
    """Return the SHA-256 of all tensors: names, types, shapes and bytes.

    Floating-point tensors are converted to `dtype` first. The model may be offloaded.
    """
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if tensor.is_meta:
            tensor = _offloaded(model, name)
        if tensor.is_floating_point():
            tensor = tensor.to(dtype)
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        values = tensor.cpu().contiguous().flatten().view(torch.uint8)
        digest.update(values.numpy())
    return digest.hexdigest()


def _offloaded(model: torch.nn.Module, name: str) -> torch.Tensor:
    """Return a tensor that sequential offloading keeps in a hook of its module."""
    path, _, leaf = name.rpartition(".")
    hook: Any = model.get_submodule(path)._hf_hook
    maps = [getattr(one, "weights_map", None) for one in getattr(hook, "hooks", [hook])]
    return next(tensors[leaf] for tensors in maps if tensors is not None)


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Return the SHA-256 of a fast tokenizer's definition, or of a slow one's vocabulary."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        contents = tokenizer.get_vocab()
    else:
        contents = json.loads(backend.to_str())
        for passing in ("truncation", "padding"):  # set by each call
            contents.pop(passing, None)
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()
