"""Windows against full attention: time and memory, both sides in one run.

    OMP_NUM_THREADS=2 python benchmarks/windows.py                 # everything, about twelve minutes on two cores; writes results/windows.{json,md}
    OMP_NUM_THREADS=1 python benchmarks/windows.py --quick          # small sizes, prints only

Sizes of the CPU goals: width 256, 4 heads of 64, 4 layers, FFN 1,536, windows of 8 x 8 x 8 = 512 tokens, 512 text tokens.
The ratios are what counts; times are minima over repetitions and belong to the machine that the result names.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel

from muralist.cost.transformer import Dimensions, forward
from muralist.nn.attention import WindowAttention, attend_full, attend_windows, backends
from muralist.nn.kernels import Kernels
from muralist.nn.transformer import Graft, MuralTransformer
from muralist.nn.windows import Run, Shape, partition, reorder

WIDTH, HEADS, LAYERS, FFN, TEXT, EXTRA = 256, 4, 4, 1536, 512, 64
WINDOW: Shape = (8, 8, 8)
CHUNK = 4096
RESULTS = Path(__file__).parent / "results"
WIDE, WIDE_LAYERS, WIDE_TOKENS = 512, 2, 65536  # the size of the real-size goals; two layers, since full attention over them takes minutes
GRIDS: dict[int, Shape] = {2048: (8, 16, 16), 8192: (8, 32, 32), 16384: (8, 32, 64), 32768: (8, 64, 64), 65536: (16, 64, 64)}
DOUBLING = [8192, 16384, 32768, 65536]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def best(work: Callable[[], object], repeats: int) -> float:
    """Seconds of the fastest of `repeats` runs after one warm-up: CPU seconds with one thread, which other work inflates less than wall; else wall."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    work()
    times = []
    for _ in range(repeats):
        start = clock()
        work()
        times.append(clock() - start)
    return min(times)


def sizes(width: int, layers: int) -> dict[str, int]:
    """A configuration with heads of 64 and FFNs of six widths."""
    head = WIDTH // HEADS
    return dict(
        num_attention_heads=width // head, attention_head_dim=head, num_layers=layers, ffn_dim=width * FFN // WIDTH, text_dim=WIDTH, freq_dim=64,
        in_channels=16, out_channels=16,
    )  # fmt: skip


def model(dtype: torch.dtype, width: int = WIDTH, layers: int = LAYERS) -> WanTransformer3DModel:
    torch.manual_seed(0)
    return WanTransformer3DModel(**sizes(width, layers)).eval().to(dtype)


def latents(tokens: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    f, y, x = GRIDS[tokens]
    return torch.randn(1, 16, f, 2 * y, 2 * x, dtype=dtype), torch.tensor([500.0]), torch.randn(1, TEXT, WIDTH, dtype=dtype)


def one_layer(tokens: int, dtype: torch.dtype) -> dict[str, float]:
    """Attention of one layer: all keys, against 512 keys of the window and 64 further ones (folding and concatenation included)."""
    q, k, v = (torch.randn(1, tokens, HEADS, WIDTH // HEADS, dtype=dtype) for _ in range(3))
    groups = partition(GRIDS[tokens], WINDOW).groups
    more = torch.randn(1, sum(run.num_windows for run in groups), EXTRA, HEADS, WIDTH // HEADS, dtype=dtype)

    def extra(run: Run) -> tuple[torch.Tensor, torch.Tensor]:
        part = more[:, run.first : run.first + run.num_windows]
        return part, part

    windows = best(lambda: attend_windows(q, k, v, groups, extra), 20)
    full = best(lambda: attend_full(q, k, v), 2 if tokens > 20000 else 3)
    limit = tokens / (512 + EXTRA)
    return {"tokens": tokens, "full_s": full, "windows_s": windows, "ratio": full / windows, "limit": limit, "goal": 40.0}


def floor(tokens: int, dtype: torch.dtype) -> dict[str, float]:
    """The windowed forward against the same forward whose attention returns its queries: all of it, and self-attention only."""
    given = latents(tokens, dtype)
    mural = MuralTransformer.adopt(model(dtype)).configure(Graft(WindowAttention(WINDOW), token_chunk=CHUNK))
    backends.register("identity", lambda q, k, v: q)
    backends.register("identity self", lambda q, k, v: F.scaled_dot_product_attention(q, k, v) if len(q) == 1 else q)  # cross-attention is not folded
    seconds = {}
    for name in ("sdpa", "identity", "identity self"):
        with backends.use(name):
            seconds[name] = best(lambda: mural(*given), 2)
    result = {"tokens": tokens, "windowed_s": seconds["sdpa"], "identity_s": seconds["identity"], "identity_self_s": seconds["identity self"]}
    return result | {"ratio": seconds["sdpa"] / seconds["identity"], "ratio_self_only": seconds["sdpa"] / seconds["identity self"], "goal": 1.6}


def scaling(sizes: list[int], dtype: torch.dtype, rounds: int = 4) -> list[dict[str, float]]:
    """Time of the windowed forward as the grid doubles; all sizes in turn, several times, since a shared machine has slow minutes."""
    mural = MuralTransformer.adopt(model(dtype)).configure(Graft(WindowAttention(WINDOW), token_chunk=CHUNK))
    given = {tokens: latents(tokens, dtype) for tokens in sizes}
    times = [{tokens: best(lambda tokens=tokens: mural(*given[tokens]), 1) for tokens in sizes} for _ in range(rounds)]
    seconds = [min(one[tokens] for one in times) for tokens in sizes]
    ratios = [None, *(large / small for small, large in pairwise(seconds))]
    return [{"tokens": tokens, "s": s, "ratio": ratio, "goal": 2.1} for tokens, s, ratio in zip(sizes, seconds, ratios)]


def matmul_flops(dtype: torch.dtype) -> float:
    """FLOP/s of a product of square matrices of 2048."""
    a, b = (torch.randn(2048, 2048, dtype=dtype) for _ in range(2))
    return 2 * 2048**3 / best(lambda: a @ b, 10)


def achieved(width: int, layers: int, tokens: int, dtype: torch.dtype, compile: str) -> dict[str, Any]:
    """FLOP/s of the windowed forward against those of a matrix product, measured before and after it."""
    graft = Graft(WindowAttention(WINDOW), token_chunk=CHUNK, kernels=Kernels(attention="sdpa", compile=compile))
    mural, given = MuralTransformer.adopt(model(dtype, width, layers)).configure(graft), latents(tokens, dtype)
    rates = [matmul_flops(dtype)]
    seconds = best(lambda: mural(*given), 2)
    rates.append(matmul_flops(dtype))
    dimensions = Dimensions.of(dict(mural.config))
    flops = forward(dimensions, graft, GRIDS[tokens], TEXT).flops
    row = {
        "width": width,
        "layers": layers,
        "compile": compile,
        "tokens": tokens,
        "s": seconds,
        "gflop": flops / 1e9,
        "matmul_gflops": [rate / 1e9 for rate in rates],
    }
    return row | {"ratio": flops / seconds / max(rates), "goal": 0.6}


def reordering(tokens: int) -> dict[str, float]:
    """What changing the order costs: a permutation of the residual stream."""
    even, odd = (partition(GRIDS[tokens], WINDOW, shifted=shifted) for shifted in (False, True))
    x = torch.randn(1, tokens, WIDTH)
    return {"tokens": tokens, "s": best(lambda: reorder(x, even, odd), 5)}


RETURN_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}  # glibc gives freed tensors back at once: resident = live
GRAFTS = {
    "stock": None,
    "full, chunks": Graft(token_chunk=CHUNK),
    "windows": Graft(WindowAttention(WINDOW)),
    "windows, chunks": Graft(WindowAttention(WINDOW), token_chunk=CHUNK),
}


def peak(kind: str, tokens: int, dtype: torch.dtype, width: int, layers: int) -> float:
    """Peak resident memory during one forward above that before it, in MiB (Linux; run in a process of its own)."""
    net = model(dtype, width, layers)
    if GRAFTS[kind] is not None:
        net = MuralTransformer.adopt(net).configure(GRAFTS[kind])
    given = latents(tokens, dtype)
    net(*latents(2048, dtype))  # thread pools, kernels' own buffers
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again at the present size
    before = resident("VmRSS")
    net(*given)
    return resident("VmHWM") - before


def resident(field: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def peaks(tokens: int, dtype_name: str, kinds: Sequence[str] = tuple(GRAFTS), width: int = WIDTH, layers: int = LAYERS) -> dict[str, float]:
    """Activation peak of some kinds, each in a fresh process; the residual stream itself for scale."""
    result: dict[str, float] = {"tokens": tokens, "width": width, "residual_stream_mib": tokens * width * DTYPES[dtype_name].itemsize / 2**20}
    for kind in kinds:
        command = [sys.executable, __file__, "--peak", kind, "--tokens", str(tokens), "--dtype", dtype_name, "--width", str(width), "--layers", str(layers)]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | RETURN_MEMORY)
        result[f"{kind}_mib"] = float(done.stdout.split()[-1])
    return result | {"ratio": result["stock_mib"] / result["windows, chunks_mib"], "goal": 4.0}


def machine() -> dict[str, object]:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    flags = next((line for line in lines if line.startswith("flags")), "").split()
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "bf16_instructions": [flag for flag in ("avx512_bf16", "amx_bf16") if flag in flags],
        "load_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "date": date.today().isoformat(),
    }


def measure(quick: bool) -> dict[str, object]:
    large, doubling = (8192, [2048, 8192]) if quick else (32768, DOUBLING)
    report: dict[str, object] = {"machine": machine()}
    for name, dtype in DTYPES.items():
        size = large if name == "fp32" else 8192  # bf16 without AMX is several times slower: smaller, for the record
        report[name] = {"one_layer": one_layer(size, dtype), "floor": floor(size, dtype), "peak": peaks(size, name)}
    report["fp32"] |= {"scaling": scaling(doubling, torch.float32), "reordering": reordering(large)}
    if not quick:
        report["fp32"]["achieved"] = [
            achieved(width, layers, tokens, torch.float32, compile)
            for width, layers, tokens in ((WIDTH, LAYERS, large), (WIDE, WIDE_LAYERS, WIDE_TOKENS))
            for compile in ("off", "blocks")
        ]
        report["fp32"]["wide_peak"] = peaks(WIDE_TOKENS, "fp32", ("stock", "windows, chunks"), WIDE, WIDE_LAYERS)
    report["machine"]["load_after"] = round(os.getloadavg()[0], 2)
    return report


def markdown(report: dict) -> str:
    info = report["machine"]
    lines = ["# Windows against full attention", "", f"`OMP_NUM_THREADS={info['threads']} python benchmarks/windows.py`, {info['date']}", ""]
    lines += [f"Machine: {info['cpu']}, {info['cores']} cores, {info['threads']} threads, bf16 instructions: {', '.join(info['bf16_instructions']) or 'none'};"]
    lines += [f"load average {info['load_before']} before and {info['load_after']} after (above {info['threads']} the machine was busy with other work)."]
    lines += ["Times are CPU seconds of the one thread." if info["threads"] == 1 else "Times are wall seconds."]
    lines += [f"Python {info['python']}, torch {info['torch']}, diffusers {info['diffusers']}.", ""]
    lines += [f"Width {WIDTH}, {HEADS} heads, {LAYERS} layers, FFN {FFN}, window {WINDOW}, text {TEXT}, token_chunk {CHUNK};"]
    lines += [f"rows of width {WIDE}: {WIDE_LAYERS} layers, FFN {WIDE * FFN // WIDTH}.", ""]
    lines += ["| what | type | tokens | one side | other side | ratio | goal | limit |", "|---|---|---|---|---|---|---|---|"]
    for name in DTYPES:
        part = report[name]
        row = part["one_layer"]
        lines.append(
            f"| full attention / windows of 512 + {EXTRA} keys, one layer | {name} | {row['tokens']:,} | {row['full_s']:.3f} s | {row['windows_s']:.4f} s "
            f"| {row['ratio']:.1f}x | >= {row['goal']:.0f}x at 32,768 | {row['limit']:.1f}x |"
        )
        row = part["floor"]
        cells = f"| {name} | {row['tokens']:,} | {row['windowed_s']:.3f} s |"
        lines.append(f"| windowed forward / attention = identity {cells} {row['identity_s']:.3f} s | {row['ratio']:.2f}x | <= {row['goal']}x | 1x |")
        lines.append(f"| windowed forward / self-attention = identity {cells} {row['identity_self_s']:.3f} s | {row['ratio_self_only']:.2f}x | | 1x |")
        for row in filter(None, (part["peak"], part.get("wide_peak"))):
            for kind in (kind for kind in list(GRAFTS)[1:] if f"{kind}_mib" in row):
                ours = row[f"{kind}_mib"]
                goal = f">= {row['goal']:.0f}x" if kind == "windows, chunks" else ""
                cells = f"| {name} | {row['tokens']:,} | {row['stock_mib']:.0f} MiB | {ours:.0f} MiB | {row['stock_mib'] / ours:.1f}x | {goal} | |"
                lines.append(f"| activation peak at width {row['width']}: stock / {kind} {cells}")
    for row in report["fp32"]["scaling"][1:]:
        lines.append(f"| windowed forward, time(2N) / time(N) | fp32 | {row['tokens']:,} | {row['s']:.3f} s | | {row['ratio']:.2f}x | <= {row['goal']}x | 2x |")
    for row in report["fp32"].get("achieved", []):
        matmul = max(row["matmul_gflops"])
        cells = f"| fp32 | {row['tokens']:,} | {row['gflop'] / row['s']:.0f} GFLOP/s | {matmul:.0f} GFLOP/s | {row['ratio']:.2f} | >= {row['goal']} | 1 |"
        lines.append(f"| windowed forward of width {row['width']}, compile {row['compile']} / matrix product {cells}")
    row = report["fp32"]["reordering"]
    lines += ["", f"Changing the order of {row['tokens']:,} tokens once: {row['s'] * 1e3:.1f} ms."]
    stream = report["fp32"]["peak"]["residual_stream_mib"]
    lines += [
        f"One fp32 residual stream of the first peak rows: {stream:.0f} MiB. Peaks: growth of peak resident memory over one forward, each in its own process."
    ]
    lines += ["", *(f"- {note}" for note in report.get("notes", []))]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, print only")
    parser.add_argument("--scaling", action="store_true", help="measure only time against tokens, for the results that are there (same machine)")
    parser.add_argument("--peak", choices=list(GRAFTS), help=argparse.SUPPRESS)
    parser.add_argument("--tokens", type=int, choices=list(GRIDS), help=argparse.SUPPRESS)
    parser.add_argument("--width", type=int, default=WIDTH, help=argparse.SUPPRESS)
    parser.add_argument("--layers", type=int, default=LAYERS, help=argparse.SUPPRESS)
    parser.add_argument("--dtype", choices=list(DTYPES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    with torch.inference_mode():
        if options.peak:
            print(peak(options.peak, options.tokens, DTYPES[options.dtype], options.width, options.layers))
            return
        if options.scaling:
            report = json.loads((RESULTS / "windows.json").read_text())
            report["fp32"]["scaling"] = scaling(DOUBLING, torch.float32)
        else:
            report = measure(options.quick)
    print(markdown(report))
    if not options.quick:
        (RESULTS / "windows.json").write_text(json.dumps(report, indent=2) + "\n")
        (RESULTS / "windows.md").write_text(markdown(report))


if __name__ == "__main__":
    main()
