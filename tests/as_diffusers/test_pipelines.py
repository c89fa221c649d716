"""The requirements of Diffusers' shared tests of pipelines."""

import ast
import contextlib
import inspect
import io
import json
import textwrap

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor

from localdit.pipelines import LocalDiTPipeline
from tests.as_diffusers.cases import (
    BATCHED,
    KINDS,
    arguments,
    distance,
    draw,
    make,
    simplest_components,
)
from tests.tiny import tiny_components

TEXT = (
    "prompt_embeds",
    "prompt_attention_mask",
    "negative_prompt_embeds",
    "negative_prompt_attention_mask",
)


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def kind(request):
    return request.param


@pytest.fixture(params=[tiny_components, simplest_components], ids=["tiny", "simplest"])
def components(request):
    return request.param()


def test_calls_accept_the_arguments_of_diffusers_pipelines(kind):
    parameters = inspect.signature(kind.__call__).parameters
    expected = {
        *("prompt", "negative_prompt", "height", "width", "guidance_scale"),
        *("num_inference_steps", "num_images_per_prompt", "generator", "latents"),
        *("prompt_embeds", "negative_prompt_embeds", "output_type", "return_dict"),
        *("callback_on_step_end", "callback_on_step_end_tensor_inputs"),
    }
    assert expected <= set(parameters)
    required = {n for n, p in parameters.items() if p.default is inspect.Parameter.empty}
    assert required == {"self"}


def test_the_components_are_those_passed_to_the_constructor(kind, components):
    assert set(make(kind, components).components) == set(components)


def test_a_tuple_holds_the_same_pictures(kind, components):
    pipe = make(kind, components)
    pictures = pipe(**arguments(kind), return_dict=False)
    assert isinstance(pictures, tuple)
    assert distance(pictures[0], draw(pipe)) == 0


def test_a_batch_gives_the_same_pictures_as_single_calls(kind, components):
    """Prompts of different lengths, the last one too long to be read whole."""
    pipe = make(kind, components)
    given = arguments(kind)
    batch = {name: [given[name]] * 3 for name in BATCHED if name in given}
    batch["prompt"] = [given["prompt"], "a", "large red " * 100]
    batch["generator"] = [torch.Generator().manual_seed(seed) for seed in range(3)]
    together = draw(pipe, **batch)
    assert together.shape[0] == 3
    for row in range(3):
        alone = draw(
            pipe, prompt=batch["prompt"][row], generator=torch.Generator().manual_seed(row)
        )
        assert distance(together[row], alone[0]) < 1e-4


@pytest.mark.parametrize("prompts", [1, 2])
@pytest.mark.parametrize("each", [1, 2])
def test_number_of_pictures(kind, prompts, each):
    given = arguments(kind)
    batch = {name: [given[name]] * prompts for name in BATCHED if name in given}
    assert len(draw(make(kind), **batch, num_images_per_prompt=each)) == prompts * each


def test_guidance_changes_no_shape(kind, components):
    pipe = make(kind, components)
    assert draw(pipe, guidance_scale=1.0).shape == draw(pipe, guidance_scale=7.5).shape


def test_kinds_of_output_agree(kind, components):
    pipe = make(kind, components)
    arrays = draw(pipe)
    assert distance(draw(pipe, output_type="pt").permute(0, 2, 3, 1), arrays) < 1e-6
    assert distance(np.asarray(draw(pipe, output_type="pil")[0]), (arrays * 255).round()[0]) <= 1


from_images = pytest.mark.parametrize(
    "kind", [kind for kind in KINDS.values() if kind is not LocalDiTPipeline]
)


@from_images
def test_kinds_of_image_agree(kind, components):
    image, pipe = arguments(kind)["image"], make(kind, components)
    expected = draw(pipe)
    array = VaeImageProcessor.pt_to_numpy(image)
    assert distance(draw(pipe, image=array), expected) < 1e-5
    pixels = VaeImageProcessor.numpy_to_pil(array)
    assert distance(draw(pipe, image=pixels), expected) < 1e-2


@from_images
def test_latents_as_image_give_the_same_picture_as_the_image(kind, components):
    """Use an image processor that leaves values alone, to compare with the autoencoder."""
    image, pipe = arguments(kind)["image"], make(kind, components)
    pipe.image_processor = VaeImageProcessor(do_resize=False, do_normalize=False)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        latents = pipe.vae.encode(image).latent_dist.sample(generator)
    # Given latents, inpainting puts back latents, not pixels; so everything is repainted.
    given = arguments(kind)
    mask = {name: torch.ones_like(given[name]) for name in given if name == "mask_image"}
    scaled = latents * pipe.vae.config.scaling_factor
    from_latents = draw(pipe, image=scaled, generator=generator, **mask)
    assert distance(from_latents, draw(pipe, **mask)) < 1e-5


# Text


class ReturnedNames(ast.NodeVisitor):
    """Return the names in a function's return statements: Diffusers reads them as its results."""

    def __init__(self, function):
        self.names = []
        self.visit(ast.parse(textwrap.dedent(inspect.getsource(function))))

    def visit_Return(self, node):
        self.names += [ast.unparse(element) for element in node.value.elts]


def test_prompts_are_encoded_in_isolation(kind, components):
    """One pipeline has only the text encoder, the other has everything else."""
    is_text = {name: name in ("tokenizer", "text_encoder") for name in components}
    with_text, without = (
        kind(**{n: c if is_text[n] is kept else None for n, c in components.items()})
        for kept in (True, False)
    )
    without.set_progress_bar_config(disable=True)
    given = arguments(kind)
    known = inspect.signature(kind.encode_prompt).parameters
    encoded = with_text.encode_prompt(**{n: given.pop(n) for n in list(given) if n in known})
    named = dict(zip(ReturnedNames(kind.encode_prompt).names, encoded, strict=True))
    assert set(named) <= set(inspect.signature(kind.__call__).parameters)
    pictures = without(**given, **{n: x.detach() for n, x in named.items()}, negative_prompt=None)
    assert distance(pictures.images, draw(make(kind, components))) < 1e-5


def test_optional_components_may_be_absent(kind, components, tmp_path):
    pipe = make(kind, components)
    with torch.no_grad():
        embeds = dict(zip(TEXT, pipe.encode_prompt("a cat"), strict=True))
    for name in ("tokenizer", "text_encoder"):
        setattr(pipe, name, None)
    expected = draw(pipe, prompt=None, **embeds)
    pipe.save_pretrained(tmp_path)
    loaded = kind.from_pretrained(tmp_path)
    assert loaded.tokenizer is None and loaded.text_encoder is None
    assert distance(draw(loaded, prompt=None, **embeds), expected) == 0
    pipe.vae = None
    pipe.save_pretrained(tmp_path)
    loaded = kind.from_pretrained(tmp_path)
    assert all(getattr(loaded, name) is None for name in pipe._optional_components)


# Callbacks


def test_callbacks_see_all_tensors_and_may_replace_each(kind, components):
    pipe = make(kind, components)
    names = pipe._callback_tensor_inputs
    assert set(names) >= {"latents", "prompt_embeds"}
    reference = draw(pipe, output_type="latent")

    def unchanged(pipeline, index, timestep, tensors):
        assert list(tensors) == names
        return {name: tensor.clone() for name, tensor in tensors.items()}

    options = {"callback_on_step_end_tensor_inputs": names, "output_type": "latent"}
    assert distance(draw(pipe, callback_on_step_end=unchanged, **options), reference) == 0
    for name in names:
        # A mask without the text's first token; another tensor with other values.
        def changed(pipeline, index, timestep, tensors, name=name):
            replacement = tensors[name].clone()
            if name.endswith("mask"):
                replacement[:, 0] = 0
            else:
                replacement += 1
            return {name: replacement}

        assert distance(draw(pipe, callback_on_step_end=changed, **options), reference) > 1e-4, name


def test_a_callback_blanks_the_last_latents(kind):
    def blank(pipeline, index, timestep, tensors):
        last = index == pipeline.num_timesteps - 1
        return {"latents": torch.zeros_like(tensors["latents"])} if last else {}

    assert not draw(make(kind), callback_on_step_end=blank, output_type="latent").any()


def test_a_callback_raises_the_guidance_at_every_step(kind, components):
    pipe = make(kind, components)

    def stronger(pipeline, index, timestep, tensors):
        pipeline._guidance_scale += 1.0
        return tensors

    draw(pipe, guidance_scale=2.0, callback_on_step_end=stronger)
    assert pipe.guidance_scale == 2.0 + pipe.num_timesteps


def test_the_progress_bar_shows_unless_it_is_switched_off(kind):
    pipe = kind(**tiny_components())
    for disable in (False, True):
        pipe.set_progress_bar_config(disable=disable)
        with contextlib.redirect_stderr(io.StringIO()) as shown:
            draw(pipe)
        assert ("2/2" in shown.getvalue()) is not disable


# Saving, loading, sharing


def test_only_the_variant_is_saved_and_loaded(kind, tmp_path):
    pipe = make(kind)
    pipe.save_pretrained(tmp_path, variant="fp16")
    models = [n for n, c in pipe.components.items() if isinstance(c, torch.nn.Module)]
    assert set(models) <= set(json.loads((tmp_path / "model_index.json").read_text()))
    for name in models:
        files = [file.name for file in (tmp_path / name).glob("*.safetensors")]
        assert files and all(".fp16." in file for file in files)
    assert distance(draw(kind.from_pretrained(tmp_path, variant="fp16")), draw(pipe)) == 0
    with pytest.raises((ValueError, OSError), match="variant"):
        kind.from_pretrained(tmp_path, variant="int8")


def test_each_component_has_its_own_dtype(kind, tmp_path):
    make(kind).save_pretrained(tmp_path)
    for name in ("text_encoder", "transformer", "vae"):
        dtypes = {name: torch.bfloat16, "default": torch.float16}
        loaded = kind.from_pretrained(tmp_path, torch_dtype=dtypes)
        for other in ("text_encoder", "transformer", "vae"):
            expected = torch.bfloat16 if other == name else torch.float16
            assert getattr(loaded, other).dtype is expected
        assert np.isfinite(draw(loaded)).all()


def test_half_precision_pipelines_save_load_and_run(kind, components, tmp_path):
    pipe = make(kind, components)
    exact = draw(pipe)
    pipe.to(dtype=torch.float16)
    half = draw(pipe)
    assert distance(half, exact) < 0.1
    pipe.save_pretrained(tmp_path)
    loaded = kind.from_pretrained(tmp_path, torch_dtype=torch.float16)
    dtypes = {c.dtype for c in loaded.components.values() if hasattr(c, "dtype")}
    assert dtypes == {torch.float16}
    assert distance(draw(loaded), half) < 1e-2


@pytest.mark.parametrize("device_map", ["cpu", "balanced", "auto"])
def test_a_pipeline_loads_onto_devices(kind, tmp_path, device_map):
    pipe = make(kind)
    pipe.save_pretrained(tmp_path)
    loaded = kind.from_pretrained(tmp_path, device_map=device_map)
    assert distance(draw(loaded), draw(pipe)) == 0


def test_pipelines_convert_into_one_another_with_the_same_results(kind, components):
    first = make(LocalDiTPipeline, components)
    there = kind.from_pipe(first)
    back = LocalDiTPipeline.from_pipe(there)
    assert dict(back.config) == dict(first.config)
    assert distance(draw(there), draw(make(kind, components))) == 0
    converted = kind.from_pipe(first, torch_dtype=torch.float32)
    assert distance(draw(converted), draw(there)) == 0


# Options of a pipeline and its autoencoder


@pytest.mark.parametrize("size", [1, "auto", "max"])
def test_sliced_attention_changes_nothing(kind, size):
    pipe = make(kind)
    reference = draw(pipe)
    pipe.enable_attention_slicing(slice_size=size)
    assert distance(draw(pipe), reference) == 0


@pytest.mark.parametrize("switch", ["enable_slicing", "enable_tiling"])
def test_the_autoencoder_works_in_slices_and_tiles(kind, switch):
    pipe = make(kind)
    given = arguments(kind)
    batch = {name: [given[name]] * 2 for name in BATCHED if name in given}
    reference = draw(pipe, **batch)
    getattr(pipe.vae, switch)()
    assert distance(draw(pipe, **batch), reference) < 1e-5
