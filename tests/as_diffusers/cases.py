"""The pipelines that the tests here run, with arguments for a short call of each."""

import inspect

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler

from localdit.pipelines import LocalDiTImg2ImgPipeline, LocalDiTInpaintPipeline, LocalDiTPipeline
from tests.tiny import tiny_components

KINDS = {
    "text to image": LocalDiTPipeline,
    "image to image": LocalDiTImg2ImgPipeline,
    "inpainting": LocalDiTInpaintPipeline,
}
SIDE = 32  # of the pictures, in pixels
BATCHED = ("prompt", "negative_prompt", "image", "mask_image")


def make(kind, components=None, **overrides):
    """A pipeline of a kind, made of new tiny components with random weights.

    Weights that a fresh model has at zero, or at one, would hide that something is left out.
    """
    components = components or tiny_components(**overrides)
    pipe = kind(**components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def scramble(model, seed=0):
    """Draw every parameter of a model from a seed; return the model."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    return model


def simplest_components():
    """Components as Diffusers' own tests of PixArt make them: an autoencoder that does not scale,
    a scheduler without noise levels, a variance that is learned."""
    components = tiny_components(out_channels=8, use_additional_conditions=False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = AutoencoderKL().eval()
    return {**components, "vae": vae, "scheduler": DDIMScheduler()}


def arguments(kind, **changes):
    """Arguments of a call: a prompt, a seed and, if the pipeline takes them, image and mask."""
    given = {
        "prompt": "a large red circle",
        "generator": torch.Generator().manual_seed(0),
        "num_inference_steps": 2,
        "guidance_scale": 5.0,
        "output_type": "np",
    }
    accepted = inspect.signature(kind.__call__).parameters
    if "image" in accepted:
        drawn = torch.Generator().manual_seed(1)
        given["image"] = torch.rand(1, 3, SIDE, SIDE, generator=drawn)
        given |= {"num_inference_steps": 4, "strength": 0.5}
    else:
        given |= {"height": SIDE, "width": SIDE}
    if "mask_image" in accepted:
        given["mask_image"] = torch.zeros(1, 1, SIDE, SIDE)
        given["mask_image"][..., : SIDE // 2] = 1
    return {**given, **changes}


def draw(pipe, **changes):
    """Return the pictures `(B, H, W, 3)` of a call, or the result in another `output_type`."""
    return pipe(**arguments(type(pipe), **changes)).images


def distance(one, other):
    """The largest difference between two arrays or tensors, in float32."""
    one, other = (
        x.float().detach().numpy() if torch.is_tensor(x) else np.asarray(x, dtype=np.float32)
        for x in (one, other)
    )
    return np.abs(one - other).max()
