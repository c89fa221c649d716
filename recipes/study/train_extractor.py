"""Train a small classifier of the study's pictures; its features measure their distances.

    python recipes/study/train_extractor.py --output output/study/extractor

The classifier, a residual network, reads task, number of objects and colours from a drawing, or
with `--pictures` the category of an emoji or the photograph that a part is from. Writes a folder of
Transformers, for `localdit.evaluation.distances`, and prints the share of held-out answers
that are right.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import pictures
import scenes
from PIL import Image

NUMBERS = 6  # 0 to 5 objects
HELD_OUT = 2_000_003  # seed of the drawings that the classifier is tested with


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--pictures", type=Path, help="folder of pictures.py to learn instead")
    parser.add_argument("--scenes", type=int, default=4000, help="number of training pictures")
    parser.add_argument("--steps", type=int, default=600, help="optimizer steps")
    parser.add_argument("--batch-size", type=int, default=32, help="pictures per step")
    return parser.parse_args()


def answers(scene: scenes.Study) -> list[float]:
    """Return the answers about a scene as zeros and ones: task, number of objects, colours."""
    colours = {scene.frame[0], *(thing.colour for thing in scene.objects)}
    return [
        *(float(scene.task == task) for task in scenes.TASKS),
        *(float(len(scene.objects) == number) for number in range(NUMBERS)),
        *(float(colour in colours) for colour in scenes.COLOURS),
    ]


def drawings(count: int, seed: int) -> tuple[list[Image.Image], list[list[float]]]:
    """Return drawings and the answers about them."""
    many = list(scenes.sample_many(count, seed))
    return [scenes.draw(scene) for scene in many], [answers(scene) for scene in many]


def labelled(folder: Path, labels: Sequence[str]) -> tuple[list[Image.Image], list[list[float]]]:
    """Return the pictures of a folder, and whether each has each of the labels."""
    many = pictures.read(folder)
    wanted = [[float(one.label == label) for label in labels] for one in many]
    return [one.picture for one in many], wanted


def main() -> None:
    args = parse_args()

    import torch
    from transformers import BitImageProcessor, ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    processor = BitImageProcessor(
        do_resize=False, do_center_crop=False,
        image_mean=[0.5] * 3, image_std=[0.5] * 3,
    )  # fmt: skip

    def tensors(data: tuple[list[Image.Image], list[list[float]]]) -> tuple[torch.Tensor, ...]:
        """Return pictures `(N, 3, 16, 16)` and answers `(N, answers)`."""
        pixels = processor(images=data[0], return_tensors="pt")["pixel_values"]
        return pixels, torch.tensor(data[1])

    if args.pictures:
        folders = args.pictures / "train", args.pictures / "held-out"
        labels = sorted({one.label for one in pictures.read(folders[0])})
        known, unknown = (labelled(folder, labels) for folder in folders)
    else:
        known, unknown = drawings(args.scenes, 0), drawings(500, HELD_OUT)
    pixels, targets = tensors(known)
    config = ResNetConfig(
        embedding_size=16, hidden_sizes=[32, 64, 64], depths=[1, 1, 1], layer_type="basic",
        num_labels=targets.shape[1], problem_type="multi_label_classification",
    )  # fmt: skip
    model = ResNetForImageClassification(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=args.steps)
    for _ in range(args.steps):
        rows = torch.randint(len(pixels), (args.batch_size,))
        loss = model(pixels[rows], labels=targets[rows]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

    model.eval().save_pretrained(args.output)
    processor.save_pretrained(args.output)
    pixels, targets = tensors(unknown)
    with torch.no_grad():
        right = (model(pixels).logits > 0) == (targets > 0)
    print(f"right: {right.double().mean():.4f} of the answers, {right.all(1).double().mean():.3f} "
          "of the pictures")  # fmt: skip


if __name__ == "__main__":
    main()
