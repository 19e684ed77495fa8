"""The latent upsampler's training: pairs show the same thing twice, both loss phases lower the loss, and the part loads as what it is."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from itertools import product

import pytest
import torch

from muralist.base_info import inspect_base
from muralist.data import latents
from muralist.data.latents import LatentPairs, PairConfig, build_pairs
from muralist.errors import UserError
from muralist.nn.enlarge import enlarged
from muralist.nn.latent_upsampler import LatentUpsampler, LatentUpsamplerConfig, VrtConfig
from muralist.nn.latent_upsampler.polynomial import MONOMIALS, LocalPolynomial, axis, ratio, share
from muralist.store.parts import load_part, save_part
from muralist.train import latent_upsampler as training
from muralist.train import state
from muralist.train.latent_upsampler import train_latent_upsampler
from muralist.train.loop import Length, Schedule, fit
from muralist.train.miniature import GRID, new_vae
from muralist.train.objectives.latent_upsample import LatentUpsample, LatentUpsampleConfig
from muralist.train.objectives.least_squares import fit_polynomial, neighbourhoods
from muralist.train.trainee import VideoData

CPU = torch.device("cpu")
SMALL = VrtConfig(in_channels=48, dim=12, depth=1, refine_dim=12, refine_depth=1, groups=1, heads=3, window=(2, 4, 4), still_groups=0)
CONFIG = LatentUpsamplerConfig(encoder=SMALL, hidden=(16,), decoder=None)


def network():
    torch.manual_seed(0)
    return LatentUpsampler(CONFIG)


def test_a_pair_shows_the_same_part_of_the_scene_at_two_sizes(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(latents, "SHARD", 2)
    monkeypatch.setattr(latents, "_encode", lambda encoder, video: seen.append(video) or torch.zeros(1, 48, 1, 1, 1))
    config = PairConfig(name="p", count=2, low=GRID, scale=2.0, side=64, frames=5)
    vae = new_vae()
    pairs = build_pairs(vae, config, tmp_path, report=lambda line: None)
    assert len(pairs.low) == len(pairs.high) == 2 and len(seen) == 4
    for low, high in zip(seen[::2], seen[1::2]):
        assert low.shape == (5, 64, 64, 3) and high.shape == (5, 128, 128, 3)
        reduced = high.unflatten(1, (64, 2)).unflatten(3, (64, 2)).mean(dim=(2, 4))
        assert -10 * torch.log10((reduced - low).square().mean()) > 30
    again = build_pairs(vae, config, tmp_path, report=lambda line: pytest.fail("encoded again"))
    assert torch.equal(again.low, pairs.low)
    with pytest.raises(UserError, match="another encoder"):
        build_pairs(new_vae(seed=1), config, tmp_path)


def test_the_trained_part_lies_in_the_output_and_the_model_stays_as_it_is(tiny22, tmp_path, monkeypatch):
    before = {path: path.read_bytes() for path in tiny22.rglob("*") if path.is_file()}
    monkeypatch.setattr(training, "_scales", lambda own, data: [])
    monkeypatch.setattr(training, "miniature", lambda channels: CONFIG)
    monkeypatch.setattr(training, "LatentUpsample", lambda network, *rest: Still(network))
    made = train_latent_upsampler(tmp_path / "run", length=Length(steps=1), device=CPU, resume=False, model=tiny22, report=lambda line: None)
    assert made == tmp_path / "run" / "parts" / "latent_upsampler" and load_part(made, "latent_upsampler")
    assert {path: path.read_bytes() for path in tiny22.rglob("*") if path.is_file()} == before
    with pytest.raises(UserError, match="stand on another --clips"):
        train_latent_upsampler(
            tmp_path / "run", length=Length(minutes=1), device=CPU, resume=True, model=tiny22, data=VideoData(clips=2), report=lambda line: None
        )


def test_a_training_goes_on_from_the_bases_own_network_if_it_is_the_same(tiny22, tmp_path):
    model, said = tmp_path / "model", []
    shutil.copytree(tiny22, model)
    shutil.rmtree(model / "parts", ignore_errors=True)
    _, new = training._begun(inspect_base(str(model)), CONFIG, said.append)
    own = network()
    save_part(model / "parts" / "latent_upsampler", "latent_upsampler", asdict(CONFIG), dict(own.named_parameters()))
    begun, stands_on = training._begun(inspect_base(str(model)), CONFIG, said.append)
    assert all(torch.equal(begun.state_dict()[name], tensor) for name, tensor in own.state_dict().items()) and stands_on != new and not said
    other, stands_on = training._begun(inspect_base(str(model)), replace(CONFIG, hidden=(8,)), said.append)
    assert other.config.hidden == (8,) and stands_on == new and "another configuration" in said[0]
    old = asdict(CONFIG) | {"polynomial": True}  # of which the weights meant something else
    shutil.rmtree(model / "parts")
    save_part(model / "parts" / "latent_upsampler", "latent_upsampler", old, dict(own.named_parameters()))
    assert training._begun(inspect_base(str(model)), CONFIG, said.append)[1] == new and "an earlier form" in said[1]


@torch.no_grad()
@pytest.mark.parametrize("size", [(8, 10), (4, 5)], ids=["nothing is left to fit", "nothing counts"])
def test_what_asks_for_no_polynomial_gets_none(size):
    low = torch.randn(3, 1, 2, 4, 5)
    (found := LocalPolynomial(1)).conv.reset_parameters()
    fit_polynomial(found, [LatentPairs(low, enlarged(low, size, "bilinear"))])
    assert not found.conv.weight.any() and not found.conv.bias.any()


@pytest.mark.parametrize(("stored", "other"), [({"latent_upsampler": "new"}, "latent_upsampler"), ({"network": "{}"}, "network")])
def test_checkpoints_of_another_network_or_fit_are_refused(stored, other, tiny22, tmp_path, monkeypatch):
    model = shutil.copytree(tiny22, tmp_path / "model")
    shutil.rmtree(model / "parts")
    monkeypatch.setattr(training, "_scales", lambda own, data: [])
    state.save(tmp_path / "run" / training.CHECKPOINTS, 1, {}, {"origin": stored})
    options = {"device": CPU, "model": model, "network": replace(CONFIG, polynomials=True), "report": lambda line: None}
    with pytest.raises(UserError, match=f"stand on another {other}"):
        train_latent_upsampler(tmp_path / "run", length=Length(steps=2), resume=True, **options)


@pytest.mark.parametrize(("own", "expected"), [(256, [1.5, 2.0, 3.0, 8.5]), (2176, [1.5, 2.0, 3.0]), (4352, [1.5, 2.0, 3.0])])
def test_factors_lead_from_the_bases_own_size_to_4k_and_never_down(own, expected):
    assert training._scales(own, VideoData()) == expected


@pytest.mark.parametrize(("scale", "frames"), [(1.5, 29), (3.0, 29), (8.5, 9), (30.0, 1)])
def test_pairs_are_as_long_as_the_large_clip_allows(tiny22, scale, frames):
    info = inspect_base(str(tiny22))
    info = replace(info, defaults=replace(info.defaults, grid=replace(GRID, num_frames=49)))
    assert training._pairs(info, scale, 1).frames == frames


@torch.no_grad()
def test_least_squares_are_those_of_every_pair_of_positions():
    """Against one dense system: a row for each target position and each source position that has weight there."""
    torch.manual_seed(0)
    low, size, found = torch.randn(12, 1, 2, 4, 5), (7, 9), LocalPolynomial(1)
    pools = [LatentPairs(low, torch.randn(12, 1, 2, *size)), LatentPairs(low, torch.randn(12, 1, 2, 6, 7))]
    fit_polynomial(found, pools, ridge=1e-3, rounds=0)
    gram, right = 0, 0
    for pool in pools:
        around, size = neighbourhoods(pool.low.double()), tuple(pool.high.shape[-2:])
        wanted, r = (pool.high - enlarged(pool.low, size, "bilinear")).double(), ratio((4, 5), size)
        (wy, dy), (wx, dx) = (axis(*sides) for sides in zip((4, 5), size))
        for (i, b), (j, c) in product(wy.nonzero().tolist(), wx.nonzero().tolist()):
            values = torch.stack([r**k * dy[i, b] ** m * dx[j, c] ** n for m, n, k in MONOMIALS]) * share((4, 5), size)
            rows = torch.einsum("k,npd->npkd", values, around[:, :, b, c]).flatten(2).flatten(0, 1)
            weight = wy[i, b] * wx[j, c] / pool.high.numel()
            gram, right = gram + weight * rows.T @ rows, right + weight * rows.T @ wanted[:, 0, :, i, j].flatten()
    gram.diagonal().add_(1e-3 * gram.diagonal().mean())
    expected = torch.linalg.solve(gram, right).unflatten(0, (len(MONOMIALS), -1))
    got = torch.cat([found.conv.weight[:, 0].flatten(1), found.conv.bias[:, None]], dim=1)
    assert (got - expected).abs().max() < 1e-4 * expected.abs().max()


@torch.no_grad()
def test_least_squares_find_a_polynomial_that_made_the_pairs():
    torch.manual_seed(0)
    made, found = (LocalPolynomial(2) for _ in range(2))
    made.conv.reset_parameters()
    pools = []
    # at the first factor it fades, offsets of the second differ from row to row, those of the third from one position to the next
    for size in ((9, 11), (12, 15), (18, 22)):
        low = torch.randn(24, 2, 3, 8, 10)
        pools.append(LatentPairs(low, enlarged(low, size, "bilinear") + made(low, size)))
    errors = []
    for rounds in (0, 8, 100):
        fit_polynomial(found, pools, ridge=1e-9, rounds=rounds)
        errors.append(max((found(p.low, s) - made(p.low, s)).abs().max() / made(p.low, s).std() for p in pools for s in [tuple(p.high.shape[-2:])]))
    assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-3, errors
    fit_polynomial(found, pools, ridge=1e3)
    assert found.conv.weight.abs().max() < 1e-2 * made.conv.weight.abs().max()


def test_a_new_network_with_a_polynomial_starts_from_its_least_squares(tiny22, tmp_path, monkeypatch):
    asked = []
    model = shutil.copytree(tiny22, tmp_path / "model")
    shutil.rmtree(model / "parts")
    monkeypatch.setattr(training, "_scales", lambda own, data: [])
    monkeypatch.setattr(training, "LatentUpsample", lambda network, *rest: Still(network))
    monkeypatch.setattr(training, "fit_polynomial", lambda polynomial, pools: asked.append(polynomial))
    network = replace(CONFIG, polynomials=True)

    def stopped(*rest):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # while it encodes: the command to go on that it prints says --resume
        patch.setattr(training, "_scales", stopped)
        options = {"device": CPU, "resume": False, "model": model, "network": network, "report": lambda line: None}
        train_latent_upsampler(tmp_path / "run", length=Length(steps=1), **options)
    for steps in (1, 2):
        options = {"device": CPU, "resume": True, "model": model, "network": network, "report": lambda line: None}
        made = train_latent_upsampler(tmp_path / "run", length=Length(steps=steps), **options)
    assert len(asked) == 1
    shutil.copytree(made, model / "parts" / "latent_upsampler")
    train_latent_upsampler(tmp_path / "again", length=Length(steps=1), **options | {"resume": False})
    assert len(asked) == 1


class Still:
    """A loss without data."""

    def __init__(self, module):
        self.module = module

    def loss(self, step, progress):
        return sum(p.square().sum() for p in self.module.parameters()), {}


@pytest.mark.parametrize("pixels_from", [1.1, 0.0], ids=["latents", "pixels"])
def test_training_lowers_the_loss(pixels_from, tmp_path):
    torch.manual_seed(0)
    low = torch.randn(4, 48, 2, 4, 6)
    high = torch.nn.functional.interpolate(low.flatten(1, 2), scale_factor=2, mode="nearest").unflatten(1, (48, 2))  # bilinear is wrong by a learnable rule
    objective = LatentUpsample(network(), new_vae(), [LatentPairs(low.half(), high.half())], LatentUpsampleConfig(pixels_from=pixels_from, patch=4), CPU)
    before = objective.loss(0, 1.0)[0].item()
    fit(objective, Schedule(length=Length(steps=20), learning_rate=5e-3, warmup=5), tmp_path, resume=False, report=lambda line: None)
    assert objective.loss(0, 1.0)[0].item() < 0.9 * before


def test_a_part_comes_back_as_it_was(tmp_path):
    model = network()
    save_part(tmp_path / "part", "latent_upsampler", asdict(CONFIG), dict(model.named_parameters()))
    record, tensors = load_part(tmp_path / "part", "latent_upsampler")
    assert LatentUpsamplerConfig.of(record) == CONFIG
    assert set(tensors) == set(dict(model.named_parameters())) and all(torch.equal(tensors[n], p) for n, p in model.named_parameters())


def test_a_part_of_another_kind_or_with_foreign_weights_is_refused(tmp_path):
    folder = save_part(tmp_path / "part", "latent_upsampler", asdict(CONFIG), {"x": torch.zeros(1)})
    with pytest.raises(UserError, match="experts"):
        load_part(folder, "experts")
    record = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(record | {"hidden": [32]}))
    with pytest.raises(UserError, match="belong together"):
        load_part(folder, "latent_upsampler")
