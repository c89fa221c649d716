"""The text space: from prompts and captions to the states that the denoiser attends to.

Pipelines, training, encoding ahead of training and validation all encode text with `TextSpace`, so
captions and prompts are prepared alike. What differs between text encoders (T5 and its family,
decoders such as Gemma whose last hidden states serve as the caption, CLIP) is here alone.
"""

from __future__ import annotations

import logging
import weakref
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

# Far more than 120 tokens of any language. Tokenising megabytes takes seconds and gigabytes.
MAX_PROMPT_CHARACTERS = 10_000
# Text is cut or padded to a multiple of this many tokens: few lengths to compile for, and rows of
# masks that fast attention kernels accept.
TOKEN_MULTIPLE = 8
ENCODING_BATCH_SIZE = 32
CACHE_BYTES = 64 * 2**20  # 32 prompts of 120 tokens of FLAN-T5-XXL in float32
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
        ValueError: the list is empty, or a prompt is longer than `MAX_PROMPT_CHARACTERS`.
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
        if len(text) > MAX_PROMPT_CHARACTERS:
            raise ValueError(
                f"{which} has {len(text)} characters; at most {MAX_PROMPT_CHARACTERS} are "
                "accepted. Shorten it: the model reads little more than a hundred words."
            )
    return prompts


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
    """

    def __init__(self, tokenizer: Any, text_encoder: Any, cache: TextCache | None = None) -> None:
        self.tokenizer = tokenizer
        self.text_encoder = text_encoder
        self.cache = cache

    @property
    def width(self) -> int:
        """Channels of the states."""
        return text_width(self.text_encoder.config.to_dict())

    def tokenize(
        self, texts: Sequence[str], max_length: int, warn: bool = False, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Prepare and tokenise texts.

        Args:
            texts: N prompts or captions. They are lower-cased and stripped.
            max_length: tokens that a text is cut at, the end-of-sequence token included.
            warn: log a warning that quotes what was cut.
            **options: further options of the tokenizer.

        Returns:
            Token ids and attention mask (1 = token, 0 = padding), each `(N, L)` and int64.
        """
        texts = [text.lower().strip() for text in texts]
        tokens = self.tokenizer(
            texts,
            max_length=max_length,
            truncation=True,
            return_attention_mask=True,
            return_tensors="pt",
            **options,
        )
        if warn:
            for text, mask in zip(texts, tokens.attention_mask, strict=True):
                if mask.all():
                    self._warn_if_cut(text, max_length)
        return tokens.input_ids, tokens.attention_mask

    def count_tokens(self, texts: Sequence[str], max_length: int) -> list[int]:
        """Return the number of tokens of each text, after it is cut."""
        if not texts:
            return []
        texts = [text.lower().strip() for text in texts]
        tokens = self.tokenizer(texts, max_length=max_length, truncation=True)
        return [len(ids) for ids in tokens.input_ids]

    def encode(
        self, texts: Sequence[str], max_length: int, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode each text by itself, or take it from the cache.

        The states of a text depend neither on the other texts nor on what the cache holds.

        Args:
            texts: N texts.
            max_length: tokens L that a text is padded or cut to.
            device: where the text encoder computes.

        Returns:
            States `(N, L, C)` and their mask `(N, L)`, 1 = token.

        Raises:
            ValueError: if a text is not in the cache and there is no text encoder.
        """
        import torch

        input_ids, mask = self.tokenize(texts, max_length, warn=True, padding="max_length")
        if self.cache is not None:
            self.cache.serve(self.text_encoder, device)
        keys = _keys(input_ids, mask)
        states: dict[bytes, torch.Tensor] = {}
        for row, key in enumerate(keys):
            if key not in states:
                one = slice(row, row + 1)
                states[key] = self._states_of(key, input_ids[one], mask[one], device)
        return torch.stack([states[key] for key in keys]), mask.to(device)

    def encode_batch(
        self, texts: Sequence[str], max_length: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode texts together, padded to the longest; what the mask leaves out has no effect.

        Returns:
            States `(N, L, C)` and their mask `(N, L)`, 1 = token, on the encoder's device.
        """
        import torch

        device = self.text_encoder.device
        input_ids, mask = self.tokenize(texts, max_length, padding="longest")
        with torch.no_grad():
            return self._states(input_ids.to(device), mask.to(device)), mask.to(device)

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
        keys = _keys(*self.tokenize(texts, max_length, padding="max_length"))
        return self.cache is not None and all(self.cache.get(key) is not None for key in keys)

    def _states_of(
        self, key: bytes, input_ids: torch.Tensor, mask: torch.Tensor, device: torch.device
    ) -> torch.Tensor:
        """Return the states `(L, C)` of one text, cached if nothing can tell the difference."""
        import torch

        encoder, cache = self.text_encoder, self.cache
        learns = encoder is not None and (
            encoder.training  # drops other channels each time
            or (torch.is_grad_enabled() and any(p.requires_grad for p in encoder.parameters()))
        )
        cached = None if learns or cache is None else cache.get(key)
        if cached is not None:
            return cached.to(device)
        if encoder is None:
            raise ValueError(NO_ENCODER)
        states = self._states(input_ids.to(device), mask.to(device))[0]
        if not encoder.training and cache is not None:
            cache.put(key, states)
        return states

    def _states(self, input_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return the encoder's last hidden states `(N, L, C)`."""
        output = self.text_encoder(input_ids, attention_mask=mask)
        if hasattr(output, "logits"):
            raise ValueError(
                f"{type(self.text_encoder).__name__} predicts tokens. Use the model inside it, "
                "whose last hidden states serve as the caption: `text_encoder.base_model`."
            )
        return output[0]

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


def _keys(input_ids: torch.Tensor, mask: torch.Tensor) -> list[bytes]:
    """Return a cache key per text: its tokens, so that no tokenizer matters."""
    return [
        ids.numpy().tobytes() + keep.numpy().tobytes()
        for ids, keep in zip(input_ids, mask, strict=True)
    ]


def pad_states(states: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad states of texts of different lengths with zeros, to a multiple of `TOKEN_MULTIPLE`.

    Args:
        states: B tensors `(tokens, C)`.

    Returns:
        States `(B, L, C)` and their mask `(B, L)`, int64, 1 = token.
    """
    import torch

    lengths = torch.tensor([len(one) for one in states])
    longest = -(-int(lengths.max()) // TOKEN_MULTIPLE) * TOKEN_MULTIPLE
    padded = states[0].new_zeros(len(states), longest, states[0].shape[1])
    for row, one in zip(padded, states, strict=True):
        row[: len(one)] = one
    mask = torch.arange(longest) < lengths[:, None]
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
    last = int(kept.any(dim=0).nonzero().max()) + 1
    length = -(-last // TOKEN_MULTIPLE) * TOKEN_MULTIPLE
    return embeds[:, :length].contiguous(), mask[:, :length].contiguous()


class TextCache:
    """A bounded store of text states in CPU memory; the least recently used go first.

    It holds the states of one text encoder. It empties itself as soon as it serves another one, or
    the same one with other weights, dtype or device. Without a text encoder it goes on serving.

    Args:
        max_bytes: bytes to hold at most; 0 switches the cache off.
    """

    def __init__(self, max_bytes: int = CACHE_BYTES) -> None:
        self.max_bytes = max_bytes
        self._entries: OrderedDict[Hashable, torch.Tensor] = OrderedDict()
        self._encoder: weakref.ref[torch.nn.Module] | None = None
        self._state: Hashable = None

    def __len__(self) -> int:
        """Number of texts held."""
        return len(self._entries)

    @property
    def nbytes(self) -> int:
        """Size of the states held, in bytes."""
        return sum(states.nbytes for states in self._entries.values())

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
        """Return the states `(L, C)` under `key`, on the CPU, not to be changed; None if absent."""
        if key in self._entries:
            self._entries.move_to_end(key)
        return self._entries.get(key)

    def put(self, key: Hashable, states: torch.Tensor) -> None:
        """Store a copy of states `(L, C)`, unless they exceed `max_bytes` by themselves."""
        if states.nbytes > self.max_bytes:
            return
        self._entries[key] = states.detach().to("cpu", copy=True)
        self._entries.move_to_end(key)
        while self.nbytes > self.max_bytes:
            self._entries.popitem(last=False)


def encoder_state(encoder: torch.nn.Module, device: torch.device) -> Hashable:
    """Return what an encoder's results depend on and that costs nothing to read.

    PyTorch counts in-place changes of a tensor, so optimizer steps, `load_state_dict` and adapters
    show; moving between devices does not count.
    """
    import torch

    parameters = list(encoder.parameters())
    changes = sum(p._version for p in parameters if not p.is_inference())
    dtypes = tuple(sorted({str(p.dtype) for p in parameters}))
    kind = device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return len(parameters), changes, dtypes, autocast, str(device)
