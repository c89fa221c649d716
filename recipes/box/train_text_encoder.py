"""Build the tokenizer and train the small T5 encoder of the model in the box.

    python recipes/box/train_text_encoder.py --output output/box

Writes `text_encoder` (read by `transformers.T5EncoderModel`) and `tokenizer` (read by
`transformers.T5TokenizerFast`) into the folder. The encoder learns to recognise the scene in a
caption: the background, the attributes of the objects in the order of the text, how they are
arranged, and the object at each place. The probes that predict these are discarded.
"""

from __future__ import annotations

import argparse
import math
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import T5EncoderModel, T5Tokenizer

    from localdit.scenes import Caption
    from localdit.scenes.captions import Said

MAX_TOKENS = 120
CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,;:!?-'\"()/&"
WIDTH = 128

# Names of objects for the probes: by order in the text, and by place.
IN_TEXT = ("first", "second", "third")
PLACES_OF_PAIR = {"side by side": ("left", "right"), "one above the other": ("above", "below")}
PLACES_OF_THREE = ("place 0", "place 1", "place 2")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write into")
    parser.add_argument("--seed", type=int, default=0, help="seed of captions and weights")
    parser.add_argument("--steps", type=int, default=3_000, help="optimizer steps")
    parser.add_argument("--batch-size", type=int, default=96, help="captions per step")
    parser.add_argument("--scenes", type=int, default=40_000, help="scenes to caption")
    parser.add_argument("--noise", type=float, default=0.08,
                        help="share of the captions with made-up words")  # fmt: skip
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    return parser.parse_args()


def make_captions(
    count: int, seed: int, held_out: bool, per_scene: int, noise: float = 0.0
) -> list[Caption]:
    """Return captions of random scenes, `per_scene` each, two thirds of them complete.

    `noise` is the share with made-up words.
    """
    import numpy as np

    from localdit.scenes import describe_often, sample_scenes

    rng = np.random.default_rng([seed, 7])
    scenes = sample_scenes(count, seed, held_out)
    return [c for scene in scenes for c in describe_often(scene, rng, per_scene, 2 / 3, noise)]


def build_tokenizer(texts: list[str]) -> T5Tokenizer:
    """Build a unigram tokenizer in which each word of the texts is one token.

    Other words are split into characters. Characters outside `CHARACTERS` become `<unk>`, including
    capital letters, which the pipeline lower-cases before it calls a tokenizer.
    """
    from transformers import T5Tokenizer

    counts = Counter(piece for text in texts for piece in re.findall(r"▁?[a-z]+", _mark(text)))
    total = sum(counts.values())
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    words = [(piece, math.log(n / total)) for piece, n in sorted(counts.items()) if len(piece) > 1]
    letters = [(piece, -20.0) for piece in ["▁", *CHARACTERS] if piece not in counts]
    return T5Tokenizer(vocab=special + words + letters, extra_ids=0, model_max_length=MAX_TOKENS)


def _mark(text: str) -> str:
    return "".join(f"▁{word}" for word in text.split())


def build_encoder(vocabulary: int) -> T5EncoderModel:
    """Build a T5 encoder of 0.7M parameters whose heads initially attend to neighbours."""
    import torch
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=vocabulary,
        d_model=WIDTH,
        d_kv=32,
        d_ff=384,
        num_layers=3,
        num_heads=4,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        pad_token_id=0,
        eos_token_id=1,
        is_encoder_decoder=False,
        use_cache=False,
    )
    encoder = T5EncoderModel(config)
    attention = encoder.encoder.block[0].layer[0].SelfAttention
    # Buckets 1.. are keys to the left, buckets n/2 + 1.. keys to the right.
    half = config.relative_attention_num_buckets // 2
    with torch.no_grad():
        for head, bucket in enumerate((1, half + 1, 2)):
            attention.relative_attention_bias.weight[bucket, head] += 3.0
    return encoder


def fields() -> dict[str, tuple[str | None, ...]]:
    """Return the fields that the probes predict, and their possible values; None is "not said"."""
    from localdit.scenes.phrasing import PAIRS
    from localdit.scenes.scene import ARRANGEMENTS, BACKGROUNDS, COLOURS, POSITIONS, SHAPES, SIZES

    words: dict[str, tuple[str | None, ...]] = {
        "background": (None, *BACKGROUNDS),
        "background 1": (None, *COLOURS),
        "background 2": (None, *COLOURS),
        "position": (None, *POSITIONS),
        "arrangement": (None, *PAIRS, *ARRANGEMENTS),
        "count": ("1", "2", "3"),
    }
    places_of_two = (place for places in PLACES_OF_PAIR.values() for place in places)
    for thing in (*IN_TEXT, *places_of_two, *PLACES_OF_THREE):
        looks = {"shape": SHAPES, "colour": COLOURS, "size": SIZES}
        words |= {f"{thing} {look}": (None, *values) for look, values in looks.items()}
    return words


def answers(caption: Caption) -> dict[str, str | None]:
    """Return the right value of each of `fields`; fields without an object are left out."""
    objects: dict[str, Said] = dict(zip(IN_TEXT, caption.objects, strict=False))
    if caption.arrangement is not None:
        names = PLACES_OF_PAIR.get(caption.arrangement, PLACES_OF_THREE)
        things = zip(caption.places, caption.objects, strict=False)
        objects |= {names[place]: thing for place, thing in things}
    known: dict[str, str | None] = {
        "background": caption.background,
        "background 1": caption.colours[0],
        "background 2": caption.colours[1],
        "position": caption.position,
        "arrangement": caption.arrangement,
        "count": str(len(caption.objects)),
    }
    for name, thing in objects.items():
        known |= {f"{name} shape": thing.shape, f"{name} colour": thing.colour}
        known |= {f"{name} size": thing.size}
    return known


def encode_answers(captions: list[Caption]) -> torch.Tensor:
    """Return the class of each field for each caption, (captions, fields)."""
    import torch

    words = fields()
    rows = []
    for caption in captions:
        known = answers(caption)
        rows.append([options.index(known.get(name)) for name, options in words.items()])
    return torch.tensor(rows)


def build_probes() -> torch.nn.ModuleDict:
    """Build one query that pools the tokens, and one classifier, per field."""
    from torch import nn

    sizes = [len(options) for options in fields().values()]
    heads = nn.ModuleList(nn.Linear(WIDTH, size) for size in sizes)
    queries = nn.Linear(WIDTH, len(sizes), bias=False)
    return nn.ModuleDict({"queries": queries, "heads": heads})


def probe(
    probes: torch.nn.ModuleDict, states: torch.Tensor, mask: torch.Tensor
) -> list[torch.Tensor]:
    """Return the logits of each field, from states (b, tokens, width) and mask (b, tokens)."""
    heads: Iterable[torch.nn.Module] = probes["heads"].children()
    scores = probes["queries"](states).masked_fill(mask[:, :, None] == 0, float("-inf"))
    pooled = scores.softmax(dim=1).transpose(1, 2) @ states  # (b, fields, width)
    return [head(pooled[:, i]) for i, head in enumerate(heads)]


def measure(
    encoder: T5EncoderModel,
    probes: torch.nn.ModuleDict,
    tokens: dict[str, torch.Tensor],
    targets: torch.Tensor,
) -> tuple[torch.Tensor, float]:
    """Return the accuracy of each field, and the share of captions without any mistake."""
    import torch

    right = []
    with torch.no_grad():
        for rows in torch.arange(len(targets)).split(256):
            mask = tokens["attention_mask"][rows]
            states = encoder(tokens["input_ids"][rows], mask).last_hidden_state
            logits = probe(probes, states, mask)
            guesses = torch.stack([field.argmax(dim=-1) for field in logits], dim=1)
            right.append(guesses == targets[rows])
    hits = torch.cat(right)
    return hits.float().mean(dim=0), float(hits.all(dim=1).float().mean())


def check_reload(tokenizer: T5Tokenizer, folder: Path, texts: list[str]) -> None:
    from transformers import AutoTokenizer

    again = AutoTokenizer.from_pretrained(folder)
    assert again(texts)["input_ids"] == tokenizer(texts)["input_ids"], "the tokenizer changed"


def training_loss(
    encoder: T5EncoderModel,
    probes: torch.nn.ModuleDict,
    tokens: dict[str, torch.Tensor],
    targets: torch.Tensor,
) -> torch.Tensor:
    """Return the mean cross entropy of the fields for one padded batch."""
    import torch
    import torch.nn.functional as F

    mask = tokens["attention_mask"]
    longest = int(mask.sum(dim=1).max())
    mask = mask[:, :longest]
    states = encoder(tokens["input_ids"][:, :longest], mask).last_hidden_state
    logits = probe(probes, states, mask)
    losses = [F.cross_entropy(field, targets[:, i]) for i, field in enumerate(logits)]
    return torch.stack(losses).mean()


def batches(lengths: torch.Tensor, size: int, steps: int) -> Iterator[torch.Tensor]:
    """Yield the rows of `steps` random batches, each of captions of similar length."""
    import torch

    pool = 16  # batches that are sorted together
    for step in range(steps):
        if step % pool == 0:
            rows = torch.randint(len(lengths), (pool * size,))
            sorted_rows = rows[lengths[rows].argsort()].view(pool, size)
            sorted_rows = sorted_rows[torch.randperm(pool)]
        yield sorted_rows[step % pool]


def report(
    encoder: T5EncoderModel, probes: torch.nn.ModuleDict, tokenizer: T5Tokenizer, seed: int
) -> None:
    """Print the accuracy on held-out captions, also if all of them hold made-up words."""
    for noise in (1.0, 0.0):
        captions = make_captions(1_000, seed, held_out=True, per_scene=3, noise=noise)
        tokens = dict(tokenizer([c.text for c in captions], padding=True, return_tensors="pt"))
        accuracy, flawless = measure(encoder, probes, tokens, encode_answers(captions))
        what = "held-out captions with made-up words" if noise else "held-out captions"
        print(f"{what} read without a mistake {100 * flawless:.2f} %")
    for name, value in zip(fields(), accuracy.tolist(), strict=True):
        print(f"{name:16} {100 * value:6.2f} %")


def main() -> None:
    args = parse_args()

    import torch

    started = time.perf_counter()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    plain = make_captions(args.scenes, args.seed, held_out=False, per_scene=2)
    tokenizer = build_tokenizer([caption.text for caption in plain])
    captions = make_captions(args.scenes, args.seed, False, per_scene=6, noise=args.noise)
    texts = [caption.text for caption in captions]
    tokenizer.save_pretrained(args.output / "tokenizer")
    odd = ["Crimson DODECAHEDRON, naïve", "日本語 🟥 \u0000", "", "top-left  \n corner!"]
    check_reload(tokenizer, args.output / "tokenizer", texts[:1000] + odd)
    tokens = dict(tokenizer(texts, padding=True, return_tensors="pt"))
    targets = encode_answers(captions)
    print(f"{len(tokenizer)} tokens, {len(texts)} captions of at most "
          f"{tokens['input_ids'].shape[1]} tokens", flush=True)  # fmt: skip

    encoder, probes = build_encoder(len(tokenizer)), build_probes()
    parameters = [*encoder.parameters(), *probes.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.steps)
    lengths = tokens["attention_mask"].sum(dim=1)
    for step, rows in enumerate(batches(lengths, args.batch_size, args.steps), start=1):
        batch = {name: values[rows] for name, values in tokens.items()}
        loss = training_loss(encoder, probes, batch, targets[rows])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 250 == 0:
            seconds = time.perf_counter() - started
            print(f"step {step} loss {loss.item():.4f} after {seconds:.0f} s", flush=True)

    encoder.half().save_pretrained(args.output / "text_encoder")
    report(encoder.float(), probes, tokenizer, args.seed)  # the weights rounded to 16 bits
    print(f"{time.perf_counter() - started:.0f} s in all")


if __name__ == "__main__":
    main()
