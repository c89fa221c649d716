import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from localdit.models.windows import (
    Route,
    WindowGrid,
    cached_tensors,
    rectangle_size,
    rectangle_tokens,
    relative_position_index,
    shift_sizes,
    window_layout,
)
from tests.models.oracle import visible_tokens

CPU = torch.device("cpu")


@st.composite
def layouts(draw):
    window = draw(st.sampled_from([1, 2, 4, 8]))
    return (
        draw(st.integers(1, 19)),
        draw(st.integers(1, 19)),
        window,
        draw(st.integers(0, window - 1)),
    )


@given(layouts())
def test_tokens_read_their_own_slot_and_see_the_right_tokens(case):
    height, width, window, shift = case
    order, inverse, hidden = window_layout(WindowGrid(*case, case[-1]), CPU)
    tokens = height * width
    assert torch.equal(order[inverse], torch.arange(tokens))

    sees = torch.zeros(tokens, tokens, dtype=torch.bool)
    per_window = order.view(-1, window**2)
    is_token = torch.zeros_like(order, dtype=torch.bool).index_fill(0, inverse, True)
    is_token = is_token.view_as(per_window)
    for n in range(len(per_window)):
        for i in range(window**2):
            for j in range(window**2):
                if is_token[n, i] and (hidden is None or not hidden[n, i, j]):
                    assert is_token[n, j], "a token sees padding"
                    sees[per_window[n, i], per_window[n, j]] = True
    assert torch.equal(sees, visible_tokens(*case)[0])


@given(layouts())
def test_no_row_of_the_mask_is_empty(case):
    hidden = window_layout(WindowGrid(*case, case[-1]), CPU).hidden
    if hidden is not None:  # an empty row would be a softmax over nothing: NaN
        assert not hidden.all(-1).any()


def test_a_map_of_whole_windows_needs_no_mask():
    assert window_layout(WindowGrid(8, 12, 4, 0, 0), CPU).hidden is None
    assert window_layout(WindowGrid(8, 12, 4, 1, 1), CPU).hidden is not None
    assert window_layout(WindowGrid(8, 13, 4, 0, 0), CPU).hidden is not None


@given(layouts(), st.integers(1, 200))
def test_bands_hold_all_tokens_and_see_what_the_map_sees(case, max_tokens):
    height, width, window, shift = case
    bands = WindowGrid(*case, shift).bands(max_tokens)
    tokens = torch.arange(height * width)
    assert torch.equal(torch.cat([tokens[part] for part, _ in bands]), tokens)

    visible = visible_tokens(*case)[0]
    for part, band in bands:
        assert band.height * band.width == len(tokens[part])
        assert band.column_shift == shift
        outside = torch.ones(len(tokens), dtype=torch.bool)
        outside[part] = False
        assert not visible[part][:, outside].any()
        # The windows of the band are those of the map.
        order, inverse, hidden = window_layout(band, CPU)
        slots = inverse[:, None] // window**2 == inverse[None] // window**2
        if hidden is not None:
            own = hidden[
                inverse[:, None] // window**2, inverse[:, None] % window**2, inverse % window**2
            ]
            slots &= ~own
        assert torch.equal(slots, visible[part, part])


def test_bands_are_even_and_within_the_limit():
    grid = WindowGrid(64, 64, 4, 1, 1)
    heights = [band.height for _, band in grid.bands(1024)]
    assert heights == [17, 16, 16, 15]
    assert [band.row_shift for _, band in grid.bands(1024)] == [1, 0, 0, 0]
    assert [band.height for _, band in WindowGrid(36, 64, 4).bands(1024)] == [12, 12, 12]
    assert [band.height for _, band in grid.bands(1)] == [
        5,
        *[4] * 14,
        3,
    ]  # a row of windows at least
    assert grid.bands(4096) == [(slice(0, 4096), grid)]


def test_layouts_made_in_inference_mode_work_in_training():
    with torch.inference_mode():
        layout = window_layout(WindowGrid(7, 5, 4, 3, 3), CPU)
    x = torch.randn(1, 35, 2, requires_grad=True)
    x.index_select(1, layout.order).sum().backward()
    assert x.grad.isfinite().all()


def test_relative_positions_count_rows_then_columns():
    index = relative_position_index(2, CPU)  # slots: (0,0) (0,1) (1,0) (1,1); table 3 x 3
    assert index.tolist() == [[4, 3, 1, 0], [5, 4, 2, 1], [7, 6, 4, 3], [8, 7, 5, 4]]


def test_shift_schedules():
    assert shift_sizes(6, 4, "cyclic") == [0, 1, 2, 3, 0, 1]
    assert shift_sizes(5, 8, "alternating") == [0, 4, 0, 4, 0]
    with pytest.raises(ValueError, match="'cyclic'.*'alternating'"):
        shift_sizes(2, 4, "swin")


@pytest.mark.parametrize(
    ("size", "window_size", "share", "expected"),
    [
        ((16, 16), 4, 0.5, (12, 12)),  # 9 of 16 windows
        ((64, 64), 4, 0.5, (44, 48)),  # 132 of 256 windows
        ((32, 64), 4, 0.5, (24, 44)),
        ((8, 8), 4, 0.5, (4, 8)),
        ((8, 8), 4, 0.01, (4, 4)),
        ((9, 11), 4, 1.0, (8, 8)),  # whole windows only
    ],
)
def test_rectangles_hold_about_a_share_of_the_map(size, window_size, share, expected):
    assert rectangle_size(*size, window_size, share) == expected


def test_rectangles_are_whole_windows_that_also_touch_the_edges():
    grid, rectangle = WindowGrid(13, 20, 4), (8, 12)
    places = torch.rand(2000, 2, generator=torch.Generator().manual_seed(0))
    tokens = rectangle_tokens(places, grid, rectangle)
    rows, columns = tokens // grid.width, tokens % grid.width
    assert set(rows[:, 0].tolist()) == {0, 4}  # the last row of windows is not whole
    assert set(columns[:, 0].tolist()) == {0, 4, 8}
    expected = rows[:, :1, None] + torch.arange(8)[:, None] + torch.zeros(12).long()
    assert torch.equal(rows, expected.flatten(1))
    # Of 7 columns of places, 3 are moved to each edge.
    at_left = (columns[:, 0] == 0).float().mean().item()
    assert at_left == pytest.approx(3 / 7, abs=0.05)
    ends = rectangle_tokens(torch.tensor([[0.0, 0.0], [1.0, 1.0]]), grid, rectangle)
    assert ends[:, 0].tolist() == [0, 4 * 20 + 8]


def test_a_route_takes_tokens_and_puts_them_back():
    maps = torch.randn(2, 6, 3, requires_grad=True)
    route = Route(range(1), 1, 2, torch.tensor([[0, 1], [4, 5]]))
    taken = route.take(maps)
    assert torch.equal(taken, torch.stack([maps[0, :2], maps[1, 4:]]))
    back = route.put_back(maps, 10 * taken)
    expected = maps.detach().clone()
    expected[0, :2] *= 10
    expected[1, 4:] *= 10
    assert torch.equal(back, expected)
    back.sum().backward()
    assert torch.equal(maps.grad == 10, expected == 10 * maps)


def test_cached_tensors_are_made_once_and_can_be_trained_with():
    made = []

    @cached_tensors(2)
    def ramp(length):
        made.append(length)
        return torch.arange(length, dtype=torch.float32)

    with torch.inference_mode():
        first = ramp(3)
    assert ramp(3) is first and made == [3]
    weight = torch.ones(3, requires_grad=True)
    (weight * first).sum().backward()
    assert torch.equal(weight.grad, first)
    assert ramp.cache_info().maxsize == 2


def test_a_compiler_has_nothing_to_warn_of_in_cached_tensors():
    @cached_tensors(2)
    def ramp(length):
        return torch.arange(length)

    compiled = torch.compile(lambda x: x + ramp(len(x)), backend="eager", fullgraph=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert compiled(torch.ones(3)).tolist() == [1, 2, 3]
