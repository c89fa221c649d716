"""Fingerprints of the encoders, which identify them wherever they are stored."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from localdit.training.components import Encoders


def encoder_fingerprints(encoders: Encoders) -> dict[str, str]:
    """Return the SHA-256 of tokenizer, text encoder and VAE, in hexadecimal.

    The weights of the text encoder are rounded to bfloat16 first, as on a GPU, because a
    fingerprint must not depend on the device.
    """
    return {
        "tokenizer": _tokenizer_fingerprint(encoders.tokenizer),
        "text_encoder": weights_fingerprint(encoders.text_encoder, torch.bfloat16),
        "vae": weights_fingerprint(encoders.vae, torch.float32),
    }


def weights_fingerprint(model: torch.nn.Module, dtype: torch.dtype) -> str:
    """Return the SHA-256 of the names, types, shapes and bytes of all tensors.

    Floating-point tensors are converted to `dtype` first.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if tensor.is_floating_point():
            tensor = tensor.to(dtype)
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        values = tensor.cpu().contiguous().flatten().view(torch.uint8)
        digest.update(values.numpy())
    return digest.hexdigest()


def _tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the SHA-256 of the whole of a fast tokenizer, or of the vocabulary of a slow one."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        contents = tokenizer.get_vocab()
    else:
        contents = json.loads(backend.to_str())
        for passing in ("truncation", "padding"):  # set by each call
            contents.pop(passing, None)
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()
