import pytest
import torch
from torch import nn

from localdit.core.diffusion import Objective
from localdit.training.methods import Inputs, noised_prediction
from localdit.training.methods.fine_tuning import FineTuning
from tests.tiny import TEXT_WIDTH, tiny_components


@pytest.fixture(scope="module")
def inputs():
    generator = torch.Generator().manual_seed(0)
    conditions = {
        "resolution": torch.full((3, 2), 64.0),
        "aspect_ratio": torch.ones(3, 1),
    }
    latents = torch.randn(3, 4, 8, 8, generator=generator)
    text = torch.randn(3, 5, TEXT_WIDTH, generator=generator)
    return Inputs(latents, text, torch.ones(3, 5), conditions)


def test_the_loss_of_a_sample_is_its_weighted_mean_squared_error(inputs):
    transformer = tiny_components()["transformer"].eval()
    objective = Objective(min_snr_gamma=5.0)
    method = FineTuning(transformer, objective, adapters=False)
    noise, positions = torch.randn_like(inputs.latents), torch.tensor([0.1, 0.5, 0.9])
    losses = method.losses(method.trained, inputs, noise, positions)
    prediction, target, timesteps = noised_prediction(
        transformer, objective, inputs, noise, positions
    )
    assert torch.equal(target, noise)
    expected = (prediction - noise).square().mean(dim=(1, 2, 3)) * objective.weights(timesteps)
    torch.testing.assert_close(losses, expected)


def test_the_prepared_model_is_called_and_not_the_bare_one(inputs):
    class Zero(nn.Module):
        def forward(self, latents, **conditions):
            return (torch.zeros_like(latents),)

    method = FineTuning(tiny_components()["transformer"], Objective(), adapters=False)
    noise = torch.full_like(inputs.latents, 2.0)
    losses = method.losses({"transformer": Zero()}, inputs, noise, torch.tensor([0.1, 0.2, 0.3]))
    assert losses.tolist() == [4.0] * 3


def test_adapters_leave_the_transformer_unchanged_and_save_a_third_of_the_operations(inputs):
    transformer = tiny_components()["transformer"]
    size = transformer.config.sample_size
    whole, adapters = (FineTuning(transformer, Objective(), flag) for flag in (False, True))
    assert adapters.step_flops(inputs) * 3 == whole.step_flops(inputs) * 2 > 0
    adapters.set_sample_size(2 * size)
    assert transformer.config.sample_size == size
    whole.set_sample_size(2 * size)
    assert transformer.config.sample_size == 2 * size
