"""One job of encoding: the data, the encoders, the manifest of what they make, and the work."""

from __future__ import annotations

import argparse
import math
import tarfile
from collections import Counter
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from localdit.machine import hidden
from localdit.training.components import Encoders, encoder_sources, load_encoders
from localdit.training.data.encoded import open_encoded, tar_path, unwritten_shards
from localdit.training.data.faults import Faults, require_few
from localdit.training.data.finding import find_samples
from localdit.training.data.manifest import Manifest
from localdit.training.encode.fingerprints import encoder_fingerprints
from localdit.training.encode.folder import free_bytes
from localdit.training.encode.plan import DiskNeed, Plan, disk_need, make_plan
from localdit.training.encode.shards import ShardEncoder, read_pictures
from localdit.training.encoding import CaptionEncoder, vae_scale


@dataclass(frozen=True)
class Job:
    """What a command encodes, and with what.

    Attributes:
        plan: the samples.
        faults: the broken ones among what was found.
        manifest: of the set that will be.
        need: the disk that it will take.
        encoders: on the device.
        captions: the text encoder, as it is used.
    """

    plan: Plan
    faults: Faults
    manifest: Manifest
    need: DiskNeed
    encoders: Encoders
    captions: CaptionEncoder

    def empty_text(self) -> torch.Tensor:
        """Text states of the empty caption, (tokens, text width) bfloat16."""
        states, mask = self.captions([""])
        return states[mask.bool()].to("cpu", torch.bfloat16)

    def bytes_of(self, shards: Sequence[int]) -> int:
        """What some shards will take on the disk; a little more, never less."""
        samples = sum(self.need.total[self.plan.shard(shard)].sum() for shard in shards)
        return math.ceil(samples) + len(shards) * tarfile.RECORDSIZE  # tars end in whole records

    def describe(self, folder: Path) -> str:
        """What is to be encoded into a folder, and the disk it takes."""
        counts = Counter(self.plan.buckets.tolist())
        lines = [f"{len(self.plan.samples):,} samples to encode:"]
        lines += [
            f"  {count:,} of {self.plan.sizes[bucket]} pixels" for bucket, count in counts.items()
        ]
        if self.plan.too_small:
            lines.append(f"{self.plan.too_small:,} more are too small and left out (--max-upscale)")
        if self.faults.total:
            lines.append(f"{self.faults.total:,} more are broken and left out:\n{self.faults}")
        need, total = self.need, self.bytes_of(range(self.plan.num_shards))
        shards = unwritten_shards(folder, self.manifest)
        lines += [
            f"Disk: {human_size(total)}: latents {human_size(need.latents.sum())}, text "
            f"{human_size(need.text.sum())} ({need.tokens_per_caption:.1f} tokens to a caption)",
            f"Shards: {self.plan.num_shards:,}, of which {len(shards):,} are to be written: "
            f"{human_size(self.bytes_of(shards))}; {human_size(free_bytes(folder))} are free",
        ]
        return "\n".join(lines)

    def require_space(self, folder: Path) -> None:
        """Stop where the disk is too small for what is still to be written.

        Raises:
            ValueError: if it is.
        """
        needed = self.bytes_of(unwritten_shards(folder, self.manifest))
        free = free_bytes(folder)
        if needed > free:
            raise ValueError(
                f"Encoding takes {human_size(needed)} more, but where --output {folder} is, "
                f"{human_size(free)} are free. Make room, or choose another place, fewer samples, "
                "a smaller --image-size or --max-caption-length."
            )


def prepare(args: argparse.Namespace, command: str, device: torch.device, quiet: bool) -> Job:
    """Find the samples, load the encoders, and say what comes of them.

    Args:
        args: the options.
        command: the whole command, to be told to who finds the work unfinished.
        device: where the encoders are to be.
        quiet: whether to show no progress.

    Raises:
        OSError: if data or encoders are not there.
        ValueError: if there is nothing to encode, or too much of it is broken.
    """
    found = find_samples(args.data_root, args.data_format, progress=not quiet)
    if found.encoded is not None:
        raise ValueError(f"--data-root {args.data_root} is encoded already: give the pictures.")
    require_few(found.faults, len(found.samples), args.max_broken)
    plan = make_plan(found.samples, args)

    sources = encoder_sources(args)
    encoders = load_encoders(sources, torch.bfloat16 if device.type == "cuda" else torch.float32)
    manifest = _manifest(args, command, plan, sources, encoders)
    encoders.to(device)
    captions = CaptionEncoder(encoders.tokenizer, encoders.text_encoder, args.max_caption_length)
    need = disk_need(
        plan, captions, manifest.latent_channels, manifest.vae_scale, manifest.text_width
    )
    return Job(plan, found.faults, manifest, need, encoders, captions)


def _manifest(
    args: argparse.Namespace, command: str, plan: Plan, sources: dict[str, str], encoders: Encoders
) -> Manifest:
    """Of what and how a set is encoded."""
    vae = encoders.vae.config
    return Manifest(
        image_size=args.image_size,
        window_size=args.window_size,
        crop=args.crop,
        max_aspect_ratio=args.max_aspect_ratio,
        max_upscale=args.max_upscale,
        sizes=tuple(plan.sizes),
        max_caption_length=args.max_caption_length,
        mixed_precision=args.mixed_precision,
        latent_channels=vae.latent_channels,
        vae_scale=vae_scale(encoders.vae),
        scaling_factor=vae.scaling_factor,
        text_width=encoders.text_encoder.config.d_model,
        fingerprints=encoder_fingerprints(encoders),
        samples=len(plan.samples),
        shards=plan.num_shards,
        samples_per_shard=plan.samples_per_shard,
        samples_digest=plan.digest(),
        sources=sources,
        command=command,
        too_small=plan.too_small,
    )


def encode(args: argparse.Namespace, job: Job, shards: Sequence[int], quiet: bool) -> None:
    """Write shards, one after the other; each one is safe once it is done.

    Args:
        args: the options.
        job: what is encoded.
        shards: this process's.
        quiet: whether to show no progress.

    Raises:
        OSError: if they can't be written.
        ValueError: if too many samples turn out to be broken.
    """
    plan, vae = job.plan, job.encoders.vae
    # On a CPU the activations of a few pictures fit its caches; those of many do not.
    batch_size = 2 if vae.device.type == "cpu" else args.batch_size
    pictures = read_pictures(plan, shards, batch_size, args.num_workers)
    total, broken = sum(len(plan.shard(shard)) for shard in shards), 0
    faults = deepcopy(job.faults)
    with tqdm(total=total, desc="Encoding", unit=" samples", disable=hidden(quiet)) as progress:
        encoder = ShardEncoder(
            args.output,
            plan,
            job.manifest.digest(),
            vae,
            job.captions,
            batch_size,
            bf16=args.mixed_precision == "bf16",
            progress=progress.update,
        )
        for shard in shards:
            for fault in encoder.write(shard, pictures):
                faults.add(fault)
                broken += 1
            require_few(faults, len(plan.samples) - broken, args.max_broken)


def report(args: argparse.Namespace, job: Job) -> str:
    """What there is, once all shards are written.

    Raises:
        ValueError: if it can't be read back, or too many samples were broken.
    """
    found = open_encoded(args.output)
    tars = [tar_path(args.output, shard) for shard in range(job.plan.num_shards)]
    size = human_size(sum(path.stat().st_size for path in tars))
    lines = [f"{len(found.samples):,} samples are encoded in {args.output}, {size}."]
    if found.faults.total:
        lines.append(f"{found.faults.total:,} more are broken and left out:\n{found.faults}")
        require_few(found.faults, len(found.samples), args.max_broken)
    size = f"--image-size {args.image_size}"
    lines.append(f"Train with: python train.py --data-root {args.output} {size}")
    return "\n".join(lines)


def human_size(size: float) -> str:
    """Bytes in the unit that suits: `1.2 GB`."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.1f} TB"
