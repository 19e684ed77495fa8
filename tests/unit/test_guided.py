"""Windows with a proxy's keys: against the plain formula with all pairs of tokens, whichever way it is computed."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from muralist.errors import UserError
from muralist.nn.attention import GuidedWindows, Middle, Near, WindowAttention
from muralist.nn.attention.guided import Pooling, Within, _nearest, neighbours, places, pooled_places
from muralist.nn.attention.reference import reference_attention, window_mask
from muralist.nn.block import MuralBlock
from muralist.nn.rope import axis_dims
from muralist.nn.transformer import Graft, MuralTransformer
from muralist.nn.windows import partition
from muralist.stages.refine import PROXY_SHRINK, ProxyWindows, Refine, window_size

FINE, COARSE, SCALE = (5, 6, 9), (2, 3, 4), 4.0
WINDOWS = WindowAttention((2, 3, 4))


def model(layers=2):
    torch.manual_seed(0)
    made = MuralTransformer(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=8, freq_dim=8, ffn_dim=32, num_layers=layers
    ).eval()
    for block in made.blocks:
        for layer in (block.attn1.to_q, block.attn1.to_v):
            layer.weight.data.mul_(4)
    return made


def latents(shape, seed=1):
    return torch.randn(1, 4, shape[0], 2 * shape[1], 2 * shape[2], generator=torch.Generator().manual_seed(seed))


TEXT = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(3))
LATE, EARLY = torch.tensor([800.0]), torch.tensor([0.0])


@torch.no_grad()
def run(transformer, attention, *, chunk=None, seed=1, coarse_seed=2):
    memory = transformer.remember(latents(COARSE, coarse_seed), EARLY, TEXT, SCALE)
    transformer.configure(Graft(attention=attention, token_chunk=chunk))
    return transformer(latents(FINE, seed), LATE, TEXT, return_dict=False, attention_kwargs={"proxy": memory})[0]


# --- the formula, token by token --------------------------------------------------------------------------------------------------


def rotated(x, positions):
    """x [n, H, d] turned by positions [n, 3]: pair i of axis a by position / 10000^(2i / d_a)."""
    turned, start = x.clone(), 0
    for axis, dim in enumerate(axis_dims(x.shape[-1])):
        for i in range(dim // 2):
            angle = positions[:, axis] / 10000 ** (2 * i / dim)
            a, b = x[:, :, start + 2 * i], x[:, :, start + 2 * i + 1]
            turned[:, :, start + 2 * i] = a * angle.cos()[:, None] - b * angle.sin()[:, None]
            turned[:, :, start + 2 * i + 1] = a * angle.sin()[:, None] + b * angle.cos()[:, None]
        start += dim
    return turned


def window_span(index, length, side, shifted):
    """First and last token of the window along an axis that `index` lies in."""
    if side >= length:
        return 0, length - 1
    offset = side // 2 if shifted else 0
    first = (index - offset) // side * side + offset
    return max(first, 0), min(first + side, length) - 1


def seen(token, axis, count, reach, places, shifted):
    """Coarse indices along an axis that the window of a token sees, and the places where it sees them."""
    first, last = window_span(token[axis], FINE[axis], WINDOWS.size[axis], shifted)
    middle = (first + last) / 2
    groups = [list(range(k, k + min(count, len(places)))) for k in range(len(places) - min(count, len(places)) + 1)]
    best = min(groups, key=lambda g: abs(sum(places[j] for j in g) / len(g) - middle))
    return [(j, middle + max(-reach, min(reach, places[j] - middle))) for j in best]


def expected_attention(query, key, value, coarse_key, coarse_value, axes, coarse_shape, near, shifted):
    """All by loops: query, key, value [N, H, d] fine, not rotated; coarse ones likewise -> [N, H, d]."""
    grid = torch.cartesian_prod(*(torch.arange(n) for n in FINE)).view(-1, 3)
    q, k = (rotated(x.double(), grid.double()) for x in (query, key))
    mask, results = window_mask(FINE, WINDOWS.size, shifted=shifted), []
    for n, token in enumerate(grid.tolist()):
        per_axis = [seen(token, axis, near.count[axis], near.reach[axis], axes[axis].tolist(), shifted) for axis in range(3)]
        chosen = [(f, y, x) for f in per_axis[0] for y in per_axis[1] for x in per_axis[2]]
        index = [(f[0] * coarse_shape[1] + y[0]) * coarse_shape[2] + x[0] for f, y, x in chosen]
        where = torch.tensor([[f[1], y[1], x[1]] for f, y, x in chosen], dtype=torch.float64)
        keys = torch.cat([k[mask[n]], rotated(coarse_key[index].double(), where)])
        values = torch.cat([value[mask[n]].double(), coarse_value[index].double()])
        results.append(reference_attention(*(x.transpose(0, 1)[None] for x in (q[n : n + 1], keys, values)))[0].transpose(0, 1))
    return torch.cat(results)


@torch.no_grad()
@pytest.mark.parametrize("near", [Near((2, 2, 2)), Near((1, 3, 9), reach=(1.0, 2.0, 1.5))], ids=["near", "drawn in"])
@pytest.mark.parametrize("shifted", [False, True])
def test_a_guided_layer_is_the_formula(near, shifted, monkeypatch):
    transformer, calls = model(layers=2), []
    block = transformer.blocks[1 if shifted else 0]
    project = block.attn1.to_out[0]
    inputs = {}
    for name in ("to_q", "to_k", "to_v"):
        getattr(block.attn1, name).register_forward_hook(lambda module, given, out, name=name: inputs.setdefault(name, []).append(out))
    project.register_forward_pre_hook(lambda module, given: calls.append(given[0]))
    memory = transformer.remember(latents(COARSE, 2), EARLY, TEXT, SCALE)
    calls.clear()
    inputs.clear()
    transformer.configure(Graft(attention=GuidedWindows(WINDOWS, near)))
    transformer(latents(FINE), LATE, TEXT, return_dict=False, attention_kwargs={"proxy": memory})
    cut = partition(FINE, WINDOWS.size, shifted=shifted)

    def heads(x, norm=None):
        return (norm(x) if norm is not None else x)[0][cut.inverse].unflatten(-1, (2, 16))

    query, key, value = heads(inputs["to_q"][0], block.attn1.norm_q), heads(inputs["to_k"][0], block.attn1.norm_k), heads(inputs["to_v"][0])
    coarse_key, coarse_value = (x[0] for x in memory.layers[1 if shifted else 0])
    want = expected_attention(query, key, value, coarse_key, coarse_value, places(COARSE, Within(FINE), SCALE), COARSE, near, shifted)
    got = calls[0][0][cut.inverse].unflatten(-1, (2, 16))
    assert (got - want).abs().max() < 1e-5


# --- properties of the whole model -------------------------------------------------------------------------------------------------


def test_chunks_change_nothing():
    transformer, attention = model(), GuidedWindows(WINDOWS, Near((2, 2, 2)), Middle(pool=(1, 2, 2), near=Near((1, 2, 2))))
    whole = run(transformer, attention)
    for chunk in (1, 30):
        assert (run(transformer, attention, chunk=chunk) - whole).abs().max() < 1e-5


@torch.no_grad()
def test_a_piece_of_a_video_sees_what_it_sees_as_a_part_of_it():
    fine, size, corner = (4, 9, 12), (2, 3, 4), (2, 3, 8)
    transformer, whole = model(layers=1), latents(fine)  # one layer: its windows are not shifted, so that those of the piece are some of the whole's
    memory = transformer.remember(latents(COARSE, 2), EARLY, TEXT, SCALE)
    transformer.configure(Graft(attention=GuidedWindows(WindowAttention(size), Near((2, 2, 2), reach=(1.0, 2.0, 3.0)))))

    def painted(z, memory):
        return transformer(z, LATE, TEXT, return_dict=False, attention_kwargs={"proxy": memory})[0]

    f, y, x = corner
    want = painted(whole, memory)[:, :, f:, 2 * y :, 2 * x :]
    piece = whole[:, :, f:, 2 * y :, 2 * x :]
    assert (painted(piece, memory.of(0, Within(fine, corner))) - want).abs().max() < 1e-5
    assert (painted(piece, memory.of(0, Within(fine))) - want).abs().max() > 1e-3


def test_the_proxy_and_the_middle_level_matter_and_far_detail_does_not():
    transformer = model()
    plain = GuidedWindows(WindowAttention((2, 3, 4), shift=False), Near((2, 2, 2)))
    a = run(transformer, plain)
    assert (run(transformer, plain, coarse_seed=9) - a).abs().max() > 1e-2
    between = GuidedWindows(plain.windows, plain.near, Middle(pool=(1, 3, 3), near=Near((4, 2, 2))))
    assert (run(transformer, between) - a).abs().max() > 1e-3
    changed = latents(FINE)
    changed[:, :, 4:] += 1  # the last frame is a window of its own
    memory = transformer.remember(latents(COARSE, 2), EARLY, TEXT, SCALE)
    with torch.no_grad():
        transformer.configure(Graft(attention=plain))
        b = transformer(changed, LATE, TEXT, return_dict=False, attention_kwargs={"proxy": memory})[0]
        assert torch.equal(a[:, :, :4], b[:, :, :4])
        transformer.configure(Graft(attention=between))
        c = transformer(changed, LATE, TEXT, return_dict=False, attention_kwargs={"proxy": memory})[0]
    assert (run(transformer, between)[:, :, :4] - c[:, :, :4]).abs().max() > 1e-4


@torch.no_grad()
def test_the_proxy_is_what_the_base_makes_of_it_alone():
    """Its keys are those of a stock forward on scaled positions, and do not know the fine video."""
    transformer, seen = model(), []
    hooks = [block.attn1.norm_k.register_forward_hook(lambda m, given, out: seen.append(out)) for block in transformer.blocks]
    memory = transformer.remember(latents(COARSE, 2), EARLY, TEXT, SCALE)
    count = len(seen)
    transformer.configure(Graft())
    seen.clear()
    transformer(latents(COARSE, 2), EARLY, TEXT, return_dict=False)
    for hook in hooks:
        hook.remove()
    assert count == 4 and (memory.layers[0][0].flatten(2) - seen[0]).abs().max() < 1e-6  # positions enter behind the first block's keys
    assert transformer.graft == Graft()


def test_gradients_reach_the_weights_through_window_and_proxy():
    transformer, coarse = model(), latents(COARSE, 2).requires_grad_(True)
    memory = transformer.remember(coarse, EARLY, TEXT, SCALE)
    transformer.configure(Graft(attention=GuidedWindows(WINDOWS, Near((2, 2, 2)))))
    out = transformer(latents(FINE), LATE, TEXT, return_dict=False, attention_kwargs={"proxy": memory})[0]
    out.square().mean().backward()
    assert transformer.blocks[0].attn1.to_k.weight.grad.abs().max() > 0 and all(isinstance(block, MuralBlock) for block in transformer.blocks)
    assert coarse.grad.abs().max() > 0, "the only way from the proxy to the output is its keys and values"


def test_places_are_drawn_in_to_the_reach():
    _, small = _nearest(torch.tensor([3.0]), torch.tensor([-20.0, 0.0, 6.0, 40.0]), 4, 5.0)
    assert small.tolist() == [[-2.0, 0.0, 6.0, 8.0]]


def test_a_proxy_is_asked_for_and_not_taken_by_others():
    transformer = model()
    memory = transformer.remember(latents(COARSE), EARLY, TEXT, SCALE)
    for attention, given_memory in ((GuidedWindows(WINDOWS), None), (WINDOWS, memory)):
        transformer.configure(Graft(attention=attention))
        with pytest.raises(ValueError, match="guided windows need a proxy"):
            transformer(latents(FINE), LATE, TEXT, attention_kwargs={"proxy": given_memory})


# --- geometry ----------------------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.tuples(*[st.integers(1, 9)] * 3), st.tuples(*[st.integers(1, 5)] * 3), st.tuples(*[st.integers(1, 6)] * 3), st.booleans())
def test_every_window_has_its_count_of_distinct_neighbours_within_reach(fine, coarse, size, shifted):
    cut, near = partition(fine, size, shifted=shifted), Near((2, 3, 2), reach=(2.0, 3.0, 4.0))
    found = neighbours(cut, coarse, places(coarse, Within(fine), 4.0), near, 16)
    many = math.prod(min(a, b) for a, b in zip(near.count, coarse))
    assert found.index.shape == (len(cut.origins), many) and found.cos.shape == (*found.index.shape, 8)
    assert all(len(set(row)) == many and min(row) >= 0 and max(row) < math.prod(coarse) for row in found.index.tolist())


def furthest(windows: ProxyWindows, fine: tuple[int, int, int], coarse: tuple[int, int, int]) -> list[float]:
    """The largest distance of a token from a place that it sees, along each axis."""
    refine = Refine(num_inference_steps=1, guidance_scale=1.0, flow_shift=1.0, attention=windows)
    axes, found = places(coarse, Within(fine), 4.0), [0.0, 0.0, 0.0]
    for cut in refine.graft(fine).attention.partitions(fine):
        for run in cut.groups:
            first = cut.origins[run.first : run.first + run.num_windows].double()
            for axis, side in enumerate(run.shape):
                seen = _nearest(first[:, axis] + (side - 1) / 2, axes[axis], windows.near[axis], windows.reach[axis])[1]
                found[axis] = max(found[axis], *((seen - first[:, axis, None] - token).abs().max().item() for token in (0, side - 1)))
    return found


OWN = {"embedded": (8, 8, 14), "1.3B": (21, 30, 52), "5B": (21, 22, 40)}  # token grids of bases
TIMES = {"1080p": (1, 4), "4k": (1, 8), "8k": (1, 17), "four times as long, 4k": (4, 8)}  # as many frames, rows and columns


@pytest.mark.parametrize("times", TIMES.values(), ids=TIMES)
@pytest.mark.parametrize("own", OWN.values(), ids=OWN)
def test_no_place_is_further_from_a_token_than_in_training(own, times):
    """What is trained at the base's own size alone works at any: it never meets a relative position that it has not seen.

    A window of another grid may be longer along one side and shorter along another, which the base itself bears: half the difference is let pass.
    """
    frames = (own[0] - 1) * times[0] + 1
    fine, coarse = (frames, own[1] * times[1], own[2] * times[1]), (-(-frames // 4), *own[1:])
    windows = ProxyWindows.trained(own)
    trained = furthest(windows, own, (-(-own[0] // 4), own[1] // PROXY_SHRINK, own[2] // PROXY_SHRINK))
    longer = [max(here - there, 0) / 2 for here, there in zip(window_size(windows, fine), window_size(windows, own))]
    assert all(here <= there + more + 0.5 for here, there, more in zip(furthest(windows, fine, coarse)[1:], trained[1:], longer[1:]))
    for made in (windows, ProxyWindows.of_crops(own)):
        assert furthest(made, fine, coarse)[0] <= own[0]


def test_places_span_the_fine_grid():
    time, rows, columns = places((8, 8, 14), Within((29, 68, 120)), 4.0)
    assert time.tolist() == [0, 4, 8, 12, 16, 20, 24, 28]
    assert rows.mean().item() == pytest.approx(67 / 2) and (columns.diff() - 120 / 14).abs().max() < 1e-9


def test_means_over_blocks_are_means():
    cut = partition((3, 4, 6), (2, 3, 4), shifted=True)
    x = torch.randn(2, 72, 5)
    pooling = Pooling.of(cut, (2, 2, 4))
    got = pooling.mean((slice(a, a + 10), x[:, cut.order][:, a : a + 10]) for a in range(0, 72, 10)).unflatten(1, pooling.shape)
    video = x.unflatten(1, (3, 4, 6))
    for f, y, c in torch.cartesian_prod(torch.arange(2), torch.arange(2), torch.arange(2)).tolist():
        block = video[:, 2 * f : 2 * f + 2, 2 * y : 2 * y + 2, 4 * c : 4 * c + 4]
        assert (got[:, f, y, c] - block.mean(dim=(1, 2, 3))).abs().max() < 1e-6
    assert pooled_places(cut, (2, 2, 4))[0].tolist() == [0.5, 2.0] and pooled_places(cut, (2, 2, 4))[2].tolist() == [1.5, 4.5]


@pytest.mark.parametrize("wrong", [lambda: Near((0, 1, 1)), lambda: Near((1, 1)), lambda: Near(reach=(0.0, 1.0, 1.0)), lambda: Middle(pool=(0, 1, 1))])
def test_geometry_that_cannot_be_is_refused(wrong):
    with pytest.raises(UserError):
        wrong()
