"""The first-block cache: which steps it skips, what it adds in place of the blocks, and that a run with it can be stopped anywhere."""

from __future__ import annotations

import shutil
import weakref
from dataclasses import replace

import pytest
import torch

from muralist.base import Base
from muralist.base_info import inspect_base
from muralist.errors import UserError
from muralist.nn import out_of_memory
from muralist.nn.attention import WindowAttention
from muralist.nn.block import MuralBlock
from muralist.nn.block_cache import STRIDE, FirstBlockCache, relative_change
from muralist.nn.transformer import Graft, MuralTransformer
from muralist.pipeline import denoise
from muralist.plan import plan
from muralist.progress import Silent
from muralist.request import Asked, make_request, restore
from muralist.sampling import flow
from muralist.stages.proxy import LowResolutionProxy
from muralist.stages.refine import Refine, Windows
from muralist.store.run import RunDirectory
from muralist.types import Grid, TextCond
from muralist.velocity import Sight, velocity_field
from tests.faults.test_out_of_memory import Failing
from tests.unit.test_plan import ROOMY, TINY, Alive, base, request, stage
from tests.unit.test_streaming import bases, spoiled  # noqa: F401 (a fixture)

ALWAYS, NEVER = float("inf"), 1e-12
TOKENS = (3, 4, 6)
GRAFTS = {
    "stock": Graft(),
    "chunks": Graft(token_chunk=16),
    "windows": Graft(attention=WindowAttention((2, 2, 2)), token_chunk=16),
    "windows, all at once": Graft(attention=WindowAttention((2, 2, 2))),
    "windows that stay": Graft(attention=WindowAttention((2, 3, 3), shift=False), token_chunk=16),
    "experts": Graft(token_chunk=16, experts=("low", "high")),
}
SIGHTS = {"text": Sight(), "an anchor": Sight(anchor=torch.randn(1, 48, 3, 4, 4, generator=torch.Generator().manual_seed(3)))}
TEXT = TextCond(torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(1)), torch.zeros(1, 4, 32))
Z = torch.randn(1, 48, 3, 8, 12, generator=torch.Generator().manual_seed(2))
LEVELS = [0.85, 0.8, 0.72, 0.6, 0.0]  # one expert works at all of them


@pytest.fixture(scope="module")
def painter(tiny22):
    return Base(inspect_base(str(tiny22)), torch.device("cpu"), torch.float32)


def denoised(painter, graft, cache, levels=LEVELS, sight=None, interval=flow.WHOLE):
    """(the latent, whether each step was whole, forwards of the last block after each step)"""
    velocity = velocity_field(painter, TEXT, guidance_scale=2.0, guidance_interval=interval, graft=graft, adapter="detail", sight=sight or Sight(), cache=cache)
    whole, counts, count = [], [], [0]

    def counted(*_):
        count[0] += 1

    def after_step(step, z):
        whole.append(cache is None or cache.whole)
        counts.append(count[0])

    painter.merge("detail")  # as the field will have it: weights that are streamed are loaded anew for that
    hook = painter.transformer(levels[0]).blocks[-1].register_forward_hook(counted)
    try:
        return flow.denoise(velocity, Z, levels, after_step=after_step), whole, counts
    finally:
        hook.remove()


@pytest.mark.parametrize("sight", SIGHTS.values(), ids=SIGHTS)
@pytest.mark.parametrize("graft", GRAFTS.values(), ids=GRAFTS)
def test_a_threshold_below_every_change_changes_no_bit(graft, sight, painter):
    plain, _, counts = denoised(painter, graft, None, sight=sight)
    found, whole, same = denoised(painter, graft, FirstBlockCache(NEVER), sight=sight)
    assert torch.equal(found, plain) and all(whole) and same == counts == [2, 4, 6, 8]


def by_hand(painter, graft, sight):
    """Every block of every step is computed, and what the later ones made is thrown away for what they added at the first step, in raster order."""
    cuts = graft.attention.partitions(TOKENS)
    first, last = (cuts[number % len(cuts)] for number in (0, 1))
    rests, firsts = [], []

    def after_first(block, given, output):
        firsts.append(output[:, first.inverse].clone())

    def after_last(block, given, output):
        tokens = output[:, last.inverse]
        if len(firsts) <= 2:  # the first step: one pass for each prompt
            rests.append(tokens - firsts[-1])
        return (firsts[-1] + rests[(len(firsts) - 1) % 2])[:, last.order].contiguous()

    blocks = painter.transformer(0.5).blocks
    hooks = [blocks[0].register_forward_hook(after_first), blocks[-1].register_forward_hook(after_last)]
    try:
        return denoised(painter, graft, None, sight=sight)[0]
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("sight", SIGHTS.values(), ids=SIGHTS)
@pytest.mark.parametrize("graft", GRAFTS.values(), ids=GRAFTS)
def test_a_skipped_step_adds_what_the_last_full_one_did(graft, sight, painter):
    expected, plain = by_hand(painter, graft, sight), denoised(painter, graft, None, sight=sight)[0]
    found, whole, counts = denoised(painter, graft, FirstBlockCache(ALWAYS), sight=sight)
    assert whole == [True, False, False, False] and counts == [2, 2, 2, 2]
    assert (found - expected).abs().max() < 1e-5 and (found - plain).abs().max() > 1e-3


def test_order_and_chunks_of_tokens_change_nothing_about_it(painter):
    one_window = Graft(attention=WindowAttention(TOKENS))
    for alike in ((GRAFTS["stock"], GRAFTS["chunks"], one_window), (GRAFTS["windows"], GRAFTS["windows, all at once"])):
        first, *others = (denoised(painter, graft, FirstBlockCache(ALWAYS))[0] for graft in alike)
        assert all((other - first).abs().max() < 1e-5 for other in others)


def test_the_conditional_pass_decides_for_both(painter):
    """A threshold between the changes of its own steps: some are skipped, and always both passes together."""
    seen = []
    cache = FirstBlockCache(NEVER)
    leads = cache._leads
    cache.conditional._decide = lambda residual, kept: (kept and seen.append(relative_change(residual, cache._residual))) or leads(residual, kept)
    denoised(painter, GRAFTS["windows"], cache)
    cache = FirstBlockCache(sum(sorted(seen)[:2]) / 2)
    _, whole, counts = denoised(painter, GRAFTS["windows"], cache)
    assert set(whole) == {True, False}
    assert counts == [2 * sum(whole[: step + 1]) for step in range(4)]


def test_where_guidance_begins_its_pass_is_computed_in_full(painter):
    _, whole, counts = denoised(painter, Graft(), FirstBlockCache(ALWAYS), interval=(0.0, 0.75))
    assert whole == [True, False, False, False] and counts == [1, 1, 2, 2]


def test_a_full_step_leaves_nothing_older_behind(painter):
    """Guidance ended, went on without its pass, and begins again: what that pass kept before is not added."""
    cache = FirstBlockCache(ALWAYS)
    velocity = velocity_field(painter, TEXT, guidance_scale=2.0, guidance_interval=(0.5, 0.7), graft=Graft(), adapter=None, cache=cache)
    velocity(Z, 0.6)
    cache.conditional.forget()
    velocity(Z, 0.4)
    assert cache.whole and cache.unconditional._rest is None


def test_experts_that_come_or_go_force_a_full_step(painter):
    _, whole, counts = denoised(painter, GRAFTS["experts"], FirstBlockCache(ALWAYS), levels=[1.0, 0.9, 0.85, 0.8, 0.0])
    assert whole == [True, False, True, False] and counts == [2, 2, 4, 4]


def test_another_transformer_forces_a_full_step_and_the_first_one_goes(tiny22, tmp_path):
    folder = shutil.copytree(tiny22, tmp_path / "base")
    shutil.copytree(folder / "transformer", folder / "transformer_2")
    painter = Base(replace(inspect_base(str(folder)), boundary=0.75), torch.device("cpu"), torch.float32)
    cache, whole, alive = FirstBlockCache(ALWAYS), [], []
    velocity = velocity_field(painter, TEXT, guidance_scale=2.0, graft=Graft(), adapter=None, cache=cache)
    high = weakref.ref(painter.transformer(1.0))

    def after_step(step, z):
        whole.append(cache.whole)
        alive.append(high() is not None)

    flow.denoise(velocity, Z, LEVELS, after_step=after_step)
    assert whole == [True, False, True, False] and alive == [True, True, False, False]


def test_memory_that_runs_out_forces_full_steps(painter, monkeypatch):
    """In the second step, which is skipped: the unconditional pass goes on in smaller chunks, and so does the third step."""
    monkeypatch.setattr(out_of_memory, "FLOOR", 2)
    expected = denoised(painter, GRAFTS["windows"], None)[0]
    with monkeypatch.context() as patch:
        patch.setattr(MuralBlock, "forward", Failing(MuralBlock.forward, (6,)))
        _, whole, counts = denoised(painter, GRAFTS["windows"], FirstBlockCache(ALWAYS))
    assert whole == [True, False, True, False] and counts == [2, 3, 5, 5]
    with monkeypatch.context() as patch:  # in the middle of full ones
        patch.setattr(MuralBlock, "forward", Failing(MuralBlock.forward, (2, 5, 10)))
        found, whole, _ = denoised(painter, GRAFTS["windows"], FirstBlockCache(NEVER))
    assert all(whole) and (found - expected).abs().max() < 1e-5


@pytest.mark.parametrize("graft", [GRAFTS["stock"], GRAFTS["windows"]], ids=["stock", "windows"])
def test_blocks_that_are_skipped_are_not_asked_for(graft, tiny22, spoiled):  # noqa: F811
    expected, found = (denoised(painter, graft, FirstBlockCache(ALWAYS)) for painter in bases(tiny22))
    assert torch.equal(expected[0], found[0]) and expected[2] == found[2] == [2, 2, 2, 2]


def test_the_change_is_relative_to_what_was_there():
    before = torch.tensor([[[2.0, -2.0]]])
    assert relative_change(1.25 * before, before) == pytest.approx(0.25)
    nothing = torch.zeros(1, 1, 2)
    assert not relative_change(nothing, nothing) < ALWAYS and not relative_change(torch.full((1, 1, 2), torch.nan), before) < ALWAYS


# -- Runs that are stopped --


class Stopping(Silent):
    """An observer that stops the run at its n-th move, counted over all stages."""

    def __init__(self, at: int | None = None):
        super().__init__()
        self.at, self.moves = at, []

    def advance(self, stage, done):
        self.moves.append((stage, done))
        if len(self.moves) == self.at:
            raise KeyboardInterrupt


OPTIONS = {"prompt": "a red ball", "width": 128, "height": 64, "num_frames": 5, "seed": 2, "num_inference_steps": 8, "recipe": "cascade"}
CACHED = ("proxy.cache=0.055", "refine.cache=0.068")  # some steps of both stages are skipped, some are not


@pytest.fixture
def saved(monkeypatch):
    """(stage, step) of every snapshot."""
    steps = []

    def save_step(self, stage, step, *arguments, original=RunDirectory.save_step, **options):
        steps.append((stage, step))
        original(self, stage, step, *arguments, **options)

    monkeypatch.setattr(RunDirectory, "save_step", save_step)
    return steps


def painted(painter, folder, settings=CACHED, stop_at=None):
    """(latent, every move) of a run in `folder`, gone on with if it is there; KeyboardInterrupt where it is to be stopped."""
    made = make_request(Asked(**OPTIONS, settings=settings), painter.info, note=print)
    observer = Stopping(stop_at)
    with RunDirectory.create(folder, {"request": made.record()}) as run:
        return denoise(made, painter, run, observer).z.clone(), observer.moves


@pytest.mark.slow
def test_a_run_with_a_cache_goes_on_bit_for_bit_wherever_it_stops(painter, tmp_path, saved):
    expected, moves = painted(painter, tmp_path / "whole")
    assert moves == [*(("proxy", step) for step in range(1, 9)), ("upsample", 1), *(("refine", step) for step in range(5, 9))]
    assert all(0 < sum(name == each for name, _ in saved) < steps for each, steps in (("proxy", 7), ("refine", 3))), "no step or every step was skipped"
    for stop_at in range(1, len(moves) + 1):
        with pytest.raises(KeyboardInterrupt):
            painted(painter, tmp_path / str(stop_at), stop_at=stop_at)
        assert torch.equal(painted(painter, tmp_path / str(stop_at))[0], expected), moves[stop_at - 1]


def test_a_run_that_is_stopped_again_and_again_ends_in_the_same_latent(painter, tmp_path):
    for stop_at in (3, 6, 3, 3, 2, 3):
        with pytest.raises(KeyboardInterrupt):
            painted(painter, tmp_path / "run", stop_at=stop_at)
    assert torch.equal(painted(painter, tmp_path / "run")[0], painted(painter, tmp_path / "whole")[0])


def test_without_a_cache_every_step_is_saved_at_once(painter, saved, tmp_path):
    _, moves = painted(painter, tmp_path, ())
    assert saved == [move for move in moves if move[0] != "upsample"]  # a guide is a result, not a step


def test_a_cache_with_which_every_step_is_whole_saves_each_but_the_last(painter, saved, tmp_path):
    """One step later; the last latent is the stage's result."""
    painted(painter, tmp_path, ("proxy.cache=1e-9",))
    assert [step for stage, step in saved if stage == "proxy"] == list(range(1, 8))


# -- What is asked, and what it costs --


@pytest.mark.parametrize("threshold", [0, 1, -0.1, 1.5, float("nan"), float("inf")])
def test_bad_thresholds_are_refused(threshold):
    numbers = {"num_inference_steps": 4, "guidance_scale": 2.0, "flow_shift": 5.0, "cache": threshold}
    with pytest.raises(UserError, match="between 0 and 1"):
        Refine(**numbers)
    with pytest.raises(UserError, match="between 0 and 1"):
        LowResolutionProxy(height=64, width=64, **numbers)


def test_a_threshold_is_part_of_the_request(tiny22):
    made = make_request(Asked(prompt="a ball", seed=1, settings=("refine.cache=0.1",)), inspect_base(str(tiny22)), note=print)
    assert (made.config.refine.cache, made.config.proxy.cache) == (0.1, None) and made.record()["config"]["refine"]["cache"] == 0.1
    assert restore(made.record()) == made


@torch.no_grad()
@pytest.mark.parametrize("threshold", [NEVER, ALWAYS])
@pytest.mark.parametrize(
    "graft", [Graft(), Graft(token_chunk=256), Graft(attention=WindowAttention((5, 5, 5)), token_chunk=256)], ids=["stock", "full", "windows"]
)
def test_what_a_pass_keeps_is_one_stream_of_tokens_and_two_samples(graft, threshold):
    config = TINY | dict(num_attention_heads=4, attention_head_dim=64, ffn_dim=1024)
    model, z, text = MuralTransformer(**config).configure(graft), torch.randn(1, 16, 5, 36, 40), torch.randn(1, 6, 32)
    peaks = []
    for cached in (None, FirstBlockCache(threshold).conditional):
        with Alive(model) as seen:
            for time in (900.0, 899.0):
                model(z, torch.tensor([time]), text, attention_kwargs={"cache": cached})
        peaks.append(seen.peak)
    one = 5 * 18 * 20 * 256 * 4
    assert 1 <= (peaks[1] - peaks[0]) / one <= 1.15


@pytest.mark.parametrize(("guidance", "passes"), [(5.0, 2), (1.0, 1)])
def test_the_plan_counts_what_is_kept_and_says_at_most(guidance, passes):
    grid = Grid(num_frames=5, height=80, width=112)
    off, on = (
        stage(plan(request(grid, attention=Windows(tokens=40, travel=False), guidance_scale=guidance, cache=cache), base(), ROOMY), "refine")
        for cache in (None, 0.1)
    )
    one = on.tokens * 32 * 4  # two heads of 16, float32
    assert on.memory_bytes - off.memory_bytes == passes * one + 2 * one // STRIDE
    assert (on.flops, on.seconds, on.disk_bytes) == (off.flops, off.seconds, off.disk_bytes)
    assert on.action == off.action + ", first-block cache below 0.1: work and time at most"
