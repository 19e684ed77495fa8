"""The latent upsampler's parts against their plain definitions: the implicit function query by query, shifted windows by masked attention."""

from __future__ import annotations

from dataclasses import asdict
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange

from muralist.errors import UserError
from muralist.nn.enlarge import enlarged
from muralist.nn.latent_upsampler import LatentUpsampler, LatentUpsamplerConfig, VrtConfig, paper, polynomial, tmsa
from muralist.nn.latent_upsampler.implicit import ImplicitUpsampler
from muralist.nn.latent_upsampler.polynomial import MONOMIALS, LocalPolynomial
from muralist.nn.latent_upsampler.tmsa import MutualSelfAttention, TmsaBlock, fitted, shift_masks, sine_positions

SMALL = VrtConfig(in_channels=4, dim=12, depth=2, mutual_share=0.5, refine_dim=12, refine_depth=2, groups=2, heads=3, window=(2, 4, 4), still_groups=1)


def small(decoder=SMALL):
    torch.manual_seed(0)
    return LatentUpsampler(LatentUpsamplerConfig(encoder=SMALL, hidden=(16, 8), decoder=decoder)).eval()


def test_the_paper_configuration_has_the_papers_size():
    with torch.device("meta"):
        model = LatentUpsampler(paper())
    assert 21.5e6 < sum(p.numel() for p in model.parameters()) < 22.5e6
    assert model.implicit.imnet.layers[0].in_features == 3246
    names = set(model.state_dict())
    expected = ("encoder.stage1.residual_group1.blocks.0.attn.qkv_mut.weight", "encoder.stage2.reshape.2.weight", "encoder.stage8.0.2.weight")
    assert {*expected, "encoder.stage8.6.residual_group.blocks.3.mlp.fc11.bias", "decoder.conv_after_body.weight", "conv.weight"} <= names


@torch.no_grad()
@pytest.mark.parametrize("size", [(5, 6), (8, 9), (15, 18), (11, 17)])
def test_the_implicit_function_is_that_of_each_query(size):
    torch.manual_seed(1)
    module = ImplicitUpsampler(5, 3, (16, 8))
    features = torch.randn(1, 3, 5, 6, 5)
    got = module(features, size)
    padded = F.pad(features, (0, 0, 1, 1, 1, 1, 1, 1))
    for t, y, x in [(0, 0, 0), (1, 2, 3), (2, size[0] - 1, size[1] - 1), (1, size[0] - 1, 0), (2, 1, size[1] // 2)]:
        coordinate = [-1 + (2 * i + 1) / n for i, n in zip((t, y, x), (3, *size))]
        centres = [[-1 + (2 * i + 1) / n for i in range(n)] for n in (3, 5, 6)]
        nearest = [min(range(len(axis)), key=lambda i, axis=axis, at=at: (round(abs(axis[i] - at), 9), -i)) for axis, at in zip(centres, coordinate)]
        offset = [(at - axis[i]) * n for at, axis, i, n in zip(coordinate, centres, nearest, (3, 5, 6))]
        cell = [2 / n * m for n, m in zip((3, *size), (3, 5, 6))]
        a, b, c = nearest
        patch = padded[0, a : a + 3, b : b + 3, c : c + 3].permute(0, 3, 1, 2).flatten()  # (time, channel, row, column)
        expected = module.imnet.layers(torch.cat([patch, torch.tensor(offset + cell, dtype=torch.float32)]))
        assert (got[0, t, y, x] - expected).abs().max() < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("size", [(5, 6), (6, 7), (8, 9), (11, 17)])
def test_the_polynomial_is_the_mean_of_those_around_each_query(size):
    torch.manual_seed(1)
    module = LocalPolynomial(3)
    module.conv.reset_parameters()
    z = torch.randn(1, 3, 2, 5, 6)
    got, ratio = module(z, size), (5 / size[0] + 6 / size[1]) / 2
    share = min(3 * (1 - ratio), 1) ** 0.5  # none at factor 1, all from 1.5
    padded = F.pad(z, (1, 1, 1, 1, 1, 1))
    for t, y, x in [(0, 0, 0), (1, 2, 3), (1, size[0] - 1, size[1] - 1), (0, size[0] - 1, 0)]:
        at = [(i + 0.5) * of / n - 0.5 for i, of, n in zip((y, x), (5, 6), size)]  # in source positions
        expected = torch.zeros(3)
        for b, c in product(range(5), range(6)):
            inside = [min(max(place, 0), of - 1) for place, of in zip(at, (5, 6))]
            weight = max(1 - abs(inside[0] - b), 0) * max(1 - abs(inside[1] - c), 0)
            dy, dx = 2 * (at[0] - b), 2 * (at[1] - c)
            maps = (module.conv.weight * padded[0, :, t : t + 3, b : b + 3, c : c + 3]).sum(dim=(1, 2, 3, 4)) + module.conv.bias
            expected += weight * share * sum(ratio**r * dy**i * dx**j * part for (i, j, r), part in zip(MONOMIALS, maps.split(3)))
        assert (got[0, :, t, y, x] - expected).abs().max() < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("some", [1, 2, 5])
def test_polynomials_are_the_same_some_frames_at_a_time(some, monkeypatch):
    torch.manual_seed(0)
    module = LocalPolynomial(3)
    z = torch.randn(2, 3, 5, 6, 7)
    module.conv.reset_parameters()
    whole = module(z, (9, 13))
    monkeypatch.setattr(polynomial, "VALUES", 2 * some * polynomial.values(3, (6, 7), (9, 13)))
    seen, plain = [], module._frames
    monkeypatch.setattr(module, "_frames", lambda padded, *given: seen.append(padded.shape[2] - 2) or plain(padded, *given))
    assert (module(z, (9, 13)) - whole).abs().max() < 1e-6
    assert seen == [some] * (5 // some) + [5 % some] * (5 % some > 0)


@torch.no_grad()
def test_with_a_polynomial_the_networks_start_at_nothing():
    torch.manual_seed(0)
    network = LatentUpsampler(LatentUpsamplerConfig(encoder=SMALL, hidden=(16, 8), decoder=SMALL, polynomials=True)).eval()
    network.polynomial.conv.reset_parameters()
    z = torch.randn(1, 4, 2, 6, 9)
    assert torch.equal(network(z, (9, 14)), enlarged(z, (9, 14), "bilinear") + network.polynomial(z, (9, 14)))
    assert torch.equal(enlarged(z[:, :, 1:], (9, 14), "bilinear")[:, :, 0], F.interpolate(z[:, :, 1], size=(9, 14), mode="bilinear"))


@torch.no_grad()
@pytest.mark.parametrize("mutual", [False, True])
@pytest.mark.parametrize("size", [(4, 8, 8), (6, 8, 12), (2, 4, 4)])
def test_shifted_windows_are_attention_of_the_cells_that_the_shift_cuts(size, mutual):
    """Cut the unrolled video at the shifted borders: every cell attends to itself alone (checked for the plain branch, cell by cell)."""
    torch.manual_seed(2)
    block = TmsaBlock(12, (2, 4, 4), 3, 2.0, shifted=True, mutual=mutual).eval()
    x = torch.randn(1, *size, 12)
    window, shift = fitted(size, block.window, True)
    base = block._windows(x)
    borders = [[0, *range(s, n, w), n] if s else [*range(0, n, w), n] for n, w, s in zip(size, window, shift)]
    cells = [slice(a, b) for a, b in zip(borders[1][:-1], borders[1][1:])]
    for rows in cells:
        changed = x.clone()
        changed[:, :, rows] += 1.0
        moved = (block._windows(changed) - base).abs().amax(dim=(0, 1, 3, 4)) > 1e-6
        assert moved[rows].all() and not moved[[i for i in range(size[1]) if not rows.start <= i < rows.stop]].any()


@torch.no_grad()
def test_a_frame_takes_from_its_neighbour_in_mutual_attention():
    torch.manual_seed(3)
    attention = MutualSelfAttention(12, (2, 2, 2), 3, mutual=True)
    attention.proj.weight[:, 12:] = 0  # the mutual half alone
    x = torch.randn(1, 8, 12)
    query, key, value = attention._split(attention.qkv_mut(x + attention.position_bias.repeat(1, 2, 1)))
    expected = F.scaled_dot_product_attention(query[:, :, 4:], key[:, :, :4], value[:, :, :4]).transpose(1, 2).flatten(2)
    assert (attention(x, None)[:, :4] - F.linear(expected, attention.proj.weight[:, :12], attention.proj.bias)).abs().max() < 1e-5


def test_the_mask_parts_what_only_the_roll_brings_together():
    kinds, of_window = shift_masks((1, 1, 8), (1, 1, 4), (0, 0, 2))
    mask = kinds[of_window]
    assert (mask[0] == 0).all()
    assert (mask[1][:2, :2] == 0).all() and (mask[1][:2, 2:] < -50).all()


@pytest.mark.parametrize("shift", [(3, 4, 4), (0, 4, 0), (1, 0, 2)])
def test_the_masks_are_those_of_all_positions(shift):
    """Against the region that each position of the unshifted video lies in."""
    size, window = (12, 16, 24), (6, 8, 8)
    region = torch.zeros(size)
    for axis, (length, side, by) in enumerate(zip(size, window, shift)):
        place = torch.arange(length)
        part = (place >= length - side).int() + ((place >= length - by).int() if by else 0)
        region = region * 3 + part.view([-1 if i == axis else 1 for i in range(3)])
    rows = rearrange(region, "(a t) (b y) (c x) -> (a b c) (t y x)", t=window[0], y=window[1], x=window[2])
    kinds, of_window = shift_masks(size, window, shift)
    assert torch.equal(kinds[of_window], torch.where(rows[:, :, None] == rows[:, None, :], 0.0, -100.0))


def test_a_walk_without_values_leaves_no_masks_without_values():
    shift_masks.cache_clear()
    x = torch.randn(1, 4, 20, 20, 16, generator=torch.Generator().manual_seed(0))
    with torch.device("meta"), torch.inference_mode():
        TmsaBlock(16, (2, 8, 8), 2, 1.0, shifted=True, mutual=True)(torch.empty_like(x, device="meta"))
    block = TmsaBlock(16, (2, 8, 8), 2, 1.0, shifted=True, mutual=True)
    assert block(x).sum().isfinite() and shift_masks.cache_info().hits  # with the very mask of the walk
    block(x).sum().backward()


def test_positions_differ_everywhere():
    places = sine_positions((4, 4), 6)[0]
    assert places.shape == (16, 12) and len(torch.unique(places.round(decimals=4), dim=0)) == 16


@torch.no_grad()
@pytest.mark.parametrize("decoder", [SMALL, None], ids=["decoder", "none"])
@pytest.mark.parametrize("size, target", [((8, 8), (16, 16)), ((7, 10), (11, 21)), ((9, 9), (9, 9))])
def test_any_size_to_any_size(size, target, decoder):
    z = torch.randn(2, 4, 3, *size)
    assert small(decoder)(z, target).shape == (2, 4, 3, *target)


@torch.no_grad()
def test_batches_do_not_mix():
    z = torch.randn(2, 4, 3, 8, 10)
    model = small()
    assert (model(z, (13, 17))[1:] - model(z[1:], (13, 17))).abs().max() < 1e-5


def test_smaller_is_refused():
    with pytest.raises(UserError, match="at least 1"):
        small()(torch.randn(1, 4, 2, 8, 8), (7, 16))


@torch.no_grad()
@pytest.mark.parametrize("frames", [1, 2, 3])
@pytest.mark.parametrize("side", [8, 24, 40])
def test_one_frame_is_enlarged_as_well(frames, side):
    """A window of one frame of 3x3 positions has no halves for mutual attention: it is padded to two frames."""
    torch.manual_seed(0)
    network = LatentUpsampler(LatentUpsamplerConfig(encoder=SMALL, hidden=(16, 8), decoder=SMALL)).eval()
    made = network(torch.randn(1, 4, frames, side, side), (2 * side, 2 * side))
    assert made.shape == (1, 4, frames, 2 * side, 2 * side) and made.isfinite().all()


@torch.no_grad()
def test_masked_windows_are_the_same_some_at_a_time(monkeypatch):
    torch.manual_seed(0)
    block = tmsa.TmsaBlock(12, (2, 4, 4), 3, 2.0, shifted=True, mutual=True).eval()
    x = torch.randn(2, 5, 12, 8, 12)
    whole = block(x)
    monkeypatch.setattr(tmsa, "SCORES", 5 * 3 * 32**2)
    assert (block(x) - whole).abs().max() < 1e-6


def test_a_part_whose_polynomial_means_something_else_is_refused():
    with pytest.raises(UserError, match="muralist train latent-upsampler"):
        LatentUpsamplerConfig.of(asdict(small().config) | {"polynomial": True})
