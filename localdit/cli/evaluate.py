"""`localdit evaluate`: draw the pictures of a benchmark, and score what can be scored here."""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import with_settings
from ..evaluation import (
    PICTURES,
    Layout,
    Prompt,
    clip_score,
    distances,
    extractor,
    read_prompts,
    real_paths,
    require_enough,
    scene_scores,
)
from ..files import write_whole
from ..parsing import Parser, folder_argument, one_line, path_argument, say
from . import arguments
from .arguments import usage_errors
from .drawing import load, picture_settings
from .plan import Choice, check_model, check_num_images, choose_model, fit_size, report_fallback

if TYPE_CHECKING:
    from PIL import Image

    from ..pipelines import LocalDiTPipeline

INSTALL = 'pip install "localdit[evaluate]"'
MAX_PICTURES = 1_000_000  # of all prompts
SHEET = 48  # pictures on the contact sheet
EXPECTED = {
    "--clip": "a CLIPModel of Transformers with its processor",
    "--feature-extractor": "a vision model of Transformers with its image processor",
}
LONGEST_WAIT = timedelta(days=30)  # of a process for the others


@dataclass(frozen=True)
class Plan:
    """A checked `localdit evaluate` command."""

    model: Choice  # the model, with the settings of sampling
    prompts: list[Prompt]
    layout: Layout
    negative_prompt: str  # of all pictures
    seed: int  # of the first picture; picture k of prompt i has seed + i * num_images + k
    # Functions of prompts and their pictures, which return scores by name
    scores: list[Callable[..., dict[str, float]]]


def build_parser() -> Parser:
    """Return the parser."""
    parser = Parser(
        prog="localdit evaluate",
        usage="%(prog)s PROMPTS [options]",
        description="Generate the pictures of a benchmark in the folders that its scorer reads, "
        "and compute the scores that need no other program. Started again after an interruption, "
        "the command generates only what is missing. `accelerate launch -m localdit evaluate ...` "
        "shares the work among processes and generates the same pictures.",
        epilog="example: localdit evaluate evaluation_metadata.jsonl --model box -o output/geneval",
    )
    add = parser.add_argument
    add("prompts", metavar="PROMPTS", type=path_argument,
        help="GenEval's evaluation_metadata.jsonl, DPG-Bench's folder of prompts, or a file with "
        'a line such as {"prompt": "a red circle"} for each prompt')  # fmt: skip
    add("--max-prompts", metavar="N", type=int, help="use only the first N prompts")
    add("-o", "--output", metavar="FOLDER", type=folder_argument, default=Path("output/evaluation"),
        help="folder for the pictures and scores (default: output/evaluation)")  # fmt: skip
    arguments.add_sampling(parser, size="the model's own size", num_images=4)
    add = parser.add_argument_group("scores").add_argument
    add("--clip", metavar="FOLDER", type=path_argument,
        help="folder of a CLIP model of Transformers, for the CLIP score")  # fmt: skip
    add("--reference", metavar="FOLDER", type=path_argument,
        help="folder of real pictures, for the Fréchet and kernel distances, precision and "
        "recall")  # fmt: skip
    add("--feature-extractor", metavar="FOLDER", type=path_argument,
        help="folder of a vision model of Transformers, such as DINOv2, for "
        "--reference")  # fmt: skip
    arguments.add_model(parser)
    arguments.add_debug(parser)
    parser.set_defaults(run=evaluate)
    return parser


def evaluate(args: argparse.Namespace) -> None:
    """Draw what is missing, and score all pictures."""
    with _shared_work() as (rank, count, device):
        plan = make_plan(args, device if count > 1 else None)
        if rank == 0:
            report_fallback(plan.model)
        draw(plan, load(plan.model), rank, count)
    if rank == 0:
        report(plan)


@contextmanager
def _shared_work() -> Iterator[tuple[int, int, str]]:
    """Yield this process's number, the number of processes, and this one's device.

    At the end, wait for the other processes. Alone, a process is number 0 of 1.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield 0, 1, ""
        return
    from accelerate import PartialState

    state = PartialState(timeout=LONGEST_WAIT)
    yield state.process_index, state.num_processes, str(state.device)
    state.wait_for_everyone()
    state.destroy_process_group()


def make_plan(args: argparse.Namespace, device: str | None = None) -> Plan:
    """Check the command; the output folder is created.

    Args:
        device: the device if no option names one; None chooses.
    """
    from ..core.text import check_prompts
    from ..images import prepare_output_folder

    with usage_errors():
        if args.max_prompts is not None and args.max_prompts < 1:
            raise ValueError(f"--max-prompts is {args.max_prompts}; expected at least 1")
        prompts = read_prompts(args.prompts)[: args.max_prompts]
        check_num_images(args.num_images, len(prompts), MAX_PICTURES)
        check_prompts([prompt.text for prompt in prompts])
        check_prompts(args.negative_prompt or "", "--negative-prompt")
        if not 0 <= args.seed < 2**62:
            raise ValueError(f"--seed is {args.seed}; expected at least 0 and less than 2**62")
        chosen = choose_model(args)
        model = check_model(replace(chosen, device=chosen.device or device))
        size = fit_size(model.config, (args.height, args.width))
        layout = Layout(args.output, args.num_images, sheets=args.prompts.is_dir())
        layout.require_own(prompts)
        scores = _scores(args, prompts)
        prepare_output_folder(args.output)
    return Plan(
        model=replace(model, config=with_settings(model.config, size)),
        prompts=prompts,
        layout=layout,
        negative_prompt=args.negative_prompt or "",
        seed=args.seed,
        scores=scores,
    )


def _scores(
    args: argparse.Namespace, prompts: Sequence[Prompt]
) -> list[Callable[..., dict[str, float]]]:
    """Return the functions that score the pictures of prompts, after a check of what they need.

    The models have to score a blank picture: Transformers loads whatever it finds in a folder.
    """
    from PIL import Image

    from ..images import load_image

    if (args.reference is None) != (args.feature_extractor is None):
        raise ValueError("--reference and --feature-extractor go together; give both or neither")
    folders = {name: getattr(args, name) for name in ("clip", "reference", "feature_extractor")}
    given = {name: folder for name, folder in folders.items() if folder is not None}
    for name, folder in given.items():
        if not folder.is_dir():
            option = name.replace("_", "-")
            raise FileNotFoundError(f"--{option} is {folder}; expected a folder")
    if args.reference is not None and importlib.util.find_spec("torchmetrics") is None:
        raise ImportError(f"--reference needs TorchMetrics: {INSTALL}")
    scores: list[Callable[..., dict[str, float]]] = [scene_scores]
    blank = [Image.new("RGB", (64, 64))]
    if args.clip is not None:
        with _trial("--clip", args.clip):
            clip_score(prompts[:1], [blank], args.clip)
        scores.append(lambda prompts, pictures: clip_score(prompts, pictures, args.clip))
    if args.reference is not None:
        require_enough(len(prompts) * args.num_images, len(real_paths(args.reference)))
        with _trial("--feature-extractor", args.feature_extractor):
            extractor(args.feature_extractor)(blank)
        scores.append(
            lambda prompts, pictures: distances(
                (one for drawn in pictures for one in drawn),
                map(load_image, real_paths(args.reference)),
                args.feature_extractor,
            )
        )
    return scores


@contextmanager
def _trial(option: str, folder: Path) -> Iterator[None]:
    """Turn any error of a model that scores into a ValueError that names its option."""
    try:
        yield
    except Exception as error:  # Transformers raises many kinds
        raise ValueError(
            f"{option} is {folder}, whose model can't score a picture ({error}); expected "
            f"{EXPECTED[option]}"
        ) from error


def draw(plan: Plan, pipe: LocalDiTPipeline, rank: int = 0, count: int = 1) -> None:
    """Draw the pictures that are missing, of every `count`-th prompt from number `rank` on.

    A picture depends on its settings and its place in a batch alone, and the batches are the same
    whatever the number of processes. The folders of earlier pictures are checked first.
    """
    from ..images import image_grid, load_image, save_image
    from ..inference import inference

    found = fingerprints(pipe)
    config, number = plan.model.config, plan.layout.num_images
    mine = range(rank, len(plan.prompts), count)

    def settings(index: int, place: int) -> dict[str, Any]:
        seed = plan.seed + index * number + place
        text = plan.prompts[index].text
        carried = picture_settings(plan.model, pipe, config, text, plan.negative_prompt, seed)
        return carried | found

    for index in mine:
        for place, path in enumerate(plan.layout.pictures(plan.prompts[index])):
            if path.exists():
                _require_same(path, settings(index, place))
    for index in mine:
        prompt = plan.prompts[index]
        paths, sheet = plan.layout.pictures(prompt), plan.layout.sheet(prompt)
        missing = [path for path in paths if not path.exists()]
        plan.layout.prepare(prompt)
        for start in range(0, number, config.batch_size):
            batch = paths[start : start + config.batch_size]
            if not set(batch).intersection(missing):
                continue
            pictures = inference(
                pipe,
                [prompt.text] * len(batch),
                plan.negative_prompt,
                config,
                seed=plan.seed + index * number + start,
            )
            for place, (path, picture) in enumerate(zip(batch, pictures, strict=True), start):
                if path in missing:
                    save_image(picture, path, settings(index, place))
        if sheet is not None and (missing or not sheet.exists()):
            save_image(image_grid([load_image(path) for path in paths]), sheet)
        if missing:
            say(one_line(f"{plan.layout.folder / PICTURES / prompt.name}: {prompt.text}"))


def fingerprints(pipe: LocalDiTPipeline) -> dict[str, str]:
    """Return the beginnings of the SHA-256 of all parts of a pipeline."""
    from ..core.encoders import Encoders, weights_fingerprint
    from ..core.samplers import config_of

    weights = weights_fingerprint(pipe.transformer, pipe.transformer.dtype)
    parts = Encoders(pipe.tokenizer, pipe.text_encoder, pipe.vae).fingerprints()
    config = {
        name: value
        for name, value in config_of(pipe.scheduler).items()
        if name == "_class_name" or not name.startswith("_")
    }
    text = json.dumps(config, sort_keys=True, default=str)
    parts["scheduler"] = hashlib.sha256(text.encode()).hexdigest()
    named = {f"{name}_fingerprint": value for name, value in parts.items()}
    return {name: value[:16] for name, value in ({"weights": weights} | named).items()}


def _require_same(path: Path, settings: dict[str, Any]) -> None:
    """Refuse a picture that was drawn with other settings."""
    from ..images import read_metadata

    found = read_metadata(path)
    if any(name.endswith("_fingerprint") and name not in found for name in settings):
        raise ValueError(
            f"{path} does not say which VAE, text encoder and scheduler drew it: an earlier "
            "version of LocalDiT wrote it. Give another --output."
        )
    other = [name for name in {**settings, **found} if settings.get(name) != found.get(name)]
    if other:
        name = other[0]
        raise ValueError(
            f"{path} was drawn with {name} {found.get(name)!r}, not {settings.get(name)!r}. Give "
            "the same settings, or another --output."
        )


def report(plan: Plan) -> None:
    """Score all pictures; write `scores.json`, `scores.md` and `samples.png`, and print a table."""
    from ..images import image_grid, load_image, read_metadata, save_image

    folder = plan.layout.folder

    def pictures() -> Iterator[Sequence[Image.Image]]:
        for prompt in plan.prompts:
            yield [load_image(path) for path in plan.layout.pictures(prompt)]

    scores: dict[str, float] = {}
    for score in plan.scores:
        scores |= score(plan.prompts, pictures())
    paths = [path for prompt in plan.prompts for path in plan.layout.pictures(prompt)]
    drawn = read_metadata(paths[0])
    of_all = {name: drawn[name] for name in drawn if name not in ("prompt", "seed")}
    found = {
        "prompts": len(plan.prompts),
        "pictures": len(paths),
        "settings": of_all | {"seed": plan.seed},
        "scores": scores,
    }
    save_image(image_grid([load_image(path) for path in paths[:SHEET]]), folder / "samples.png")
    rows = [("prompts", len(plan.prompts)), ("pictures", len(paths)), *scores.items()]
    lines = ["| | |", "|---|---|", *(f"| {name} | {value:.4g} |" for name, value in rows)]
    texts = {"scores.json": json.dumps(found, indent=1, ensure_ascii=False),
             "scores.md": "\n".join(lines)}  # fmt: skip
    for name, text in texts.items():
        write_whole(folder / name, f"{text}\n")
    say(texts["scores.md"])
    say(f"{folder / PICTURES} has the pictures, {folder / 'samples.png'} shows the first ones.")
