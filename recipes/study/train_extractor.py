"""Train a small classifier of the study's scenes; its features measure distances of pictures.

    python recipes/study/train_extractor.py --output output/study/extractor

The classifier, a residual network, reads task, number of objects and colours from a
picture. Writes a folder of Transformers, for `localdit.evaluation.quality.distances`, and
prints the share of held-out answers that are right.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import scenes

if TYPE_CHECKING:
    import torch

NUMBERS = 6  # 0 to 5 objects
HELD_OUT = 2_000_003  # seed of the drawings that the classifier is tested with


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
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


def batch_of(many: Sequence[scenes.Study], processor: object) -> tuple[torch.Tensor, torch.Tensor]:
    """Return pictures `(B, 3, 16, 16)` and answers `(B, answers)`."""
    import torch

    pictures = [scenes.draw(scene) for scene in many]
    pixels = processor(images=pictures, return_tensors="pt")["pixel_values"]  # type: ignore[operator]
    return pixels, torch.tensor([answers(scene) for scene in many])


def main() -> None:
    args = parse_args()

    import torch
    from transformers import BitImageProcessor, ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    processor = BitImageProcessor(
        do_resize=False, do_center_crop=False,
        image_mean=[0.5] * 3, image_std=[0.5] * 3,
    )  # fmt: skip
    pixels, targets = batch_of(list(scenes.sample_many(args.scenes, 0)), processor)
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
    pixels, targets = batch_of(list(scenes.sample_many(500, HELD_OUT)), processor)
    with torch.no_grad():
        right = (model(pixels).logits > 0) == (targets > 0)
    print(f"right: {right.double().mean():.4f} of the answers, {right.all(1).double().mean():.3f} "
          "of the pictures")  # fmt: skip


if __name__ == "__main__":
    main()
