"""High, balanced, low: what each decides, which one is taken by itself, what is refused, and what a resume keeps."""

from __future__ import annotations

from dataclasses import replace

import pytest

from muralist.bench.wan import SIZES
from muralist.cost import stages
from muralist.cost.budget import Budget
from muralist.cost.levels import LEVELS
from muralist.errors import UserError
from muralist.nn import heap
from muralist.plan import Machine, Plan, plan
from muralist.recipes import find
from muralist.store.run import RunDirectory
from muralist.types import Grid
from tests.shell import muralist
from tests.unit.test_plan import ROOMY, base, request, stage

CARD = Machine.of("24GB")
UHD = Grid(num_frames=81, height=2160, width=3840)
SMALL = ("--size", "128x64", "--num-frames", 5, "--seed", 1)


UMT5 = dict(vocab_size=256384, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64)


@pytest.fixture(autouse=True)
def text_encoder(monkeypatch):
    """The sizes of published models have no folder, hence no configuration of their text encoder."""
    read = stages._text_config
    monkeypatch.setattr(stages, "_text_config", lambda info: UMT5 if info.name in SIZES else read(info))


def planned(size: str, budget: Budget = Budget(), machine: Machine = CARD, grid: Grid = UHD, **more) -> Plan:  # noqa: B008 (frozen)
    info = SIZES[size].info(size)
    return plan(replace(request(grid), recipe="cascade", config=find("cascade")(info)), info, machine, budget=budget, **more)


def test_a_machine_with_room_changes_nothing():
    made, high = planned("1.3B"), planned("1.3B", Budget("high"))
    assert made == high and made.memory == "high" and not made.streamed and made.request.config.refine.token_chunk == 8192


def test_each_level_needs_less_and_says_what_it_does():
    high, balanced, low = (planned("5B", Budget(mode)) for mode in LEVELS)
    for name in ("proxy", "refine", "decode"):
        needs = [stage(made, name).memory_bytes for made in (high, balanced, low)]
        assert needs[0] >= needs[1] >= needs[2] and needs[0] > needs[2], (name, needs)
    assert "2048 tokens at a time" in stage(balanced, "refine").action and "streamed" not in stage(balanced, "refine").action
    assert "1024 tokens at a time, blocks streamed from main memory" in stage(low, "proxy").action
    assert any(note.startswith("memory low: at most 1024 tokens at a time, blocks streamed") for note in low.notes)
    assert low.streamed and stage(low, "refine").host_bytes > 2 * SIZES["5B"].parameters and not balanced.streamed
    assert low.record()["memory"] == {"level": "low", "streamed": True}


@pytest.mark.parametrize(("gigabytes", "level"), [(24, "high"), (12.5, "low"), (8, "low")])
def test_auto_takes_the_first_level_that_fits(gigabytes, level):
    made = planned("5B", Budget("auto", gigabytes))
    assert made.memory == level and made.refusals == () and made.memory_bytes <= gigabytes * 1e9


def test_a_level_that_does_not_fit_names_one_that_does():
    with pytest.raises(UserError, match="use --memory low"):
        planned("5B", Budget("high", 12.5)).check()


@pytest.mark.parametrize("gigabytes", [4.9, 5])
def test_below_the_smallest_plan_it_is_told_what_fits(gigabytes):
    with pytest.raises(UserError) as error:
        planned("5B", Budget("auto", gigabytes)).check()
    most = error.value.fix.split("at most ")[1].split()[0]
    smaller = dict(zip(("width", "height"), map(int, most.split("x")))) if "x" in most else {"num_frames": int(most)}
    planned("5B", Budget("auto", gigabytes), grid=replace(UHD, **smaller)).check()


def test_streamed_weights_need_main_memory():
    with pytest.raises(UserError, match="main memory for weights"):
        planned("5B", Budget("low"), replace(CARD, memory_bytes=8 * 10**9)).check()


def test_a_cpu_has_nothing_to_stream():
    made = plan(request(Grid(num_frames=9, height=320, width=480), cascade=True), base(), replace(ROOMY, device_bytes=None), budget=Budget("low"))
    assert not made.streamed and made.request.config.refine.token_chunk == made.request.config.proxy.token_chunk == 1024


def test_a_begun_run_keeps_its_chunks_and_streams_where_it_must():
    begun = planned("5B").request
    made = plan(begun, SIZES["5B"].info("5B"), CARD, budget=Budget("auto", 13), begun=True)
    assert made.request == begun and made.streamed


def test_what_cannot_change_in_a_begun_run_is_not_promised():
    begun = request(Grid(num_frames=9, height=320, width=480), cascade=True)
    made = plan(begun, base(), replace(ROOMY, device_bytes=None), budget=Budget("low"), begun=True)
    assert made.request == begun and any("nothing changes" in note for note in made.notes) and not any("tokens at a time" in note for note in made.notes)
    begun = planned("5B").request
    made = plan(begun, SIZES["5B"].info("5B"), CARD, budget=Budget("high", 6), begun=True)
    assert made.refusals and all("size" not in refusal.fix and "frames" not in refusal.fix for refusal in made.refusals)


def test_other_chunks_than_those_of_a_begun_run_are_refused(tiny22, tmp_path):
    arguments = ("generate", "a ball", "--model", tiny22, *SMALL, "-o", tmp_path / "a.mp4", "--keep-run")
    assert muralist(*arguments).code == 0
    for setting in (
        "refine.token_chunk=7",
        "proxy.token_chunk=5",
        "decode.tile=64",
        "refine.token_chunk=2048",
        "refine.token_chunk=1024",
        "refine.token_chunk=null",
    ):
        answer = muralist(*arguments, "--set", setting)
        assert answer.code == 2 and setting.split("=")[0].split(".")[-1] in answer.error, answer.err


@pytest.mark.parametrize("memory", ["balanced", "low"])
def test_a_level_is_part_of_the_run(memory, tiny22, tmp_path):
    arguments = ("generate", "a ball", "--model", tiny22, *SMALL, "-o", tmp_path / "a.mp4", "--memory", memory, "--keep-run")
    assert muralist(*arguments).code == 0
    config = RunDirectory.stored(tmp_path / "a.mp4.run")["request"]["config"]
    assert config["refine"]["token_chunk"] == config["proxy"]["token_chunk"] == LEVELS[memory].token_chunk
    again = muralist(*arguments[:-3], "--keep-run", "--json")  # another level does not start another run: what it decided is there
    assert again.code == 0 and again.events[-1]["request"]["config"] == config
    assert muralist("resume", tmp_path / "a.mp4.run", "--keep-run").code == 0


@pytest.mark.parametrize(("memory", "begun", "returns"), [("high", None, False), ("low", None, True), ("auto", "low", True), ("low", "high", False)])
def test_what_is_freed_goes_back_where_chunks_are_small(memory, begun, returns, tiny22, tmp_path, monkeypatch):
    """It follows from the chunks, which a begun run keeps at any level."""
    told = []
    monkeypatch.setattr(heap, "_set", told.append)
    monkeypatch.setattr(heap, "_returning", False)
    arguments = ("generate", "a ball", "--model", tiny22, *SMALL, "-o", tmp_path / "a.mp4", "--keep-run")
    if begun:
        assert muralist(*arguments, "--memory", begun).code == 0
        monkeypatch.setattr(heap, "_returning", False)
        told.clear()
    assert muralist(*arguments, "--memory", memory).code == 0
    assert told == ([{heap.M_MMAP_THRESHOLD: heap.SMALL}] if returns else [])


def test_a_process_with_room_again_takes_it_back(monkeypatch):
    told = []
    monkeypatch.setattr(heap, "_set", told.append)
    monkeypatch.setattr(heap, "_returning", False)
    heap.keep_large_blocks()
    assert not told
    heap.return_large_blocks()
    heap.keep_large_blocks()
    heap.keep_large_blocks()
    assert told == [{heap.M_MMAP_THRESHOLD: heap.SMALL}, {heap.M_MMAP_THRESHOLD: heap.LARGEST, heap.M_TRIM_THRESHOLD: 2 * heap.LARGEST}]


def test_a_limit_that_was_set_is_named_as_what_can_be_raised():
    begun = request(Grid(num_frames=9, height=320, width=480), cascade=True)
    for budget, fix in ((Budget("auto", 0.01), "raise --vram-limit"), (Budget("auto"), "free memory")):
        made = plan(begun, base(), replace(ROOMY, device_bytes=None, memory_bytes=10**7), budget=budget, begun=True)
        assert made.refusals and made.refusals[0].fix.startswith(fix)


def test_the_other_spelling_of_the_limit_is_told(tiny22, tmp_path):
    answer = muralist("plan", "--model", tiny22, *SMALL, "--memory-limit", 2)
    assert answer.code == 0 and "--memory-limit is read as --vram-limit" in answer.err
