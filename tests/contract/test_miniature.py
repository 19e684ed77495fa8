"""The embedded base is what it says: a plain Wan folder that anybody's diffusers opens, small, and without pickles."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import WanPipeline

from muralist.base_info import UPSAMPLER, inspect_base
from muralist.nn.latent_upsampler import LatentUpsamplerConfig, miniature
from muralist.store.parts import read_part
from tests.shell import muralist

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
    added = [size for path, size in sizes.items() if path.parts[0] in ("adapters", "parts")]
    assert sum(sizes.values()) - sum(added) <= 32 * MB and sum(added) <= 64 * MB
    kinds = {path.parts[:2] for path in sizes if path.parts[0] in ("adapters", "parts")}
    assert all(sum(size for path, size in sizes.items() if path.parts[:2] == kind) <= 16 * MB for kind in kinds)


def test_no_path_of_a_machine_is_in_its_files():
    for path in FOLDER.rglob("*"):
        if path.suffix == ".json":
            assert not any(root in path.read_text() for root in ("/var/", "/home/", "/work/", "/tmp/")), path


def test_its_upsampler_is_of_the_shape_that_training_makes():
    """So that training it goes on from it."""
    record = read_part(FOLDER / "parts" / UPSAMPLER, UPSAMPLER)
    assert LatentUpsamplerConfig.of(record) == miniature(inspect_base("miniature").geometry.channels)


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "skip"), [("cascade", 1), ("luve", 1), ("pixelwizard", 0), ("ultragen", 0), ("atlasvid", 1)])
def test_a_recipe_it_has_the_parts_for_paints(recipe, skip, tmp_path):
    """At a size at which windows are shifted and the upsampler's too."""
    size = ("--size", "896x512", "--num-frames", 5, "--num-inference-steps", 3, "--skip-steps", skip)
    answer = muralist("generate", "a red ball rises over sand", "--recipe", recipe, *size, "--seed", 0, "-o", tmp_path / "a.mp4")
    assert answer.code == 0, answer.err
