"""Write the held-out captions and their scenes as prompts for `localdit evaluate`.

    python recipes/box/write_prompts.py --output output/box/prompts.jsonl --count 1000

The captions are those of `score.py`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from score import prompts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="file to write")
    parser.add_argument("--count", type=int, default=1000, help="number of captions")
    parser.add_argument("--seed", type=int, default=0, help="seed of scenes and captions")
    args = parser.parse_args()
    pairs = zip(*prompts(args.count, args.seed, held_out=True), strict=True)
    lines = [json.dumps({"prompt": text, "scene": scene.to_dict()}) for scene, text in pairs]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text("\n".join(lines) + "\n", "utf-8")
    print(f"{len(lines)} prompts in {args.output}")


if __name__ == "__main__":
    main()
