import pytest
import torch

from localdit.core.diffusion import Objective
from localdit.training.data.buckets import Size
from localdit.training.methods import Inputs
from localdit.training.methods.fine_tuning import FineTuning
from localdit.training.validation import validation_losses
from tests.tiny import TEXT_WIDTH, tiny_components

SQUARE, WIDE = Size(64, 64), Size(32, 96)
SIZES = [SQUARE, WIDE]
BINS = ["0.00-0.25", "0.25-0.50", "0.50-0.75", "0.75-1.00"]


def errors(objective):
    """Return the errors of predictions."""
    return FineTuning(None, objective, adapters=False).validation_errors


def make_batch(ids, size=SQUARE, weights=None):
    """Return latents and text that depend only on the ids."""
    latents, text = [], []
    for sample in ids:
        generator = torch.Generator().manual_seed(ord(sample))
        latents.append(torch.randn(4, size.height // 8, size.width // 8, generator=generator))
        text.append(torch.randn(3, TEXT_WIDTH, generator=generator))
    conditions = {
        "resolution": torch.tensor([[float(size.height), size.width]] * len(ids)),
        "aspect_ratio": torch.full((len(ids), 1), size.width / size.height),
    }
    mask = torch.ones(len(ids), 3)
    weights = torch.ones(len(ids)) if weights is None else torch.tensor(weights)
    inputs = Inputs(torch.stack(latents), torch.stack(text), mask, conditions, weights=weights)
    return size, ids, inputs


@pytest.fixture(scope="module")
def model():
    return tiny_components()["transformer"]


def close(found, expected):
    return found.keys() == expected.keys() and all(
        found[name] == pytest.approx(expected[name], rel=1e-5) for name in expected
    )


@pytest.mark.parametrize("chosen", [Objective(), Objective("v_prediction"), Objective("flow")])
def test_losses_are_the_same_every_time_and_in_any_batches(model, chosen):
    torch.manual_seed(0)
    first = validation_losses(model, errors(chosen), [make_batch("abcd")], SIZES)
    torch.manual_seed(1)
    assert validation_losses(model, errors(chosen), [make_batch("abcd")], SIZES) == first
    apart = [make_batch("dc"), make_batch("a"), make_batch("b")]
    assert close(validation_losses(model, errors(chosen), apart, SIZES), first)
    other = validation_losses(model, errors(chosen), [make_batch("abcd")], SIZES, seed=1)
    assert other["validation/model/loss"] != first["validation/model/loss"]


def test_losses_are_means_over_samples(model):
    def losses(*batches, name="ema"):
        return validation_losses(model, errors(Objective()), batches, SIZES, name)

    both = losses(make_batch("ab"), make_batch("c", WIDE))
    one, two, three = (
        losses(batch) for batch in (make_batch("a"), make_batch("b"), make_batch("c", WIDE))
    )
    assert set(both) == {
        f"validation/ema/{size}{end}"
        for size in ("", "64x64/", "32x96/")
        for end in ("loss", *BINS)
    }
    for end in ("loss", *BINS):
        a, b = one[f"validation/ema/64x64/{end}"], two[f"validation/ema/64x64/{end}"]
        c = three[f"validation/ema/32x96/{end}"]
        assert both[f"validation/ema/64x64/{end}"] == pytest.approx((a + b) / 2, rel=1e-4)
        assert both[f"validation/ema/32x96/{end}"] == pytest.approx(c, rel=1e-4)
        assert both[f"validation/ema/{end}"] == pytest.approx((a + b + c) / 3, rel=1e-4)
    bins = [both[f"validation/ema/{end}"] for end in BINS]
    assert both["validation/ema/loss"] == pytest.approx(sum(bins) / 4)
    assert "validation/ema/32x96/loss" not in one


class Recorder(torch.nn.Module):
    """Predicts zero, and records its inputs."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.asked = []

    def forward(self, sample, timestep, **conditions):
        assert not self.training
        self.asked.append((sample, timestep))
        return (torch.zeros_like(sample),)


def test_each_sample_is_evaluated_once_per_bin():
    model = Recorder().train()
    found = validation_losses(
        model, errors(Objective("flow")), [make_batch("abc")], SIZES, num_bins=5
    )
    assert len(model.asked) == 5
    for number, (_, timesteps) in enumerate(model.asked):
        assert (timesteps >= 200 * number).all()
        assert (timesteps < 200 * (number + 1)).all()
        assert len(set(timesteps.tolist())) == 3
    assert model.training
    # The target, noise less latents, has variance 2.
    assert found["validation/model/loss"] == pytest.approx(2, abs=0.3)


def test_a_perfect_model_has_no_loss():
    chosen, (size, ids, inputs) = Objective("flow"), make_batch("ab")

    class Perfect(Recorder):
        def forward(self, sample, timestep, **conditions):
            return ((sample - inputs.latents) / (timestep / 1000).view(-1, 1, 1, 1),)

    found = validation_losses(Perfect(), errors(chosen), [(size, ids, inputs)], SIZES)
    assert found["validation/model/loss"] == pytest.approx(0, abs=1e-6)


def test_placeholders_do_not_count(model):
    expected = validation_losses(model, errors(Objective()), [make_batch("a")], SIZES)
    padded = make_batch("ax", weights=[1.0, 0.0])
    padded[2].latents[1] = torch.nan
    assert close(validation_losses(model, errors(Objective()), [padded], SIZES), expected)


def test_several_processes_return_the_losses_of_one(model):
    mine, theirs = make_batch("ab"), make_batch("c", WIDE)
    expected = validation_losses(model, errors(Objective()), [mine, theirs], SIZES)
    sums = []

    def give(tensor):
        sums.append(tensor)
        return tensor

    validation_losses(model, errors(Objective()), [theirs], SIZES, reduce=give)
    found = validation_losses(
        model, errors(Objective()), [mine], SIZES, reduce=lambda tensor: tensor + sums[0]
    )
    assert close(found, expected)
    # A process may have nothing to bring.
    alone = validation_losses(model, errors(Objective()), [], SIZES, reduce=lambda tensor: sums[0])
    assert alone["validation/model/32x96/loss"] == expected["validation/model/32x96/loss"]


def test_the_model_keeps_its_mode(model):
    model.train()
    validation_losses(model, errors(Objective()), [make_batch("a")], SIZES)
    assert model.training
    model.eval()
    with pytest.raises(ValueError, match="do not divide into"):
        validation_losses(
            model.train(), errors(Objective()), [make_batch("a", Size(64, 8))], [Size(64, 8)]
        )
    assert model.training
    model.eval()
