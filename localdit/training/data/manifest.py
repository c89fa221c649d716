"""The manifest of encoded data: of what it was made, and how."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from localdit.training.data.buckets import Size

FORMAT = 1
MANIFEST = "encoded.json"
NOTES = ("command", "sources", "too_small")  # what may differ when encoding goes on


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Of what and how a set was encoded.

    Attributes:
        image_size, window_size, crop, max_aspect_ratio, max_upscale: the options of these names.
        sizes: of the buckets, in pixels.
        max_caption_length: text tokens that captions are cut at.
        mixed_precision: in which the pictures were encoded.
        latent_channels, vae_scale, scaling_factor: of the VAE; the scale is pixels to a latent.
        text_width: channels of the text states.
        fingerprints: SHA-256 of tokenizer, text encoder and VAE.
        samples, shards, samples_per_shard: how many were planned.
        samples_digest: SHA-256 of the samples' ids, captions and sizes, in their order.
        sources: where tokenizer, text encoder and VAE came from, as was given.
        command: what writes the set, and goes on with it.
        too_small: pictures left out because they would have been enlarged too much.
    """

    image_size: int
    window_size: int
    crop: str
    max_aspect_ratio: float
    max_upscale: float
    sizes: tuple[Size, ...]
    max_caption_length: int
    mixed_precision: str
    latent_channels: int
    vae_scale: int
    scaling_factor: float
    text_width: int
    fingerprints: dict[str, str]
    samples: int
    shards: int
    samples_per_shard: int
    samples_digest: str
    sources: dict[str, str]
    command: str
    too_small: int

    def to_json(self) -> dict[str, Any]:
        """The manifest in plain lists, texts and numbers."""
        return {"format": FORMAT, **asdict(self), "sizes": [list(size) for size in self.sizes]}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Manifest:
        """The inverse of `to_json`.

        Raises:
            KeyError, TypeError: if it is no manifest.
        """
        known = {field.name: values[field.name] for field in fields(cls)}
        return cls(**known | {"sizes": tuple(Size(*size) for size in values["sizes"])})

    def differences(self, other: Manifest) -> list[str]:
        """What keeps samples of the other set from being added to this one, a text each."""
        ours, theirs = self._settings(), other._settings()
        return [
            f"another {name}"
            for name, fingerprint in self.fingerprints.items()
            if other.fingerprints.get(name) != fingerprint
        ] + [
            f"{name} {theirs[name]} instead of {ours[name]}"
            for name in ours
            if name != "fingerprints" and ours[name] != theirs[name]
        ]

    def digest(self) -> str:
        """SHA-256 of all but the notes; each shard's index carries it."""
        return hashlib.sha256(json.dumps(self._settings(), sort_keys=True).encode()).hexdigest()

    def _settings(self) -> dict[str, Any]:
        return {name: value for name, value in self.to_json().items() if name not in NOTES}


def read_manifest(folder: Path) -> Manifest:
    """The manifest of an encoded set.

    Raises:
        ValueError: if the folder holds none, or one that can't be understood.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(f"{folder} holds no encoded data: there is no {MANIFEST} in it.")
    values = read_json(path)
    if values.get("format") != FORMAT:
        raise ValueError(
            f"{path} has format {values.get('format')!r}, this version of LocalDiT reads {FORMAT}: "
            "encode the data anew, or use the version that encoded it."
        )
    try:
        return Manifest.from_json(values)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}): encode the data anew.") from None


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        ValueError: if it holds none.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON file ({error}): it is damaged.") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no JSON object: it is damaged.")
    return values
