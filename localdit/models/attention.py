"""The attention of LocalDiT: one module, three processors that can be swapped.

`LocalDiTAttention` owns the weights. Its processor turns packed queries, keys and values of a map
of tokens into what they attend to: within shifted windows (`LocalAttnProcessor`), with a global
context beside them (`LocalGlobalAttnProcessor`), or over the whole map (`FullAttnProcessor`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from einops import rearrange
from torch import nn

from .global_context import GlobalContext
from .rope import apply_rope, rope_angles
from .windows import WindowLayout, padded, relative_position_index, window_layout


class RMSNorm(nn.Module):
    """Root mean square normalisation over the last axis (Zhang & Sennrich, 2019), in float32 at
    least."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        x = hidden_states.to(compute_dtype(hidden_states))
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return (x * self.weight.to(x.dtype)).to(hidden_states.dtype)


def compute_dtype(tensor: torch.Tensor) -> torch.dtype:
    """The dtype in which norms and rotations are computed: float32, or float64 for float64."""
    return torch.promote_types(tensor.dtype, torch.float32)


class LocalDiTAttention(nn.Module, AttentionModuleMixin):
    """Self-attention over a map of tokens, computed by its `processor`.

    The module adds its own input to its output: trained weights depend on it.

    Args:
        num_heads, head_dim: heads and channels per head; `head_dim` a multiple of 4 where
            `do_rope`.
        window_size, shift_size: side of a window, and roll of the map before it is cut, in tokens.
        layer_type: "local", "local_global" or "full": the processor to start with, and so the
            weights to own (a relative position bias for windows, a `GlobalContext` for
            "local_global").
        do_rope: whether queries and keys are turned by their position.
        qk_norm_eps: epsilon of the RMSNorm on queries and keys.
        dropout: probability of dropping an output channel in training.
    """

    _supports_qkv_fusion = False  # always fused

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        window_size: int,
        shift_size: int = 0,
        layer_type: str = "local",
        do_rope: bool = True,
        qk_norm_eps: float = 1e-10,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if layer_type not in PROCESSORS:
            raise ValueError(f"Layer type {layer_type!r} is none of {', '.join(PROCESSORS)}.")
        if do_rope and head_dim % 4:
            raise ValueError(
                f"`attention_head_dim` is {head_dim}: with `do_rope` it has to be a multiple of 4, "
                "two angles for each of two axes."
            )
        dim = num_heads * head_dim
        self.num_heads, self.head_dim = num_heads, head_dim
        self.window_size, self.shift_size = window_size, shift_size
        self.do_rope = do_rope

        self.to_qkv = nn.Linear(dim, 3 * dim)
        self.norm_q = RMSNorm(head_dim, qk_norm_eps)
        self.norm_k = RMSNorm(head_dim, qk_norm_eps)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim), nn.Dropout(dropout)])

        self.local_rel_pos_bias: nn.Parameter | None = None
        if layer_type != "full":
            self.local_rel_pos_bias = nn.Parameter(
                torch.zeros((2 * window_size - 1) ** 2, num_heads)
            )
        self.global_context: GlobalContext | None = None
        if layer_type == "local_global":
            self.global_context = GlobalContext(num_heads, head_dim, window_size)
        self.processor: Any = PROCESSORS[layer_type]()

    def set_processor(self, processor: Any) -> None:
        """Compute with another processor from now on; the weights stay.

        Raises:
            ValueError: if the processor needs a global context and the module has none.
        """
        if isinstance(processor, LocalGlobalAttnProcessor) and self.global_context is None:
            raise ValueError(
                "This attention has no weights for a global context. Build the model with "
                "`use_global=True` (or `layer_types`) to use `LocalGlobalAttnProcessor`."
            )
        super().set_processor(processor)

    def forward(self, hidden_states: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Attend within a map.

        Args:
            hidden_states: `(B, height * width, C)`, row-major.
            height, width: size of the map in tokens.
        """
        attended = self.processor(self, self.to_qkv(hidden_states), height, width)
        to_out, dropout = self.to_out
        return dropout(to_out(attended)) + hidden_states

    def rotate(self, x: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Turn `(..., height * width, heads, head_dim)` by position, where `do_rope`."""
        if not self.do_rope:
            return x
        angles = rope_angles(height, width, self.head_dim, x.device, compute_dtype(x))
        return apply_rope(x, angles)


class _AttnProcessor:
    """What the processors share: the attention backend, which Diffusers sets by these two names.

    A processor of self-attention is called with `(attn, qkv, height, width)`, where `qkv` is
    `(B, N, 3 C)`: queries, keys and values of all tokens, in row-major order and before norms and
    rotation. It returns `(B, N, C)`.
    """

    _attention_backend: Any = None
    _parallel_config: Any = None

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`softmax(q k^T / sqrt(d) + attn_mask) v` on `(B, tokens, heads, head_dim)`."""
        return dispatch_attention_fn(
            query,
            key,
            value,
            attn_mask=attn_mask,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )


class LocalAttnProcessor(_AttnProcessor):
    """Attention within shifted windows (Swin Transformer, section 3.2)."""

    def __call__(
        self, attn: LocalDiTAttention, qkv: torch.Tensor, height: int, width: int
    ) -> torch.Tensor:
        w = attn.window_size
        layout = window_layout(height, width, w, attn.shift_size, qkv.device)
        windows = qkv.index_select(1, layout.order)
        query, key, value = rearrange(
            windows, "b (n l) (three h d) -> three (b n) l h d", three=3, l=w * w, h=attn.num_heads
        )
        # Rotations enter the logits through differences of positions alone, and tokens that see
        # each other lie together on the map: positions within the window serve for every window.
        query = attn.rotate(attn.norm_q(query), w, w)
        key = attn.rotate(attn.norm_k(key), w, w)
        bias = window_bias(attn.local_rel_pos_bias, layout, w, qkv.shape[0], qkv.dtype)
        out = self.attend(query, key, value, bias)
        out = rearrange(out, "(b n) l h d -> b (n l) (h d)", b=qkv.shape[0])
        return out.index_select(1, layout.inverse)


class LocalGlobalAttnProcessor(_AttnProcessor):
    """The mean of window attention and of the window's look at features of the whole map."""

    def __call__(
        self, attn: LocalDiTAttention, qkv: torch.Tensor, height: int, width: int
    ) -> torch.Tensor:
        assert attn.global_context is not None  # `set_processor` has seen to it
        context, w = attn.global_context, attn.window_size
        layout = window_layout(height, width, w, attn.shift_size, qkv.device)
        query, key, value = rearrange(
            qkv, "b n (three h d) -> three b n h d", three=3, h=attn.num_heads
        )
        query = attn.rotate(attn.norm_q(query), height, width)
        key = attn.rotate(attn.norm_k(key), height, width)
        global_key, global_value = rearrange(
            context.to_global_kv(key.flatten(2)),
            "b n (two h d) -> two b n h d",
            two=2,
            h=attn.num_heads,
        )
        global_query = self._global_query(attn, query, height, width)

        def cut(x: torch.Tensor) -> torch.Tensor:
            return rearrange(x.index_select(1, layout.order), "b (n l) h d -> (b n) l h d", l=w * w)

        batch = qkv.shape[0], qkv.dtype
        local_bias = window_bias(attn.local_rel_pos_bias, layout, w, *batch)
        global_bias = window_bias(context.global_rel_pos_bias, layout, w, *batch)
        out = self.attend(cut(query), cut(key), cut(value), local_bias)
        out = out + self.attend(global_query, cut(global_key), cut(global_value), global_bias)
        out = rearrange(out / 2, "(b n) l h d -> b (n l) (h d)", b=qkv.shape[0])
        return out.index_select(1, layout.inverse)

    @staticmethod
    def _global_query(
        attn: LocalDiTAttention, query: torch.Tensor, height: int, width: int
    ) -> torch.Tensor:
        """Features of the padded and rolled map, cut into windows: `(B * windows, l, h, d)`."""
        assert attn.global_context is not None
        w, shift = attn.window_size, attn.shift_size
        image = rearrange(query, "b (y x) h d -> b (h d) y x", y=height)
        image = F.pad(image, (0, padded(width, w) - width, 0, padded(height, w) - height))
        image = image.roll((-shift, -shift), dims=(2, 3))
        image = attn.global_context.query_feat_extract(image)
        return rearrange(
            image, "b (h d) (y i) (x j) -> (b y x) (i j) h d", h=attn.num_heads, i=w, j=w
        )


class FullAttnProcessor(_AttnProcessor):
    """Attention of every token to every other: the same model without windows, to compare with."""

    def __call__(
        self, attn: LocalDiTAttention, qkv: torch.Tensor, height: int, width: int
    ) -> torch.Tensor:
        query, key, value = rearrange(
            qkv, "b n (three h d) -> three b n h d", three=3, h=attn.num_heads
        )
        query = attn.rotate(attn.norm_q(query), height, width)
        key = attn.rotate(attn.norm_k(key), height, width)
        return self.attend(query, key, value).flatten(2)


PROCESSORS: dict[str, type[_AttnProcessor]] = {
    "local": LocalAttnProcessor,
    "local_global": LocalGlobalAttnProcessor,
    "full": FullAttnProcessor,
}


def window_bias(
    table: torch.Tensor | None,
    layout: WindowLayout,
    window_size: int,
    batch_size: int,
    dtype: torch.dtype,
) -> torch.Tensor | None:
    """What is added to the logits of each window: relative position bias, and -inf where hidden.

    Args:
        table: `((2 w - 1)**2, heads)`, or None for no bias.
        batch_size: number of maps in the batch.

    Returns:
        `(1 or batch_size * num_windows, heads or 1, w**2, w**2)`; None where there is nothing to
        add.
    """
    if table is None and layout.hidden is None:
        return None
    bias = torch.zeros(1, 1, 1, dtype=dtype, device=layout.order.device)
    if table is not None:
        index = relative_position_index(window_size, table.device)
        bias = table.to(dtype)[index].permute(2, 0, 1)  # (heads, l, l)
    if layout.hidden is None:
        return bias[None]
    bias = torch.where(layout.hidden[:, None], -torch.inf, bias)  # (num_windows, heads, l, l)
    return bias.expand(batch_size, *bias.shape).flatten(0, 1)


class CrossAttention(nn.Module, AttentionModuleMixin):
    """Attention of image tokens to text tokens, with RMSNorm on queries and keys of each head."""

    _supports_qkv_fusion = False

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        text_dim: int,
        qk_norm_eps: float = 1e-10,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        dim = num_heads * head_dim
        self.num_heads, self.head_dim = num_heads, head_dim
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(text_dim, dim)
        self.to_v = nn.Linear(text_dim, dim)
        self.norm_q = RMSNorm(head_dim, qk_norm_eps)
        self.norm_k = RMSNorm(head_dim, qk_norm_eps)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim), nn.Dropout(dropout)])
        self.processor: Any = CrossAttnProcessor()

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend to the text.

        Args:
            hidden_states: `(B, N, C)`.
            encoder_hidden_states: `(B, L, text_dim)`.
            attention_bias: `(B, 1, L)`, added to the logits of every head and query.
        """
        attended = self.processor(self, hidden_states, encoder_hidden_states, attention_bias)
        to_out, dropout = self.to_out
        return dropout(to_out(attended))


class CrossAttnProcessor(_AttnProcessor):
    """Scaled dot-product attention to the text."""

    def __call__(
        self,
        attn: CrossAttention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_bias: torch.Tensor | None,
    ) -> torch.Tensor:
        query, key, value = (
            rearrange(x, "b n (h d) -> b n h d", h=attn.num_heads)
            for x in (
                attn.to_q(hidden_states),
                attn.to_k(encoder_hidden_states),
                attn.to_v(encoder_hidden_states),
            )
        )
        bias = None if attention_bias is None else attention_bias[:, None]  # (B, 1, 1, L)
        return self.attend(attn.norm_q(query), attn.norm_k(key), value, bias).flatten(2)
