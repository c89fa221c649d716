"""`inference`: its calls of the pipelines, its batches, and bad input."""

import numpy as np
import pytest
import torch
from PIL import Image

from localdit.config import Config
from localdit.core.samplers import make_sampler
from localdit.images import save_image
from localdit.inference import inference, inference_batches
from localdit.pipelines import LocalDiTImg2ImgPipeline, LocalDiTInpaintPipeline
from tests.tiny import tiny_pipeline

PROMPTS = ["a red circle", "a blue square above a star", "a cat"]


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


@pytest.fixture
def config():
    return Config(height=64, width=48, denoising_steps=3, max_length=8)


@pytest.fixture
def spy(pipe, monkeypatch):
    """Records the arguments of each call of a pipeline, of either kind."""
    calls = []
    for kind in (type(pipe), LocalDiTImg2ImgPipeline):

        def record(self, _call=kind.__call__, **kwargs):
            calls.append(kwargs)
            return _call(self, **kwargs)

        monkeypatch.setattr(kind, "__call__", record)
    return calls


def arrays(images):
    return [np.asarray(image).astype(int) for image in images]


def same(a, b):
    return all(np.abs(x - y).max() <= 1 for x, y in zip(arrays(a), arrays(b), strict=True))


def test_as_in_the_readme(pipe, config, spy):
    images = inference(pipe, PROMPTS[:1], ["bad quality"], config)
    assert [image.size for image in images] == [(48, 64)]
    assert images[0].mode == "RGB"
    (call,) = spy
    assert call["guidance_scale"] == 7.0
    assert call["num_inference_steps"] == 3
    assert call["max_sequence_length"] == 8
    assert call["negative_prompt"] == ["bad quality"]


def test_a_few_step_model_that_is_drawn_otherwise_is_warned_of(pipe, config, caplog):
    few = type(pipe)(**pipe.components, num_inference_steps=4, guidance_scale=1.0)
    warned = {}
    for steps, scale, negatives in ((3, 7.0, ""), (20, 7.0, None), (4, 1.0, ""), (3, 7.0, None)):
        config.denoising_steps, config.guidance_scale = steps, scale
        caplog.clear()
        inference_batches(few, PROMPTS, negatives, config)
        warned[steps, scale, negatives] = "made for 4 steps without guidance" in caplog.text
        inference_batches(pipe, PROMPTS, negatives, config)
        assert len(caplog.records) == warned[steps, scale, negatives]
    assert list(warned.values()) == [True, True, False, False]


def test_the_sampler_of_the_config_draws_and_the_pipeline_keeps_its_own(pipe, config, spy):
    kept, image = pipe.scheduler, Image.new("RGB", (48, 64), "red")
    plain = inference(pipe, PROMPTS[:1], "", config, seed=5)
    config.sampler = "ddim"
    drawn = inference(pipe, PROMPTS[:1], "", config, seed=5)
    assert pipe.scheduler is kept
    own = type(pipe).from_pipe(pipe, scheduler=make_sampler("ddim", kept))
    own.set_progress_bar_config(disable=True)
    edited = inference(pipe, PROMPTS[:1], "", config, image, seed=5)
    config.sampler = None
    assert same(drawn, inference(own, PROMPTS[:1], "", config, seed=5)) and not same(drawn, plain)
    assert same(edited, inference(own, PROMPTS[:1], "", config, image, seed=5))
    config.sampler = "eular"
    with pytest.raises(ValueError, match=r"Config\.sampler is 'eular'"):
        inference_batches(pipe, PROMPTS, "", config)


def test_equals_the_pipeline(pipe, config):
    images = inference(pipe, PROMPTS[:1], "bad", config, seed=np.int64(5))
    expected = pipe(
        PROMPTS[0],
        negative_prompt="bad",
        height=64,
        width=48,
        num_inference_steps=3,
        guidance_scale=7.0,
        generator=torch.Generator().manual_seed(5),
        max_sequence_length=8,
    ).images
    assert same(images, expected)


def test_no_negative_prompts_means_no_guidance(pipe, config, spy):
    without = inference(pipe, PROMPTS[:1], None, config, seed=1)
    assert spy[0]["guidance_scale"] == 1.0
    assert "negative_prompt" not in spy[0]
    config.guidance_scale = 1.0
    assert same(without, inference(pipe, PROMPTS[:1], [""], config, seed=1))
    config.guidance_scale = 7.0
    assert not same(without, inference(pipe, PROMPTS[:1], [""], config, seed=1))


def test_a_seed_gives_the_same_pictures_in_batches_of_any_size(pipe, config, spy):
    one_by_one = inference(pipe, PROMPTS, "bad", config, seed=3)
    config.batch_size = 2
    in_twos = inference(pipe, PROMPTS, ["bad"] * 3, config, seed=3)
    assert [len(call["prompt"]) for call in spy] == [1, 1, 1, 2, 1]
    assert same(one_by_one, in_twos)
    assert same(one_by_one[1:2], inference(pipe, PROMPTS[1], "bad", config, seed=4))
    assert not same(one_by_one[:1], inference(pipe, PROMPTS[0], "bad", config, seed=4))


def test_generators_and_latents(pipe, config):
    config.batch_size = 2
    latents = torch.stack(
        [torch.randn(4, 8, 6, generator=torch.Generator().manual_seed(s)) for s in (7, 8, 9)]
    )
    seeded = inference(pipe, PROMPTS, "", config, seed=7)
    assert same(seeded, inference(pipe, PROMPTS, "", config, latents=latents))
    generators = [torch.Generator().manual_seed(s) for s in (7, 8, 9)]
    assert same(seeded, inference(pipe, PROMPTS, "", config, generator=generators))
    single = inference(pipe, PROMPTS, "", config, generator=torch.Generator().manual_seed(7))
    assert same(seeded[:1], single[:1])


def test_image_to_image(pipe, config, spy, tmp_path):
    image = Image.new("RGBA", (100, 30), (255, 0, 0, 128))
    config.denoising_strength = 0.7
    images = inference(pipe, PROMPTS[:2], "bad", config, image=image, seed=0)
    assert [i.size for i in images] == [(48, 64)] * 2
    assert spy[0]["strength"] == 0.7
    (given,) = spy[0]["image"]
    assert given.size == (48, 64)
    assert given.getpixel((0, 0)) == (255, 127, 127)
    path = save_image(image, tmp_path / "a.png")
    assert same(images, inference(pipe, PROMPTS[:2], "bad", config, [path, str(path)], seed=0))
    other = LocalDiTImg2ImgPipeline(**pipe.components)
    other.set_progress_bar_config(disable=True)
    assert same(images[:1], inference(other, PROMPTS[0], "bad", config, image, seed=0))


def masked(size, box):
    """A mask that is white within a box."""
    mask = Image.new("L", size)
    mask.paste(255, box)
    return mask


def test_inpainting(pipe, config, tmp_path):
    image = Image.effect_noise((48, 64), 90).convert("RGB")
    mask = masked(image.size, (8, 8, 32, 40))
    mask.save(tmp_path / "mask.png")
    images = inference(pipe, PROMPTS[:2], "bad", config, image, mask=tmp_path / "mask.png", seed=0)
    assert len(images) == 2 and not same(images[:1], images[1:])
    kept = np.asarray(mask) == 0
    for picture in images:
        assert (np.asarray(picture)[kept] == np.asarray(image)[kept]).all()
        assert (np.asarray(picture)[~kept] != np.asarray(image)[~kept]).any()
    expected = LocalDiTInpaintPipeline(**pipe.components)
    expected.set_progress_bar_config(disable=True)
    assert same(images, inference(expected, PROMPTS[:2], "bad", config, image, mask=mask, seed=0))


def test_inpainting_scales_image_and_mask_in_the_same_way(pipe, config):
    """Both are cropped to the drawn size; with a crop, the picture keeps its own size."""
    image = Image.effect_noise((96, 64), 90).convert("RGB")
    mask = masked(image.size, (40, 16, 56, 48))  # in the middle, which is not cut off
    (cut,) = inference(pipe, PROMPTS[:1], None, config, image, mask=mask, seed=0)
    assert cut.size == (48, 64)
    middle = np.asarray(image)[:, 24:72]
    changed = (np.asarray(cut) != middle).any(-1)
    assert changed[16:48, 16:32].any()
    assert not changed[:, :16].any() and not changed[:, 32:].any()
    whole = inference(
        pipe, PROMPTS[:1], None, config, image, mask=mask, padding_mask_crop=8, seed=0
    )
    assert whole[0].size == image.size


def test_images_of_different_sizes_give_the_same_pictures_in_batches_of_any_size(pipe, config):
    sizes = [(96, 64), (96, 64), (64, 64)]
    images = [Image.effect_noise(size, 90).convert("RGB") for size in sizes]
    masks = [masked(size, (left, 16, 40, 40)) for size, left in zip(sizes, (8, 24, 8), strict=True)]
    given = {"mask": masks, "padding_mask_crop": 4, "seed": 0}
    one_by_one = inference(pipe, PROMPTS, None, config, images, **given)
    config.batch_size = 3
    seen = []
    together = inference(
        pipe, PROMPTS, None, config, images, progress=lambda *args: seen.append(args), **given
    )
    assert [picture.size for picture in together] == sizes
    assert same(one_by_one, together)
    assert len(seen) == seen[-1][0] == seen[-1][1]


def test_one_image_for_each_prompt(pipe, config, spy):
    images = [Image.new("RGB", (48, 64), colour) for colour in ("red", "lime")]
    inference(pipe, PROMPTS[:2], None, config, images)
    assert [call["image"][0].getpixel((0, 0)) for call in spy] == [(255, 0, 0), (0, 255, 0)]


@pytest.mark.parametrize(("image", "steps"), [(None, 3), (Image.new("RGB", (48, 64)), 2)])
def test_progress_counts_the_steps_of_all_batches(pipe, config, image, steps):
    seen = []
    config.batch_size = 2
    inference(pipe, PROMPTS, None, config, image, progress=lambda *args: seen.append(args))
    assert seen == [(i + 1, 2 * steps) for i in range(2 * steps)]


def test_batches_come_one_at_a_time(pipe, config, spy):
    batches = inference_batches(pipe, PROMPTS, None, config)
    assert len(spy) == 0
    assert len(next(batches)) == len(spy) == 1


def test_bad_input_is_found_before_sampling(pipe, config, spy, tmp_path):
    def refuses(match, prompts=PROMPTS, neg_prompts=None, error=ValueError, **kwargs):
        with pytest.raises(error, match=match):
            inference_batches(pipe, prompts, neg_prompts, config, **kwargs)

    image = Image.new("RGB", (48, 64))
    refuses("prompts is an empty list", prompts=[])
    refuses(r"prompts\[1\] has 10001 characters", prompts=["a", "b" * 10_001])
    refuses(r"neg_prompts\[0\] must be a str", neg_prompts=[None] * 3, error=TypeError)
    refuses("neg_prompts has 2 entries for 3 prompts", neg_prompts=["bad", "worse"])
    refuses("neg_prompts has 0 entries", neg_prompts=[])
    refuses("image has 2 entries for 3 prompts", image=[image, image])
    refuses("generator has 1 entries", generator=[torch.Generator()])
    refuses("latents has 1 entries", latents=torch.zeros(1, 4, 8, 6))
    array = np.zeros((3, 4, 8, 6))
    refuses("latents must be a torch.Tensor, got ndarray", latents=array, error=TypeError)
    refuses(r"latents must have shape \(4, 8, 6\)", latents=torch.zeros(3, 8, 6))
    mixed = [torch.zeros(4, 8, 6), torch.zeros(4, 8, 8), torch.zeros(4, 8, 6)]
    refuses(r"latents must have shape \(4, 8, 6\), got \(4, 8, 8\)", latents=mixed)
    refuses("latents contains NaN", latents=torch.full((3, 4, 8, 6), torch.nan))
    refuses("the image is a ndarray; expected a path", image=array[0], error=TypeError)
    refuses("the mask is a ndarray; expected", image=image, mask=array[0, 0], error=TypeError)
    refuses("mask is given without an image", mask=image)
    refuses("padding_mask_crop is given without a mask", image=image, padding_mask_crop=8)
    small = Image.new("L", (8, 8), "white")
    refuses("the mask has 8 x 8 pixels; expected the picture's 48 x 64", image=image, mask=small)
    refuses("nothing in the mask is white", image=image, mask=image)
    white = Image.new("L", image.size, "white")
    pictures = {"image": image, "mask": white}
    refuses("padding_mask_crop must be an integer of at least 0", **pictures, padding_mask_crop=-1)
    left = masked((480, 64), (0, 0, 48, 64))
    refuses("cropped away", image=Image.new("RGB", left.size), mask=left)
    refuses("seed and generator", seed=1, generator=torch.Generator())
    for seed in (True, "7", 1.5, torch.tensor(3), -(2**63) - 1):
        refuses("seed must be an integer of at least", seed=seed)
    refuses(r"seed is .* expected seeds below 2\*\*64 for all 3 pictures", seed=2**64 - 1)
    refuses("generator must be a torch.Generator", generator=5, error=TypeError)
    refuses(r"gone\.png", image=tmp_path / "gone.png", error=FileNotFoundError)
    (tmp_path / "text.png").write_text("text")
    refuses("is not an image", image=tmp_path / "text.png")
    assert not spy


def test_a_size_that_the_model_cannot_draw_is_found_before_sampling(pipe, config, spy):
    config.height = 770
    with pytest.raises(ValueError, match=r"Config\.height must be .* got 770; .*: 768 or 784"):
        inference_batches(pipe, PROMPTS, None, config)
    assert not spy


def test_image_to_image_keeps_the_offloading(pipe, config, monkeypatch):
    moved = []
    monkeypatch.setattr(
        LocalDiTImg2ImgPipeline,
        "enable_model_cpu_offload",
        lambda self, device: moved.append(device),
    )
    monkeypatch.setattr(pipe, "_all_hooks", ["hook"], raising=False)
    monkeypatch.setattr(pipe, "_offload_device", torch.device("cpu"), raising=False)
    inference(pipe, PROMPTS[:1], None, config, Image.new("RGB", (48, 64)))
    assert moved == [torch.device("cpu")]
