"""Encoded data: the latents and text states of pictures and captions, made ahead of training.

A folder holds `encoded.json`, the manifest, which describes the data, the encoders and the options;
`empty.safetensors` with the text states of the empty caption; and the samples: tars
`shard-00000.tar` and so on, as WebDataset readers take them. Each tar has an index beside it, so
that samples are read in any order without scanning a tar. `python -m localdit.training.encode`
writes such a folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from localdit.checkpoint.reading import is_finite
from localdit.core.latents import LatentFormat
from localdit.files import parse_json, user_path, write_json, write_whole
from localdit.training.data.buckets import Size
from localdit.training.data.samples import Blob, BrokenSample, Fault, Faults, Sample

FORMAT = 1
MANIFEST = "encoded.json"
EMPTY_CAPTION = "empty.safetensors"
MAX_SHARDS = 1_000_000
# Fields that may differ when encoding is resumed.
NOTES = ("command", "sources", "too_small", "empty_caption")
STATISTICS = ("shift_factor", "latents_mean", "latents_std")
# Fields added later: written only if they are not None, so that older sets keep their digest.
ADDED = (*STATISTICS, "empty_caption")


@dataclass(frozen=True, kw_only=True)
class EncodedManifest:
    """The data, the encoders and the options of an encoded set."""

    # The options of these names.
    image_size: int
    window_size: int
    crop: str
    max_aspect_ratio: float
    max_upscale: float
    sizes: tuple[Size, ...]  # of the buckets, in pixels
    max_caption_length: int  # text tokens after which captions are cut
    mixed_precision: str  # in which the pictures were encoded
    latent_channels: int
    vae_scale: int  # pixels per latent
    scaling_factor: float
    text_width: int  # channels
    fingerprints: dict[str, str]  # SHA-256 of tokenizer, text encoder and VAE
    samples: int  # planned, as the next two
    shards: int
    samples_per_shard: int
    samples_digest: str  # SHA-256 of the ids, captions and sizes of the samples, in their order
    sources: dict[str, str]  # tokenizer, text encoder and VAE, as they were named in the options
    command: str  # the command that writes the set and resumes it
    too_small: int  # pictures left out because they would have been enlarged too much
    # Of the VAE, if it has them. Versions that did not apply them did not write them; see
    # `require_latent_format`.
    shift_factor: float | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None
    empty_caption: str | None = None  # SHA-256 of its file

    @property
    def latent_format(self) -> LatentFormat:
        """Format of the latents."""
        return LatentFormat(
            self.latent_channels,
            self.vae_scale,
            self.scaling_factor,
            self.shift_factor or 0.0,
            self.latents_mean,
            self.latents_std,
        )

    def to_json(self) -> dict[str, Any]:
        """Return the manifest as plain lists, texts and numbers."""
        values = {"format": FORMAT, **asdict(self)}
        for name in ADDED:
            if values[name] is None:
                del values[name]
        return json.loads(json.dumps(values))

    def command_for(self, folder: Path) -> str:
        """Return the command that resumes the set, which may have been moved to another folder."""
        words = [word.removeprefix("--output=") for word in shlex.split(str(self.command))]
        moved = not any(
            os.path.abspath(user_path(word)) == os.path.abspath(folder) for word in words
        )
        return self.command + f" --output {shlex.quote(str(folder))}" * moved

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> EncodedManifest:
        """Invert `to_json`.

        Raises:
            KeyError, TypeError: if it is not a manifest.
        """
        known = {field.name: values[field.name] for field in fields(cls)
                 if field.name not in ADDED}  # fmt: skip
        known["sizes"] = tuple(Size(*size) for size in values["sizes"])
        for name in ADDED:
            value = values.get(name)
            known[name] = tuple(value) if isinstance(value, list) else value
        return cls(**known)

    def differences(self, other: EncodedManifest) -> list[str]:
        """Return the reasons why samples of the other set can't be added to this one."""
        ours, theirs = self._settings(), other._settings()
        return [
            f"another {name}"
            for name, fingerprint in self.fingerprints.items()
            if other.fingerprints.get(name) != fingerprint
        ] + [
            f"{name} {theirs.get(name)} instead of {ours.get(name)}"
            for name in ours | theirs
            if name != "fingerprints" and ours.get(name) != theirs.get(name)
        ]

    def digest(self) -> str:
        """Return the SHA-256 of all but the notes; the index of each shard repeats it."""
        return hashlib.sha256(json.dumps(self._settings(), sort_keys=True).encode()).hexdigest()

    def _settings(self) -> dict[str, Any]:
        return {name: value for name, value in self.to_json().items() if name not in NOTES}


def read_encoded_manifest(folder: Path) -> EncodedManifest:
    """Read the manifest of an encoded set."""
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(f"{folder} has no encoded data: it has no {MANIFEST}.")
    try:
        values = parse_json(path.read_bytes(), "it")
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if values.get("format") != FORMAT:
        raise ValueError(
            f"{path} has format {values.get('format')!r}, this version of LocalDiT reads {FORMAT}: "
            "encode the data again, or use the version that encoded it."
        )
    try:
        manifest = EncodedManifest.from_json(values)
        if not 0 <= manifest.shards <= MAX_SHARDS:
            raise TypeError(f"{manifest.shards} shards")
        return manifest
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}): encode the data again.") from None


def require_latent_format(folder: Path, manifest: EncodedManifest, expected: LatentFormat) -> None:
    """Refuse a set whose latents do not have the format of the VAE that is to decode them."""
    for field in fields(LatentFormat):
        given, value = (getattr(one, field.name) for one in (manifest.latent_format, expected))
        if given != value:
            old = f" Old versions ignored {field.name}." if field.name in STATISTICS else ""
            raise ValueError(
                f"{folder} was encoded with {field.name} {given}, but its VAE has {field.name} "
                f"{value}, so the latents are wrong for this VAE.{old} Encode the data again, into "
                "a new folder, or name the VAE that encoded it."
            )


@dataclass(frozen=True)
class EncodedSet:
    """An encoded set, without its samples."""

    folder: Path
    manifest: EncodedManifest
    empty_text: torch.Tensor  # of the empty caption, (tokens, text width) bfloat16


def tar_path(folder: Path, shard: int) -> Path:
    """Return the path of a shard."""
    return folder / f"shard-{shard:05d}.tar"


def index_path(folder: Path, shard: int) -> Path:
    """Return the path of the index of a shard."""
    return folder / f"shard-{shard:05d}.json"


def write_empty_text(folder: Path, manifest: EncodedManifest, states: torch.Tensor) -> None:
    """Write the manifest, and the text states of the empty caption, whose SHA-256 it notes."""
    data = save({"text": states})
    noted = replace(manifest, empty_caption=hashlib.sha256(data).hexdigest())
    write_json(folder / MANIFEST, noted.to_json())
    write_whole(folder / EMPTY_CAPTION, data)


def read_empty_text(folder: Path, manifest: EncodedManifest) -> torch.Tensor:
    """Read the text states of the empty caption, (tokens, text width) bfloat16."""
    path = folder / EMPTY_CAPTION
    try:
        data = path.read_bytes()
        states = load(data)["text"]
        if manifest.empty_caption not in (None, hashlib.sha256(data).hexdigest()):
            raise ValueError("its bytes are not those that were written")
        shape = tuple(states.shape)
        if len(shape) != 2 or shape[1] != manifest.text_width or not is_finite(states):
            raise ValueError(f"states of shape {shape}, or states that are not finite")
        return states
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"{path} can't be read ({error}). Remove it, and run again: "
            f"{manifest.command_for(folder)}"
        ) from None


def index_digest(values: dict[str, Any]) -> str:
    """Return the SHA-256 of the contents of an index; earlier versions did not write it there."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def unwritten_shards(folder: Path, manifest: EncodedManifest) -> list[int]:
    """Return the shards that are not yet encoded: those without an index."""
    return [shard for shard in range(manifest.shards) if not index_path(folder, shard).is_file()]


def read_shard(
    folder: Path, shard: int, manifest: EncodedManifest, digest: str
) -> tuple[list[Sample], list[Fault]]:
    """Read the samples of a shard, and those that turned out to be broken during encoding."""
    tar, index = tar_path(folder, shard), index_path(folder, shard)
    again = f"Remove {index.name} and run again: {manifest.command_for(folder)}"
    try:
        values = parse_json(index.read_bytes(), "it")
        if values.pop("sha256", None) not in (None, index_digest(values)):
            raise ValueError("its SHA-256 differs from its contents")
        stored, size = values["set"], values["bytes"]
        samples = [
            Sample(
                id=entry["id"],
                image=Blob(str(tar), entry["offset"], entry["size"], entry["crc32"]),
                captions=tuple(entry["captions"]),
                height=entry["height"],
                width=entry["width"],
            )
            for entry in values["samples"]
        ]
        faults = [Fault(*fault) for fault in values["faults"]]
        for sample, entry in zip(samples, values["samples"], strict=True):
            offset, length = entry["offset"], entry["size"]
            inside = 0 <= offset <= offset + length <= size and isinstance(offset + length, int)
            if not inside or (sample.height, sample.width) not in manifest.sizes:
                raise ValueError(f"place or size of {sample.id!r}")
            captions = entry["captions"]
            if not (isinstance(captions, list) and set(map(type, captions)) == {str}):
                raise ValueError(f"captions of {sample.id!r}")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{index} is damaged ({error}). {again}") from None
    if stored != digest:
        raise ValueError(f"{index} belongs to another set than {folder / MANIFEST}. {again}")
    planned = min(manifest.samples_per_shard, manifest.samples - shard * manifest.samples_per_shard)
    if (listed := len(samples) + len(faults)) != planned:
        raise ValueError(f"{index} lists {listed:,} samples; {planned:,} were planned. {again}")
    found = tar.stat().st_size if tar.is_file() else 0
    if found != size:
        raise ValueError(f"{tar} has {found:,} bytes, but {size:,} were written. {again}")
    return samples, faults


def open_encoded(folder: str | Path) -> tuple[list[Sample], Faults, EncodedSet]:
    """Open an encoded set by its manifest and indices; the tars are not read.

    Returns:
        Its samples, those that turned out to be broken during encoding, and the set.
    """
    folder = Path(folder)
    manifest = read_encoded_manifest(folder)
    if missing := unwritten_shards(folder, manifest):
        raise ValueError(
            f"{folder} is not complete: {len(missing):,} of {manifest.shards:,} shards are not yet "
            f"encoded. Resume with: {manifest.command_for(folder)}"
        )
    digest = manifest.digest()
    samples, faults = [], Faults()
    for shard in range(manifest.shards):
        healthy, broken = read_shard(folder, shard, manifest, digest)
        samples += healthy
        for fault in broken:
            faults.add(fault)
    return samples, faults, EncodedSet(folder, manifest, read_empty_text(folder, manifest))


def read_encoded(
    sample: Sample, caption: int | None = 0
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Read the latents of an encoded sample, and the text states of one of its captions.

    Args:
        sample: a sample from `open_encoded`.
        caption: the number of the caption; None if it is dropped.

    Returns:
        Latents (C, h, w) float32, and states (tokens, text width) bfloat16 or None.

    Raises:
        BrokenSample: if they can't be read, or are not what was written.
    """
    try:
        tensors = load(sample.image.read())
        latents = tensors["latents"].float()
        text = None if caption is None else tensors[f"text_{caption}"]
    except OSError as error:
        raise BrokenSample("unreadable", str(error)) from error
    except (KeyError, SafetensorError) as error:
        raise BrokenSample("damaged", f"not an encoded sample ({error!r})") from error
    if latents.ndim != 3 or latents.shape[1] * sample.width != latents.shape[2] * sample.height:
        shape = tuple(latents.shape)
        raise BrokenSample(
            "damaged", f"latents of shape {shape} for {sample.height} x {sample.width} pixels"
        )
    return latents, text
