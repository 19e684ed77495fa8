"""Tiles cover without gap or overlap, halos cut back to what was asked, blend weights sum to one: checked on thousands of geometries."""

import random
from itertools import pairwise, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from muralist.tiling import Box, Span, blend_weights, overlapping, split, tile_boxes

sizes = st.integers(1, 400)


@st.composite
def covers(draw):
    """(size, tile, overlap) that `overlapping` accepts."""
    tile = draw(st.integers(1, 100))
    return draw(sizes), tile, draw(st.integers(0, tile * 7 // 8))


@settings(max_examples=500, deadline=None)
@given(size=sizes, per_tile=st.integers(1, 60), multiple=st.sampled_from([1, 2, 8, 16]))
def test_split_is_a_partition(size, per_tile, multiple):
    spans = split(size, per_tile * multiple, multiple)
    assert spans[0].start == 0 and spans[-1].stop == size
    assert all(a.stop == b.start and a.stop % multiple == 0 for a, b in pairwise(spans))
    lengths = [len(span) for span in spans]
    assert min(lengths) > 0 and max(lengths) <= per_tile * multiple
    assert max(lengths) - min(lengths) <= 2 * multiple  # nearly equal: the last one may be cut by less than a multiple


def check_partition_of_unity(size, tile, overlap):
    spans = overlapping(size, tile, overlap)
    weights = blend_weights(spans, size)
    assert all(len(weight) == len(span) == min(size, tile) for span, weight in zip(spans, weights, strict=True))
    every, places = torch.cat(weights), torch.tensor([place for span in spans for place in range(span.start, span.stop)])
    total = torch.zeros(size, dtype=torch.float64).index_add_(0, places, every.double())  # many windows may overlap: the sum itself must not round
    assert (every > 0).all() and (total - 1).abs().max() <= 1e-6
    assert all(len(a.meet(b)) >= overlap for a, b in pairwise(spans))


@settings(max_examples=300, deadline=None)
@given(cover=covers())
def test_blend_weights_are_a_partition_of_unity(cover):
    check_partition_of_unity(*cover)


def test_ten_thousand_geometries_are_partitions_of_unity():
    draw = random.Random(0)
    for _ in range(10_000):
        tile = draw.randint(1, 100)
        check_partition_of_unity(draw.randint(1, 400), tile, draw.randrange(tile // 2 + 1))


@settings(max_examples=100, deadline=None)
@given(a=covers(), b=covers())
def test_outer_products_of_weights_sum_to_one(a, b):
    total = torch.zeros(a[0], b[0], dtype=torch.float64)
    rows, columns = (zip(spans, blend_weights(spans, cover[0])) for cover, spans in ((a, overlapping(*a)), (b, overlapping(*b))))
    for (y, down), (x, across) in product(rows, columns):
        total[y.start : y.stop, x.start : x.stop] += torch.outer(down, across)
    assert (total - 1).abs().max() <= 1e-6


@settings(max_examples=100, deadline=None)
@given(height=sizes, width=sizes, tile=st.integers(4, 200))
def test_tile_boxes_cover_each_position_once(height, width, tile):
    count = torch.zeros(height, width, dtype=torch.int16)
    for box in tile_boxes(height, width, tile, 4):
        count[box.y.start : box.y.stop, box.x.start : box.x.stop] += 1
    assert bool((count == 1).all())


@settings(max_examples=300, deadline=None)
@given(start=st.integers(0, 90), length=st.integers(1, 50), halo=st.integers(0, 30), factor=st.integers(1, 4))
def test_spans_grow_clip_scale_and_cut_back(start, length, halo, factor):
    span, line = Span(start, start + length), torch.arange(200)
    grown = span.grow(halo).clip(200)
    assert torch.equal(line[grown.start : grown.stop][span.inside(grown)], line[span.start : span.stop])
    assert span.times(factor).over(factor) == span
    coarse = span.over(factor).times(factor)
    assert coarse.start <= span.start and span.stop <= coarse.stop and len(coarse) < length + 2 * factor


def test_a_box_outside_another_is_refused():
    with pytest.raises(ValueError, match="not inside"):
        Box.whole(4, 5).inside(Box.whole(4, 4))


def test_gaps_and_impossible_tiles_are_refused():
    with pytest.raises(ValueError, match="gap at position 3"):
        blend_weights([Span(0, 3), Span(4, 8)], 8)
    with pytest.raises(ValueError, match="outside"):
        blend_weights([Span(0, 9)], 8)
    for call in (lambda: split(10, 4, 8), lambda: split(0, 4), lambda: overlapping(10, 4, 4), lambda: overlapping(0, 4, 1)):
        with pytest.raises(ValueError):
            call()


def test_disjoint_spans_meet_in_nothing():
    assert len(Span(0, 3).meet(Span(5, 9))) == 0 and Span(0, 3).shift(2) == Span(2, 5)
