import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from localdit.models.windows import (
    WindowGrid,
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
