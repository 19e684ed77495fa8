"""What the plan says for Wan bases at 4K on cards of 24, 80 and 140 GB: writes docs/plan.md.

python benchmarks/plans.py
"""

from __future__ import annotations

import textwrap
from dataclasses import replace
from pathlib import Path

from muralist.base_info import BaseInfo
from muralist.bench.wan import LARGER, SIZES
from muralist.config import Request
from muralist.plan import Machine, Plan, plan
from muralist.recipes import find

FRAMES = (29, 81, 161)
MACHINES = ("24GB", "80GB", "140GB")
INTRO = """# What a plan says

`muralist plan` (and `generate --dry-run`) computes the cost of a video before any weight is loaded: tokens, FLOPs, memory, disk and time of each
stage, what will be done about it, and what cannot fit (exit code 2, with the nearest request that fits). `--model` is a complete folder: the plan
reads its configurations and the headers of its weights. A hub id is downloaded first, weights included.

- **FLOPs** of transformer, text encoder and decoder are those that PyTorch's counter finds (`benchmarks/results/flops.md`,
  `tests/unit/test_plan.py`); an adapter is a part of the weights; where two take turns
  at every step (`refine.attention.proxy_noise=same`), its own are taken from its file size.
- **Memory** counts weights and the tensors that are alive together; a test compares the transformer's forward with what it really allocates
  (within -10 and +20 %), and `benchmarks/results/plan_memory.md` forwards, decodes and enlargements with the resident memory of a process: within 15 %,
  where freed memory goes back to the system. That is below level `high`: on a CPU at `high` the C library keeps freed chunks, 1.3 to 1.7 times what
  a narrow forward holds (`muralist/nn/heap.py`). **Disk** is what the files of all stages take; the size of the video file is a guess.
- **Times** are estimates: FLOPs over a share of the matmul rate plus memory traffic over the copy rate. `muralist plan` measures both rates
  here. The presets below are assumptions (24 GB: RTX 4090 class, 150 TFLOP/s, 0.92 TB/s; 80 GB: H100 class, 790 TFLOP/s, 3.0 TB/s; 140 GB:
  H200 class, 790 TFLOP/s, 4.3 TB/s), with PyTorch's own attention kernels, layers not compiled, decoders at the rates of public code. No time
  below has been checked on such a card. `--machine 24GB --vram-limit 16` plans for the rates of that card with 16 GB free.
- **What the plan decides**: the level of memory (`--memory`; `auto` is the first that fits): tokens at a time, the decode order and tiles, and on a
  GPU whether blocks wait in main memory. Where the default limit of 4.3 GB holds only small tiles, it raises the limit to what
  tiles of 512 pixels take, the same on every machine that has the room. `Plan.request` is the request with that filled in: the one to run.
- **Linear layers in 8 bits** (`--linears fp8`) are counted with half their weights and the float32 copy of the tokens that they round, but as fast as plain
  ones: what they gain has not been measured on any GPU. On a CPU, plain weights are loaded into the same memory first and count.

## 1.3B and 5B at 4K on 24, 80 and 140 GB

Made by `python benchmarks/plans.py` from published shapes, without weights; 50 steps, guidance 5. Memory and disk are the same on all three.
"""


def planned(base: BaseInfo, recipe: str, num_frames: int, machine: Machine) -> Plan:
    grid = replace(base.defaults.grid, num_frames=num_frames, height=2160, width=3840)
    asked = Request(prompt="a video", negative_prompt="", grid=grid, seed=0, model=base.name, revision=None, recipe=recipe, config=find(recipe)(base))
    return plan(asked, base, machine)


def span(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def larger() -> str:
    """The bases that are not in the tables, in a paragraph."""
    card, told, fitting = Machine.of("24GB"), [], set()
    for name, size in LARGER.items():
        base = size.info(name)
        made, smaller = (planned(base, "cascade", 81, replace(card, device_bytes=count)) for count in (card.device_bytes, 16 * 10**9))
        host, own = max(stage.host_bytes for stage in made.stages), made.request.config.proxy
        numbers = f"{made.memory_bytes / 1e9:.1f} GB, {host / 1e9:.1f} GB of main memory and {span(made.seconds)}"
        told.append(f"{name}, at {size.sampling['num_inference_steps']} steps with a proxy of {own.width}x{own.height}, takes {numbers}")
        fitting |= {refusal.fix for refusal in smaller.refusals}
    start = f"The larger bases are not in the tables. Planned likewise on the 24 GB card, `cascade`, 81 frames, they come to level `{made.memory}`"
    (fix,) = fitting
    text = f"{start} (each preset has 64 GB of main memory): {'; '.join(told)}. With 16 GB free both are refused: {fix}."
    return textwrap.fill(text, 160) + "\n\n"


def table(columns: list[str], rows: list[list[str]]) -> str:
    return "\n".join(["| " + " | ".join(line) + " |" for line in (columns, ["---"] * len(columns), *rows)]) + "\n"


def overview() -> str:
    rows = []
    for name, size in SIZES.items():
        for recipe in ("cascade", "direct"):
            for num_frames in FRAMES:
                plans = [planned(size.info(name), recipe, num_frames, Machine.of(machine)) for machine in MACHINES]
                saving = next(stage for stage in plans[0].stages if stage.stage == "refine").attention_saving
                space = [f"{plans[0].memory_bytes / 1e9:.1f}", f"{plans[0].disk_bytes / 1e9:.1f}"]
                times = [span(one.seconds) if not one.refusals else "does not fit" for one in plans]
                rows.append([name, recipe, str(num_frames), f"{plans[0].flops / 1e15:,.0f}", f"{saving:,.0f}x", *space, *times])
    columns = ["base", "recipe", "frames", "PFLOP", "attention saved in refine", "memory GB", "disk GB", *(f"time, {machine}" for machine in MACHINES)]
    return table(columns, rows)


def stages(made: Plan) -> str:
    rows = []
    for s in made.stages:
        size = [f"{s.tokens:,}", f"{s.keys_per_query:,.0f}"] if s.tokens else ["", ""]
        work = [f"{s.flops / 1e15:,.2f}", f"{s.attention_saving:,.0f}x"] if s.tokens else [f"{s.flops / 1e15:,.2f}" if s.flops else "", ""]
        rows.append([s.stage, s.work, *size, *work, f"{s.memory_bytes / 1e9:.1f}", f"{s.disk_bytes / 1e9:.2f}", span(s.seconds), s.action])
    text = table(["stage", "work", "tokens", "keys a query", "PFLOP", "attention saved", "memory GB", "disk GB", "time", "what will be done"], rows)
    refused = [f"- **refused**: {r.where}: {r.what}; {r.fix}\n" for r in made.refusals]
    return "\n".join([text, "".join([*(f"- {note}\n" for note in made.notes), *refused])])


def main() -> None:
    text = INTRO + larger() + overview()
    for name, size in SIZES.items():
        for recipe in ("cascade", "direct"):
            made = planned(size.info(name), recipe, 81, Machine.of("24GB"))
            text += f"\n### {name}, {recipe}, 81 frames at 3840x2160, 24 GB\n\n" + stages(made)
    small = replace(Machine.of("24GB"), name="the same card with 13 GB", device_bytes=13 * 10**9)
    text += "\n### Level low: 5B, cascade, 81 frames on 13 GB\n\n" + stages(planned(SIZES["5B"].info("5B"), "cascade", 81, small))
    text += "\n### Refused: 1.3B, direct, 161 frames on 13 GB\n\n" + stages(planned(SIZES["1.3B"].info("1.3B"), "direct", 161, small))
    Path(__file__).parents[1].joinpath("docs", "plan.md").write_text(text)


if __name__ == "__main__":
    main()
