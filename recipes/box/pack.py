"""Pack a trained pipeline into the package, with 16-bit weights.

    python recipes/box/pack.py --pipeline output/box/run/final --vae output/box/decoder \
      --output localdit/box
    python recipes/box/pack.py --student output/box/few_steps/final --output localdit/box

The second command adds a student to the packed folder of its teacher.

Local paths are removed from the files, and the tokenizer's class name is one that both Transformers
4 and 5 find.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

# Settings of the tokenizer's latest call that Transformers writes and Transformers 4 may not read.
CALL_SETTINGS = (
    "backend", "extra_special_tokens", "is_local", "local_files_only", "max_length",
    "pad_to_multiple_of", "pad_token_type_id", "padding_side", "stride", "truncation_side",
    "truncation_strategy",
)  # fmt: skip

# Layers of a student that are stored with 8-bit weights.
IN_8_BITS = ("ff.net.0.proj", "ff.net.2", "attn2.to_q", "attn2.to_k")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--pipeline", type=Path, help="folder of the pipeline")
    parser.add_argument("--vae", type=Path, help="folder of an autoencoder with the same encoder "
                        "and another decoder; by default the pipeline's")  # fmt: skip
    source.add_argument("--student", type=Path, help="folder of a student of the packed pipeline")
    parser.add_argument(
        "--output", type=Path, required=True, help="folder to write; it is replaced"
    )
    return parser.parse_args()


def edit_json(path: Path, **changes: Any) -> None:
    """Set entries of a JSON file; None removes one."""
    entries = json.loads(path.read_text("utf-8")) | changes
    for name in [name for name, value in changes.items() if value is None]:
        entries.pop(name, None)
    path.write_text(json.dumps(entries, indent=2) + "\n", "utf-8")


def pack_student(student: Path, box: Path) -> None:
    """Write transformer, scheduler and index of a student; it shares the other parts.

    Some layers have 8-bit weights, so that teacher and student have less than 20 MB. That changes
    images by 0.2 to 0.6 of 255 (root mean square).
    """
    import torch

    from localdit.models import LocalDiTTransformer2DModel

    folder = box / "few_steps"
    shutil.rmtree(folder, ignore_errors=True)
    transformer = LocalDiTTransformer2DModel.from_pretrained(student / "transformer")
    weights = folder / "transformer"
    transformer.to(torch.float16)
    for name, layer in transformer.named_modules():
        if name.endswith(IN_8_BITS):
            layer.weight.data = layer.weight.data.to(torch.float8_e4m3fn)
    transformer.save_pretrained(weights)
    for file in weights.iterdir():
        file.chmod(0o644)
    edit_json(folder / "transformer" / "config.json", _name_or_path=None)
    shutil.copytree(student / "scheduler", folder / "scheduler")
    index = json.loads((box / "model_index.json").read_text("utf-8"))
    own = json.loads((student / "model_index.json").read_text("utf-8"))
    names = ("scheduler", "num_inference_steps", "guidance_scale")
    index |= {name: own[name] for name in names} | {"_shares_parts": True}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def pack_pipeline(pipeline: Path, vae: Path | None, box: Path) -> None:
    """Write the folder of a pipeline; it is replaced."""
    import torch
    from diffusers import AutoencoderDC

    from localdit.pipelines import LocalDiTPipeline

    pipe = LocalDiTPipeline.from_pretrained(pipeline)
    if vae is not None:
        pipe.register_modules(vae=AutoencoderDC.from_pretrained(vae))
    for part in (pipe.vae, pipe.text_encoder, pipe.transformer):
        part.to(torch.float16)
    pipe.tokenizer.backend_tokenizer.no_truncation()
    pipe.tokenizer.backend_tokenizer.no_padding()
    new = box.with_name(box.name + ".new")
    pipe.save_pretrained(new)

    (
        new / "README.md"
    ).unlink()  # its example would name this folder, but users load the box by a function
    for config in new.glob("*/config.json"):
        edit_json(config, _name_or_path=None)
    # Transformers loads in the dtype given here, Diffusers in float32.
    edit_json(new / "text_encoder" / "config.json", dtype="float32")
    tokenizer = "T5TokenizerFast"
    edit_json(
        new / "model_index.json",
        _name_or_path=None,
        tokenizer=["transformers", tokenizer],
        guidance_scale=2.0,
        whole_words=True,
    )
    edit_json(
        new / "tokenizer" / "tokenizer_config.json",
        tokenizer_class=tokenizer,
        **dict.fromkeys(CALL_SETTINGS),
    )
    shutil.rmtree(box, ignore_errors=True)
    new.rename(box)


def main() -> None:
    args = parse_args()
    if args.student:
        pack_student(args.student, args.output)
    else:
        pack_pipeline(args.pipeline, args.vae, args.output)
    size = sum(file.stat().st_size for file in args.output.rglob("*") if file.is_file())
    print(f"{args.output}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
