"""The report of `--dry-run` on memory, operations and time."""

import re

import pytest
import torch

from localdit.core.latents import LatentFormat
from localdit.models import LocalDiTTransformer2DModel
from localdit.training.cost import META, activation_bytes, cost_report, saved_bytes
from localdit.training.data.buckets import Size
from localdit.training.initialization import load_transformer
from localdit.training.methods import Inputs
from localdit.training.methods.repa import load_latent_features, make_projection
from localdit.training.optimizer import make_optimizer
from localdit.training.options import parse_args
from tests.training.workplace import ROOT, make_image_encoder

BOX = ROOT / "localdit/box"
SHAPE = {
    "num_attention_heads": 2,
    "attention_head_dim": 24,
    "num_layers": 3,
    "sample_size": 16,
    "caption_channels": 16,
}


def inputs(rows):
    return Inputs(
        torch.empty(rows, 4, 16, 16, device=META),
        torch.empty(rows, 6, 16, device=META),
        torch.empty(rows, 6, device=META),
        {"resolution": None, "aspect_ratio": None},
    )


@pytest.mark.parametrize("layer_types", [None, ["local", "full", "full"]])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_activations_are_those_of_the_whole_batch(layer_types, precision):
    args, shape = parse_args(["--data-root", "x"]), SHAPE | {"layer_types": layer_types}
    whole = saved_bytes(args, shape, inputs(5), 5, precision, checkpointing=False)
    assert activation_bytes(args, shape, inputs(5), precision) == pytest.approx(whole, rel=0.01)
    # Each block keeps its input; one block at a time keeps the rest.
    args.gradient_checkpointing = True
    assert 0.2 * whole < activation_bytes(args, shape, inputs(5), precision) < 0.6 * whole


def report(tmp_path, *options, **circumstances):
    shape = tmp_path / "shape.json"
    shape.write_text(re.sub("'", '"', str(SHAPE)))
    argv = ["--data-root", "x", "--transformer-config", str(shape), "--output", str(tmp_path)]
    args = parse_args([*argv, "--batch-size", "4", "--max-train-steps", "10", *options])
    wanted = {"num_processes": 1, "sharded": False, "mixed_precision": "no"} | circumstances
    return cost_report(args, args.stages[0], Size(128, 128), 16, LatentFormat(4, 8), **wanted)


@pytest.mark.parametrize(
    ("text_width", "options"),
    [
        (16, ["--transformer-config", "tiny"]),
        (128, ["--transformer", str(BOX / "transformer"), "--new-latents", "1"]),
    ],
)
def test_the_transformer_is_the_one_that_the_run_trains(text_width, options):
    args = parse_args(["--data-root", "x", "--image-size", "128", *options])
    latents = LatentFormat(6, 16)
    told = cost_report(args, args.stages[0], Size(128, 128), text_width, latents, 1, False, "no")
    transformer = load_transformer(args, text_width, latents)
    assert f"Transformer: {transformer.num_parameters():,} weights" in told


def figure(text, name):
    return float(re.search(rf"{name} ([\d.]+) MiB", text)[1])


def test_memory_is_that_of_weights_gradients_optimizer_and_averages(tmp_path):
    model = LocalDiTTransformer2DModel(**SHAPE)
    size = sum(parameter.numel() for parameter in model.parameters()) * 4 / 2**20
    text = report(tmp_path)
    for name, share in (("weights", 1), ("gradients", 1), ("optimizer", 2), ("averages", 1)):
        assert figure(text, name) == pytest.approx(share * size, rel=0.01, abs=0.005), name
    assert figure(report(tmp_path, "--post-hoc-ema"), "averages") == pytest.approx(3 * size, 0.01)
    sharded = report(tmp_path, num_processes=4, sharded=True)
    assert figure(sharded, "weights") == pytest.approx(size / 4, rel=0.02, abs=0.005)
    assert "averages" not in report(tmp_path, "--ema-on-cpu")
    assert "a step of 16 pictures" in sharded


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_memory_of_the_optimizer_is_that_of_its_state(name, tmp_path):
    if name == "muon" and not hasattr(torch.optim, "Muon"):
        pytest.skip("PyTorch has no Muon before 2.9.")
    model = LocalDiTTransformer2DModel(**SHAPE)
    optimizer = make_optimizer(model.named_parameters(), name, 1e-3, 0.0)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    state = [tensor for entry in optimizer.state.values() for tensor in entry.values()]
    expected = sum(tensor.nbytes for tensor in state) / 2**20
    text = report(tmp_path, "--optimizer", name)
    assert figure(text, "optimizer") == pytest.approx(expected, rel=0.01, abs=0.005)


def test_adapters_and_a_student_have_their_own_memory(tmp_path):
    box = ["--transformer", str(BOX / "transformer"), "--pretrained", str(BOX)]
    plain = report(tmp_path, *box)
    adapters = report(tmp_path, *box, "--lora-rank", "2")
    assert figure(adapters, "optimizer") < 0.02 * figure(plain, "optimizer")
    assert figure(adapters, "activations") < figure(plain, "activations")
    teacher = [
        "--method",
        "distil",
        "--teacher",
        str(BOX / "transformer"),
        "--pretrained",
        str(BOX),
    ]
    one, four = (
        report(tmp_path, *teacher, "--distillation", loss)
        for loss in ("latent-consistency", "trajectory")
    )
    assert figure(one, "frozen teacher") == figure(plain, "weights")
    assert figure(four, "activations") == pytest.approx(4 * figure(one, "activations"), rel=0.1)


@pytest.mark.parametrize(
    "targets",
    [
        ["transformer_blocks.1.attn1.to_qkv", "transformer_blocks.2.ff.net.2"],
        ["1.attn1.to_qkv"],
        ["to_global_kv"],  # not every block has it
        ["caption_projection.linear_1", "proj_out"],
    ],
)
def test_adapters_may_be_in_some_layers_only(targets, tmp_path):
    LocalDiTTransformer2DModel(
        **SHAPE | {"use_global": True, "layer_types": ["local", "local", "local_global"]}
    ).save_pretrained(tmp_path / "model")
    options = ["--transformer", str(tmp_path / "model"), "--lora-rank", "2"]

    def activations(*more):
        argv = ["--data-root", "x", *options, "--output", str(tmp_path), *more]
        args = parse_args(argv)
        text = cost_report(
            args, args.stages[0], Size(128, 128), 16, LatentFormat(4, 8), 1, False, "no"
        )
        return figure(text, "activations")

    assert 0 < activations("--lora-target-modules", *targets) < 1.05 * activations()


def test_the_projection_of_repa_is_trained_and_the_image_encoder_is_not(tmp_path):
    folder = make_image_encoder(tmp_path / "encoder")
    options = ["--repa-weight", "0.5", "--repa-encoder", str(folder), "--repa-block", "2"]
    found, plain = report(tmp_path, *options), report(tmp_path)

    def size(model):
        return sum(parameter.numel() for parameter in model.parameters()) * 4 / 2**20

    more = size(make_projection(48, 32))
    for name, share in (("weights", 1), ("gradients", 1), ("optimizer", 2), ("averages", 0)):
        difference = figure(found, name) - figure(plain, name)
        assert difference == pytest.approx(share * more, abs=0.011), name
    encoder = size(load_latent_features(folder, vae=None))
    assert figure(found, "frozen image encoder") == pytest.approx(encoder, abs=0.006)


def test_time_is_that_of_the_pace_that_a_run_measured(tmp_path):
    assert "unknown without a measured pace" in report(tmp_path)
    line = '{"step": %d, "loss": 1.0, "images_per_second": %s}\n'
    (tmp_path / "metrics.jsonl").write_text(line % (1, 0.1) + line % (2, 0.5))
    # 10 steps of 4 pictures take 80 seconds.
    assert f"{80 / 86400:.2g} days at 0.5 pictures per second" in report(tmp_path)
