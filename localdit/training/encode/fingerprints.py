"""Fingerprints of the encoders: what tells one from another, wherever they are kept."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from localdit.training.components import Encoders


def encoder_fingerprints(encoders: Encoders) -> dict[str, str]:
    """SHA-256 of tokenizer, text encoder and VAE, in hexadecimal.

    The text encoder's weights are rounded to bfloat16 first: that is how a GPU holds them, and a
    fingerprint must not depend on the device.
    """
    return {
        "tokenizer": _tokenizer_fingerprint(encoders.tokenizer),
        "text_encoder": weights_fingerprint(encoders.text_encoder, torch.bfloat16),
        "vae": weights_fingerprint(encoders.vae, torch.float32),
    }


def weights_fingerprint(model: torch.nn.Module, dtype: torch.dtype) -> str:
    """Of the names, types, shapes and bytes of all tensors; those with fractions in `dtype`."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if tensor.is_floating_point():
            tensor = tensor.to(dtype)
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        values = tensor.cpu().contiguous().flatten().view(torch.uint8)
        digest.update(values.numpy())
    return digest.hexdigest()


def _tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Of all that a fast tokenizer does, or of the vocabulary of a slow one."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        contents = tokenizer.get_vocab()
    else:
        contents = json.loads(backend.to_str())
        for passing in ("truncation", "padding"):  # set anew by each call
            contents.pop(passing, None)
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()
