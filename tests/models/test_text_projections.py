import gc

import pytest
import torch
from torch import nn

from localdit.models import text_projections
from localdit.models.text_projections import projected, reuse_projections
from tests.tiny import tiny_components, tiny_pipeline


class Counted(nn.Linear):
    """A projection that counts its calls."""

    calls = 0

    def forward(self, text):
        self.calls += 1
        return super().forward(text)


@pytest.fixture
def text():
    return torch.randn(1, 3, 4)


def run(module, text):
    with torch.no_grad():
        return projected(text, module, [module], module)


def test_a_registered_text_is_projected_once(text):
    module, other = Counted(4, 4), Counted(4, 4)
    run(module, text), run(module, text)
    assert module.calls == 2
    reuse_projections(text)
    first = run(module, text)
    assert run(module, text) is first and module.calls == 3
    assert not torch.equal(run(other, text), first)


def test_what_is_made_of_the_projection_is_kept_as_well(text):
    first, second = Counted(4, 4), Counted(4, 4)
    reuse_projections(text)
    made = [run(second, run(first, text)) for _ in range(2)]
    assert made[0] is made[1] and (first.calls, second.calls) == (1, 1)


def change_text(module, text):
    text.mul_(2)


def change_weights(module, text):
    with torch.no_grad():
        module.weight.mul_(2)


def replace_weights(module, text):
    module.weight = nn.Parameter(2 * module.weight.detach())


def load_weights(module, text):
    module.load_state_dict({name: 2 * value for name, value in module.state_dict().items()})


@pytest.mark.parametrize("change", [change_text, change_weights, replace_weights, load_weights])
def test_a_change_is_seen(change, text):
    module = Counted(4, 4)
    reuse_projections(text)
    run(module, text)
    change(module, text)
    with torch.no_grad():
        expected = module(text)
    assert torch.equal(run(module, text), expected)


def test_hooks_and_adapters_see_each_call(text):
    module = Counted(4, 4)
    reuse_projections(text)
    run(module, text)
    handle = module.register_forward_hook(lambda module, args, output: 2 * output)
    with torch.no_grad():
        expected = module(text)
    assert torch.equal(run(module, text), expected)
    handle.remove()
    module.active_adapters = ["default"]
    calls = module.calls
    run(module, text), run(module, text)
    assert module.calls == calls + 2


def test_training_and_inference_mode_keep_nothing(text):
    module = Counted(4, 4)
    reuse_projections(text)
    assert projected(text, module, [module], module).requires_grad
    assert projected(text, module, [module], module).requires_grad
    with torch.inference_mode():
        inside = text + 1
        reuse_projections(inside)
        projected(inside, module, [module], module), projected(inside, module, [module], module)
    assert module.calls == 4


def test_results_go_with_their_text():
    gc.collect()
    module, before = Counted(4, 4), len(text_projections._KEPT)
    text = torch.randn(1, 3, 4)
    reuse_projections(text)
    run(module, text)
    assert len(text_projections._KEPT) == before + 2  # the text and its projection
    del text
    gc.collect()
    assert len(text_projections._KEPT) == before


def test_a_call_of_a_pipeline_projects_its_text_once(monkeypatch):
    pipe = tiny_pipeline()
    block = pipe.transformer.transformer_blocks[0].attn2
    calls = []
    compute = block._keys_and_values
    monkeypatch.setattr(block, "_keys_and_values", lambda text: calls.append(1) or compute(text))
    arguments = {"height": 32, "width": 32, "num_inference_steps": 3, "output_type": "latent"}

    def draw():
        return pipe("a red circle", generator=torch.Generator().manual_seed(0), **arguments).images

    kept = draw()
    assert len(calls) == 1
    with torch.inference_mode():  # where nothing is kept
        afresh = draw()
    assert len(calls) == 4
    assert torch.equal(kept, afresh)
    pipe.transformer.load_state_dict(tiny_components(1)["transformer"].state_dict())
    assert not torch.equal(draw(), kept)
