import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    BitImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPTokenizer,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2Model,
)

from localdit import evaluation
from localdit.evaluation import Prompt
from localdit.scenes import draw_scene, sample_scenes

pytest.importorskip("torchmetrics")
SIDE = 32


def pictures(count, seed=0):
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)) for _ in range(count)]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A folder with a tiny CLIP model that knows letters."""
    folder = tmp_path_factory.mktemp("clip")
    letters = [chr(one) for one in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(one + "</w>" for one in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer.from_pretrained(folder, model_max_length=16).save_pretrained(folder)
    CLIPImageProcessor(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
    ).save_pretrained(folder)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    shape |= {"num_attention_heads": 2}
    text = CLIPTextConfig(
        **shape, vocab_size=len(words), max_position_embeddings=16,
        bos_token_id=len(words) - 2, eos_token_id=len(words) - 1, pad_token_id=len(words) - 1,
    )  # fmt: skip
    vision = CLIPVisionConfig(**shape, image_size=SIDE, patch_size=8)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = CLIPConfig(
            text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8
        )
        CLIPModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    """A folder with a tiny DINOv2."""
    folder = tmp_path_factory.mktemp("dino")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = Dinov2Config(
            hidden_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=SIDE, patch_size=8
        )
        Dinov2Model(config).save_pretrained(folder)
    BitImageProcessor(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
    ).save_pretrained(folder)
    return folder


def test_scenes_are_scored_by_number_of_objects():
    scenes = list(sample_scenes(12, 0))
    assert {len(scene.objects) for scene in scenes} == {1, 2, 3}
    prompts = [Prompt(str(i), "a", {}, scene) for i, scene in enumerate(scenes)]
    prompts.append(Prompt("other", "a photo", {}))  # has no scene
    drawn = [[draw_scene(scene, 128)] for scene in scenes] + [pictures(1)]
    found = evaluation.scene_scores(prompts, drawn)
    groups = ("one object", "2 objects", "3 objects")
    assert {found[f"scene, {group}: all"] for group in groups} == {1}
    wrong = [[Image.new("RGB", (128, 128))] for _ in prompts]
    assert evaluation.scene_scores(prompts, wrong)["scene, one object: all"] == 0
    assert evaluation.scene_scores(prompts[-1:], drawn[-1:]) == {}


def test_the_clip_score_is_the_cosine_in_clips_space(clip):
    from transformers import CLIPProcessor

    drawn, texts = [pictures(2), pictures(2, 1)], ["red", "blue"]
    prompts = [Prompt(text, text, {}) for text in texts]
    found = evaluation.clip_score(prompts, drawn, clip)["CLIP score"]
    model, processor = CLIPModel.from_pretrained(clip), CLIPProcessor.from_pretrained(clip)
    with torch.no_grad():
        output = model(
            **processor(
                text=["red"] * 2 + ["blue"] * 2, images=[*drawn[0], *drawn[1]], return_tensors="pt",
                padding=True,
            )
        )  # fmt: skip
    cosines = torch.cosine_similarity(output.image_embeds, output.text_embeds)
    assert found == pytest.approx(100 * cosines.clamp(min=0).mean().item(), abs=1e-3)


def test_scores_refuse_a_model_that_lacks_weights_or_has_some_that_are_not_finite(clip, tmp_path):
    scores = {
        "clip": lambda folder: evaluation.clip_score([Prompt("a", "a", {})], [pictures(1)], folder),
        "distances": lambda folder: evaluation.distances(pictures(4), pictures(4), folder),
    }
    weights = load_file(clip / "model.safetensors")
    for name in ("visual_projection.weight", "vision_model.post_layernorm.weight"):
        shutil.copytree(clip, tmp_path, dirs_exist_ok=True)
        (tmp_path / "model.safetensors").unlink()
        for values, message in ((None, "lacks the weights"), (torch.nan, "values that are not fi")):
            changed = weights | {name: torch.full_like(weights[name], values or 0)}
            if values is None:
                del changed[name]
            save_file(changed, tmp_path / "model.safetensors", {"format": "pt"})
            for score in scores.values():
                with pytest.raises(ValueError, match=message):
                    score(tmp_path)


@pytest.mark.parametrize("model", ["dino", "clip"])
def test_equal_sets_have_no_distance_and_others_have_one(model, request):
    folder = request.getfixturevalue(model)
    same = evaluation.distances(pictures(40), pictures(40), folder)
    assert same["Fréchet distance"] == pytest.approx(0, abs=1e-6)
    assert (same["precision"], same["recall"]) == (1, 1)
    grey = [Image.new("RGB", (SIDE, SIDE), (i, i, i)) for i in range(40)]
    other = evaluation.distances(grey, pictures(40), folder)
    assert other["Fréchet distance"] > 100 * abs(same["Fréchet distance"])
    assert other["kernel distance"] > abs(same["kernel distance"])
    assert (other["precision"], other["recall"]) == (0, 0)


def test_the_frechet_distance_is_that_of_its_formula(dino):
    drawn, real = pictures(60), [one.point(lambda v: v // 2) for one in pictures(60, 1)]
    found = evaluation.distances(drawn, real, dino)["Fréchet distance"]
    extract = evaluation.extractor(dino)
    (m1, c1), (m2, c2) = (
        (one.mean(0), np.cov(one, rowvar=False))
        for one in (extract(drawn).numpy(), extract(real).numpy())
    )
    of_root = np.sqrt(np.linalg.eigvals(c1 @ c2).real.clip(0)).sum()
    wanted = ((m1 - m2) ** 2).sum() + np.trace(c1 + c2) - 2 * of_root
    assert found == pytest.approx(wanted, rel=1e-3)


def test_the_kernel_distance_does_not_depend_on_the_callers_random_state(dino):
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        found.append(evaluation.distances(pictures(30), pictures(50, 1), dino)["kernel distance"])
    assert found[0] == found[1]


def test_precision_and_recall_count_what_is_near():
    true = torch.tensor([[0.0], [1.0], [2.0], [3.0], [4.0]])
    fake = torch.tensor([[0.5], [1.5], [2.5], [3.5], [90.0], [91.0], [92.0], [93.0]])
    precision, recall = evaluation.precision_and_recall(true, fake)
    assert (precision, recall) == (0.5, 1.0)


def test_too_few_pictures_are_refused(dino):
    with pytest.raises(ValueError, match="There are 2 drawn and 9 real pictures"):
        evaluation.distances(pictures(2), pictures(9), dino)


def test_real_pictures_are_read_from_folders_within(tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("b.png", "a.jpg", "in/c.webp"):
        pictures(1)[0].save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no picture")
    assert [path.name for path in evaluation.real_paths(tmp_path)] == ["a.jpg", "b.png", "c.webp"]
