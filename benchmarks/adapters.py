"""What an adapter costs beside the weights, and as a part of them: one forward of the embedded base in windows, without, beside, merged.

    OMP_NUM_THREADS=2 python benchmarks/adapters.py          # two minutes on two cores; writes results/adapters.{json,md}

The three take turns; times are minima of five.
"""

from __future__ import annotations

import time

import torch
from common import write

from muralist.base import Base
from muralist.base_info import inspect_base
from muralist.nn.adapters import merge_adapter, select_adapter
from muralist.nn.transformer import Graft, MuralTransformer
from muralist.nn.windows import WindowAttention

ADAPTER, WINDOW, CHUNK, TURNS = "uhr", (8, 8, 8), 8192, 5
GRIDS = ((8, 68, 120), (8, 136, 240))  # latents of 1920x1088 and of 3840x2176, 29 frames


def ready(adapter: str | None, merged: bool) -> MuralTransformer:
    model = Base(inspect_base("miniature"), torch.device("cpu"), torch.float32).transformer()
    select_adapter(model, adapter)
    if merged:
        merge_adapter(model, adapter)
    return model.configure(Graft(WindowAttention(WINDOW), token_chunk=CHUNK))


def timed(model: MuralTransformer, z: torch.Tensor, text: torch.Tensor) -> tuple[float, torch.Tensor]:
    started = time.perf_counter()
    output = model(z, torch.tensor([500.0]), text, return_dict=False)[0]
    return time.perf_counter() - started, output


@torch.inference_mode()
def main() -> None:
    torch.manual_seed(0)
    models = {"without": ready(None, False), "beside": ready(ADAPTER, False), "merged": ready(ADAPTER, True)}
    rows = []
    for grid in GRIDS:
        z, text = torch.randn(1, 48, *grid), torch.randn(1, 16, 128)
        outputs, seconds = {}, {name: [] for name in models}
        for _ in range(TURNS):
            for name, model in models.items():
                took, outputs[name] = timed(model, z, text)
                seconds[name].append(took)
        best = {f"{name}_s": min(times) for name, times in seconds.items()}
        apart = (outputs["merged"] - outputs["beside"]).abs().max() / outputs["beside"].abs().max()
        rows.append({"latents": grid, **best, "beside / merged": best["beside_s"] / best["merged_s"], "largest difference": apart.item()})
        print(rows[-1], flush=True)
    write("adapters", rows, f"miniature, adapter {ADAPTER} of rank 32, windows of {WINDOW}, chunks of {CHUNK} tokens")


if __name__ == "__main__":
    main()
