"""Attention kernels agree with the plain reference, missing ones are told and replaced; compiled blocks equal eager ones and are compiled a few times only."""

from __future__ import annotations

import json
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from torch._dynamo.utils import counters

from muralist.base import Base
from muralist.base_info import inspect_base
from muralist.errors import UserError
from muralist.nn import compiled as compiled_module
from muralist.nn.attention import GuidedWindows, WindowAttention, attend_full, backends
from muralist.nn.attention.reference import reference_attention
from muralist.nn.kernels import PLAIN, Kernels
from muralist.nn.transformer import Graft
from muralist.stages.refine import Refine, Windows, refine
from muralist.store.run import RunDirectory
from muralist.types import Grid, TextCond
from tests.shell import muralist

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
BF16 = 4e-3  # half a step of bfloat16 at 1, with an accumulation in float32; outputs stay below 1
NAMES = [name for name in backends.NAMES if name != "auto"]


def heads(length: int, dtype: torch.dtype, device: torch.device, seed: int) -> torch.Tensor:
    """[2, length, 3, 64]"""
    return torch.randn(2, length, 3, 64, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def agrees(name: str, device: torch.device, dtype: torch.dtype) -> None:
    if reason := backends.why_not(name, device, dtype, 64):
        pytest.skip(reason)
    q, k, v = heads(70, dtype, device, 0), heads(50, dtype, device, 1), heads(50, dtype, device, 2)
    with backends.use(name):
        result = attend_full(q, k, v).float()
    expected = reference_attention(*(x.double().transpose(1, 2) for x in (q, k, v))).transpose(1, 2).float()
    tolerance = 1e-5 if dtype == torch.float32 else BF16 if name != "sage" else backends.AGREES
    assert (result - expected).abs().max() <= tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_every_kernel_that_is_there_agrees_with_the_reference(name, dtype):
    agrees(name, CPU, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_every_kernel_that_is_there_agrees_with_the_reference_on_a_gpu(name, dtype):
    agrees(name, CUDA, dtype)


@pytest.mark.gpu
def test_a_gpu_has_the_built_in_kernels():
    assert [backends.why_not(name, CUDA, torch.bfloat16, 128) for name in ("sdpa", "flash", "cudnn", "efficient")] == [None] * 4


def test_the_plain_kernels_are_always_there():
    assert [backends.why_not(name, CPU, torch.float32, 64) for name in ("sdpa", "flash", "reference")] == [None] * 3


def test_backend_switch_is_undone_and_names_its_choices():
    used = []
    backends.register("probe", lambda q, k, v: used.append(len(q)) or reference_attention(q, k, v))
    try:
        with backends.use("probe"):
            attend_full(*(heads(4, torch.float32, CPU, seed) for seed in range(3)))
        attend_full(*(heads(4, torch.float32, CPU, seed) for seed in range(3)))
        assert used == [2]
        with pytest.raises(UserError, match="sdpa"), backends.use("no such"):
            pass
    finally:
        backends.unregister("probe")


@pytest.mark.parametrize(("module", "function", "name"), [("flash_attn_interface", "flash_attn_func", "fa3"), ("flash_attn.cute", "flash_attn_func", "fa4")])
def test_the_adapters_of_flash_kernels_hand_over_sequence_first(monkeypatch, module, function, name):
    """A stand-in with the package's signature: [B, n, H, d] in, the same and a log-sum-exp out, low precision only."""

    def flash(q, k, v):
        if q.dtype not in (torch.bfloat16, torch.float16):
            raise RuntimeError("FlashAttention only supports fp16 and bf16")
        return reference_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2), None

    fake(monkeypatch, module, function, flash)
    agrees(name, CPU, torch.bfloat16)
    assert "does not take float32" in backends.why_not(name, CPU, torch.float32, 64)


def test_the_adapter_of_sage_says_its_layout(monkeypatch):
    def sage(q, k, v, tensor_layout, is_causal):
        assert tensor_layout == "HND" and not is_causal
        return reference_attention(q, k, v)

    fake(monkeypatch, "sageattention", "sageattn", sage)
    agrees("sage", CPU, torch.bfloat16)


def test_packed_sequences_are_those_of_the_batch(monkeypatch):
    def varlen(q, k, v, starts_q, starts_k, longest_q, longest_k):
        parts = [
            reference_attention(*(x[None].transpose(1, 2) for x in (q[a:b], k[c:d], v[c:d])))[0].transpose(0, 1)
            for a, b, c, d in zip(starts_q, starts_q[1:], starts_k, starts_k[1:])
        ]
        assert starts_q.dtype == torch.int32 and (longest_q, longest_k) in ((96, 64), (70, 50))
        return torch.cat(parts)

    fake(monkeypatch, "torch.nn.attention.varlen", "varlen_attn", varlen)
    agrees("varlen", CPU, torch.float32)


def fake(monkeypatch: pytest.MonkeyPatch, module: str, name: str, function) -> None:
    stand_in = types.ModuleType(module)
    setattr(stand_in, name, function)
    for parent in [module.rpartition(".")[0]] if module.startswith("flash_attn.") else []:
        monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
    monkeypatch.setitem(sys.modules, module, stand_in)
    forget()


def forget() -> None:
    backends.kernel.cache_clear()
    backends.why_not.cache_clear()


@pytest.fixture(autouse=True)
def forget_stand_ins():
    yield
    forget()


def test_a_kernel_that_disagrees_is_not_used():
    backends.register("wrong", lambda q, k, v: q)
    try:
        assert "off the reference" in backends.why_not("wrong", CPU, torch.float32, 64)
    finally:
        backends.unregister("wrong")


@pytest.mark.parametrize(
    ("failure", "told"),
    [
        (AssertionError(), "it does not take float32 heads of 64 on cpu (AssertionError)"),
        (RuntimeError("\n \n"), "it does not take float32 heads of 64 on cpu (RuntimeError)"),
        (ImportError("libfa3.so: undefined symbol: _ZN3c105\nmore"), "it cannot be loaded (libfa3.so: undefined symbol: _ZN3c105)"),
        (ImportError(), "it cannot be loaded (ImportError)"),
        (ModuleNotFoundError("No module named 'flash_attn'", name="flash_attn"), backends.ABSENT),
        (ModuleNotFoundError("No module named 'cutlass'", name="cutlass"), "it cannot be loaded (No module named 'cutlass')"),
    ],
)
def test_a_kernel_that_fails_is_named_by_how_it_fails(failure, told):
    def fail(q, k, v):
        raise failure

    backends.register("broken", fail)
    try:
        assert backends.why_not("broken", CPU, torch.float32, 64) == told
    finally:
        backends.unregister("broken")


def test_what_is_missing_is_named_and_replaced():
    assert backends.settle("auto", CPU, torch.float32, 64) == ("sdpa", None)
    assert backends.settle("fa3", CPU, torch.bfloat16, 64) == ("sdpa", "attention fa3: it is not installed; sdpa computes it")
    settled, notes = Kernels(attention="cudnn", compile="blocks").settled(CPU, torch.float32, 64, (64, 128))
    assert settled == Kernels(attention="sdpa", compile="blocks") and len(notes) == 1 and "cudnn: it does not take float32" in notes[0]
    with pytest.raises(UserError, match="use one of auto, sdpa"):
        Kernels(attention="fa5")


def test_the_command_line_says_it_once_and_records_what_computes(tiny22, tmp_path):
    size = ("--size", "128x66", "--num-frames", 5, "--seed", 1, "--model", tiny22, "--json")
    answer = muralist("generate", "a red ball", "-o", tmp_path / "a.mp4", "--attention", "fa3", *size)
    assert answer.code == 0 and answer.err.count("attention fa3: it is not installed; sdpa computes it") == 1
    assert computed(tmp_path / "a.mp4") == "sdpa"
    answer = muralist("generate", "a red ball", "-o", tmp_path / "b.mp4", "--attention", "reference", *size)
    assert answer.code == 0 and computed(tmp_path / "b.mp4") == "reference"
    assert "use one of auto, sdpa" in muralist("plan", "--attention", "fa5", *size[:-1]).error


def computed(video: Path) -> str:
    kernels = json.loads(video.with_name(video.name + ".json").read_text())["metadata"]["kernels"]
    return ", ".join(one["attention"] for one in kernels)


def test_a_run_goes_on_where_its_kernel_is_gone(tiny22, tmp_path, monkeypatch):
    """The request keeps what was asked for; what computes is decided where it goes on, and the file says what did."""
    fake(monkeypatch, "sageattention", "sageattn", lambda q, k, v, **layout: reference_attention(q, k, v))
    typed = ("generate", "a red ball", "--model", tiny22, "--size", "128x66", "--num-frames", 5, "--seed", 1, "--attention", "sage", "--keep-run")
    assert muralist(*typed, "-o", tmp_path / "a.mp4").code == 0 and computed(tmp_path / "a.mp4") == "sage"
    monkeypatch.delitem(sys.modules, "sageattention")
    forget()
    (tmp_path / "a.mp4").unlink()
    answer = muralist(*typed, "-o", tmp_path / "a.mp4")
    assert answer.code == 0 and "attention sage: it is not installed; sdpa computes it" in answer.err
    assert computed(tmp_path / "a.mp4") == "sage", "nothing was computed again"


def test_a_run_that_went_on_with_another_kernel_says_both(tiny22, tmp_path, monkeypatch):
    fake(monkeypatch, "sageattention", "sageattn", lambda q, k, v, **layout: reference_attention(q, k, v))
    typed = ("generate", "a red ball", "--model", tiny22, "--size", "128x66", "--num-frames", 5, "--seed", 1, "--attention", "sage")
    stop = Mock(side_effect=[None, None, KeyboardInterrupt])  # after the third save of a step
    with monkeypatch.context() as patch:
        save_step = RunDirectory.save_step
        patch.setattr(RunDirectory, "save_step", lambda *a, **k: (save_step(*a, **k), stop())[0])
        assert muralist(*typed, "-o", tmp_path / "a.mp4").code == 130
    monkeypatch.delitem(sys.modules, "sageattention")
    forget()
    answer = muralist(*typed, "-o", tmp_path / "a.mp4")
    assert answer.code == 0 and "steps were computed with" in answer.err and computed(tmp_path / "a.mp4") == "sage, sdpa"


def test_doctor_lists_the_kernels():
    found = muralist("doctor", "--json").events[0]
    assert "sdpa" in found["attention"]["found"] and "--linears fp8" in found["8-bit linears"]["found"]


# --- compiled blocks --------------------------------------------------------------------------------------------------------------

GRID = Grid(num_frames=13, height=160, width=224)  # 4 x 10 x 14 tokens of the tiny 2.1 base
RAGGED = WindowAttention((3, 4, 6))  # at most 8 shapes of windows, and other ones in odd layers
GRAFTS = {
    "full": Graft(token_chunk=150),
    "windows": Graft(attention=RAGGED, token_chunk=150),
    "guided": Graft(attention=GuidedWindows(RAGGED), token_chunk=150),
}


@pytest.fixture
def base(tiny21) -> Base:
    torch._dynamo.reset()
    counters.clear()
    return Base(inspect_base(str(tiny21)), CPU, torch.float32)


def forward(base: Base, graft: Graft) -> torch.Tensor:
    """One forward [1, 16, 4, 20, 28] of random latents."""
    generator = torch.Generator().manual_seed(0)
    z, coarse = torch.randn(1, 16, 4, 20, 28, generator=generator), torch.randn(1, 16, 4, 8, 8, generator=generator)
    text, level, transformer = torch.randn(1, 512, 32, generator=generator), torch.tensor([500.0]), base.transformer()
    transformer.configure(graft)
    with torch.inference_mode():
        seen = {"proxy": transformer.remember(coarse, level, text, 1.0)} if isinstance(graft.attention, GuidedWindows) else {}
        return transformer(z, level, text, return_dict=False, attention_kwargs=seen)[0]


def compiled(graft: Graft) -> Graft:
    return Graft(attention=graft.attention, token_chunk=graft.token_chunk, kernels=Kernels(attention="sdpa", compile="blocks"))


@pytest.mark.parametrize(
    ("device", "there", "variables", "lacking"),
    [
        (CPU, ["g++"], {}, None),
        (CPU, ["clang++", "gcc"], {}, "no C++ compiler (g++)"),
        (CPU, ["clang++"], {"CXX": "clang++"}, None),
        (CPU, ["g++"], {"CXX": "icpx"}, "no C++ compiler (icpx)"),
        (CUDA, ["clang"], {}, None),
        (CUDA, ["g++"], {}, "no C compiler (gcc or clang)"),
        (CUDA, ["gcc"], {"CC": "icx"}, "no C compiler (icx)"),
    ],
)
def test_compiling_needs_the_compiler_that_will_be_asked_for(monkeypatch, tmp_path, device, there, variables, lacking):
    for name in there:
        (tmp_path / name).touch(mode=0o755)
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"PATH": str(tmp_path), **variables}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(compiled_module, "find_spec", lambda name: name)
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(compiled_module.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(sys, "platform", "linux")
    found = compiled_module.why_not(device)
    assert found is None if lacking is None else lacking in found


def test_compiling_for_a_gpu_needs_pythons_header(monkeypatch, tmp_path):
    monkeypatch.setattr(compiled_module, "find_spec", lambda name: name)
    monkeypatch.setattr(compiled_module.sysconfig, "get_path", lambda name: str(tmp_path))
    assert "Python.h" in compiled_module.why_not(CUDA) and "python3-dev" in compiled_module.why_not(CUDA)


def test_a_process_may_see_many_graphs_of_one_function(monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    function = compiled_module.regional(lambda x, name: x + len(name))
    names = ["a" * length for length in range(12)]  # each text is a constant of its graph
    with compiled_module.compiling(), ThreadPoolExecutor(1) as other:
        assert [function(torch.zeros(3), name)[0].item() for name in names] == list(range(12))
        assert other.submit(function, torch.zeros(3), "b" * 12).result()[0].item() == 12


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind if kind == "guided" else pytest.param(kind, marks=pytest.mark.long) for kind in GRAFTS])
def test_compiled_blocks_equal_eager_ones(base, kind):
    eager, fast = forward(base, GRAFTS[kind]), forward(base, compiled(GRAFTS[kind]))
    assert counters["stats"]["unique_graphs"] > 0 and (eager - fast).abs().max() <= 1e-5 and eager.std() > 0.1


@pytest.mark.slow
def test_a_whole_denoising_with_ragged_windows_compiles_a_few_graphs_and_no_more(base):
    """Six pieces; those whose number of windows is one, or whose adapter changes, may be compiled again, but no step after the first compiles."""
    text = TextCond(torch.randn(1, 512, 32), torch.randn(1, 512, 32))
    counts: list[int] = []

    def run(grid: Grid) -> None:
        how = Refine(num_inference_steps=4, guidance_scale=2.0, flow_shift=3.0, attention=Windows(tokens=70), token_chunk=150)
        refine(base, text, None, grid, how, seed=0, saved=None, after_step=lambda *_: counts.append(graphs()), kernels=fast)

    fast = Kernels(attention="sdpa", compile="blocks")
    run(GRID)
    assert 5 <= counts[0] <= 12 and counts == counts[:1] * 4
    run(Grid(num_frames=9, height=176, width=208))
    assert counts[-1] == counts[0], "another size is served by the same graphs"


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def test_plain_kernels_leave_the_stock_blocks_alone(base):
    assert Graft().keeps_stock_blocks and not Graft(kernels=Kernels(attention="flash")).keeps_stock_blocks
    plain = forward(base, Graft())
    other = forward(base, Graft(kernels=Kernels(attention="reference")))
    assert (plain - other).abs().max() <= 1e-5 and Graft().kernels == PLAIN
