"""Score the images of the model in the box by sampler, for the first held-out captions.

    python recipes/box/score_samplers.py --pipeline localdit/box --count 24

Prints a table. Every sampler starts from the same noise.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from score import generate, prompts


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pipeline", type=Path, required=True, help="folder of the pipeline")
    parser.add_argument("--count", type=int, default=24, help="number of held-out captions")
    parser.add_argument("--side", type=int, default=256, help="width and height in pixels")
    parser.add_argument("--num-inference-steps", "--steps", type=int,
                        help="number of inference steps; by default the pipeline's")  # fmt: skip
    parser.add_argument("--guidance-scale", type=float,
                        help="weight of the caption; by default the pipeline's")  # fmt: skip
    parser.add_argument("--batch-size", type=int, default=8, help="captions per call")
    parser.add_argument("--seed", type=int, default=0, help="seed of captions and noise")
    parser.add_argument("--device", default="cpu", help="device to generate on")
    parser.add_argument("--samplers", nargs="+", help="names (default: all that suit)")
    return parser.parse_args()


def main() -> None:
    args = parse_args()

    from localdit.core.samplers import config_of, make_sampler, suitable_samplers
    from localdit.pipelines import LocalDiTPipeline
    from localdit.scenes.score import score_picture

    pipe = LocalDiTPipeline.from_pretrained(args.pipeline).to(args.device)
    pipe.set_progress_bar_config(disable=True)
    own = pipe.scheduler
    scenes, texts = prompts(args.count, args.seed, held_out=True)
    print(f"| sampler | all right, of {args.count} | seconds per image |\n|---|---|---|")
    for name in args.samplers or suitable_samplers(config_of(own)):
        pipe.scheduler = make_sampler(name, own)
        started = time.perf_counter()
        pictures = generate(pipe, texts, args)
        seconds = (time.perf_counter() - started) / args.count
        scores = [score_picture(*pair)["all"] for pair in zip(pictures, scenes, strict=True)]
        print(f"| `{name}` | {sum(scores):.0f} | {seconds:.1f} |", flush=True)


if __name__ == "__main__":
    main()
