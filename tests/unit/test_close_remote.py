"""Close and remote windows, against two masks; and what they and windows with branches cost, against what is counted."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st

from muralist.cost import transformer as cost
from muralist.nn.attention import BranchedWindows, CloseRemote
from muralist.nn.attention.close_remote import remote
from muralist.nn.attention.reference import reference_attention
from muralist.nn.branches import attach_branches
from muralist.nn.kinds import hierarchical
from muralist.nn.rope import RopeScale, rotary_table, rotate
from muralist.nn.transformer import Graft, MuralTransformer
from muralist.nn.windows import partition, partition_evenly, reorder
from tests.branched import BRANCHES, DIM, LAYERS, SMALL, forward, model
from tests.unit.test_plan import Alive, counter

# -- Close and remote --


@settings(max_examples=60, deadline=None)
@given(st.tuples(st.integers(1, 4), st.integers(1, 7), st.integers(1, 7)), st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4)))
def test_lattices_hold_the_tokens_of_equal_remainders(shape, counts):
    close = partition_evenly(shape, counts)
    apart, start = remote(close), 0
    seen = torch.zeros(math.prod(shape), dtype=torch.long)
    for run in apart.groups:
        for window in apart.order[start : start + run.tokens].view(run.num_windows, -1):
            f, y, x = window // (shape[1] * shape[2]), window // shape[2] % shape[1], window % shape[2]
            for axis, count, length in zip((f, y, x), counts, shape):
                assert len(set((axis % min(count, length)).tolist())) == 1
            seen[window] += 1
        start += run.tokens
    assert (seen == 1).all() and torch.equal(apart.order[apart.inverse], torch.arange(math.prod(shape)))


def test_close_and_remote_windows_are_the_mean_of_two_masks():
    made, seen, shape, counts = model(), {}, (2, 5, 7), (1, 2, 3)
    attn = made.blocks[0].attn1
    for name, module in (("q", attn.norm_q), ("k", attn.norm_k), ("v", attn.to_v)):
        module.register_forward_hook(lambda module, given, result, name=name: seen.__setitem__(name, result))
    attn.to_out[0].register_forward_hook(lambda module, given, result: seen.__setitem__("z", given[0]))
    with torch.no_grad():
        forward(made, shape, attention=CloseRemote(cuts=(counts,)))
    close, raster = partition_evenly(shape, counts), partition(shape, shape)
    q, k, v, z = (reorder(seen[name], close, raster) for name in "qkvz")
    rope = rotary_table(RopeScale(), shape, 24).at(torch.arange(math.prod(shape)))
    q, k, v = (x.unflatten(-1, (2, 24)) for x in (q, k, v))
    q, k, v = (rearrange(x, "b n h d -> b h n d") for x in (rotate(q, *rope), rotate(k, *rope), v))
    place = torch.cartesian_prod(*(torch.arange(side) for side in shape))
    blocks = [torch.tensor([i for i, piece in enumerate(np.array_split(range(side), count)) for _ in piece]) for side, count in zip(shape, counts)]
    together = torch.stack([block[place[:, axis]] for axis, block in enumerate(blocks)], 1)
    masks = [(labels[:, None] == labels[None]).all(-1) for labels in (together, place % torch.tensor(counts))]
    wanted = sum(rearrange(reference_attention(q, k, v, mask), "b h n d -> b n (h d)") for mask in masks) / 2
    assert (z - wanted).abs().max() < 1e-5


def test_the_cuts_follow_the_grid_as_the_released_tables_do():
    """The released cuts of (21, 136, 240): windows of 1,344 to 2,142 tokens after single frames."""
    cuts = CloseRemote(tokens=2048).counts((21, 136, 240))
    assert cuts[0] == (21, 1, 1) and [cut[0] for cut in cuts] == [21, 1, 1, 3, 7]
    sizes = [math.prod(-(-side // count) for side, count in zip((21, 136, 240), cut)) for cut in cuts[1:]]
    assert all(1344 <= size <= 2142 for size in sizes)
    assert len(CloseRemote().counts((1, 3, 5))) == 5


@pytest.mark.parametrize("shape", [(2, 8, 12), (3, 9, 13)])
def test_flops_of_close_and_remote_windows_are_those_counted(shape):
    made, attention = model(), CloseRemote(tokens=24)
    with torch.no_grad(), counter() as counted:
        whole = forward(made, shape, attention=attention)
        said = 2 * cost.forward(cost.Dimensions.of(SMALL), Graft(attention=attention), shape, 5).flops
        assert 0.98 <= counted.get_total_flops() / said <= 1.02
    with torch.no_grad():
        assert (forward(made, shape, attention=attention, token_chunk=16) - whole).abs().max() < 1e-5


# -- Cost --


SHAPES, PROJECTING, RESTORING = ((2, 8, 12), (3, 9, 13)), ("once", "each"), ("separable", "depthwise", "dense")
CHANGES = ({}, {"odd": "same"}, {"odd": "shifted"}, {"branches": ("coarse",)}, {"plain": (0, 3)}, {"place": 1}, {"odd": "shifted", "place": 3})
# Each shape and each projecting with each change and each restoring, and with each other, instead of all 60 combinations
PAIRS = [
    (change, restoring, SHAPES[(c + r) % 2], PROJECTING[(c // 2 + r + r // 2) % 2]) for c, change in enumerate(CHANGES) for r, restoring in enumerate(RESTORING)
]


@pytest.mark.parametrize(("change", "restoring", "shape", "projecting"), PAIRS)
def test_flops_are_those_counted(change, restoring, shape, projecting):
    config = hierarchical(DIM, LAYERS, rank=4, projecting=projecting, restoring=restoring)
    attention = replace(BranchedWindows(4, branches=BRANCHES), **change)
    made = model(config)
    with torch.no_grad(), counter() as counted:
        forward(made, shape, attention=attention)
    said = 2 * cost.forward(cost.Dimensions.of(SMALL), Graft(attention=attention), shape, 5, config).flops
    assert 0.98 <= counted.get_total_flops() / said <= 1.02


@pytest.mark.parametrize("odd", ["more", "shifted", "same"])
@pytest.mark.parametrize("step", range(4))
def test_pairs_are_those_of_the_windows_at_each_step(odd, step):
    """Attention is a small part of a small model's FLOPs: counted alone, and exactly."""
    shape, attention = (2, 13, 22), BranchedWindows(4, odd, travel=True).at(step)
    cuts = attention.partitions(shape)
    each = [sum(group.num_windows * group.tokens_per_window**2 for group in cut.groups) for cut in cuts]
    assert cost.pairs(attention, shape, 3) == sum(each[layer % len(each)] for layer in range(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("token_chunk", [None, 500])
@pytest.mark.parametrize(
    "attention",
    [BranchedWindows(4, branches=BRANCHES), BranchedWindows(4, plain=(0, 1)), CloseRemote(tokens=256)],
    ids=["branches", "plain", "close and remote"],
)
def test_live_memory_of_a_forward(attention, token_chunk, dtype):
    config = SMALL | dict(num_attention_heads=4, attention_head_dim=64, ffn_dim=1024, num_layers=2)
    made, branches = MuralTransformer(**config), hierarchical(256, 2)
    attach_branches(made.blocks, branches)
    made = made.to(dtype).configure(Graft(attention=attention, token_chunk=token_chunk))
    z, text = torch.randn(1, 4, 5, 36, 40, dtype=dtype), torch.randn(1, 6, 16, dtype=dtype)
    with torch.no_grad(), Alive(made) as seen:
        made(z, torch.ones(1), text)
    said = cost.live_bytes(cost.Dimensions.of(config), made.graft, (5, 18, 20), dtype.itemsize, branches)
    assert 0.9 <= said / seen.peak <= 1.35


def test_attention_costs_a_twelfth_as_the_paper_counts():
    config = hierarchical(DIM, LAYERS)
    attention = BranchedWindows(4, odd="same", branches=BRANCHES)
    said = cost.forward(cost.Dimensions.of(SMALL), Graft(attention=attention), (21, 136, 240), 512, config)
    assert said.attention_saving == pytest.approx(4 * 4**4 / (5 * 4**2 + 4), rel=1e-3)  # equation 13: 12.19
