import json
import math

import pytest
import torch

from localdit.core.diffusion import Objective
from localdit.models import LocalDiTTransformer2DModel
from localdit.training.initialization import (
    encoder_sources,
    initialize_weights,
    settle_objective,
)
from localdit.training.methods.distillation import LatentConsistency
from localdit.training.methods.fine_tuning import FineTuning
from localdit.training.options import parse_args


@pytest.fixture(scope="module")
def transformer():
    torch.manual_seed(0)
    model = LocalDiTTransformer2DModel(
        num_attention_heads=3, attention_head_dim=32, num_layers=2, sample_size=8,
        caption_channels=48, use_global=True, use_additional_conditions=True,
    )  # fmt: skip
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, 7.0)
    initialize_weights(model)
    return model


def test_linear_layers_are_xavier_uniform(transformer):
    block = transformer.transformer_blocks[1]
    embedding = transformer.pos_embed.proj.weight.flatten(1)
    for weight in (block.attn1.to_qkv.weight, block.ff.net[2].weight, embedding):
        fan_out, fan_in = weight.shape
        bound = math.sqrt(6 / (fan_in + fan_out))
        assert bound * 0.95 < weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.06)


def test_conditioning_layers_have_a_small_deviation(transformer):
    for weight in (
        transformer.adaln_single.linear.weight,
        transformer.adaln_single.emb.timestep_embedder.linear_1.weight,
        transformer.adaln_single.emb.resolution_embedder.linear_1.weight,
        transformer.adaln_single.emb.aspect_ratio_embedder.linear_1.weight,
        transformer.caption_projection.linear_2.weight,
    ):
        assert weight.std().item() == pytest.approx(0.02, rel=0.06)


def test_biases_and_outputs_are_zero(transformer):
    for name, parameter in transformer.named_parameters():
        zero = name.endswith((".bias", "rel_pos_bias", "attn2.to_out.0.weight"))
        zero = zero or name == "proj_out.weight"
        assert (parameter == 0).all() == zero, name


def test_an_untrained_model_predicts_zero(transformer):
    conditions = {"resolution": torch.ones(1, 2), "aspect_ratio": torch.ones(1, 1)}
    sample = transformer(
        torch.randn(1, 4, 8, 8),
        torch.randn(1, 3, 48),
        torch.tensor([10]),
        conditions,
        return_dict=False,
    )[0]
    assert (sample == 0).all()


def says(folder, kind, **settings):
    """Write a scheduler beside a transformer, and return the transformer's folder."""
    (folder / "scheduler").mkdir(parents=True)
    config = {"_class_name": "DDIMScheduler"} | ({"prediction_type": kind} if kind else {})
    config |= settings
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(config))
    (folder / "transformer").mkdir()
    return folder / "transformer"


def settled(*options, checkpoint=None):
    args = parse_args(["--data-root", "x", *map(str, options)])
    message = settle_objective(args, checkpoint)
    return args.prediction_type, message


def test_the_scheduler_beside_the_weights_says_what_they_predict(tmp_path):
    velocity, silent = says(tmp_path / "v", "v_prediction"), says(tmp_path / "silent", None)
    kind, message = settled("--transformer", velocity)
    assert kind == "v_prediction"
    assert f"--transformer {velocity} comes with a scheduler for it" in message
    assert settled("--transformer", velocity, "--prediction-type", kind) == (kind, None)
    assert settled("--transformer", silent) == ("epsilon", None)
    assert settled("--transformer", silent, "--prediction-type", "flow") == ("flow", None)
    assert settled() == ("epsilon", None)
    distil = ["--method", "knowledge-distillation", "--teacher", velocity]
    assert settled(*distil)[0] == "v_prediction"
    assert settled(*distil, "--transformer", silent)[0] == "v_prediction"
    flow = says(tmp_path / "flow", "flow_prediction")
    assert settled("--transformer", flow, "--flow-shift", "3")[0] == "flow"


def test_the_settings_beside_the_weights_do_not_depend_on_the_name_of_their_folder(
    tmp_path, monkeypatch
):
    velocity = says(tmp_path / "v", "v_prediction")
    (tmp_path / "v/model_index.json").write_text('{"guidance_scale": 2.0}')
    (tmp_path / "link").symlink_to(velocity)
    for working, name in ((velocity, "."), (tmp_path, "link"), (tmp_path, "v/transformer")):
        monkeypatch.chdir(working)
        assert settled("--transformer", name)[0] == "v_prediction"
        args = parse_args(["--data-root", "x", "--transformer", name])
        sampling = FineTuning.sampling(args, Objective("v_prediction"), args.transformer)
        assert sampling.settings.guidance_scale == 2
        distil = ["--method", "distil", "--teacher", name]
        args = parse_args(["--data-root", "x", *distil])
        assert LatentConsistency.settings(args, 2)["guidance_scale"] == 2


def shift(*options, checkpoint=None):
    args = parse_args(["--data-root", "x", *map(str, options)])
    message = settle_objective(args, checkpoint)
    return args.flow_shift, message


def test_the_scheduler_beside_the_weights_says_their_shift(tmp_path):
    three = says(tmp_path / "3", "flow_prediction", flow_shift=3.0)
    two = says(tmp_path / "2", None, _class_name="FlowMatchLCMScheduler", shift=2)
    found, message = shift("--transformer", three)
    assert (
        found == 3
        and f"The flow shift is 3, that of the scheduler beside --transformer {three}" in message
    )
    assert shift("--transformer", two)[0] == 2
    assert shift("--transformer", three, "--flow-shift", "1")[0] == 1
    assert shift("--method", "distil", "--teacher", three)[0] == 3
    assert shift("--transformer", says(tmp_path / "v", "v_prediction", flow_shift=3.0))[0] == 1
    assert shift() == (1, None)
    both = ["--method", "distil", "--teacher", three, "--transformer", two]
    with pytest.raises(
        ValueError, match=r"--teacher .* \(3\) and .* \(2\) differ in shift: give --fl"
    ):
        shift(*both)
    assert shift(*both, "--flow-shift", "4")[0] == 4
    (tmp_path / "training").mkdir()
    values = {"options": {"prediction_type": "flow", "flow_shift": 5.0}}
    (tmp_path / "training/state.json").write_text(json.dumps(values))
    assert shift("--transformer", three, "--resume", "auto", checkpoint=tmp_path) == (5, None)
    for wrong in ("3", None, -1, float("nan")):
        name = says(tmp_path / f"wrong {wrong}", "flow_prediction", flow_shift=wrong)
        with pytest.raises(ValueError, match="flow_shift is .*; expected a number above 0"):
            shift("--transformer", name)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("epsilon", {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}),
        ("v_prediction", {"rescale_betas_zero_snr": True}),
        (None, {"trained_betas": [0.1, 0.2]}),
        ("epsilon", {"num_train_timesteps": 500}),
        ("flow_prediction", {"num_train_timesteps": 500}),
    ],
)
def test_weights_of_another_noise_schedule_are_refused(tmp_path, kind, settings):
    other = says(tmp_path / "other", kind, **settings)
    for named in (
        ["--transformer", other],
        ["--transformer", other, "--lora-rank", "2"],
        ["--method", "knowledge-distillation", "--teacher", other],
    ):
        (what,) = {"--transformer", "--teacher"} & set(named)
        (name, value), *_ = settings.items()
        with pytest.raises(
            ValueError, match=rf"{what} .* another noise schedule \(.*{name} "
        ) as found:
            settled(*named)
        assert str(value) in str(found.value)
    for_sampling = {"use_karras_sigmas": True, "solver_order": 3, "timestep_spacing": "trailing"}
    ours = {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}
    fine = says(tmp_path / "fine", "epsilon", **for_sampling, **ours)
    assert settled("--transformer", fine)[0] == "epsilon"


def test_weights_and_options_that_contradict_each_other_are_refused(tmp_path):
    noise, velocity = says(tmp_path / "n", "epsilon"), says(tmp_path / "v", "v_prediction")
    distil = ["--method", "knowledge-distillation", "--teacher", velocity]
    for options, message in [
        (["--transformer", velocity, "--prediction-type", "epsilon"],
         f"is epsilon, but --transformer {velocity} comes with .* give --prediction-type v_pred"),
        ([*distil, "--prediction-type", "flow"], "is flow, but --teacher .* v_prediction"),
        ([*distil, "--transformer", noise], "The schedulers beside --teacher .* differ"),
        (["--method", "distil", "--teacher", velocity, "--teacher-steps", "600"],
         "--teacher-steps: A grid of 600 .* as with 500.$"),
        (["--transformer", says(tmp_path / "x", "sample")], "for sample, which can't be trained"),
        (["--transformer", velocity, "--flow-shift", "3"], "--flow-shift is for"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            settled(*options)
    for content in ("[1]", "{", "[" * 100_000):
        (tmp_path / "v/scheduler/scheduler_config.json").write_text(content)
        with pytest.raises(ValueError, match=r"transformer: .*scheduler_config\.json"):
            settled("--transformer", velocity)


def test_a_resumed_run_keeps_its_prediction_type(tmp_path):
    velocity = says(tmp_path / "v", "v_prediction")
    (tmp_path / "training").mkdir()
    values = {"options": {"prediction_type": "epsilon"}}
    (tmp_path / "training/state.json").write_text(json.dumps(values))
    resumed = ["--transformer", velocity, "--resume", "auto"]
    assert settled(*resumed, checkpoint=tmp_path) == ("epsilon", None)
    assert settled(*resumed)[0] == "v_prediction"  # nothing to resume yet
    assert settled("--resume", "auto") == ("epsilon", None)
    with pytest.raises(ValueError, match="is epsilon, but --transformer"):  # it stays frozen
        settled(*resumed, "--lora-rank", "2", checkpoint=tmp_path)


def test_the_option_of_a_part_comes_before_the_pipeline(tmp_path):
    def sources(*options):
        return encoder_sources(parse_args(["--data-root", "data", *map(str, options)]), OTHERWISE)

    pipeline = ["--pretrained", tmp_path]
    assert sources() == OTHERWISE
    assert set(sources(*pipeline).values()) == {str(tmp_path)}
    assert sources("--vae", "own")["vae"] == "own"
    named = sources(*pipeline, "--vae", "own", "--text-encoder", "t5")
    assert named == {"tokenizer": "t5", "text_encoder": "t5", "vae": "own"}
    assert sources(*pipeline, "--tokenizer", "own") == {
        "tokenizer": "own", "text_encoder": str(tmp_path), "vae": str(tmp_path),
    }  # fmt: skip


OTHERWISE = {"tokenizer": "a", "text_encoder": "b", "vae": "c"}
