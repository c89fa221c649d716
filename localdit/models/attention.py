"""The attention of LocalDiT: one module, four processors that can be swapped.

`LocalDiTAttention` owns the weights. Its processor computes attention from the packed queries, keys
and values of a map of tokens: within shifted windows (`LocalAttnProcessor`), within windows and to
averages of the whole map (`LocalPooledAttnProcessor`), within windows and to features of the whole
map (`LocalGlobalAttnProcessor`), or over the whole map (`FullAttnProcessor`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from einops import rearrange
from torch import nn

from . import cpu
from .backends import attend_within_windows, checked_backend
from .cpu import Linear, bands, write_band
from .global_context import GlobalContext
from .layers import RMSNorm, apply_rope, compute_dtype, recomputed, rope_angles
from .text_projections import projected
from .window_attention import pool_tiles, pooled_attention
from .windows import WindowGrid


class LocalDiTAttention(nn.Module, AttentionModuleMixin):
    """Self-attention over a map of tokens, computed by its `processor`.

    The module adds its own input to its output: trained weights depend on it.

    Args:
        num_heads, head_dim: heads and channels per head; with `do_rope`, `head_dim` is a multiple
            of 4.
        window_size, shift_size: side of a window, and roll of the map before it is cut, in tokens.
        layer_type: "local", "local_pooled", "local_global" or "full": the processor to start with.
            It also decides which weights the module has: a relative position bias for windows, a
            `GlobalContext` for "local_global".
        do_rope: rotate queries and keys by their position.
        qk_norm_eps: epsilon of the RMSNorm on queries and keys.
        dropout: probability of dropping an output channel in training.
    """

    _default_processor_cls: type[Any]

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
            raise ValueError(f"Layer type {layer_type!r} is not one of {', '.join(PROCESSORS)}.")
        if do_rope and head_dim % 4:
            raise ValueError(
                f"`attention_head_dim` is {head_dim}: with `do_rope` it has to be a multiple of 4, "
                "two angles for each of two axes."
            )
        dim = num_heads * head_dim
        self.num_heads, self.head_dim = num_heads, head_dim
        self.window_size, self.shift_size = window_size, shift_size
        self.do_rope = do_rope

        self.to_qkv = Linear(dim, 3 * dim)
        self.norm_q = RMSNorm(head_dim, qk_norm_eps)
        self.norm_k = RMSNorm(head_dim, qk_norm_eps)
        self.to_out = nn.ModuleList([Linear(dim, dim), nn.Dropout(dropout)])

        self.local_rel_pos_bias: nn.Parameter | None = None
        if layer_type != "full":
            self.local_rel_pos_bias = nn.Parameter(
                torch.zeros((2 * window_size - 1) ** 2, num_heads)
            )
        self.global_context: GlobalContext | None = None
        if layer_type == "local_global":
            self.global_context = GlobalContext(num_heads, head_dim, window_size)
        self._default_processor_cls = PROCESSORS[layer_type]
        self.processor: Any = self._default_processor_cls()

    def set_processor(self, processor: Any) -> None:
        """Use another processor; the weights stay.

        Raises:
            ValueError: if the processor needs a global context and the module has none.
        """
        if isinstance(processor, LocalGlobalAttnProcessor) and self.global_context is None:
            raise ValueError(
                "This attention has no weights for a global context. Build the model with "
                "`use_global=True` (or `layer_types`) to use `LocalGlobalAttnProcessor`."
            )
        super().set_processor(processor)

    def fuse_projections(self) -> None:
        """Set the flag of fused projections: queries, keys and values always are one."""
        self.fused_projections = True

    def unfuse_projections(self) -> None:
        """Clear the flag; queries, keys and values stay one projection."""
        self.fused_projections = False

    def grid(self, height: int, width: int) -> WindowGrid:
        """Return the windows of a map of `height x width` tokens."""
        return WindowGrid(height, width, self.window_size, self.shift_size, self.shift_size)

    def forward(self, hidden_states: torch.Tensor, grid: WindowGrid) -> torch.Tensor:
        """Attend within a map.

        Args:
            hidden_states: `(B, N, C)`, the tokens of the map, row-major.
            grid: the map and its windows, as returned by `grid`; or a band of it.
        """
        attended = self.processor(self, self.to_qkv(hidden_states), grid)
        to_out, dropout = self.to_out
        return dropout(to_out(attended)) + hidden_states

    def norm_and_rotate(
        self, x: torch.Tensor, norm: RMSNorm, grid: WindowGrid, tokens: slice = slice(None)
    ) -> torch.Tensor:
        """Normalise queries or keys and rotate them by their position on the map.

        Args:
            x: `(B, tokens, C)`.
            norm: `norm_q` or `norm_k`.
            grid: the map.
            tokens: the tokens of the map that `x` holds.

        Returns:
            `(B, tokens, heads, head_dim)`.
        """
        heads = x.unflatten(-1, (self.num_heads, self.head_dim)).to(compute_dtype(x))
        heads = norm(heads)
        if self.do_rope:
            size = grid.height, grid.width
            angles = rope_angles(*size, self.head_dim, x.device, heads.dtype)[tokens]
            heads = apply_rope(heads, angles[:, None])
        return heads.to(x.dtype)


class _Processor:
    """Base of the processors.

    A processor of self-attention is called with `(attn, qkv, grid)`, where `qkv` is `(B, N, 3 C)`:
    queries, keys and values of a map's tokens, row-major, before norms and rotation. It returns
    `(B, N, C)`.
    """

    within_windows = False  # True if no token attends to another outside its window
    _attention_backend: Any = None  # Diffusers sets this and the next one
    _parallel_config: Any = None

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return `softmax(q k^T / sqrt(d) + attn_mask) v`, all `(B, tokens, heads, head_dim)`."""
        chosen = self._attention_backend or self._parallel_config
        if not chosen and cpu.trains_faster_explicitly(query, key):
            return cpu.attention(query, key, value, attn_mask)
        return dispatch_attention_fn(
            query,
            key,
            value,
            attn_mask=attn_mask,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )


class _WindowProcessor(_Processor):
    """Base of the processors with windows; `backends.py` has the choices of `backend`."""

    def __init__(self, backend: str = "auto") -> None:
        self.backend = checked_backend(backend)


class LocalAttnProcessor(_WindowProcessor):
    """Attention within shifted windows (Swin Transformer, section 3.2)."""

    within_windows = True

    def __call__(
        self, attn: LocalDiTAttention, qkv: torch.Tensor, grid: WindowGrid
    ) -> torch.Tensor:
        return attend_within_windows(
            self.backend,
            qkv,
            grid,
            attn.num_heads,
            (attn.norm_q, attn.norm_k),
            attn.do_rope,
            attn.local_rel_pos_bias,
        )


class LocalPooledAttnProcessor(_Processor):
    """Attention to the tokens of the window and to averages of the whole map, in one softmax.

    Keys and values are averaged over tiles of `window_size x window_size` tokens, as in
    `window_attention.pool_tiles`. The weights are those of attention within windows. PyTorch's
    operations compute it on every device; in training, the backward pass computes it again.
    """

    def __call__(
        self, attn: LocalDiTAttention, qkv: torch.Tensor, grid: WindowGrid
    ) -> torch.Tensor:
        return recomputed(self._attended, attn, qkv, grid)

    @staticmethod
    def _attended(attn: LocalDiTAttention, qkv: torch.Tensor, grid: WindowGrid) -> torch.Tensor:
        queries, keys, values = qkv.chunk(3, dim=-1)
        rotated = None
        for tokens, _ in bands(grid, keys):
            part = attn.norm_and_rotate(keys[:, tokens], attn.norm_k, grid, tokens).flatten(2)
            rotated = write_band(rotated, part, tokens, grid)
        assert rotated is not None
        tiles = pool_tiles(rotated, values, grid)

        # The logits of a token take more memory than the token.
        num_logits = attn.num_heads * (grid.window_size**2 + len(tiles.bias))
        logits = tiles.bias.new_empty(1).expand(*qkv.shape[:2], num_logits)
        out = None
        for tokens, band in bands(grid, logits):
            query = attn.norm_and_rotate(queries[:, tokens], attn.norm_q, grid, tokens).flatten(2)
            part = pooled_attention(
                query,
                rotated[:, tokens],
                values[:, tokens],
                tiles,
                band,
                attn.num_heads,
                attn.local_rel_pos_bias,
            )
            out = write_band(out, part, tokens, grid)
        assert out is not None
        return out


class LocalGlobalAttnProcessor(_WindowProcessor):
    """The mean of window attention and of the window's attention to features of the whole map."""

    def __call__(
        self, attn: LocalDiTAttention, qkv: torch.Tensor, grid: WindowGrid
    ) -> torch.Tensor:
        context = attn.global_context
        assert context is not None  # checked by `set_processor`
        queries, keys, _ = qkv.chunk(3, dim=-1)

        rotated = None
        for tokens, _ in bands(grid, queries):
            part = attn.norm_and_rotate(queries[:, tokens], attn.norm_q, grid, tokens).flatten(2)
            rotated = write_band(rotated, part, tokens, grid)
        assert rotated is not None
        features, global_bias = self._global_features(context, rotated, grid)
        del rotated

        out = None
        for tokens, band in bands(grid, queries):
            key = attn.norm_and_rotate(keys[:, tokens], attn.norm_k, grid, tokens).flatten(2)
            global_qkv = torch.cat([features[:, tokens], context.to_global_kv(key)], dim=-1)
            of_map = attend_within_windows(
                self.backend, global_qkv, band, attn.num_heads, None, False, global_bias
            )
            of_windows = attend_within_windows(
                self.backend,
                qkv[:, tokens],
                band,
                attn.num_heads,
                (attn.norm_q, attn.norm_k),
                attn.do_rope,
                attn.local_rel_pos_bias,
            )
            out = write_band(out, (of_windows + of_map) / 2, tokens, grid)
        assert out is not None
        return out

    @staticmethod
    def _global_features(
        context: GlobalContext, query: torch.Tensor, grid: WindowGrid
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return features of the padded and rolled map of queries, and their position bias.

        The features are `(B, N, C)`, in the map's own order.
        """
        height, width, w, *shifts = grid
        image = rearrange(query, "b (y x) c -> b y x c", y=height)
        image = F.pad(image, (0, 0, 0, grid.columns * w - width, 0, grid.rows * w - height))
        image = image.roll([-shift for shift in shifts], dims=(1, 2))
        features, bias = context(image.permute(0, 3, 1, 2))
        features = features.permute(0, 2, 3, 1).roll(shifts, dims=(1, 2))[:, :height, :width]
        return features.flatten(1, 2), bias


class FullAttnProcessor(_Processor):
    """Attention of every token to every other, to compare the same model without windows."""

    def __call__(
        self, attn: LocalDiTAttention, qkv: torch.Tensor, grid: WindowGrid
    ) -> torch.Tensor:
        query, key, value = qkv.chunk(3, dim=-1)
        return self.attend(
            attn.norm_and_rotate(query, attn.norm_q, grid),
            attn.norm_and_rotate(key, attn.norm_k, grid),
            value.unflatten(-1, (attn.num_heads, attn.head_dim)),
        ).flatten(2)


PROCESSORS: dict[str, type[_Processor]] = {
    "local": LocalAttnProcessor,
    "local_pooled": LocalPooledAttnProcessor,
    "local_global": LocalGlobalAttnProcessor,
    "full": FullAttnProcessor,
}


class CrossAttention(nn.Module, AttentionModuleMixin):
    """Attention of image tokens to text tokens, with RMSNorm on queries and keys of each head."""

    _default_processor_cls: type[Any]
    to_kv: nn.Linear  # set by `fuse_projections`
    use_bias = True  # read by Diffusers' `fuse_projections`: `to_k` and `to_v` have biases

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
        self.to_q = Linear(dim, dim)
        self.to_k = Linear(text_dim, dim)
        self.to_v = Linear(text_dim, dim)
        self.norm_q = RMSNorm(head_dim, qk_norm_eps)
        self.norm_k = RMSNorm(head_dim, qk_norm_eps)
        self.to_out = nn.ModuleList([Linear(dim, dim), nn.Dropout(dropout)])
        self._default_processor_cls = CrossAttnProcessor
        self.processor: Any = CrossAttnProcessor()

    def fuse_projections(self) -> None:
        """Fuse the projections of keys and values, unless they have adapters or are quantized."""
        layers = self.to_k, self.to_v
        if all(type(x) is Linear and type(x.weight) is nn.Parameter for x in layers):
            super().fuse_projections()

    def keys_and_values(
        self, encoder_hidden_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the normalised keys and the values of the text, `(B, L, heads, head_dim)` each.

        Args:
            encoder_hidden_states: `(B, L, text_dim)`. In a pipeline's call, the keys and values of
                the first step serve all steps.
        """
        layers = [self.to_kv] if self._is_fused else [self.to_k, self.to_v]
        return projected(encoder_hidden_states, self, [*layers, self.norm_k], self._keys_and_values)

    @property
    def _is_fused(self) -> bool:
        """Whether the fused projection is used. Adapters that were added later prevent it."""
        layers = self.to_k, self.to_v
        return bool(self.fused_projections) and all(type(layer) is Linear for layer in layers)

    def _keys_and_values(
        self, encoder_hidden_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self._is_fused:
            key, value = self.to_kv(encoder_hidden_states).chunk(2, dim=-1)
        else:
            key, value = (layer(encoder_hidden_states) for layer in (self.to_k, self.to_v))
        heads = (self.num_heads, self.head_dim)
        return self.norm_k(key.unflatten(-1, heads)), value.unflatten(-1, heads)

    def forward(
        self,
        hidden_states: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend to the text.

        Args:
            hidden_states: `(B, N, C)`.
            key, value: of the text, as returned by `keys_and_values`.
            attention_bias: `(B, 1, L)`, added to the logits of every head and query.
        """
        attended = self.processor(self, hidden_states, key, value, attention_bias)
        to_out, dropout = self.to_out
        return dropout(to_out(attended))


class CrossAttnProcessor(_Processor):
    """Scaled dot-product attention to the text."""

    def __call__(
        self,
        attn: CrossAttention,
        hidden_states: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_bias: torch.Tensor | None,
    ) -> torch.Tensor:
        query = attn.to_q(hidden_states).unflatten(-1, (attn.num_heads, attn.head_dim))
        bias = None if attention_bias is None else attention_bias[:, None]  # (B, 1, 1, L)

        def attended(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            return self.attend(attn.norm_q(query), key, value, bias)

        return recomputed(attended, query, key, value).flatten(2)
