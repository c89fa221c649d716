"""The text space: from prompts and captions to the states that the denoiser attends to.

Pipelines, training, encoding ahead of training and validation all encode text with `TextSpace`, so
captions and prompts are prepared alike. What differs between text encoders (T5 and its family,
decoders such as Gemma whose last hidden states serve as the caption, CLIP) is here alone.

There is one policy of padding. A text encoder sees each text padded on the right to a multiple of
eight tokens, or a batch padded to its longest text. States of padding are zero, and the mask keeps
them out of attention.
"""

from __future__ import annotations

import logging
import re
import threading
import weakref
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from .vocabulary import (
    prepare,
    unknown_message,
    unknown_pieces,
    unknown_words,
    unknown_words_message,
)

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

# Far more than 120 tokens of any language. Tokenising megabytes takes seconds and gigabytes.
MAX_PROMPT_CHARACTERS = 10_000
# Zero bytes, and halves of surrogate pairs, which JSON and arguments of the command line may have.
NO_CHARACTER = re.compile(r"[\0\ud800-\udfff]")
# Text is cut or padded to a multiple of this many tokens: few lengths to compile for, and rows of
# masks that fast attention kernels accept.
TOKEN_MULTIPLE = 8
ENCODING_BATCH_SIZE = 32
POSITIONS = "max_position_embeddings"  # of an encoder that has a limit, as CLIP
SAMPLED_VALUES = 8  # of each parameter, about, to notice changes
CACHE_BYTES = 64 * 2**20  # 128 prompts of 32 tokens of FLAN-T5-XXL in float32
NO_ENCODER = (
    "This pipeline has no tokenizer or no text encoder, and not all of these prompts were encoded "
    "before. Pass prompt_embeds and prompt_attention_mask and, with a guidance_scale above 1, the "
    "negative ones too; or set pipe.text_encoder (and pipe.tokenizer) again."
)


def check_prompts(prompt: str | list[str] | None, name: str = "prompt") -> list[str]:
    """Return the prompts as a list, having checked that each can be tokenised.

    Args:
        prompt: one prompt or a list of them. An empty string is a prompt, an empty list is not.
        name: the argument's name, for error messages.

    Raises:
        TypeError: something other than `str` was given.
        ValueError: the list is empty, or a prompt is longer than `MAX_PROMPT_CHARACTERS`, or has a
            zero byte or half of a surrogate pair.
    """
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, list):
        raise TypeError(f"{name} must be a str or a list of str, got {type(prompt).__name__}.")
    if not prompts:
        raise ValueError(f"{name} is an empty list: give at least one prompt.")
    for index, text in enumerate(prompts):
        which = name if isinstance(prompt, str) else f"{name}[{index}]"
        if not isinstance(text, str):
            raise TypeError(f"{which} must be a str, got {type(text).__name__}.")
        if wrong := NO_CHARACTER.search(text):
            raise ValueError(
                f"{which} has {wrong[0]!a} at position {wrong.start()}, which is not a character "
                "of text. Remove it: it comes from zero bytes, or from bytes of another encoding."
            )
        if len(text) > MAX_PROMPT_CHARACTERS:
            raise ValueError(
                f"{which} has {len(text)} characters; at most {MAX_PROMPT_CHARACTERS} are "
                "accepted. Shorten it: the model reads little more than a hundred words."
            )
    return prompts


def unused_negative_prompt(prompt: str | list[str] | None, guided: bool) -> str:
    """Return a warning about a negative prompt that is given without guidance, or ""."""
    texts = prompt if isinstance(prompt, list) else [prompt or ""]
    if guided or not any(text.strip() for text in texts):
        return ""
    return "The negative prompt has no effect: it needs a guidance scale above 1."


def text_width(config: Mapping[str, Any]) -> int:
    """Return the channels of a text encoder's states, from its configuration."""
    config = config.get("text_config") or config
    return config["d_model"] if "d_model" in config else config["hidden_size"]


class TextSpace:
    """Encode text with a tokenizer and a text encoder.

    Args:
        tokenizer: a Transformers tokenizer.
        text_encoder: a Transformers model whose last hidden states are the caption. None serves
            texts from the cache alone.
        cache: keeps the states of texts that were encoded by `encode`; None keeps nothing.
        whole_words: the tokens that the text encoder understands are whole words.
    """

    def __init__(
        self,
        tokenizer: Any,
        text_encoder: Any,
        cache: TextCache | None = None,
        whole_words: bool = False,
    ) -> None:
        self.tokenizer = tokenizer
        self.text_encoder = text_encoder
        self.cache = cache
        self.whole_words = whole_words

    @property
    def width(self) -> int:
        """Channels of the states."""
        return text_width(self.text_encoder.config.to_dict())

    def tokenize(
        self, texts: Sequence[str], max_length: int, warn: bool = False
    ) -> list[list[int]]:
        """Prepare texts and return the token ids of each, without padding.

        Args:
            texts: N prompts or captions. They are lower-cased and stripped.
            max_length: tokens that a text is cut at, the end-of-sequence token included. An encoder
                with fewer positions cuts earlier.
            warn: log warnings that quote what was cut, and pieces that the tokenizer does not know.
                The latter are quoted once as long as the cache lives, and not with `whole_words`,
                where `unknown` reports more.
        """
        if not texts:
            return []
        positions = getattr(getattr(self.text_encoder, "config", None), POSITIONS, max_length)
        limit = min(max_length, positions)
        texts = [prepare(text) for text in texts]
        tokens = self.tokenizer(texts, max_length=limit, truncation=True).input_ids
        if warn:
            for text, ids in zip(texts, tokens, strict=True):
                if len(ids) == limit:
                    self._warn_if_cut(text, limit)
            if not self.whole_words:
                self._warn_of_unknown(texts)
        return tokens

    def unknown(self, texts: Sequence[str]) -> str:
        """Return one sentence that names what is unknown in texts, or "".

        With a vocabulary of whole words, these are all words that it lacks; else, the pieces that
        the tokenizer replaces with its unknown token.
        """
        with nullcontext() if self.cache is None else self.cache.lock:  # a tokenizer has state
            if self.whole_words:
                words = unknown_words(self.tokenizer, texts)
                return unknown_words_message(words) if words else ""
            pieces = unknown_pieces(self.tokenizer, texts)
            return unknown_message(pieces) if pieces else ""

    def count_tokens(self, texts: Sequence[str], max_length: int) -> list[int]:
        """Return the number of tokens of each text, after it is cut."""
        return [len(ids) for ids in self.tokenize(texts, max_length)]

    def encode(
        self, texts: Sequence[str], max_length: int, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode each text by itself, or take it from the cache.

        The states of a text depend neither on the other texts nor on what the cache holds.

        Args:
            texts: N texts.
            max_length: tokens L that the states are padded to, and a text is cut at.
            device: where the text encoder computes.

        Returns:
            States `(N, L, C)` and their mask `(N, L)`, int64, 1 = token.
        """
        states: dict[tuple[int, ...], torch.Tensor] = {}
        with nullcontext() if self.cache is None else self.cache.lock:
            if self.cache is not None:
                self.cache.serve(self.text_encoder, device)
            tokens = [tuple(ids) for ids in self.tokenize(texts, max_length, warn=True)]
            for ids in tokens:
                if ids not in states:
                    states[ids] = self._states_of(ids, device)
        return pad_states([states[ids] for ids in tokens], max_length)

    def encode_batch(
        self, texts: Sequence[str], max_length: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode texts together, padded to the longest; padding has no effect on them.

        Returns:
            States `(N, L, C)` and their mask `(N, L)`, int64, 1 = token, on the encoder's device.
        """
        import torch

        with torch.no_grad():
            return self._states(self.tokenize(texts, max_length), self.text_encoder.device)

    def encode_unpadded(self, texts: Iterable[str], max_length: int) -> dict[str, torch.Tensor]:
        """Encode texts ahead of their use, each to the states of its own tokens.

        Texts that occur more than once are encoded once, those of similar length together.

        Returns:
            States `(tokens, C)` by text, bfloat16, on the CPU.
        """
        import torch

        ordered = sorted(set(texts), key=lambda text: (len(text), text))
        encoded: dict[str, torch.Tensor] = {}
        for start in range(0, len(ordered), ENCODING_BATCH_SIZE):
            batch = ordered[start : start + ENCODING_BATCH_SIZE]
            states, mask = self.encode_batch(batch, max_length)
            states, mask = states.to("cpu", torch.bfloat16), mask.to("cpu", torch.bool)
            encoded |= {text: states[row][mask[row]] for row, text in enumerate(batch)}
        return encoded

    def can_encode(self, texts: Sequence[str], max_length: int) -> bool:
        """Return whether there is a tokenizer, and a text encoder or the cached states."""
        if self.tokenizer is None or self.text_encoder is not None:
            return self.tokenizer is not None
        tokens = self.tokenize(texts, max_length)
        return self.cache is not None and all(
            self.cache.get(tuple(ids)) is not None for ids in tokens
        )

    def _states_of(self, ids: tuple[int, ...], device: torch.device) -> torch.Tensor:
        """Return the states `(tokens, C)` of one text, cached unless the encoder is learning."""
        import torch

        encoder, cache = self.text_encoder, self.cache
        learns = encoder is not None and (
            encoder.training  # drops other channels each time
            or (torch.is_grad_enabled() and any(p.requires_grad for p in encoder.parameters()))
        )
        cached = None if learns or cache is None else cache.get(ids)
        if cached is not None:
            return cached.to(device)
        if encoder is None:
            raise ValueError(NO_ENCODER)
        states = self._states([ids], device)[0][0, : len(ids)]
        if not encoder.training and cache is not None:
            cache.put(ids, states)
        return states

    def _states(
        self, tokens: Sequence[Sequence[int]], device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return last hidden states `(N, L, C)` and mask `(N, L)`.

        This is the one place that pads tokens: on the right, so that a decoder's tokens keep their
        places, to a multiple of `TOKEN_MULTIPLE` as far as the encoder has positions. The states of
        padding are zero.
        """
        import torch

        lengths = torch.tensor([len(ids) for ids in tokens])
        length = _rounded_up(int(lengths.max()))
        length = min(length, getattr(self.text_encoder.config, POSITIONS, length))
        padding = getattr(self.tokenizer, "pad_token_id", None) or 0
        input_ids = torch.full((len(tokens), length), padding)
        for row, ids in zip(input_ids, tokens, strict=True):
            row[: len(ids)] = torch.tensor(ids)
        mask = (torch.arange(length) < lengths[:, None]).long().to(device)
        output = self.text_encoder(input_ids.to(device), attention_mask=mask)
        if "logits" in output:
            raise ValueError(
                f"{type(self.text_encoder).__name__} predicts tokens. Use the model inside it, "
                "whose last hidden states serve as the caption: `text_encoder.base_model`."
            )
        return output[0].masked_fill(mask[..., None] == 0, 0), mask

    def _warn_if_cut(self, text: str, max_length: int) -> None:
        tokenizer = self.tokenizer
        ids = tokenizer(text, add_special_tokens=False, truncation=False, verbose=False).input_ids
        kept = max_length - tokenizer.num_special_tokens_to_add()
        if len(ids) > kept:
            logger.warning(
                "A prompt of %d tokens was cut to the first %d; left out: %r",
                len(ids),
                kept,
                tokenizer.decode(ids[kept:]),
            )

    def _warn_of_unknown(self, texts: Sequence[str]) -> None:
        pieces = unknown_pieces(self.tokenizer, texts)
        if self.cache is not None:
            pieces = self.cache.first_told(pieces)
        if pieces:
            logger.warning("%s", unknown_message(pieces))


def _rounded_up(length: int) -> int:
    return -(-length // TOKEN_MULTIPLE) * TOKEN_MULTIPLE


def pad_states(
    states: Sequence[torch.Tensor], length: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad states of texts of different lengths with zeros.

    Args:
        states: B tensors `(tokens, C)`.
        length: tokens L to pad to; by default a multiple of `TOKEN_MULTIPLE`.

    Returns:
        States `(B, L, C)` and their mask `(B, L)`, int64, 1 = token.
    """
    import torch

    lengths = torch.tensor([len(one) for one in states])
    length = _rounded_up(int(lengths.max())) if length is None else length
    padded = torch.stack(
        [torch.nn.functional.pad(one, (0, 0, 0, length - len(one))) for one in states]
    )
    mask = torch.arange(length) < lengths[:, None]
    return padded, mask.long().to(padded.device)


def cut_padding(embeds: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut off tokens that are padding in every row, down to a multiple of `TOKEN_MULTIPLE`.

    The transformer adds -10000 to the logits of padding, whose exponential is 0 in every dtype. A
    row of padding alone would weigh its tokens equally; if there is one, nothing is cut.

    Args:
        embeds: `(B, L, C)`.
        mask: `(B, L)`, 0 = padding.
    """
    kept = mask != 0
    if not kept.any(dim=1).all():
        return embeds, mask
    length = _rounded_up(int(kept.any(dim=0).nonzero().max()) + 1)
    return embeds[:, :length].contiguous(), mask[:, :length].contiguous()


class TextCache:
    """A bounded store of text states in CPU memory; the least recently used go first.

    It holds the states of one text encoder. It empties itself as soon as it serves another one, or
    the same one with other weights, layers, hooks, dtype or device, as far as `encoder_state` shows
    them. Without a text encoder it goes on serving.

    `lock` is held while texts are encoded, so that threads can share the cache. A copy of it, as
    pickle makes one, holds the same states.

    Args:
        max_bytes: bytes to hold at most; 0 switches the cache off.
    """

    def __init__(self, max_bytes: int = CACHE_BYTES) -> None:
        self.max_bytes = max_bytes
        self._entries: OrderedDict[Hashable, torch.Tensor] = OrderedDict()
        self._told: set[str] = set()
        self._encoder: weakref.ref[torch.nn.Module] | None = None
        self._state: Hashable = None
        self.lock = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the lock, and the reference to an encoder that is another one in a copy."""
        return {**vars(self), "_encoder": None, "_entries": self._entries.copy(), "lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore, with a lock of its own."""
        vars(self).update(state, lock=threading.RLock())

    def __len__(self) -> int:
        """Number of texts held."""
        return len(self._entries)

    @property
    def nbytes(self) -> int:
        """Size of the states held, in bytes."""
        return sum(states.nbytes for states in list(self._entries.values()))

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()

    def serve(self, encoder: torch.nn.Module | None, device: torch.device) -> None:
        """Hold the states of `encoder` as it is now, computing on `device`, and of no other.

        With None, the states of the last encoder stay.
        """
        if encoder is None:
            return
        state = encoder_state(encoder, device)
        if self._encoder is None or self._encoder() is not encoder or self._state != state:
            self.clear()
        self._encoder, self._state = weakref.ref(encoder), state

    def get(self, key: Hashable) -> torch.Tensor | None:
        """Return the states `(tokens, C)` under `key`, on the CPU, or None. Do not change them."""
        if key in self._entries:
            self._entries.move_to_end(key)
        return self._entries.get(key)

    def put(self, key: Hashable, states: torch.Tensor) -> None:
        """Store a copy of states `(tokens, C)`, unless they exceed `max_bytes` by themselves."""
        if states.nbytes > self.max_bytes:
            return
        import torch

        with torch.inference_mode(False):  # what is kept can be used in and out of that mode
            self._entries[key] = states.detach().to("cpu", copy=True)
        self._entries.move_to_end(key)
        while self.nbytes > self.max_bytes:
            self._entries.popitem(last=False)

    def first_told(self, pieces: Mapping[str, int]) -> dict[str, int]:
        """Return the pieces of text that were not passed to this method before."""
        if len(self._told) > MAX_PROMPT_CHARACTERS:
            self._told.clear()
        new = {piece: count for piece, count in pieces.items() if piece not in self._told}
        self._told.update(new)
        return new


def encoder_state(encoder: torch.nn.Module, device: torch.device) -> Hashable:
    """Return what an encoder's results depend on and that costs little to read.

    PyTorch counts in-place changes of a tensor, except those of its `data`. These, and other data,
    show in a few values of each parameter. The place of the weights does not count, so that an
    encoder may move between devices.
    """
    import torch

    parameters = list(encoder.parameters())
    changes = sum(p._version for p in parameters if not p.is_inference())
    modules = tuple(
        (id(one), *one._forward_pre_hooks, *one._forward_hooks) for one in encoder.modules()
    )
    kind = device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return modules, changes, _samples(parameters), autocast, str(device)


def _samples(parameters: Iterable[torch.Tensor]) -> Hashable:
    """Return the bytes of some values of each parameter, spread over it, by dtype.

    Tensors of other libraries, which hold quantized weights, and those without memory are left out.
    """
    import torch

    samples: dict[tuple[str, torch.device], list[torch.Tensor]] = {}
    for tensor in (parameter.data for parameter in parameters):
        if type(tensor) is torch.Tensor and not tensor.is_meta:
            some = tensor.flatten()[:: max(1, tensor.numel() // SAMPLED_VALUES)]
            samples.setdefault((str(tensor.dtype), tensor.device), []).append(some)
    return tuple(
        (dtype, torch.cat(some).view(torch.uint8).cpu().numpy().tobytes())
        for (dtype, _), some in samples.items()
    )
