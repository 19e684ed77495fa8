"""Every recipe works on both flavours of Wan through the same command, repeats itself, and resumes."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import av
import pytest

from muralist.base_info import inspect_base
from muralist.config import Config
from muralist.recipes import RECIPES, summary
from muralist.request import Asked, make_request, restore
from muralist.settings import changed
from muralist.store import atomic
from tests.shell import muralist

SMALL = ("--size", "160x96", "--num-frames", 9, "--seed", 5, "--num-inference-steps", 4)
SERVES = {
    "direct": (), "cascade": (), "atlasvid": ("proxy", "detail"), "luve": ("latent_upsampler", "experts"), "ultragen": ("branches", "branched"),
    "pixelwizard": ("injector", "step_size", "anchored"),
}  # fmt: skip
every_recipe = pytest.mark.parametrize("recipe", sorted(RECIPES))


def paint(recipe, base, output, *more):
    return muralist("generate", "a red ball moves right over grass", "--recipe", recipe, "--model", base, "-o", output, *SMALL, *more)


@every_recipe
def test_a_recipe_is_a_function_from_a_base_to_a_configuration(recipe, tiny_base):
    assert isinstance(RECIPES[recipe](inspect_base(str(tiny_base))), Config)
    assert summary(recipe)


@pytest.fixture(scope="module")
def painted(tmp_path_factory) -> Callable[[str, Path], Path]:
    """The video of a recipe and a base, its run beside it."""

    @cache
    def made(recipe: str, base: Path) -> Path:
        output = tmp_path_factory.mktemp("painted") / "a.mp4"
        answer = paint(recipe, base, output, "--keep-run")
        assert answer.code == 0, answer.err
        return output

    return made


@every_recipe
def test_every_recipe_paints_on_both_flavours(recipe, tiny_base, painted):
    with av.open(str(painted(recipe, tiny_base))) as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="gray") for frame in container.decode(video=0)]
    assert (stream.width, stream.height, len(frames)) == (160, 96, 9)
    assert max(frame.std() for frame in frames) > 1, "an empty picture"


@every_recipe
def test_resuming_gives_the_same_file_bit_for_bit(recipe, tiny22, tmp_path, monkeypatch):
    """Also where adapters and parts that do not serve are gone by then; where one that serves has changed, it is refused."""
    model = shutil.copytree(tiny22, tmp_path / "model")
    assert paint(recipe, model, tmp_path / "whole.mp4").code == 0
    saved = []

    def stop(path, *arguments, publish_dir=atomic.publish_dir, **options):
        publish_dir(path, *arguments, **options)
        saved.append(path.name)
        if path.name.startswith("refine-step"):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(atomic, "publish_dir", stop)
        assert paint(recipe, model, tmp_path / "a.mp4").code == 130, saved
    for folder in (folder for place in ("adapters", "parts") for folder in (model / place).iterdir()):
        file = next(folder.glob("*.safetensors"))
        if folder.name not in SERVES[recipe]:
            shutil.rmtree(folder)
            continue
        content = file.read_bytes()
        file.write_bytes(content[:-64] + bytes(64))
        assert "weights or configurations have changed" in muralist("resume", tmp_path / "a.mp4.run").error, folder
        file.write_bytes(content)
    assert muralist("resume", tmp_path / "a.mp4.run").code == 0
    whole, resumed = (hashlib.sha256((tmp_path / name).read_bytes()).digest() for name in ("whole.mp4", "a.mp4"))
    assert whole == resumed


@every_recipe
def test_a_run_of_one_recipe_is_not_resumed_by_another(recipe, tiny22, painted):
    other = next(name for name in sorted(RECIPES) if name != recipe)
    assert "this run was started with" in paint(other, tiny22, painted(recipe, tiny22)).error


@every_recipe
def test_a_request_survives_the_way_through_its_record(recipe, tiny_base):
    request = make_request(Asked(prompt="a ball", seed=1, recipe=recipe), inspect_base(str(tiny_base)), note=print)
    assert restore(request.record()) == request


@every_recipe
def test_every_recipe_can_be_planned(recipe, tiny_base):
    (plan,) = muralist("plan", "--recipe", recipe, "--model", tiny_base, "--json", *SMALL).events
    assert plan["totals"]["flops"] > 0


@pytest.mark.parametrize(
    "setting",
    ['upsample={"kind": "LatentInterpolation"}', 'upsample={"kind": "PixelInterpolation", "tile": 64}',
     'upsample={"kind": "PixelInterpolation", "latent_scale": 2, "rest": {"kind": "LearnedUpsampling"}}', "refine.experts=[]", 'refine.experts=["low"]',
     'refine.experts=["high"]', "refine.skip_steps=2", "refine.attention.tokens=64"],
)  # fmt: skip
def test_every_ablation_of_luve_is_a_setting(setting, tiny22, tmp_path):
    answer = paint("luve", tiny22, tmp_path / "a.mp4", "--set", setting)
    assert answer.code == 0, answer.err
    made, asked = (
        restore(atomic.read_json(tmp_path / "a.mp4.json")["metadata"]["request"]).config,
        changed(RECIPES["luve"](inspect_base(str(tiny22))), [setting]),
    )
    assert (made.proxy, made.upsample, made.refine) == (asked.proxy, asked.upsample, asked.refine)


@pytest.mark.parametrize(
    "setting, told",
    [
        ("refine.step=3", "no 'refine.step'"),
        ("refine.steps=3", "3 is none of PlainSteps, ShortcutSteps"),
        ("refine.anchor=left", "none of ('none', 'injected')"),
        ("refine", "sets nothing"),
        ("refine.flow_shift=x", "no float"),
        ("seed=3", "no 'seed'"),
        ('upsample={"kind": "Path"}', "upsample"),
        ('upsample={"kind": "PixelInterpolation", "side": 3}', "no 'side'"),
        ("refine.experts=low", "no list"),
        ('refine.experts=["middle"]', "no expert 'middle'"),
        ("refine.kind=Path", "no 'refine.kind'"),
        ("refine.attention.tokens=1", "a whole number from 8"),
        (f"refine.attention.tokens=1{'0' * 400}", "a whole number from 8"),
        ("refine.attention.max_frames=0", "use at least 1"),
        ("upsample=5", "is none of"),
        ('upsample={"kind": "LearnedUpsampling", "tile": [4, 4]}', "2 values instead of 3"),
        ("refine.token_chunk=8k", "is none of"),
        ("proxy.height=0", "use 16 to 16384"),
        ("refine.adapter=nope", "no adapter 'nope'"),
        ("refine.adapter=5", "is none of"),
        ('refine.experts=["low", "low"]', "name each once"),
        ("decode.memory_bytes=NaN", "no int"),
    ],
)
def test_settings_that_cannot_be_are_told_in_one_line(setting, told, tiny22, tmp_path):
    answer = paint("luve", tiny22, tmp_path / "a.mp4", "--set", setting)
    assert answer.code == 2 and told in answer.error and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "setting, told",
    [
        ("refine.attention.windows=2.5", "no int"),
        ("refine.attention.windows=0", "a whole number from 1"),
        ("refine.attention.windows=9", "9 windows along a side, its branches were trained beside 2"),
        ("refine.attention.odd=even", "more"),
        ('refine.attention.branches=["fine"]', "no branch 'fine'"),
        ('refine.attention.branches=["coarse", "coarse"]', "name each once"),
        ("refine.attention.plain=[2]", "block 2 of 2"),
        ("refine.attention.plain=[-1]", "a whole number from 0"),
        ('refine.attention={"kind": "CloseRemote", "cuts": [[500, 500, 500]]}', "500x500x500 blocks of"),
        ('refine.attention={"kind": "CloseRemote", "tokens": 2}', "a whole number from 8"),
    ],
)
def test_branches_that_cannot_be_are_told_in_one_line(setting, told, tiny22, tmp_path):
    answer = paint("ultragen", tiny22, tmp_path / "a.mp4", "--set", setting)
    assert answer.code == 2 and told in answer.error and not list(tmp_path.iterdir())


def test_windows_of_ultragen_travel_where_its_branches_learned_so(tiny22):
    """The part of the embedded base is of before, and says nothing of it."""
    assert RECIPES["ultragen"](inspect_base(str(tiny22))).refine.attention.travel
    assert not RECIPES["ultragen"](inspect_base("miniature")).refine.attention.travel


@pytest.mark.parametrize(
    "setting",
    [
        'refine.attention.branches=["whole"]',
        "refine.attention.odd=same",
        "refine.attention.odd=shifted",
        "refine.attention.travel=false",
        "refine.attention.branches=[]",
        'refine.attention={"kind": "CloseRemote", "tokens": 16}',
    ],
)
def test_every_ablation_of_ultragen_is_a_setting(setting, tiny22, tmp_path):
    answer = paint("ultragen", tiny22, tmp_path / "a.mp4", "--set", setting)
    assert answer.code == 0, answer.err
