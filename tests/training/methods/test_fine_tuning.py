from argparse import Namespace

import pytest
import torch
from torch import nn

from localdit.core.diffusion import Objective
from localdit.models.flops import forward_flops
from localdit.models.windows import Route
from localdit.training.methods import Inputs, noised_prediction
from localdit.training.methods.fine_tuning import Alignment, FineTuning, Routing
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
    prediction, target, timesteps, _ = noised_prediction(
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


def gradient(method, inputs, noise, positions, losses=None):
    """Return the losses and the gradient of the transformer."""
    method.transformer.zero_grad()
    losses = method.losses(method.trained, inputs, noise, positions) if losses is None else losses
    losses.sum().backward()
    return losses.detach(), [p.grad.clone() for p in method.transformer.parameters()]


def assert_gradient(method, inputs, noise, positions, expected_losses):
    """Check that the losses show the plain term and have the gradient of other losses."""
    plain = FineTuning(method.transformer, method.objective, adapters=False)
    shown, _ = gradient(plain, inputs, noise, positions)
    losses, found = gradient(method, inputs, noise, positions)
    assert torch.equal(losses, shown)
    _, expected = gradient(method, inputs, noise, positions, expected_losses)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "objective",
    [Objective(min_snr_gamma=5.0), Objective("v_prediction"), Objective("flow")],
    ids=lambda one: one.prediction_type,
)
def test_contrast_moves_away_from_the_next_sample(objective, inputs):
    transformer = tiny_components()["transformer"].eval()
    method = FineTuning(transformer, objective, False, contrastive_weight=0.25)
    noise, positions = torch.randn_like(inputs.latents), torch.tensor([0.1, 0.5, 0.9])
    inputs = inputs._replace(weights=torch.tensor([1.0, 0.0, 1.0]))
    prediction, target, timesteps, _ = noised_prediction(
        transformer, objective, inputs, noise, positions
    )
    # The second one is a placeholder: the first is compared with the third, and the third with it.
    other = objective.target(inputs.latents[[2, 2, 0]], noise[[2, 2, 0]], timesteps)
    errors = [(prediction - one).square().mean(dim=(1, 2, 3)) for one in (target, other)]
    expected = (errors[0] - 0.25 * errors[1]) * objective.weights(timesteps)
    assert_gradient(method, inputs, noise, positions, expected)


def test_a_sample_that_is_alone_has_no_contrast(inputs):
    transformer = tiny_components()["transformer"].eval()
    method = FineTuning(transformer, Objective("flow"), False, contrastive_weight=0.25)
    noise, positions = torch.randn_like(inputs.latents), torch.tensor([0.1, 0.5, 0.9])
    inputs = inputs._replace(weights=torch.tensor([0.0, 1.0, 0.0]))
    plain = FineTuning(transformer, Objective("flow"), False)
    found, expected = (
        gradient(
            one, inputs, noise, positions, one.losses(one.trained, inputs, noise, positions)[1]
        )
        for one in (method, plain)
    )
    assert all(torch.equal(a, b) for a, b in zip(found[1], expected[1], strict=True))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_alignment_moves_the_features_of_a_block_towards_those_of_a_later_one(
    checkpointing, inputs
):
    transformer = tiny_components(num_layers=4)["transformer"]
    if checkpointing:
        transformer.enable_gradient_checkpointing()
    outputs = []
    for block in transformer.transformer_blocks:
        block.register_forward_hook(lambda block, _, output: outputs.append(output))
    objective = Objective("v_prediction", min_snr_gamma=5.0)
    method = FineTuning(transformer, objective, False, alignment=Alignment(0.5, (0, 2)))
    noise, positions = torch.randn_like(inputs.latents), torch.tensor([0.1, 0.5, 0.9])
    prediction, target, timesteps, _ = noised_prediction(
        transformer, objective, inputs, noise, positions
    )
    early, late = outputs[0], outputs[2].detach()
    lengths = early.norm(dim=2) * late.norm(dim=2)
    cosines = (early * late).sum(dim=2) / lengths  # of each token
    errors = (prediction - target).square().mean(dim=(1, 2, 3)) * objective.weights(timesteps)
    assert_gradient(method, inputs, noise, positions, errors - 0.5 * cosines.mean(dim=1))


@pytest.mark.parametrize(
    ("layers", "blocks", "expected"),
    [(28, None, (7, 15)), (18, None, (4, 9)), (6, None, (1, 2)), (6, [1, 6], (0, 5))],
)
def test_blocks_to_align(layers, blocks, expected):
    args = Namespace(alignment_weight=0.5, alignment_blocks=blocks)
    assert Alignment.from_options(args, layers) == (0.5, expected)


@pytest.mark.parametrize("blocks", [[0, 2], [2, 2], [3, 2], [2, 7]])
def test_blocks_that_are_not_there_can_not_be_aligned(blocks):
    with pytest.raises(ValueError, match=f"--alignment-blocks is {blocks[0]} {blocks[1]}; exp"):
        Alignment.from_options(Namespace(alignment_weight=0.5, alignment_blocks=blocks), 6)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_routing_takes_the_rectangle_that_the_samples_drew(checkpointing, inputs):
    transformer = tiny_components(num_layers=4)["transformer"]
    if checkpointing:
        transformer.enable_gradient_checkpointing()
    objective = Objective("flow")
    method = FineTuning(
        transformer, objective, False, contrastive_weight=0.25,
        alignment=Alignment(0.5, (0, 1)), routing=Routing(0.5, range(1, 3)),
    )  # fmt: skip
    inputs = inputs._replace(
        weights=torch.ones(3), places=torch.tensor([[0.0, 0.0], [0.99, 0.0], [0.0, 0.99]])
    )
    noise, positions = torch.randn_like(inputs.latents), torch.tensor([0.1, 0.5, 0.9])
    # Maps of 4 x 4 tokens have 2 x 2 windows, and half of them are 1 x 2.
    first = torch.arange(8)
    route = Route(range(1, 3), 2, 4, torch.stack([first, first + 8, first]))
    found = noised_prediction(
        transformer, objective, inputs, noise, positions, route=route, feature_blocks=(0, 1)
    )
    other = noise.roll(-1, 0) - inputs.latents.roll(-1, 0)
    errors = (found.prediction - found.target).square().mean(dim=(1, 2, 3))
    cosines = torch.cosine_similarity(found.features[0], found.features[1].detach(), dim=2)
    assert cosines.shape == (3, 8)
    expected = (
        errors
        - 0.25 * (found.prediction - other).square().mean(dim=(1, 2, 3))
        - 0.5 * cosines.mean(dim=1)
    )
    losses, gradients = gradient(method, inputs, noise, positions)
    assert torch.equal(losses, errors)
    _, wanted = gradient(method, inputs, noise, positions, expected)
    for one, two in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)
    sizes = (transformer.config, 8, 8, 5)
    assert method.step_flops(inputs) == 9 * forward_flops(*sizes, route) < 9 * forward_flops(*sizes)
    plain = FineTuning(transformer, objective, adapters=False)
    arguments = (transformer, inputs, noise, positions)
    assert torch.equal(method.validation_errors(*arguments), plain.validation_errors(*arguments))


@pytest.mark.parametrize(
    ("layers", "blocks", "expected"),
    [(28, None, range(2, 24)), (18, None, range(1, 15)), (6, None, range(1, 5)),
     (3, None, range(1, 2)), (6, [2, 2], range(1, 2)), (2, [1, 2], range(2))],
)  # fmt: skip
def test_blocks_to_skip(layers, blocks, expected):
    args = Namespace(token_routing=0.5, routing_blocks=blocks)
    assert Routing.from_options(args, layers) == (0.5, expected)


@pytest.mark.parametrize("blocks", [[0, 2], [3, 2], [2, 7]])
def test_blocks_that_are_not_there_can_not_be_skipped(blocks):
    with pytest.raises(ValueError, match=f"--routing-blocks is {blocks[0]} {blocks[1]}; expected"):
        Routing.from_options(Namespace(token_routing=0.5, routing_blocks=blocks), 6)


def test_transformers_with_too_few_blocks_for_the_defaults_are_refused():
    args = Namespace(token_routing=0.5, routing_blocks=None)
    for layers in (1, 2):
        with pytest.raises(ValueError, match=f"--token-routing skips .* has {layers} blocks: name"):
            Routing.from_options(args, layers)
    with pytest.raises(ValueError, match="--alignment-weight is for .* has 1 block: leave it out"):
        Alignment.from_options(Namespace(alignment_weight=0.5, alignment_blocks=None), 1)


@pytest.mark.parametrize(("share", "size"), [(0.5, (4, 16)), (0.5, (16, 7)), (0.1, (8, 8))])
def test_maps_without_a_rectangle_are_refused(share, size):
    with pytest.raises(ValueError, match=f"but maps of {size[0]} x {size[1]} tokens have"):
        Routing(share, range(1, 3)).rectangle(*size, window_size=4)
