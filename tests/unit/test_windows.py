"""Windows as a partition of the grid, and attention inside them against the brute-force reference."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st

from muralist.errors import UserError
from muralist.nn.attention import WindowAttention, attend_full, attend_windows
from muralist.nn.attention.reference import reference_attention, window_mask
from muralist.nn.attention.window import AT_A_TIME
from muralist.nn.windows import Run, choose_window, chunks, partition, reorder, spans, split_axis, switch, traveled, windows_of

shapes = st.tuples(st.integers(1, 5), st.integers(1, 8), st.integers(1, 8))
sizes = st.tuples(st.integers(1, 6), st.integers(1, 9), st.integers(1, 9))
quick = settings(max_examples=200, deadline=None)


def random_qkv(tokens: int, *, batch: int = 2, heads: int = 2, dim: int = 8) -> list[torch.Tensor]:
    """Queries large enough that a softmax over other keys gives clearly other values."""
    generator = torch.Generator().manual_seed(tokens)
    return [torch.randn(batch, tokens, heads, dim, generator=generator) * scale for scale in (3.0, 1.0, 1.0)]


def masked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    q, k, v = (rearrange(x, "b n h d -> b h n d") for x in (q, k, v))
    return rearrange(reference_attention(q, k, v, mask), "b h n d -> b n h d")


@quick
@given(shapes, sizes, st.booleans(), st.one_of(st.none(), st.integers(1, 40)))
def test_windowed_attention_is_masked_full_attention(shape, size, shifted, token_chunk):
    cut, raster = partition(shape, size, shifted=shifted), partition(shape, shape)
    q, k, v = random_qkv(math.prod(shape))
    ordered = [reorder(x, raster, cut) for x in (q, k, v)]
    parts = [attend_windows(*(x[:, chunk.span] for x in ordered), chunk.runs) for chunk in chunks(cut.groups, token_chunk)]
    result = reorder(torch.cat(parts, dim=1), cut, raster)
    assert (result - masked(q, k, v, window_mask(shape, size, shifted=shifted))).abs().max() < 1e-5


def test_the_comparison_with_the_reference_can_fail():
    shape, size = (3, 5, 7), (2, 2, 3)
    q, k, v = random_qkv(math.prod(shape))
    even, odd = (masked(q, k, v, window_mask(shape, size, shifted=shifted)) for shifted in (False, True))
    assert (even - odd).abs().max() > 0.1
    assert (even - attend_full(q, k, v)).abs().max() > 0.1


@quick
@given(shapes, sizes, st.booleans())
def test_partition_holds_every_token_once_and_windows_are_blocks(shape, size, shifted):
    cut = partition(shape, size, shifted=shifted)
    assert torch.equal(cut.order.sort().values, torch.arange(math.prod(shape)))
    assert torch.equal(cut.order[cut.inverse], torch.arange(math.prod(shape)))
    mask, start = window_mask(shape, size, shifted=shifted), 0
    for group in cut.groups:
        for number in range(group.first, group.first + group.num_windows):
            tokens = cut.order[start : start + group.tokens_per_window]
            members = mask[tokens[0]].nonzero().flatten()
            assert torch.equal(tokens, members), "window-major order, raster order inside a window"
            f, y, x = cut.origins[number].tolist()
            assert tokens[0] == (f * shape[1] + y) * shape[2] + x
            start += group.tokens_per_window
    assert start == math.prod(shape)


@quick
@given(shapes, sizes, st.booleans())
def test_windows_of_counts_keys_per_query(shape, size, shifted):
    listed = windows_of(shape, size, shifted)
    assert listed == [(group.num_windows, group.tokens_per_window) for group in partition(shape, size, shifted=shifted).groups]
    assert sum(count * tokens for count, tokens in listed) == math.prod(shape)
    assert sum(count * tokens**2 for count, tokens in listed) == int(window_mask(shape, size, shifted=shifted).sum())


@quick
@given(shapes, sizes, sizes)
def test_switching_orders_equals_going_through_raster_order(shape, size, other):
    a, b = partition(shape, size), partition(shape, other, shifted=True)
    x = torch.arange(math.prod(shape))
    assert torch.equal(x[a.order][switch(a, b)], x[b.order])


@quick
@given(shapes, sizes, st.booleans(), st.integers(1, 60))
def test_chunks_are_whole_windows_within_the_budget(shape, size, shifted, token_chunk):
    groups = partition(shape, size, shifted=shifted).groups
    made = chunks(groups, token_chunk)
    assert [chunk.start for chunk in made] == [0, *(chunk.stop for chunk in made[:-1])]
    assert made[-1].stop == math.prod(shape)
    for chunk in made:
        tokens = sum(run.tokens for run in chunk.runs)
        assert tokens == chunk.stop - chunk.start
        assert tokens <= token_chunk or sum(run.num_windows for run in chunk.runs) == 1
    numbers = [number for chunk in made for run in chunk.runs for number in range(run.first, run.first + run.num_windows)]
    assert numbers == list(range(sum(group.num_windows for group in groups)))


def test_a_default_device_does_not_reach_the_index_maps():
    partition.cache_clear()
    with torch.device("meta"):
        assert partition((2, 3, 4), (2, 2, 2)).order.device.type == "cpu"


def test_spans_cover_the_sequence():
    assert [(chunk.start, chunk.stop) for chunk in spans(10, 4)] == [(0, 4), (4, 8), (8, 10)]
    assert [(chunk.start, chunk.stop) for chunk in spans(10, None)] == [(0, 10)]


@pytest.mark.parametrize(
    ("length", "side", "even", "odd"),
    [
        (8, 4, (4, 4), (2, 4, 2)),
        (10, 4, (4, 4, 2), (2, 4, 4)),
        (7, 3, (3, 3, 1), (1, 3, 3)),
        (4, 4, (4,), (4,)),
        (3, 9, (3,), (3,)),
        (3, 1, (1, 1, 1), (1, 1, 1)),
    ],
)
def test_split_axis(length, side, even, odd):
    assert split_axis(length, side) == split_axis(length, side, start=side) == even
    assert split_axis(length, side, shifted=True) == split_axis(length, side, start=side // 2) == odd


@quick
@given(shapes, sizes, st.booleans(), st.tuples(*[st.integers(0, 9)] * 3))
def test_windows_that_start_elsewhere_cover_the_grid_with_the_same_sides(shape, size, shifted, start):
    cut = partition(shape, size, shifted=shifted, start=start)
    assert torch.equal(cut.order.sort().values, torch.arange(math.prod(shape)))
    for length, side, first, pieces in zip(shape, size, start, cut.axes):
        borders = set(itertools.accumulate(pieces))
        wanted = {b for b in range(1, length) if (b - first - (side // 2 if shifted else 0)) % side == 0} if side < length else set()
        assert borders == wanted | {length}
    assert windows_of(shape, size, shifted, start) == [(group.num_windows, group.tokens_per_window) for group in cut.groups]


def test_a_border_of_one_step_is_inside_a_window_of_the_next():
    """In even layers and in odd ones: over four steps a border stands at every eighth of a side once."""
    shape, windows = (8, 64, 64), WindowAttention((8, 8, 16))
    borders = [[set(itertools.accumulate(cut.axes[2])) - {64} for cut in traveled(windows, step).partitions(shape)] for step in range(5)]
    seen = [border for kinds in borders[:4] for kind in kinds for border in kind]
    assert len(seen) == len(set(seen)) and {border % 16 for border in seen} == set(range(0, 16, 2))
    assert borders[4] == borders[0]


@pytest.mark.parametrize("side", range(2, 17))
@pytest.mark.parametrize("shift", [False, True])
def test_borders_stand_still_in_no_side(side, shift):
    """Neither from one step to the next nor, where a side has four places, within four steps."""
    windows, length = WindowAttention((1, 1, side), shift=shift), 4 * side
    steps = [[set(itertools.accumulate(cut.axes[2])) - {length} for cut in traveled(windows, step).partitions((1, 1, length))] for step in range(5)]
    assert steps[4] == steps[0]
    for kind in zip(*steps, strict=True):
        assert all(last.isdisjoint(now) for last, now in itertools.pairwise(kind))
        assert sum(map(len, kind[:4])) == len(set().union(*kind)) or side < 4


@pytest.mark.parametrize(("side", "places"), [(7, [0, 2, 1, 3]), (8, [0, 2, 1, 3]), (12, [0, 3, 2, 4]), (16, [0, 4, 2, 6]), (40, [0, 10, 5, 15])])
def test_borders_stand_where_weights_were_made_with_them(side, places):
    assert [traveled(WindowAttention((side, 1, side)), step).start for step in range(4)] == [(place, 0, place) for place in places]


def test_shift_alternates_and_one_window_has_nothing_to_alternate():
    assert [cut.axes[2] for cut in WindowAttention((2, 4, 4)).partitions((4, 8, 8))] == [(4, 4), (2, 4, 2)]
    assert len(WindowAttention((2, 4, 4), shift=False).partitions((4, 8, 8))) == 1
    assert len(WindowAttention((9, 9, 9)).partitions((4, 8, 8))) == 1


def test_shifting_connects_all_tokens_within_few_layers():
    """Alternating partitions carry information from corner to corner; a single partition never leaves its window."""
    even, odd = (window_mask((4, 8, 8), (2, 4, 4), shifted=shifted).float() for shifted in (False, True))
    reach = torch.linalg.multi_dot([even, odd, even, odd])
    assert (reach > 0).all()
    assert (torch.linalg.multi_dot([even, even, even, even]) == 0).any()


@pytest.mark.parametrize("at_a_time", [1, 24, 8192])
def test_extra_keys_are_seen_by_their_window_only(monkeypatch, at_a_time):
    """Five windows of twelve tokens: one at a time, two and a rest, all of them."""
    monkeypatch.setitem(AT_A_TIME, "cpu", at_a_time)
    shape, size = (1, 4, 15), (1, 4, 3)
    cut = partition(shape, size)
    q, k, v = (reorder(x, partition(shape, shape), cut) for x in random_qkv(60))
    more_k, more_v = (torch.randn(2, 5, 5, 2, 8) for _ in range(2))

    def extra(run: Run) -> tuple[torch.Tensor, torch.Tensor]:
        windows = slice(run.first, run.first + run.num_windows)
        return more_k[:, windows], more_v[:, windows]

    result = attend_windows(q, k, v, cut.groups, extra)
    for window in range(5):
        part = slice(12 * window, 12 * window + 12)
        expected = attend_full(q[:, part], torch.cat([k[:, part], more_k[:, window]], 1), torch.cat([v[:, part], more_v[:, window]], 1))
        assert (result[:, part] - expected).abs().max() < 1e-5
    assert (result - attend_windows(q, k, v, cut.groups)).abs().max() > 0.1
    with pytest.raises(ValueError, match="6 windows for 5"):
        attend_windows(q, k, v, cut.groups, lambda run: (torch.cat([more_k, more_k[:, :1]], 1),) * 2)


@given(st.tuples(st.integers(1, 40), st.integers(1, 140), st.integers(1, 260)), st.integers(1, 5000))
@settings(max_examples=40, deadline=None)
def test_choose_window_keeps_the_budget(shape, target):
    size = choose_window(shape, target)
    assert math.prod(size) <= target
    assert all(1 <= side <= length for side, length in zip(size, shape))
    if math.prod(shape) <= target:
        assert size == shape


@pytest.mark.parametrize(("shape", "target"), [((21, 135, 240), 1024), ((21, 136, 240), 1024), ((8, 64, 64), 512), ((8, 34, 60), 600), ((31, 68, 120), 1000)])
def test_choose_window_fills_the_budget_with_even_windows_where_it_can(shape, target):
    size = choose_window(shape, target)
    assert math.prod(size) > 0.8 * target
    assert max(size) <= 3 * min(size)


def test_choose_window_divides_the_4k_grid_and_follows_the_aspect():
    assert windows_of((21, 135, 240), choose_window((21, 135, 240), 1024)) == [(675, 1008)]
    assert choose_window((21, 135, 240), 1000, aspect=(21, 1, 1))[0] == 21


@pytest.mark.parametrize("size", [(0, 1, 1), (1, 2), (1.5, 2, 2)])
def test_bad_sizes_are_refused(size):
    with pytest.raises(UserError, match="window size"):
        WindowAttention(size)


def test_bad_target_is_refused():
    with pytest.raises(UserError, match="target_tokens"):
        choose_window((4, 4, 4), 0)
