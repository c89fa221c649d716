"""Prompts are encoded once, and the text encoder can be released."""

import weakref
from pathlib import Path

import pytest
import torch
from diffusers.training_utils import EMAModel

from localdit.core.text import TextCache
from localdit.pipelines import LocalDiTImg2ImgPipeline, LocalDiTPipeline
from tests.tiny import tiny_components, tiny_pipeline


@pytest.fixture
def own():
    """A pipeline that no other test uses."""
    return tiny_pipeline()


@pytest.fixture
def encoded(own):
    """The number of prompts in each call of the text encoder."""
    calls = []
    own.text_encoder.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    return calls


def draw(pipe, prompt="a red circle", **arguments):
    arguments = {"num_inference_steps": 2, "output_type": "latent", **arguments}
    return pipe(prompt, generator=torch.Generator().manual_seed(0), **arguments).images


def test_a_prompt_is_encoded_once(own, encoded):
    first = draw(own, negative_prompt="bad")
    assert encoded == [1, 1]
    assert torch.equal(draw(own, " A RED circle", negative_prompt="bad"), first)
    assert encoded == [1, 1]
    own(["a cat", "a red circle", "a cat"], negative_prompt="bad", num_inference_steps=1)
    assert encoded == [1, 1, 1]
    draw(own, max_sequence_length=60)
    assert len(encoded) == 4  # the empty negative prompt; the length of the padding is no matter


def test_the_states_of_a_prompt_do_not_depend_on_other_prompts(own):
    with torch.no_grad():
        alone = own.encode_prompt("a cat")[0]
        own.prompt_cache.clear()
        own.encode_prompt("a dog")
        batch = own.encode_prompt(["a dog", "a cat", "a small red dog on a lake"])[0]
        assert torch.equal(batch[1], alone[0])


def test_the_device_may_be_a_name(own):
    with torch.no_grad():
        named, by_default = own.encode_prompt("a cat", device="cpu"), own.encode_prompt("a cat")
    assert all(map(torch.equal, named, by_default))


def test_callers_may_change_the_results(own):
    with torch.no_grad():
        expected = own.encode_prompt("a cat")[0].clone()
        own.encode_prompt("a cat")[0].zero_()
        own.encode_prompt("a cat")[0].zero_()
        assert torch.equal(own.encode_prompt("a cat")[0], expected)


def averaged(encoder):
    """Copy averaged weights into an encoder, as Diffusers' EMA does."""
    average = EMAModel(p + 1 for p in encoder.parameters())
    average.copy_to(encoder.parameters())


@pytest.mark.parametrize(
    "change",
    [
        lambda pipe: setattr(pipe, "text_encoder", tiny_components(seed=1)["text_encoder"]),
        lambda pipe: pipe.text_encoder.load_state_dict(
            tiny_components(seed=1)["text_encoder"].state_dict()
        ),
        lambda pipe: torch.nn.init.normal_(pipe.text_encoder.shared.weight),
        lambda pipe: pipe.text_encoder.to(torch.bfloat16),
        lambda pipe: pipe.text_encoder.shared.weight.data.mul_(1.5),
        lambda pipe: setattr(
            pipe.text_encoder.shared.weight, "data", pipe.text_encoder.shared.weight * 1.5
        ),
        lambda pipe: torch.nn.utils.vector_to_parameters(
            torch.nn.utils.parameters_to_vector(pipe.text_encoder.parameters()) * 1.5,
            pipe.text_encoder.parameters(),
        ),
        lambda pipe: averaged(pipe.text_encoder),
        lambda pipe: setattr(
            pipe.text_encoder.encoder.block[0].layer[-1].DenseReluDense, "act", torch.nn.Tanh()
        ),
        lambda pipe: pipe.text_encoder.encoder.block[0].register_forward_hook(
            lambda block, given, made: (made[0] * 2, *made[1:])
        ),
        lambda pipe: pipe.text_encoder.encoder.block[0].register_forward_pre_hook(
            lambda block, given: (given[0] * 2, *given[1:])
        ),
    ],
    ids=[
        "replaced", "loaded", "trained", "cast", "data changed", "data replaced", "vector",
        "averaged", "layer replaced", "hook", "hook before",
    ],
)  # fmt: skip
def test_another_or_changed_encoder_encodes_again(own, change):
    with torch.no_grad():
        before = own.encode_prompt("a cat")[0]
        change(own)
        after = own.encode_prompt("a cat")[0]
        own.prompt_cache.clear()
        assert torch.equal(after, own.encode_prompt("a cat")[0])
    assert not torch.equal(after, before)


def test_an_encoder_with_the_same_weights_elsewhere_is_the_same(own, encoded):
    """As offloading moves them."""
    draw(own)
    for parameter in own.text_encoder.parameters():
        parameter.data = parameter.data.clone()
    draw(own)
    assert len(encoded) == 2


def test_another_tokenizer_encodes_again(own):
    with torch.no_grad():
        before = own.encode_prompt("a cat")[0]
        vocabulary = own.tokenizer.get_vocab()
        other = tiny_components()["tokenizer"]
        other.add_tokens(["cat dog"])
        own.tokenizer = lambda texts, **k: other([t.replace("cat", "dog") for t in texts], **k)
        assert vocabulary["cat"] != vocabulary["dog"]
        assert not torch.equal(own.encode_prompt("a cat")[0], before)


def test_gradients_reach_the_text_encoder(own, encoded):
    with torch.no_grad():
        own.encode_prompt("a cat", do_classifier_free_guidance=False)
    own.encode_prompt("a cat", do_classifier_free_guidance=False)[0].sum().backward()
    assert own.text_encoder.shared.weight.grad.abs().sum() > 0
    assert len(encoded) == 2
    own.text_encoder.train()  # drops channels at random, so that each time counts
    with torch.no_grad():
        own.encode_prompt("a cat", do_classifier_free_guidance=False)
    assert len(encoded) == 3


def test_the_cache_is_bounded_and_forgets_the_least_recently_used():
    states = torch.ones(4, 8)  # 128 bytes
    cache = TextCache(max_bytes=300)
    cache.put("a", states)
    cache.put("b", states)
    assert cache.get("a") is not None
    cache.put("c", states)
    assert (cache.get("b"), len(cache), cache.nbytes) == (None, 2, 256)
    cache.put("large", torch.ones(100, 8))
    assert cache.get("large") is None
    assert len(cache) == 2
    states.zero_()
    assert cache.get("a").sum() == 32


def test_the_cache_can_be_switched_off(own, encoded):
    own.prompt_cache.max_bytes = 0
    draw(own)
    draw(own)
    assert len(encoded) == 4
    assert len(own.prompt_cache) == 0


def test_pipelines_made_from_one_another_share_what_was_encoded(own, encoded):
    draw(own)
    other = LocalDiTImg2ImgPipeline.from_pipe(own)
    other("a red circle", image=torch.zeros(3, 64, 64), num_inference_steps=2)
    assert len(encoded) == 2


# Offloading. The CPU stands in for an accelerator: the hooks do the same there.


def test_an_offloaded_encoder_is_not_moved_for_known_prompts(own, encoded):
    own.enable_model_cpu_offload(device="cpu")
    expected = draw(own)
    moves = []
    hook = own.text_encoder._hf_hook
    before, hook.pre_forward = (
        hook.pre_forward,
        lambda *a, **k: (moves.append(1), before(*a, **k))[1],
    )
    assert torch.equal(draw(own), expected)
    assert not moves
    assert len(encoded) == 2


# Without the text encoder


def test_known_prompts_work_without_the_text_encoder_and_others_say_why(own):
    expected = draw(own)
    own.release_text_encoder()
    assert own.text_encoder is None
    assert torch.equal(draw(own), expected)
    with pytest.raises(ValueError, match=r"no text encoder.*encoded before.*set pipe\.text_enc"):
        draw(own, "a blue square")
    with pytest.raises(ValueError, match="no text encoder"):
        draw(own, negative_prompt="blurry")
    with pytest.raises(ValueError, match="no text encoder"):
        own.encode_prompt("a blue square")
    own.text_encoder = tiny_components()["text_encoder"]
    assert torch.equal(draw(own), expected)
    assert draw(own, "a blue square").isfinite().all()


@pytest.mark.parametrize("replaced", ["by from_pipe", "later", "after the release"])
def test_without_its_encoder_a_pipeline_never_uses_the_states_of_another(own, replaced):
    """Pipelines that share a cache, one of which has its text encoder replaced."""
    encoder = tiny_components(seed=1)["text_encoder"]
    expected = draw(own)
    own.prompt_cache.max_bytes //= 2
    changes = {"text_encoder": encoder} if replaced == "by from_pipe" else {}
    other = LocalDiTPipeline.from_pipe(own, **changes)
    if replaced == "after the release":
        own.text_encoder = None
    other.text_encoder = encoder
    assert not torch.equal(draw(other), expected)
    own.release_text_encoder()
    assert torch.equal(draw(own), expected)
    if replaced != "by from_pipe":
        assert other.prompt_cache.max_bytes == own.prompt_cache.max_bytes


def test_the_text_encoder_can_be_deleted_as_any_component(own):
    expected = draw(own)
    encoder = own.text_encoder
    del own.text_encoder
    own.text_encoder = encoder
    assert torch.equal(draw(own), expected)


def test_a_prompt_encoded_by_itself_is_known_afterwards(own):
    expected = draw(own)
    own.prompt_cache.clear()
    own.encode_prompt("a red circle")  # with gradients on, as users call it
    own.release_text_encoder()
    torch.testing.assert_close(draw(own), expected, atol=1e-3, rtol=1e-5)


def test_prompts_move_to_the_transformers_dtype_after_release(own):
    draw(own)
    own.release_text_encoder()
    own.to(torch.bfloat16)
    assert draw(own).dtype == torch.bfloat16


@pytest.mark.parametrize("offload", [False, True])
def test_nothing_holds_a_released_encoder(own, offload):
    if offload:
        own.enable_model_cpu_offload(device="cpu")
    expected = draw(own)
    encoder = weakref.ref(own.text_encoder)
    own.release_text_encoder()
    assert encoder() is None
    assert torch.equal(draw(own), expected)


def test_a_pipeline_with_nothing_but_its_cache_still_encodes():
    parts = tiny_components() | {"transformer": None, "vae": None, "scheduler": None}
    pipe = LocalDiTPipeline(**parts)
    with torch.no_grad():
        expected = pipe.encode_prompt("a cat")
        pipe.release_text_encoder()
        for one, other in zip(pipe.encode_prompt("a cat", device="cpu"), expected, strict=True):
            assert torch.equal(one, other)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
def test_released_memory_goes_back_to_the_system(own):
    ballast = [torch.nn.Parameter(torch.ones(500, 1000)) for _ in range(60)]
    own.text_encoder.ballast = torch.nn.ParameterList(ballast)
    del ballast
    size = sum(p.nbytes for p in own.text_encoder.parameters())
    assert size > 100e6
    draw(own)
    before = resident_bytes()
    own.release_text_encoder()
    assert before - resident_bytes() > 0.9 * size
    assert draw(own).isfinite().all()


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
