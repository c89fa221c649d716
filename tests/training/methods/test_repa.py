"""Representation alignment: its features, its gradient, its checkpoints and what it refuses."""

import json
import sys
from argparse import Namespace

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file

from localdit.core.diffusion import Objective
from localdit.core.latents import LatentSpace
from localdit.models.windows import Route
from localdit.training import setup
from localdit.training.methods import Inputs, noised_prediction
from localdit.training.methods.fine_tuning import Alignment, FineTuning, Routing
from localdit.training.methods.repa import (
    FEATURES,
    IMAGENET_MEAN,
    IMAGENET_STD,
    PROJECTION,
    Repa,
    image_encoder_config,
    load_latent_features,
    make_projection,
)
from localdit.training.options import parse_args
from tests.tiny import TEXT_WIDTH, tiny_components, tiny_pipeline, tiny_vae
from tests.training.workplace import (
    lines,
    load_main,
    make_image_encoder,
    make_workplace,
    options,
    weights,
)

KINDS = ("dinov2", "dinov2_with_registers", "vit", "siglip_vision_model")


@pytest.fixture
def folder(tmp_path):
    return make_image_encoder(tmp_path / "encoder")


@pytest.mark.parametrize(
    ("layers", "block", "expected"), [(28, None, 7), (18, None, 4), (2, None, 0), (6, 6, 5)]
)
def test_the_block_to_align(layers, block, expected):
    args = Namespace(repa_weight=0.5, repa_block=block)
    assert Repa.from_options(args, layers) == (0.5, expected)


@pytest.mark.parametrize("block", [0, 7])
def test_a_block_that_is_not_there_can_not_be_aligned(block):
    with pytest.raises(ValueError, match=f"--repa-block is {block}; expected one of the 6 blocks"):
        Repa.from_options(Namespace(repa_weight=0.5, repa_block=block), 6)


@pytest.mark.parametrize(("width", "hidden"), [(1152, 2048), (24, 96)])
def test_the_projection_has_the_three_layers_of_the_paper(width, hidden):
    shapes = [tuple(p.shape) for p in make_projection(width, 32).parameters() if p.dim() == 2]
    assert shapes == [(hidden, width), (hidden, hidden), (32, hidden)]


@pytest.mark.parametrize("kind", KINDS)
def test_each_token_has_the_feature_of_its_patch(kind, tmp_path):
    folder = make_image_encoder(tmp_path / "encoder", kind)
    settings = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.1, 0.2, 0.3]}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    vae = tiny_vae()
    features = load_latent_features(folder, vae).eval()
    latents = torch.randn(2, 4, 4, 6)  # pictures of 32 x 48 pixels: 4 x 6 patches, as they are
    found = features(latents, 4, 6)
    pixels = LatentSpace(vae).decode(latents).clamp(-1, 1) / 2 + 0.5
    mean, std = (torch.tensor(settings[name]).view(3, 1, 1) for name in settings)
    more = {} if kind.startswith("dino") else {"interpolate_pos_encoding": True}
    states = features.encoder((pixels - mean) / std, **more).last_hidden_state
    extra = {"dinov2": 1, "dinov2_with_registers": 5, "vit": 1, "siglip_vision_model": 0}[kind]
    torch.testing.assert_close(found, states[:, extra:])
    assert found.shape == (2, 24, 32) and not found.requires_grad
    assert features(latents, 2, 3).shape == (2, 6, 32)


def test_pixels_are_scaled_as_imagenet_unless_the_folder_says_otherwise(folder):
    features = load_latent_features(folder, vae=None)
    assert features.mean.flatten().tolist() == pytest.approx(IMAGENET_MEAN)
    assert features.std.flatten().tolist() == pytest.approx(IMAGENET_STD)


@pytest.mark.parametrize("routed", [False, True])
def test_the_gradient_is_that_of_the_cosines(routed, folder):
    torch.manual_seed(0)
    transformer = tiny_components(num_layers=4)["transformer"]
    objective, route = Objective("flow"), None
    frozen = {FEATURES: load_latent_features(folder, tiny_vae())}
    method = FineTuning(
        transformer, objective, False, frozen, alignment=Alignment(0.3, (0, 2)), repa=Repa(0.5, 1),
        routing=Routing(0.5, range(1, 3)) if routed else None,
    )  # fmt: skip
    size = {"resolution": torch.full((2, 2), 64.0), "aspect_ratio": torch.ones(2, 1)}
    inputs = Inputs(
        torch.randn(2, 4, 8, 8), torch.randn(2, 5, TEXT_WIDTH), torch.ones(2, 5), size,
        weights=torch.ones(2), places=torch.tensor([[0.0, 0.0], [0.99, 0.0]]),
    )  # fmt: skip
    noise, positions = torch.randn_like(inputs.latents), torch.tensor([0.1, 0.7])
    if routed:
        first = torch.arange(8)  # 1 x 2 of the 2 x 2 windows
        route = Route(range(1, 3), 2, 4, torch.stack([first, first + 8]))
    found = noised_prediction(
        transformer, objective, inputs, noise, positions, feature_blocks=(0, 1, 2), route=route
    )
    early, block, late = found.features
    wanted = frozen[FEATURES](inputs.latents, 4, 4)
    wanted = route.take(wanted) if routed else wanted
    shown = (found.prediction - found.target).square().mean(dim=(1, 2, 3))
    expected = shown
    for weight, one, two in (
        (0.3, early, late.detach()),
        (0.5, method.trained[PROJECTION](block), wanted),
    ):
        expected = expected - weight * torch.cosine_similarity(one, two, dim=2).mean(dim=1)
    losses = method.losses(method.trained | method.frozen, inputs, noise, positions)
    assert torch.equal(losses, shown)
    trained = [p for model in method.trained.values() for p in model.parameters()]
    ours, theirs = (torch.autograd.grad(one.sum(), trained) for one in (losses, expected))
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)
    assert all(parameter.abs().sum() > 0 for parameter in ours[-6:])  # of the projection
    assert not any(p.requires_grad for p in frozen[FEATURES].parameters())


@pytest.mark.parametrize("kind", ["resnet", "t5", "vit_mae"])
def test_encoders_without_a_feature_for_each_patch_are_refused(kind, tmp_path):
    folder = make_image_encoder(tmp_path / "encoder", kind)
    with pytest.raises(ValueError, match=f"encoder is of the type '{kind}', which does not give"):
        load_latent_features(folder, vae=None)


def test_folders_that_are_not_whole_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="has no config.json; expected the folder of an image enc"):
        image_encoder_config(tmp_path)
    for settings, message in (
        ({"image_mean": [1, 2]}, "image_mean is .1, 2.; expected three numbers"),
        ({"image_std": [1, 1, 0]}, "image_std is .1, 1, 0.; expected numbers above 0"),
    ):
        (folder / "preprocessor_config.json").write_text(json.dumps(settings))
        with pytest.raises(ValueError, match=message):
            load_latent_features(folder, vae=None)
    (folder / "preprocessor_config.json").unlink()
    tensors = load_file(folder / "model.safetensors")
    del tensors["layernorm.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="encoder lacks the weights 'layernorm.weight'"):
        load_latent_features(folder, vae=None)


def test_a_run_trains_the_projection_and_leaves_it_out_of_the_pipeline(
    tmp_path, monkeypatch, capsys
):
    """Encoded data needs the autoencoder for it, but no text encoder."""
    from localdit.training.encode.__main__ import main as encode

    (tmp_path / "place").mkdir()
    workplace = make_workplace(tmp_path / "place")
    encode([
        "--data-root", f"{workplace}/pictures", "--pretrained", f"{workplace}/pipeline",
        "--output", f"{tmp_path}/encoded", "--image-size", "96", "--window-size", "2",
        "--num-workers", "0",
    ])  # fmt: skip
    monkeypatch.setattr(setup, "load_encoders", lambda *args: pytest.fail("not needed"))
    folder = make_image_encoder(tmp_path / "encoder")
    repa = ["--repa-weight", "0.5", "--repa-encoder", folder]

    def train(name, *more, expect=0):
        AcceleratorState._reset_state(reset_partial_state=True)
        argv = options(
            workplace, tmp_path / name, "--data-root", tmp_path / "encoded", "--save-interval", "1",
            "--max-train-steps", "2", "--mixed-precision", "bf16", *more
        )  # fmt: skip
        monkeypatch.setattr(sys, "argv", ["train.py", *argv])
        assert load_main()() == expect
        return tmp_path / name

    run, plain = train("run", *repa, "--gradient-checkpointing"), train("plain")
    assert lines(run)[0]["loss"] == lines(plain)[0]["loss"]  # the term is not shown
    name = f"training/model-{PROJECTION}.safetensors"
    first, second = (load_file(run / f"checkpoint-{step}" / name) for step in (1, 2))
    assert any(not torch.equal(tensor, second[key]) for key, tensor in first.items())
    assert weights(run / "final").keys() == weights(plain / "final").keys()

    tiny_pipeline(seed=1).save_pretrained(tmp_path / "other")
    for name, more, message in (
        ("plain", [*repa, "--resume", "auto"], "of transformer, but this run trains repa-proj"),
        ("run", ["--resume", "auto"], "of repa-projection, transformer, but this run trains trans"),
        ("no", [*repa, "--vae", tmp_path / "other"], "differ in vae"),
        ("no", [*repa, "--repa-block", "3", "--dry-run"], "--repa-block is 3; expected one of the"),
        ("no", ["--repa-weight", "1", "--repa-encoder", tmp_path, "--dry-run"], "no config.json"),
    ):
        train(name, *more, "--max-train-steps", "3", expect=1)
        assert message in capsys.readouterr().err


def test_two_models_are_not_trained_in_float16():
    method = Namespace(trained={"transformer": None, PROJECTION: None})
    accelerator = Namespace(distributed_type="NO", mixed_precision="fp16")
    with pytest.raises(ValueError, match="can't be trained together with DeepSpeed or in float16"):
        setup.make_state(parse_args(["--data-root", "x"]), method, accelerator)
