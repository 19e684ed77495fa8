"""The injector: nothing at the start, the formula after, the same in any token order, and who it lets gradients to."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from muralist.errors import UserError
from muralist.nn.attention import WindowAttention
from muralist.nn.injector import AnchorInjector
from muralist.nn.kinds import InjectorConfig
from muralist.nn.transformer import Graft, MuralTransformer

CONFIG = InjectorConfig(channels=4, dim=24)
FINE = (2, 6, 10)
VARIANTS = {"paper": {}, "scalar": {"gate": "scalar"}, "ungated": {"gate": "none"}, "plain": {"refined": False}, "every block": {"blocks": (0, 1)}}


def model(**changes):
    torch.manual_seed(0)
    made = MuralTransformer(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=8, freq_dim=8, ffn_dim=32, num_layers=2
    ).eval()
    made.injector = AnchorInjector(replace(CONFIG, **changes)).eval()
    return made


def waken(made):
    for _name, parameter in made.injector.named_parameters():
        if parameter.ndim > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.5)
    return made


ANCHOR = torch.randn(1, 4, 2, 4, 7, generator=torch.Generator().manual_seed(5))


def run(made, graft=None, anchor=ANCHOR, timestep=500.0, step=200.0):
    made.configure(graft or Graft())
    generator = torch.Generator().manual_seed(1)
    z, text = torch.randn(1, 4, 2, 12, 20, generator=generator), torch.randn(1, 5, 8, generator=generator)
    given = {} if anchor is None else {"anchor": made.injector.refine(anchor, FINE)}
    return made(z, torch.tensor([timestep]), text, return_dict=False, attention_kwargs=given)[0]


@torch.no_grad()
@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_a_fresh_injector_changes_nothing_and_a_learned_one_does(changes):
    made = model(**changes)
    assert torch.equal(run(made), run(made, anchor=None))
    waken(made)
    assert (run(made) - run(made, anchor=None)).abs().max() > 1e-2
    assert (run(made) - run(made, anchor=ANCHOR.flip(-1))).abs().max() > 1e-3


@torch.no_grad()
def test_what_is_added_is_the_formula():
    made = waken(model())
    injector, seen = made.injector, []
    hook = made.blocks[1].register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    run(made)
    run(made, anchor=None)
    hook.remove()
    images = torch.stack([F.interpolate(ANCHOR[:, :, f], size=FINE[1:], mode="bilinear", align_corners=False) for f in range(2)], dim=2)
    video = injector.features(images)
    features = F.layer_norm(video.permute(0, 2, 3, 4, 1).reshape(1, -1, 24), (24,), injector.norm.weight, injector.norm.bias, eps=1e-6)

    def wave(value):
        angle = value * torch.exp(-torch.arange(128) / 128 * torch.log(torch.tensor(10000.0)))
        return torch.cat([angle.cos(), angle.sin()])[None]

    alpha = torch.tanh(injector.gate_t(wave(500.0)) + injector.gate_dt(wave(0.0)))
    expected = injector.out["1"]((1 + alpha)[:, None] * features)
    assert (seen[0] - seen[1] - expected).abs().max() < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"blocks": (0, 1)}])
def test_windows_and_chunks_change_nothing_about_it(changes):
    made = waken(model(**changes))
    assert (run(made) - run(made, Graft(token_chunk=17))).abs().max() < 1e-5
    window = Graft(attention=WindowAttention(FINE))
    assert (run(made) - run(made, window)).abs().max() < 1e-5
    shifted = Graft(attention=WindowAttention((1, 4, 4)))
    assert (run(made, shifted) - run(made, replace(shifted, token_chunk=20))).abs().max() < 1e-5


def test_gradients_reach_the_injector():
    made = waken(model())
    run(made, Graft(attention=WindowAttention((1, 4, 4)), token_chunk=20)).square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for name, parameter in made.injector.named_parameters() if "bias" not in name)


def test_the_configuration_survives_and_mistakes_are_told():
    config = InjectorConfig(channels=4, dim=24, blocks=(0, 2), gate="scalar")
    assert InjectorConfig.of({**asdict(config), "blocks": [0, 2]}) == config
    for wrong in ({"gate": "soft"}, {"blocks": ()}, {"blocks": (1, 1)}):
        with pytest.raises(UserError):
            replace(config, **wrong)
    with pytest.raises(UserError, match="misnames"):
        InjectorConfig.of({"channels": 4, "dim": 24, "blocks": [1], "sigma": 3})
    with pytest.raises(UserError, match="an anchor of 2 latent frames for 3"):
        AnchorInjector(CONFIG).refine(ANCHOR, (3, 6, 10))


@pytest.mark.parametrize("more", [{}, {"gate": "scalar"}, {"gate": "none"}, {"refined": False}, {"blocks": (0, 2)}])
def test_a_configuration_names_the_tensors_of_its_network(more):
    config = InjectorConfig(channels=5, dim=24, **more)
    assert config.tensors() == {name: tuple(parameter.shape) for name, parameter in AnchorInjector(config).named_parameters()}
