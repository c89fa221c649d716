import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn

from localdit.pipelines import LocalDiTPipeline
from localdit.training.post_hoc_ema import SIGMA_RELS, Profile, fit, gamma, main, rebuild
from localdit.training.reporting import Reporter
from localdit.training.state import PowerFunctionAverage
from tests.training.workplace import load_main, make_workplace, options, weights

STEPS = 8


def averaged(values, updates, sigma_rel):
    """Return the power-function average of values (updates, ...), summed directly in float64.

    Update i has the integral of the profile over (i - 1, i].
    """
    edges = (np.arange(updates + 1) / updates) ** (gamma(sigma_rel) + 1)
    return np.tensordot(np.diff(edges), np.asarray(values[:updates], np.float64), 1)


def test_the_exponents_are_those_of_the_paper():
    assert gamma(0.05) == pytest.approx(16.97, abs=0.01)
    assert gamma(0.1) == pytest.approx(6.94, abs=0.01)
    for sigma_rel in (0.01, 0.13, 0.28):
        g = gamma(sigma_rel)
        assert np.sqrt((g + 1) / (g + 3)) / (g + 2) == pytest.approx(sigma_rel)


@pytest.mark.parametrize("sigma_rel", SIGMA_RELS)
def test_averages_in_training_are_those_of_the_power_function(sigma_rel):
    model, generator = nn.Linear(3, 2), torch.Generator().manual_seed(0)
    average = PowerFunctionAverage(model.named_parameters(), sigma_rel)
    values = []
    for _ in range(30):
        with torch.no_grad():
            model.weight.add_(torch.randn(2, 3, generator=generator))
        values.append(model.weight.detach().clone())
        average.update(model.named_parameters())
    expected = averaged(torch.stack(values), 30, sigma_rel)
    np.testing.assert_allclose(average.averages["weight"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sigma_rel", [0.06, 0.1, 0.15, 0.2])
def test_snapshots_give_the_average_of_another_length(sigma_rel):
    """On a random walk: any two averages differ by far more than what is allowed here."""
    values = np.cumsum(np.random.default_rng(0).standard_normal((1000, 20)), axis=0)
    profiles = [Profile(t, kept) for t in range(50, 1001, 50) for kept in SIGMA_RELS]
    factors, distance = fit(profiles, Profile(1000, sigma_rel))
    kept = np.array([averaged(values, *profile) for profile in profiles])
    error = np.abs(factors @ kept - averaged(values, 1000, sigma_rel)).max()
    assert factors.sum() == pytest.approx(1)
    assert distance < 0.02
    assert error < 0.1
    assert np.abs(kept[-1] - kept[-2]).max() > 2


def test_the_distance_is_that_of_the_profiles():
    profiles, target = [Profile(6, 0.05), Profile(10, 0.1)], Profile(10, 0.2)
    factors, distance = fit(profiles, target)
    x = (np.arange(100_000) + 0.5) / 10_000

    def density(profile):
        g = gamma(profile.sigma_rel)
        return np.where(x < profile.updates, (g + 1) * x**g / profile.updates ** (g + 1), 0)

    rest = density(target) - sum(f * density(p) for f, p in zip(factors, profiles, strict=True))
    expected = np.linalg.norm(rest) / np.linalg.norm(density(target))
    assert distance == pytest.approx(expected, rel=1e-3)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    return make_workplace(tmp_path_factory.mktemp("workplace"))


@pytest.fixture(scope="module")
def train(workplace):
    """Return a function that trains, interrupted after some steps or not at all."""

    def run(output, *more, interrupted=None, expect=0):
        AcceleratorState._reset_state(reset_partial_state=True)
        argv = ["train.py", *options(workplace, output, "--max-train-steps", STEPS,
                                     "--learning-rate", "1e-2", *more)]  # fmt: skip
        advance = Reporter.advance

        def stop(reporter):
            advance(reporter)
            if reporter.step == interrupted:
                raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", argv)
            patch.setattr(Reporter, "advance", stop)
            if interrupted:
                with pytest.raises(KeyboardInterrupt):
                    load_main()()
            else:
                assert load_main()() == expect
        return output

    return run


@pytest.fixture(scope="module")
def run(train, tmp_path_factory):
    return train(tmp_path_factory.mktemp("run") / "run", "--post-hoc-ema", "--save-interval", "1",
                 "--keep-checkpoints", "100")  # fmt: skip


def raw_weights(run, step):
    folder = run / f"checkpoint-{step}/training"
    return {name: x for (file, name), x in weights(folder).items() if file == "model.safetensors"}


def test_a_pipeline_is_rebuilt_with_the_average_of_the_run(run, tmp_path):
    assert main([str(run), "--sigma-rel", "0.15", "--output", str(tmp_path / "averaged")]) == 0
    found = LocalDiTPipeline.from_pretrained(tmp_path / "averaged").transformer.state_dict()
    states = [raw_weights(run, step) for step in range(1, STEPS + 1)]
    for name, tensor in found.items():
        values = torch.stack([state[name] for state in states])
        expected = averaged(values, STEPS, 0.15)
        moved = (values[-1] - values[0]).abs().max().item()
        error = np.abs(tensor.numpy() - expected).max()
        assert error <= 0.05 * moved + 1e-3 * np.abs(expected).max(), name  # of the fit, of float16


def test_a_length_that_was_kept_is_the_last_snapshot(run, tmp_path):
    assert rebuild(run, 0.1, tmp_path / "averaged") < 1e-6
    kept, found = weights(run / f"ema-{STEPS}/0.1"), weights(tmp_path / "averaged")
    assert kept.keys() == found.keys()
    for key, tensor in kept.items():
        assert tensor.dtype == torch.float16
        torch.testing.assert_close(found[key], tensor.float(), rtol=1e-4, atol=1e-6)


def test_copied_encoders_keep_their_bits(train, tmp_path, monkeypatch):
    """Check a file system without links."""

    def refuse(*args, **kwargs):
        raise OSError

    monkeypatch.setattr(Path, "symlink_to", refuse)
    run = train(tmp_path / "run", "--post-hoc-ema", "--save-interval", "2")
    rebuild(run, 0.15, tmp_path / "averaged")
    name = "vae/diffusion_pytorch_model.safetensors"
    copied = next(run.glob(f"ema-*/0.1/{name}"))
    assert not copied.parent.is_symlink()
    assert (tmp_path / "averaged" / name).read_bytes() == copied.read_bytes()


def test_an_interrupted_run_has_the_same_snapshots_and_keeps_them(train, run, tmp_path):
    """Its checkpoints are every two steps and the last two are kept; the snapshots all stay."""
    more = ["--post-hoc-ema", "--save-interval", "2", "--resume", "auto"]
    train(tmp_path / "run", *more, interrupted=5)
    shutil.copytree(tmp_path / "run/ema-4", tmp_path / "run/ema-5")  # of a step that is repeated
    train(tmp_path / "run", *more)
    names = {path.name for path in (tmp_path / "run").glob("*-[0-9]")}
    assert names == {"ema-2", "ema-4", "ema-6", "ema-8", "checkpoint-6", "checkpoint-8"}
    for step in (2, 4, 6, 8):
        found, expected = weights(tmp_path / f"run/ema-{step}"), weights(run / f"ema-{step}")
        assert found.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[key]) for key, tensor in found.items())
        assert json.loads((tmp_path / f"run/ema-{step}/ema.json").read_text())["updates"] == step
    found, expected = (weights(folder / "checkpoint-8") for folder in (tmp_path / "run", run))
    assert ("training/ema-0.05.safetensors", "proj_out.weight") in found
    assert all(torch.equal(tensor, expected[key]) for key, tensor in found.items())


def test_adapters_are_rebuilt(train, workplace, tmp_path):
    pytest.importorskip("peft")
    run = train(
        tmp_path / "run", "--post-hoc-ema", "--save-interval", "4", "--lora-rank", "2",
        "--transformer", workplace / "pipeline/transformer",
    )  # fmt: skip
    rebuild(run, 0.05, tmp_path / "averaged")
    pipeline = LocalDiTPipeline.from_pretrained(workplace / "pipeline")
    pipeline.load_lora_weights(tmp_path / "averaged")
    kept, found = weights(run / f"ema-{STEPS}/0.05"), weights(tmp_path / "averaged")
    assert len(kept) > 0
    for key, tensor in kept.items():
        torch.testing.assert_close(found[key], tensor.float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("share", [0.1, 1.1])  # copying fails, or writing the sum in float32
def test_a_full_disk_gives_one_message(share, run, tmp_path, full_disk, capsys):
    (size,) = (f.stat().st_size for f in run.glob("ema-8/0.1/transformer/*.safetensors"))
    with full_disk(int(share * size)):
        assert main([str(run), "--sigma-rel", "0.1", "--output", str(tmp_path / "new")]) == 1
    assert "post_hoc_ema: error: [Errno 27] File too large: " in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_rebuilt_is_refused(train, run, tmp_path, capsys):
    with pytest.raises(ValueError, match="--sigma-rel is 0.3; expected more than 0 and at most"):
        rebuild(run, 0.3, tmp_path / "averaged")
    with pytest.raises(FileExistsError, match="exists: remove it"):
        rebuild(run, 0.1, tmp_path)
    assert main([str(tmp_path), "--sigma-rel", "0.1", "--output", str(tmp_path / "new")]) == 1
    assert "has no snapshots ema-STEP: train with --post-hoc-ema" in capsys.readouterr().err
    shutil.copytree(run / "ema-8", tmp_path / "ema-8", symlinks=True)
    (tmp_path / "ema-8/ema.json").write_text('{"updates": 9, "sigma_rels": [0.05, 0.1]}\n')
    with pytest.raises(ValueError, match=r"ema-8: ema.json is damaged.*; move it away"):
        rebuild(tmp_path, 0.1, tmp_path / "new")
    train(run, "--resume", "auto", expect=1)
    assert "of a run with --post-hoc-ema, not without --post-hoc-ema. Resume" in (
        capsys.readouterr().err
    )
