"""Rotary positions against diffusers' table, and where its table cannot go."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor, WanRotaryPosEmbed
from hypothesis import given, settings
from hypothesis import strategies as st

from muralist.errors import UserError
from muralist.nn.rope import RopeScale, axis_dims, interleaved, rotary_table, rotate

UNIT = RopeScale()


def whole(rope: RopeScale, shape: tuple[int, int, int], head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    return rotary_table(rope, shape, head_dim).at(torch.arange(math.prod(shape)))


@pytest.mark.parametrize("head_dim", [12, 16, 64, 128])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (21, 17, 30), (2, 1, 1024)])
def test_scale_one_is_diffusers_bit_for_bit(head_dim, shape):
    stock = WanRotaryPosEmbed(head_dim, (1, 2, 2), 1024)(torch.empty(1, 1, shape[0], 2 * shape[1], 2 * shape[2]))
    for mine, theirs in zip(interleaved(*whole(UNIT, shape, head_dim)), stock):
        assert mine.dtype == theirs.dtype == torch.float32
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation_is_that_of_diffusers_bit_for_bit(dtype):
    """Captured from diffusers' attention itself: what reaches the kernel after its own rotation."""
    shape, head_dim = (2, 3, 4), 16
    torch.manual_seed(0)
    attn = WanAttention(32, heads=2, dim_head=head_dim, processor=WanAttnProcessor()).to(dtype)
    x, seen = torch.randn(1, 24, 32).to(dtype), []
    original = torch.nn.functional.scaled_dot_product_attention
    table = whole(UNIT, shape, head_dim)

    def capture(query, key, value, **rest):
        seen.append(query)
        return original(query, key, value, **rest)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", capture)
        attn(x, None, None, interleaved(*table))
        mine = rotate(attn.norm_q(attn.to_q(x)).unflatten(-1, (2, -1)), *table)
    assert torch.equal(mine, seen[0].transpose(1, 2))
    assert mine.dtype == dtype


def test_integer_scale_takes_the_rows_of_a_finer_grid():
    """A proxy at a quarter of the frame rate stands on every fourth temporal position."""
    fine = whole(UNIT, (9, 4, 4), 64)[0].view(9, 4, 4, -1)
    coarse = whole(RopeScale(t=4.0, y=2.0), (3, 2, 4), 64)[0].view(3, 2, 4, -1)
    assert torch.equal(coarse, fine[::4, ::2])


@settings(max_examples=40, deadline=None)
@given(st.floats(0.1, 9), st.floats(0.1, 9), st.floats(0.1, 9), st.tuples(st.floats(-50, 50), st.floats(-50, 50), st.floats(-50, 50)))
def test_angles_are_position_times_frequency(t, y, x, offset):
    shape, head_dim = (2, 3, 4), 24
    cos, sin = whole(RopeScale(t, y, x, offset), shape, head_dim)
    for token, place in ((0, (0, 0, 0)), (17, (1, 1, 1)), (23, (1, 2, 3))):
        angles = []
        for axis, dim in enumerate(axis_dims(head_dim)):
            position = place[axis] * (t, y, x)[axis] + offset[axis]
            angles += [position / 10000 ** (2 * pair / dim) for pair in range(dim // 2)]
        assert cos[token].tolist() == pytest.approx([math.cos(angle) for angle in angles], abs=1e-6)
        assert sin[token].tolist() == pytest.approx([math.sin(angle) for angle in angles], abs=1e-6)


def test_offset_shifts_all_tokens_and_leaves_scores_alone():
    """Only differences of positions matter to attention."""
    q, k = torch.randn(2, 1, 24, 1, 16, generator=torch.Generator().manual_seed(0))
    scores = []
    for offset in ((0.0, 0.0, 0.0), (2.5, -3.25, 40.0)):
        table = whole(RopeScale(offset=offset), (2, 3, 4), 16)
        scores.append(torch.einsum("bnhd,bmhd->bnm", rotate(q, *table), rotate(k, *table)))
    assert (scores[0] - scores[1]).abs().max() < 1e-4
    scaled = whole(RopeScale(x=0.5), (2, 3, 4), 16)
    assert (torch.einsum("bnhd,bmhd->bnm", rotate(q, *scaled), rotate(k, *scaled)) - scores[0]).abs().max() > 0.1


def test_no_longest_axis():
    cos, _ = whole(UNIT, (1, 1, 5000), 64)
    assert cos.shape == (5000, 32)
    assert cos[4999, axis_dims(64)[0] // 2 + axis_dims(64)[1] // 2].item() == pytest.approx(math.cos(4999), abs=1e-6)


def test_tokens_may_come_in_any_order():
    index = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    table = rotary_table(UNIT, (3, 4, 5), 16)
    for shuffled, straight in zip(table.at(index), table.at(torch.arange(60))):
        assert torch.equal(shuffled, straight[index])


def test_axis_dims():
    assert axis_dims(128) == (44, 42, 42)
    assert axis_dims(64) == (24, 20, 20)


def test_scale_must_be_positive():
    with pytest.raises(UserError, match="rope"):
        RopeScale(t=0.0)
