"""Shifted windows as address arithmetic: the slot of each token, and the tokens it attends to.

Hidden state: `window_layout` caches up to 256 layouts and `relative_position_index` up to 32
tensors, on their devices; `localdit.models.clear_caches` clears them.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

import torch

_Made = TypeVar("_Made")


def cached_tensors(
    maxsize: int,
) -> Callable[[Callable[..., _Made]], functools._lru_cache_wrapper[_Made]]:
    """Cache the tensors that a function makes, as `functools.lru_cache` does.

    They are made outside of inference mode, so they can be used in training. A compiler, which
    would ignore the cache and warn of it, sees the function itself.
    """

    def decorate(function: Callable[..., _Made]) -> functools._lru_cache_wrapper[_Made]:
        remembered = functools.lru_cache(maxsize)(torch.inference_mode(False)(function))

        @functools.wraps(function)
        def cached(*args: Any) -> _Made:
            return function(*args) if torch.compiler.is_compiling() else remembered(*args)

        result = cast("functools._lru_cache_wrapper[_Made]", cached)
        result.cache_info = remembered.cache_info  # type: ignore[method-assign]
        result.cache_clear = remembered.cache_clear  # type: ignore[method-assign]
        return result

    return decorate


class WindowGrid(NamedTuple):
    """A map of tokens and the shifted windows it is cut into.

    The map is padded right and below to whole windows, rolled up and left by the shifts, and cut
    (Swin Transformer, section 3.2: the cyclic shift).
    """

    height: int  # tokens, at least 1
    width: int  # tokens, at least 1
    window_size: int  # side of a window in tokens
    row_shift: int = 0  # distance that the map is rolled up, 0 <= shift < window_size
    column_shift: int = 0  # distance that it is rolled left, in the same range

    @property
    def rows(self) -> int:
        """Number of windows from top to bottom."""
        return -(-self.height // self.window_size)

    @property
    def columns(self) -> int:
        """Number of windows from left to right."""
        return -(-self.width // self.window_size)

    def bands(self, max_tokens: int) -> list[tuple[slice, WindowGrid]]:
        """Cut the map between rows of windows, into bands that do not see each other.

        Computations within windows, or on each token alone, give the same result on a band as on
        its part of the map. Bands have about equal height, and at most `max_tokens` tokens as far
        as whole windows allow. Tokens that the roll brings together from opposite edges stay in
        their bands: they do not see each other either.

        Returns:
            For each band from top to bottom, its tokens in the (row-major) map, and the band as a
            map.
        """
        w, shift = self.window_size, self.row_shift
        in_band = max(1, max_tokens // (self.width * w))
        in_band = -(-self.rows // -(-self.rows // in_band))  # even
        edges = [0, *range(shift + in_band * w, self.height, in_band * w), self.height]
        return [
            (
                slice(top * self.width, bottom * self.width),
                self._replace(height=bottom - top, row_shift=0 if top else shift),
            )
            for top, bottom in itertools.pairwise(edges)
        ]


class Route(NamedTuple):
    """A rectangle of each map that takes some blocks alone; all other tokens skip these blocks."""

    blocks: range  # their indices
    height: int  # of the rectangle, in tokens
    width: int  # of the rectangle, in tokens
    tokens: torch.Tensor  # (B, height * width) int64, row-major indices of each map's rectangle

    def take(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the rectangles `(B, height * width, C)` of maps `(B, N, C)`."""
        return hidden_states.gather(1, self._index(hidden_states))

    def put_back(self, hidden_states: torch.Tensor, rectangles: torch.Tensor) -> torch.Tensor:
        """Return maps `(B, N, C)` with their rectangles replaced."""
        whole = hidden_states.to(rectangles.dtype)
        return whole.scatter(1, self._index(whole), rectangles)

    def _index(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.tokens[..., None].expand(-1, -1, hidden_states.shape[2])


def rectangle_size(height: int, width: int, window_size: int, share: float) -> tuple[int, int]:
    """Return the size of a rectangle of whole windows with about a share of a map's tokens.

    Its proportions are about those of the map.

    Args:
        height, width: size of the map in tokens, at least one window.
        window_size: side of a window in tokens.
        share: share of the tokens, in [0, 1].
    """
    windows = share * height * width / window_size**2
    rows = round(share**0.5 * height / window_size)
    rows = min(max(rows, 1), height // window_size)
    columns = min(max(round(windows / rows), 1), width // window_size)
    return rows * window_size, columns * window_size


def rectangle_tokens(
    places: torch.Tensor, grid: WindowGrid, rectangle: tuple[int, int]
) -> torch.Tensor:
    """Return the tokens of a rectangle at a place in each map, `(B, tokens)` int64.

    Its corner is the corner of a window. All rectangles that touch the map are equally likely, and
    those that reach beyond its edge are moved inside: otherwise hardly any would touch the edges.

    Args:
        places: `(B, 2)`, evenly distributed in [0, 1), from top to bottom and from left to right.
        rectangle: height and width of the rectangle in tokens, whole windows of the map.
    """
    w, device = grid.window_size, places.device
    axes = []
    for place, side, length in zip(places.unbind(1), grid[:2], rectangle, strict=True):
        windows, covered = side // w, length // w
        first = (place * (windows + covered - 1)).long() - (covered - 1)
        first = first.clamp(0, windows - covered) * w
        axes.append(first[:, None] + torch.arange(length, device=device))  # (B, length)
    rows, columns = axes
    return (rows[:, :, None] * grid.width + columns[:, None]).flatten(1)


class WindowLayout(NamedTuple):
    """The places of a map's tokens after it is cut into windows."""

    # (num_windows * window_size**2,) int64. Token (row-major index) that each window slot reads.
    # Padding slots read a neighbouring token and are masked by `hidden`.
    order: torch.Tensor
    inverse: torch.Tensor  # (height * width,) int64. Slot of each token.
    # (num_windows, window_size**2, window_size**2) bool, True where query i must not see key j;
    # None if every query may see every key of its window
    hidden: torch.Tensor | None


@cached_tensors(256)
def window_layout(grid: WindowGrid, device: torch.device) -> WindowLayout:
    """Return the layout of a map in windows.

    Tokens that the roll brought together from opposite edges do not see each other (Swin
    Transformer, section 3.2: the mask of the cyclic shift), and nothing sees the padding.
    """
    height, width, w, row_shift, column_shift = grid
    rows = torch.arange(grid.rows * w, device=device).roll(-row_shift)
    columns = torch.arange(grid.columns * w, device=device).roll(-column_shift)

    y, x = torch.meshgrid(rows, columns, indexing="ij")
    order = _cut(y.clamp(max=height - 1) * width + x.clamp(max=width - 1), w)
    is_token = _cut((y < height) & (x < width), w)

    slots = torch.arange(order.numel(), device=device)
    slots = slots.view(grid.rows, grid.columns, w, w).transpose(1, 2)
    slots = slots.reshape(len(rows), len(columns))
    inverse = slots.roll((row_shift, column_shift), dims=(0, 1))[:height, :width]

    hidden = None
    if row_shift > 0 or column_shift > 0 or (height, width) != (len(rows), len(columns)):
        # Rows below the seam of the roll came from the top edge, and columns right of it from
        # the left edge. Padding is a separate region.
        wrapped_rows = torch.arange(len(rows), device=device) >= len(rows) - row_shift
        wrapped_columns = torch.arange(len(columns), device=device) >= (len(columns) - column_shift)
        region = 2 * wrapped_rows[:, None].long() + wrapped_columns[None, :].long()
        region = _cut(region, w).masked_fill(~is_token, -1)
        hidden = region[:, :, None] != region[:, None, :]

    return WindowLayout(order.flatten(), inverse.flatten(), hidden)


def _cut(grid: torch.Tensor, window_size: int) -> torch.Tensor:
    """Cut `(rows, columns)` into `(num_windows, window_size**2)`."""
    rows, columns = grid.shape
    w = window_size
    windows = grid.view(rows // w, w, columns // w, w).transpose(1, 2)
    return windows.reshape(-1, w * w)


@cached_tensors(32)
def relative_position_index(window_size: int, device: torch.device) -> torch.Tensor:
    """Return the row of the relative position table for each pair of slots, `(w**2, w**2)`.

    For query i and key j at offset (dy, dx) = position of i minus position of j, the row is
    `(dy + w - 1) * (2 w - 1) + (dx + w - 1)` (Swin Transformer, section 3.2).
    """
    w = window_size
    slot = torch.arange(w * w, device=device)
    dy = slot[:, None] // w - slot[None, :] // w
    dx = slot[:, None] % w - slot[None, :] % w
    return (dy + w - 1) * (2 * w - 1) + (dx + w - 1)


def shift_sizes(num_layers: int, window_size: int, schedule: str) -> list[int]:
    """Return the distance that each layer rolls its map.

    Args:
        schedule: "cyclic" gives `layer index mod window_size` (the released model); "alternating"
            gives `0, window_size // 2, 0, ...` (Swin Transformer).
    """
    if schedule == "cyclic":
        return [layer % window_size for layer in range(num_layers)]
    if schedule == "alternating":
        return [(layer % 2) * (window_size // 2) for layer in range(num_layers)]
    raise ValueError(
        f"`shift_schedule` is {schedule!r}; choose 'cyclic' (layer index mod window size) "
        "or 'alternating' (0, window size / 2, ...)."
    )
