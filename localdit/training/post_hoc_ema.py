"""Post-hoc EMA: averages of any length, rebuilt after training from snapshots of two averages.

Karras et al., 2024, "Analyzing and improving the training dynamics of diffusion models" (arXiv
2312.02696), sections 3.1 and 3.2. After t updates, an average with a power-function profile weighs
the weights of update i in proportion to `i ** gamma`. `sigma_rel` is the standard deviation of
that profile as a share of t: how much of the run the average looks back on.

`python -m localdit.training.post_hoc_ema` rebuilds an average from the snapshots of a run.
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from localdit.files import read_json, whole_folder, write_json
from localdit.parsing import Parser, folder_argument, path_argument, say
from localdit.training.checkpointing import DamagedCheckpoint, files_in, numbered, verify_checkpoint

if TYPE_CHECKING:
    import torch

SIGMA_RELS = (0.05, 0.1)  # of the averages that a run keeps, as in the paper
LARGEST = 0.28  # sigma_rel of an almost uniform profile
SNAPSHOT = "ema"  # folders ema-STEP of a run
SETTINGS = "ema.json"
PROGRAM = "python -m localdit.training.post_hoc_ema"
DESCRIPTION = """Rebuild an average of the weights of a run with any length.

    python -m localdit.training.post_hoc_ema runs/first --sigma-rel 0.15 --output averaged
"""


def gamma(sigma_rel: float) -> float:
    """Return the exponent of the profile with a relative standard deviation.

    This inverts `sigma_rel = sqrt(gamma + 1) / ((gamma + 2) sqrt(gamma + 3))` (Karras et al.,
    2024, section 3.1 and appendix C).
    """
    t = sigma_rel**-2
    return float(np.roots([1, 7, 16 - t, 12 - t]).real.max())


class Profile(NamedTuple):
    """The weighting of a run's weights by an average."""

    updates: int  # of the average, t
    sigma_rel: float


def fit(profiles: Sequence[Profile], target: Profile) -> tuple[np.ndarray, float]:
    """Return the factors whose sum of profiles is nearest to another profile by least squares.

    Karras et al., 2024, section 3.2 and appendix C. The factors are divided by their sum, so that
    weights that did not change in training stay what they are.

    Returns:
        A factor for each profile, and the distance of the sum from the target, as a share of the
        target's norm.
    """
    products = _inner_products([*profiles, target])
    among, with_target, of_target = products[:-1, :-1], products[:-1, -1], products[-1, -1]
    factors = np.linalg.lstsq(among, with_target, rcond=None)[0]
    factors /= factors.sum()
    rest = of_target - 2 * factors @ with_target + factors @ among @ factors
    return factors, math.sqrt(max(rest, 0.0) / of_target)


def _inner_products(profiles: Sequence[Profile]) -> np.ndarray:
    """Return the integrals of the products of all pairs of profiles, (P, P), in closed form."""
    t = np.array([[profile.updates] for profile in profiles], float)  # (P, 1)
    a = np.array([[gamma(profile.sigma_rel)] for profile in profiles])
    shorter, longer = np.minimum(t, t.T), np.maximum(t, t.T)
    exponent = np.where(t < t.T, a.T, a)  # of the profile that lasts longer
    return (a + 1) * (a.T + 1) / (a + a.T + 1) * (shorter / longer) ** exponent / longer


def write_snapshot(
    folder: Path,
    averages: Mapping[float, Mapping[str, torch.Tensor]],
    updates: int,
    write: Callable[[Path, Mapping[str, torch.Tensor]], None],
) -> None:
    """Write averages in float16.

    Args:
        folder: an empty folder. Each average is in its folder `SIGMA_REL`.
        averages: the averages by `sigma_rel`.
        write: writes weights into a folder as the result of the run.
    """
    for sigma_rel, tensors in averages.items():
        write(folder / str(sigma_rel), {name: tensor.half() for name, tensor in tensors.items()})
    write_json(folder / SETTINGS, {"updates": updates, "sigma_rels": list(averages)})


def rebuild(run: Path, sigma_rel: float, output: Path) -> float:
    """Write the average of a run that ends at its newest snapshot, in float32.

    Args:
        run: the folder of a run with `--post-hoc-ema`.
        sigma_rel: length of the average, above 0 and at most 0.28.
        output: the new folder, a pipeline or adapters as the run's own results.

    Returns:
        The distance of the profile from the one that was asked for; see `fit`.
    """
    if not 0 < sigma_rel <= LARGEST:
        raise ValueError(f"--sigma-rel is {sigma_rel}; expected more than 0 and at most {LARGEST}")
    if output.exists():
        raise FileExistsError(f"--output {output} exists: remove it, or choose another folder")
    folders: list[Path] = []
    profiles: list[Profile] = []
    for _, snapshot in reversed(numbered(run, SNAPSHOT)):
        try:
            verify_checkpoint(snapshot)
        except DamagedCheckpoint as error:
            raise ValueError(f"{snapshot}: {error}; move it away to do without it") from None
        settings = read_json(snapshot / SETTINGS)
        for kept in settings["sigma_rels"]:
            folders.append(snapshot / str(kept))
            profiles.append(Profile(settings["updates"], kept))
    if not folders:
        raise ValueError(f"{run} has no snapshots {SNAPSHOT}-STEP: train with --post-hoc-ema")
    factors, distance = fit(profiles, Profile(profiles[-1].updates, sigma_rel))
    with whole_folder(output) as unfinished:
        shutil.copytree(folders[-1], unfinished, symlinks=True, dirs_exist_ok=True)
        for name in files_in(unfinished):
            # Adapters are at the top. Encoders are links, or copies where there are no links.
            if name.endswith(".safetensors") and name.split("/")[:-1] in ([], ["transformer"]):
                _write_sum([folder / name for folder in folders], factors, unfinished / name)
    return distance


def _write_sum(files: Sequence[Path], factors: np.ndarray, target: Path) -> None:
    """Write the sum of the tensors of files, each times a factor, with the last one's metadata."""
    from safetensors import safe_open
    from safetensors.numpy import load_file, save_file

    total: dict[str, np.ndarray] = {}
    for file, factor in zip(files, factors, strict=True):
        for name, tensor in load_file(file).items():
            total[name] = total.get(name, 0) + tensor.astype(np.float32) * np.float32(factor)
    with safe_open(files[-1], "numpy") as last:
        metadata = last.metadata()
    save_file(total, target, metadata)


def main(argv: Sequence[str] | None = None) -> int:
    """Rebuild the average that the options ask for, and return the exit status."""
    parser = Parser(
        prog=PROGRAM,
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("run", type=path_argument, help="folder of a run with --post-hoc-ema")
    add("--sigma-rel", type=float, required=True,
        help=f"length of the average as a share of the run, above 0 and at most {LARGEST}: the "
        "standard deviation of its profile")  # fmt: skip
    add("--output", type=folder_argument, required=True,
        help="new folder for the pipeline or the adapters")  # fmt: skip
    args = parser.parse_args(argv)
    try:
        distance = rebuild(args.run, args.sigma_rel, args.output)
    except (OSError, ValueError) as error:
        say(f"{parser.prog}: error: {error}", "stderr")
        return 1
    say(
        f"{args.output}: an average with sigma_rel {args.sigma_rel:g}. Its profile differs from "
        f"the exact one by {distance:.2%}."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
