"""The prompts of a benchmark, and the places of its pictures.

Two benchmarks have formats of their own: GenEval (Ghosh et al., 2023) a JSON file with an object
per line, `evaluation_metadata.jsonl`, and DPG-Bench (Hu et al., 2024) a folder of text files, each
with a prompt. Your own prompts use the first format; only "prompt" is needed.

Single pictures are always where GenEval's scorer reads them, `<name>/samples/<number>.png` beside
`<name>/metadata.jsonl`. DPG-Bench's scorer reads one sheet per prompt instead, `<name>.png`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import decode_text, has_files, parse_json, write_whole

if TYPE_CHECKING:
    from ..scenes import Scene


MAX_BYTES = 100_000_000  # of a file of prompts
PICTURES, SHEETS = "pictures", "sheets"


@dataclass(frozen=True)
class Prompt:
    """A prompt of a benchmark.

    Attributes:
        name: of its pictures.
        text: the prompt.
        record: what the benchmark says of it, "prompt" among it.
        scene: what the picture has to show, if the record has a "scene".
    """

    name: str
    text: str
    record: dict[str, Any]
    scene: Scene | None = None


def read_prompts(path: Path) -> list[Prompt]:
    """Read a file of GenEval's format, or a folder of DPG-Bench's.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        ValueError: it has no prompts, or one of them can't be read; the message names the line or
            the file.
    """
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
    from ..scenes import Scene

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
    """The places of a benchmark's pictures.

    Attributes:
        folder: the folder of everything.
        num_images: pictures per prompt.
        sheets: whether each prompt gets a sheet of its pictures, for DPG-Bench.
    """

    folder: Path
    num_images: int
    sheets: bool

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
        path, record = folder / "metadata.jsonl", json.dumps(prompt.record, ensure_ascii=False)
        text = f"{record}\n".encode()
        if not path.is_file() or path.read_bytes() != text:
            write_whole(path, text)
        if self.sheets:
            (self.folder / SHEETS).mkdir(exist_ok=True)
