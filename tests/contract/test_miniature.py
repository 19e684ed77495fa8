"""The embedded base is what it says: a plain Wan folder that anybody's diffusers opens, small, and without pickles."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import WanPipeline

from muralist.base_info import inspect_base

FOLDER = inspect_base("miniature").folder
MB = 1 << 20


def test_stock_diffusers_opens_and_runs_it():
    pipeline = WanPipeline.from_pretrained(FOLDER, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    result = pipeline(
        "a red ball moves right over grass", height=64, width=96, num_frames=5, num_inference_steps=2, max_sequence_length=16, output_type="np",
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert result.frames.shape == (1, 5, 64, 96, 3) and np.isfinite(result.frames).all()
    assert result.frames.std() > 0.01, "an empty picture"


def test_it_stays_within_its_sizes_and_holds_no_code():
    sizes = {path.relative_to(FOLDER): path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()}
    assert {path.suffix for path in sizes} <= {".safetensors", ".json", ".md"}
    adapters = sum(size for path, size in sizes.items() if path.parts[0] == "adapters")
    assert sum(sizes.values()) - adapters <= 32 * MB
    assert all(sum(s for p, s in sizes.items() if p.parts[:2] == ("adapters", name)) <= 16 * MB for name in inspect_base("miniature").adapters)
