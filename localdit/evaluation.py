"""Benchmarks of text to image: their prompts, their pictures on disk, and scores.

Two benchmarks have formats of their own: GenEval (Ghosh et al., 2023) a JSON file with an object
per line, `evaluation_metadata.jsonl`, and DPG-Bench (Hu et al., 2024) a folder of text files, each
with a prompt. Your own prompts use the first format; only "prompt" is needed.

Single pictures are always where GenEval's scorer reads them, `<name>/samples/<number>.png` beside
`<name>/metadata.jsonl`. DPG-Bench's scorer reads one sheet per prompt instead, `<name>.png`.

These scores need no other program:

- Scenes: pictures of captions with a "scene" are read from their pixels (`localdit.scenes.score`).
- CLIP score (Hessel et al., 2021), by a CLIP model in a folder.
- Distances to real pictures in the features of a vision model in a folder: the Fréchet distance
  (FID, Heusel et al., 2017; with DINOv2's features FD-DINOv2, Stein et al., 2023) and the kernel
  distance (KID, Binkowski et al., 2018), by TorchMetrics, and precision and recall (Kynkäänniemi et
  al., 2019, eq. 1 and 2). They depend on the features and on the number of pictures: compare only
  figures with the same of both.
"""

from __future__ import annotations

import itertools
import json
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .core.parts import load_whole
from .files import decode_text, has_files, parse_json, write_whole

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from .scenes import Scene

MAX_BYTES = 100_000_000  # of a file of prompts
PICTURES, SHEETS = "pictures", "sheets"
NEIGHBOURS = 3  # k of precision and recall
KERNEL_SUBSET = 1000  # pictures in a subset of the kernel distance, at most
REAL_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


# Prompts and places


@dataclass(frozen=True)
class Prompt:
    """A prompt of a benchmark."""

    name: str  # of its pictures
    text: str
    record: dict[str, Any]  # what the benchmark says of it, "prompt" among it
    scene: Scene | None = None  # what the picture has to show, if the record has a "scene"


def read_prompts(path: Path) -> list[Prompt]:
    """Read a file of GenEval's format, or a folder of DPG-Bench's."""
    if path.is_dir():
        prompts = list(_prompts_of_folder(path))
        expected = "text files (*.txt) with a prompt each"
    elif path.is_file():
        prompts = list(_prompts_of_file(path))
        expected = 'lines such as {"prompt": "a photo of a bench"}'
    else:
        raise FileNotFoundError(f"{path}: there is no such file or folder")
    if not prompts:
        raise ValueError(f"{path} has no prompts; expected {expected}")
    return prompts


def _prompts_of_folder(folder: Path) -> Iterator[Prompt]:
    for path in sorted(folder.glob("*.txt")):
        yield _prompt(path.stem, {"prompt": _read(path).strip()}, str(path))


def _prompts_of_file(path: Path) -> Iterator[Prompt]:
    index = 0
    for number, line in enumerate(_read(path).split("\n"), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            yield _prompt(f"{index:05d}", parse_json(line, where), where)
            index += 1


def _prompt(name: str, record: dict[str, Any], where: str) -> Prompt:
    text = record.get("prompt")
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f'{where}: "prompt" is {text!r:.80}; expected text that is not empty')
    if "scene" not in record:
        return Prompt(name, text, record)
    from .scenes import Scene

    try:
        return Prompt(name, text, record, Scene.from_dict(record["scene"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f'{where}: "scene" is not a scene of localdit.scenes: {error!r}'
        ) from error


def _read(path: Path) -> str:
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path} has more than {MAX_BYTES // 10**6} MB; expected prompts")
    return decode_text(path.read_bytes(), path)


@dataclass(frozen=True)
class Layout:
    """The places of a benchmark's pictures."""

    folder: Path
    num_images: int  # per prompt
    sheets: bool  # whether each prompt gets a sheet of its pictures, for DPG-Bench

    def require_own(self, prompts: Sequence[Prompt]) -> None:
        """Raise FileExistsError if the folder holds something else than these prompts' pictures.

        Scorers score all that they find.
        """
        if has_files(self.folder) and not any(self.folder.glob(f"{PICTURES}/*/samples")):
            raise FileExistsError(
                f"--output {self.folder} is not empty and holds no evaluation. Choose another "
                "folder, or empty it."
            )
        own: set[Path | None] = {self.folder / PICTURES / prompt.name for prompt in prompts}
        for prompt in prompts:
            own |= {*self.pictures(prompt), self.sheet(prompt)}
        places = (f"{PICTURES}/[!.]*", f"{PICTURES}/*/samples/[!.]*", f"{SHEETS}/[!.]*")
        others = sorted({path for place in places for path in self.folder.glob(place)} - own)
        if others:
            raise FileExistsError(
                f"--output {self.folder} has more than the pictures of these prompts, such as "
                f"{others[0]}, and a scorer would score it too. Move such files away, or give "
                "another --output."
            )

    def pictures(self, prompt: Prompt) -> list[Path]:
        """Return the paths of a prompt's pictures."""
        folder = self.folder / PICTURES / prompt.name / "samples"
        return [folder / f"{number:04d}.png" for number in range(self.num_images)]

    def sheet(self, prompt: Prompt) -> Path | None:
        """Return the path of a prompt's sheet, or None if the benchmark has no sheets."""
        return self.folder / SHEETS / f"{prompt.name}.png" if self.sheets else None

    def prepare(self, prompt: Prompt) -> None:
        """Create the folders of a prompt, with what the benchmark says of it."""
        folder = self.folder / PICTURES / prompt.name
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        # In ASCII: a record of JSON may have half surrogate pairs, which can't be encoded.
        path, text = folder / "metadata.jsonl", f"{json.dumps(prompt.record)}\n".encode()
        if not path.is_file() or path.read_bytes() != text:
            write_whole(path, text)
        if self.sheets:
            (self.folder / SHEETS).mkdir(exist_ok=True)


# Scores


def scene_scores(
    prompts: Sequence[Prompt], pictures: Iterable[Sequence[Image.Image]]
) -> dict[str, float]:
    """Return the share of pictures that are right, by attribute and number of objects.

    Args:
        prompts: those without a scene are passed over.
        pictures: those of each prompt.

    Returns:
        Shares in [0, 1], such as "scene, 2 objects: all"; {} if no prompt has a scene.
    """
    from .scenes.score import mean_scores, score_picture

    groups: dict[str, list[dict[str, float]]] = {}
    for prompt, drawn in zip(prompts, pictures, strict=True):
        if prompt.scene is not None:
            count = len(prompt.scene.objects)
            group = "one object" if count == 1 else f"{count} objects"
            groups.setdefault(group, []).extend(score_picture(one, prompt.scene) for one in drawn)
    return {
        f"scene, {group}: {name}": share
        for group, scores in sorted(groups.items())
        for name, share in mean_scores(scores).items()
    }


def clip_score(
    prompts: Sequence[Prompt], pictures: Iterable[Sequence[Image.Image]], folder: Path
) -> dict[str, float]:
    """Return the mean of `100 * max(cosine, 0)` of picture and prompt in CLIP's space.

    Args:
        folder: a `CLIPModel` of Transformers with its processor. Its tokenizer cuts long prompts.
    """
    import torch
    from transformers import CLIPModel, CLIPProcessor

    model = load_whole(CLIPModel, pretrained_model_name_or_path=folder).eval()
    processor = CLIPProcessor.from_pretrained(folder)
    scores: list[float] = []
    for prompt, drawn in zip(prompts, pictures, strict=True):
        inputs = processor(
            text=[prompt.text], images=list(drawn), return_tensors="pt", truncation=True
        )
        with torch.no_grad():
            output = model(**inputs)
        cosines = torch.cosine_similarity(output.image_embeds, output.text_embeds)
        scores += (100 * cosines.clamp(min=0)).tolist()
    return {"CLIP score": sum(scores) / len(scores)}


def distances(
    drawn: Iterable[Image.Image], real: Iterable[Image.Image], folder: Path
) -> dict[str, float]:
    """Return the distances of drawn pictures to real ones in the features of a vision model.

    Args:
        folder: a vision model of Transformers with its image processor, such as DINOv2 or CLIP.
    """
    import torch
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    extract = extractor(folder)
    fake, true = _features(drawn, extract), _features(real, extract)
    count = require_enough(len(fake), len(true))
    given: Any = torch.nn.Identity()  # the metrics get features instead of pictures
    given.num_features = true.shape[1]
    frechet = FrechetInceptionDistance(feature=given)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Metric `Kernel Inception Distance` will save all")
        kernel = KernelInceptionDistance(feature=given, subset_size=min(count, KERNEL_SUBSET))
    for metric in (frechet, kernel):
        metric.update(true, real=True)
        metric.update(fake, real=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # of the subsets
        mean, deviation = kernel.compute()
    precision, recall = precision_and_recall(true, fake)
    return {
        "Fréchet distance": frechet.compute().item(),
        "kernel distance": mean.item(),
        "kernel distance, standard deviation": deviation.item(),
        "precision": precision,
        "recall": recall,
    }


def require_enough(drawn: int, real: int) -> int:
    """Return the smaller number of pictures; raise `ValueError` if the distances need more."""
    if min(drawn, real) <= NEIGHBOURS:
        raise ValueError(
            f"There are {drawn} drawn and {real} real pictures; the distances need more than "
            f"{NEIGHBOURS} of each."
        )
    return min(drawn, real)


def precision_and_recall(true: torch.Tensor, fake: torch.Tensor) -> tuple[float, float]:
    """Return the share of drawn pictures that are near real ones, and the other way round.

    A picture is near a set if it is no further from one of its pictures than that is from its k-th
    nearest neighbour in the set (Kynkäänniemi et al., 2019, eq. 1 and 2).

    Args:
        true, fake: features `(N, C)` and `(M, C)`.
    """

    def share(these: torch.Tensor, those: torch.Tensor) -> float:
        import torch

        # The nearest of its own set is the picture itself.
        radius = torch.cdist(those, those).kthvalue(NEIGHBOURS + 1, dim=1).values
        return (torch.cdist(these, those) <= radius).any(dim=1).double().mean().item()

    return share(fake, true), share(true, fake)


def real_paths(folder: Path) -> list[Path]:
    """Return the paths of the pictures in a folder and the folders in it, sorted."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in REAL_SUFFIXES)


def extractor(folder: Path) -> Any:
    """Return a function from pictures to features `(N, C)`, by the model in a folder."""
    import torch
    from transformers import AutoImageProcessor, AutoModel

    model = load_whole(AutoModel, pretrained_model_name_or_path=folder, trust_remote_code=False)
    model = getattr(model, "vision_model", model).eval()
    processor = AutoImageProcessor.from_pretrained(folder)

    def extract(pictures: list[Image.Image]) -> torch.Tensor:
        with torch.no_grad():
            output = model(**processor(images=pictures, return_tensors="pt"))
        return output.pooler_output.flatten(1).double()

    return extract


def _features(pictures: Iterable[Image.Image], extract: Any, batch_size: int = 16) -> torch.Tensor:
    """Return the features of pictures, `(N, C)`."""
    import torch

    rest = iter(pictures)
    batches = iter(lambda: list(itertools.islice(rest, batch_size)), [])
    features = [extract(batch) for batch in batches]
    return torch.cat(features) if features else torch.empty(0, 0)
