"""What a user's program does with the public names; `tests/test_release.py` has mypy read it."""

from pathlib import Path

from PIL import Image

from localdit import (
    Config,
    LocalDiTImg2ImgPipeline,
    LocalDiTInpaintPipeline,
    LocalDiTPipeline,
    LocalDiTTransformer2DModel,
    load_model,
    model_in_the_box,
)
from localdit.checkpoint import CheckpointReport, inspect_checkpoint
from localdit.images import image_grid, load_image, save_image
from localdit.inference import inference
from localdit.models import PRESETS, FullAttnProcessor
from localdit.scenes import Scene, draw_scene, sample_scenes


def draw(prompts: list[str], folder: Path) -> list[Path]:
    """Pictures of prompts, saved."""
    config = Config(ckpt_path=model_in_the_box(), height=256, width=256, guidance_scale=2.0)
    pipe: LocalDiTPipeline = load_model(config, device="cpu", dtype="float32")
    pictures: list[Image.Image] = inference(pipe, prompts, None, config, seed=0)
    paths: list[Path] = []
    for number, picture in enumerate(pictures):
        paths.append(save_image(picture, folder / f"{number}.png", {"prompt": prompts[number]}))
    save_image(image_grid([load_image(path) for path in paths]), folder / "grid.png")
    return paths


def other_names(file: Path) -> tuple[int, Image.Image]:
    """The rest, as far as it has types to check."""
    report: CheckpointReport = inspect_checkpoint(file)
    scene: Scene = next(sample_scenes(1, seed=0))
    model = LocalDiTTransformer2DModel(**PRESETS["tiny"])
    model.set_attn_processor(FullAttnProcessor())
    names = (LocalDiTImg2ImgPipeline.__name__, LocalDiTInpaintPipeline.__name__)
    return len(str(report)) + len(names), draw_scene(scene, side=64)


def a_mistake() -> Config:
    """What a checker has to find; where it does not, the remark is one too many."""
    return Config(height="128")  # type: ignore[arg-type]


if __name__ == "__main__":
    print(draw(["a red circle"], Path.cwd()))
