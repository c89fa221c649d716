"""A job of encoding: the data, the encoders, the manifest, the output folder, and the work."""

from __future__ import annotations

import argparse
import math
import shutil
import tarfile
from collections import Counter
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from localdit.core.encoders import Encoders, load_encoders
from localdit.files import (
    has_files,
    lock_folder,
    remove_unfinished,
    unfinished_in,
)
from localdit.images import prepare_output_folder
from localdit.training.data.buckets import describe_crops
from localdit.training.data.encoded import (
    EMPTY_CAPTION,
    MANIFEST,
    EncodedManifest,
    open_encoded,
    read_encoded_manifest,
    require_latent_format,
    tar_path,
    unwritten_shards,
    write_empty_text,
)
from localdit.training.data.finding import Found, find_samples
from localdit.training.data.samples import require_few
from localdit.training.data.stage_data import unknown_captions
from localdit.training.encode.shards import (
    DiskNeed,
    Plan,
    ShardEncoder,
    disk_need,
    make_plan,
    read_pictures,
)
from localdit.training.initialization import encoder_sources, latent_format
from localdit.training.options import check_image_size
from localdit.training.shutdown import deaths_of_workers


@dataclass(frozen=True)
class Job:
    """The samples that a command encodes, and the encoders."""

    plan: Plan
    found: Found  # with the broken samples
    manifest: EncodedManifest  # of the set to write
    need: DiskNeed
    encoders: Encoders  # on the device

    def empty_text(self) -> torch.Tensor:
        """Return the text states of the empty caption, (tokens, text width) bfloat16."""
        length = self.manifest.max_caption_length
        return self.encoders.text.encode_unpadded([""], length)[""]

    def bytes_of(self, shards: Sequence[int]) -> int:
        """Return the disk space that shards need, slightly overestimated."""
        samples = sum(self.need.total[self.plan.shard(shard)].sum() for shard in shards)
        return math.ceil(samples) + len(shards) * tarfile.RECORDSIZE  # tars end in whole records

    def describe(self, folder: Path) -> str:
        """Describe the samples to encode into a folder, and the disk space they need."""
        plan = self.plan
        counts = Counter(plan.buckets.tolist())
        lines = [f"{len(plan.samples):,} samples to encode:"]
        lines += [f"  {count:,} of {plan.sizes[bucket]} pixels" for bucket, count in counts.items()]
        if plan.too_small:
            lines.append(f"Left out because they are too small (--max-upscale): {plan.too_small:,}")
        if plan.cut_too_much:
            lines.append(f"Left out because of --max-crop: {plan.cut_too_much:,}")
        lines += filter(None, [
            describe_crops(plan.samples, plan.sizes, plan.buckets),
            unknown_captions(plan.samples, self.encoders.tokenizer),
            self.found.unused(),
        ])  # fmt: skip
        if (faults := self.found.faults).total:
            lines.append(f"Left out because they are broken: {faults.total:,}\n{faults}")
        need, total = self.need, self.bytes_of(range(self.plan.num_shards))
        shards = unwritten_shards(folder, self.manifest)
        lines += [
            f"Disk: {human_size(total)}: latents {human_size(need.latents.sum())}, text "
            f"{human_size(need.text.sum())} ({need.tokens_per_caption:.1f} tokens per caption)",
            f"Shards: {self.plan.num_shards:,}, of which {len(shards):,} are to be written: "
            f"{human_size(self.bytes_of(shards))}; {human_size(free_bytes(folder))} are free",
        ]
        return "\n".join(lines)

    def require_space(self, folder: Path) -> None:
        """Check that the remaining shards fit on the disk."""
        needed = self.bytes_of(unwritten_shards(folder, self.manifest))
        free = free_bytes(folder)
        if needed > free:
            raise ValueError(
                f"Encoding needs {human_size(needed)} more, but on the disk of --output {folder} "
                f"{human_size(free)} are free. Make room, or choose another disk, fewer samples, "
                "a smaller --image-size or --max-caption-length."
            )


def prepare(args: argparse.Namespace, command: str, device: torch.device, quiet: bool) -> Job:
    """Find the samples, load the encoders, and plan the work.

    Args:
        command: the whole command, which the manifest stores for resuming.
        quiet: hide the progress.
    """
    sources = encoder_sources(args)
    pixels_per_token = latent_format(sources["vae"]).pixels_per_latent * args.patch_size
    check_image_size(args.image_size, pixels_per_token)
    found = find_samples(args.data_root, args.data_format, not quiet, args.output)
    if found.encoded is not None:
        raise ValueError(f"--data-root {args.data_root} is already encoded: give the pictures.")
    found.require_samples(args.data_root)
    require_few(found.faults, len(found.samples), args.max_broken)
    plan = make_plan(found.samples, args, pixels_per_token)

    encoders = load_encoders(sources, torch.bfloat16 if device.type == "cuda" else torch.float32)
    manifest = _manifest(args, command, plan, sources, encoders)
    encoders.to(device)
    return Job(plan, found, manifest, disk_need(plan, encoders.text, manifest), encoders)


def _manifest(
    args: argparse.Namespace, command: str, plan: Plan, sources: dict[str, str], encoders: Encoders
) -> EncodedManifest:
    """Return the manifest of the set to write."""
    latents = encoders.latents.format
    return EncodedManifest(
        image_size=args.image_size,
        window_size=args.window_size,
        crop=args.crop,
        max_aspect_ratio=args.max_aspect_ratio,
        max_upscale=args.max_upscale,
        sizes=tuple(plan.sizes),
        max_caption_length=args.max_caption_length,
        mixed_precision=args.mixed_precision,
        latent_channels=latents.channels,
        vae_scale=latents.pixels_per_latent,
        scaling_factor=latents.scaling_factor,
        text_width=encoders.text.width,
        fingerprints=encoders.fingerprints(),
        samples=len(plan.samples),
        shards=plan.num_shards,
        samples_per_shard=plan.samples_per_shard,
        samples_digest=plan.digest(),
        sources=sources,
        command=command,
        too_small=plan.too_small,
        shift_factor=latents.shift_factor or None,
        latents_mean=latents.latents_mean,
        latents_std=latents.latents_std,
    )


def check_folder(folder: Path, manifest: EncodedManifest) -> None:
    """Check that the shards of a set may be written to a folder."""
    if (folder / MANIFEST).is_file():
        existing = read_encoded_manifest(folder)
        if existing.fingerprints.get("vae") == manifest.fingerprints["vae"]:
            require_latent_format(folder, existing, manifest.latent_format)
        if differences := existing.differences(manifest):
            raise ValueError(
                f"--output {folder} has data that was encoded with other settings; now there is "
                f"{'; '.join(differences)}. Choose another folder, or the same settings."
            )
    elif folder.exists() and not folder.is_dir():
        raise ValueError(f"--output {folder} is not a folder.")
    elif has_files(folder):
        raise ValueError(
            f"--output {folder} is not empty and has no encoded data. Choose another folder, or "
            "empty it."
        )


def open_folder(folder: Path, manifest: EncodedManifest, empty_text: torch.Tensor) -> list[int]:
    """Prepare a folder for its shards, and return the numbers of the missing ones."""
    prepare_output_folder(folder)
    lock_folder(
        folder,
        f"Another command is encoding into {folder}. To share the work between processes, start "
        "them together with accelerate launch or torchrun.",
    )
    remove_unfinished(folder)
    if not all((folder / name).is_file() for name in (MANIFEST, EMPTY_CAPTION)):
        write_empty_text(folder, manifest, empty_text)
    return unwritten_shards(folder, manifest)


def free_bytes(folder: Path) -> int:
    """Return the free space for a folder, existing or not. Its unfinished files count as free."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    unfinished = sum(path.stat().st_size for path in unfinished_in(folder))
    return shutil.disk_usage(existing).free + unfinished


@deaths_of_workers("run the same command again")
def encode(args: argparse.Namespace, job: Job, shards: Sequence[int], quiet: bool) -> None:
    """Write shards one after the other. Each is safe once it is written.

    Args:
        shards: the numbers of this process's shards.
        quiet: hide the progress.
    """
    plan = job.plan
    # The activations of few pictures fit the caches of a CPU; those of many do not.
    batch_size = 2 if job.encoders.vae.device.type == "cpu" else args.batch_size
    pictures = read_pictures(plan, shards, batch_size, args.num_workers)
    total, broken = sum(len(plan.shard(shard)) for shard in shards), 0
    faults = deepcopy(job.found.faults)
    with tqdm(total=total, desc="Encoding", unit=" samples", disable=quiet or None) as progress:
        encoder = ShardEncoder(
            args.output, job.manifest, plan, job.encoders, batch_size, progress.update
        )
        for shard in shards:
            for fault in encoder.write(shard, pictures):
                faults.add(fault)
                broken += 1
            require_few(faults, len(plan.samples) - broken, args.max_broken)


def report(args: argparse.Namespace, job: Job) -> str:
    """Open the finished set and describe it."""
    samples, faults, _ = open_encoded(args.output)
    tars = [tar_path(args.output, shard) for shard in range(job.plan.num_shards)]
    size = human_size(sum(path.stat().st_size for path in tars))
    lines = [f"{len(samples):,} samples are encoded in {args.output}, {size}."]
    if faults.total:
        lines.append(f"Left out because they are broken: {faults.total:,}\n{faults}")
        require_few(faults, len(samples), args.max_broken)
    size = f"--image-size {args.image_size}"
    lines.append(f"Train with: python train.py --data-root {args.output} {size}")
    return "\n".join(lines)


def human_size(size: float) -> str:
    """Format a number of bytes with a suitable unit: `1.2 GB`."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.1f} TB"
