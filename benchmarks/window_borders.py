"""Do windows show? What `adherence.py --keep` has painted, looked at along the borders of K x K windows by `diagnose` ("seams at known borders").

    python benchmarks/window_borders.py travel=DIR still=DIR --windows 4 5

The folders hold the same prompts at one size; the middle frame of each is looked at. The borders of tokens two further along are looked at too, as many: what
is found there is the grid of tokens and no window. True renders of the same frames are rows of their own: what is found in them is no seam.
Writes results/window_borders.{json,md}.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import kept
import numpy as np
import torch
from common import write
from judged import seams, window_borders

from muralist.base_info import inspect_base
from muralist.types import Grid

TRUE = "true renders"
BESIDE = 2  # tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", metavar="NAME=DIR")
    parser.add_argument("--windows", type=int, nargs="+", default=[4], help="along each side; even and odd blocks may differ")
    parser.add_argument("--model", default="miniature")
    options = parser.parse_args()
    folders = {name: kept.read(Path(folder)) for name, folder in (given.split("=", 1) for given in options.folders)}
    about, grid = of_all(folders)
    geometry = inspect_base(options.model).geometry
    borders = {f"{count} x {count}": window_borders(geometry, grid, count) for count in options.windows}
    borders |= {f"{BESIDE} tokens beside {name}": moved(lines, BESIDE * geometry.pixel_multiple) for name, lines in borders.items()}
    first = next(iter(folders.values()))
    true = [kept.of_eight_bits(kept.true_middle(clip.scene, grid.num_frames, grid.height, grid.width)) for clip in first]
    pictures = {name: [clip.frame for clip in clips] for name, clips in folders.items()} | {TRUE: true}
    rows, cases = [], []
    for name, frames in pictures.items():
        for where, lines in borders.items():
            found = [seams(frame[None], lines) for frame in frames]
            rows.append({"painted": name, "where": where} | summary(found))
            cases += [
                {"painted": name, "where": where, "prompt": clip.row["prompt"], "value": finding.value, "found": finding.found}
                for clip, finding in zip(first, found)
            ]
    for row in rows:
        print(row)
    write("window_borders", rows, f"{len(true)} held-out prompts, {about['recipe']}, {about['size']} x {about['num_frames']}, middle frames", cases)


def of_all(folders: Mapping[str, Sequence[kept.Kept]]) -> tuple[dict[str, Any], Grid]:
    """What all have in common, and their grid. Ends the run for folders of other prompts or sizes."""
    seen = {(clip.about["size"], clip.about["num_frames"], clip.about["recipe"]) for clips in folders.values() for clip in clips}
    prompts = {tuple(clip.row["prompt"] for clip in clips) for clips in folders.values()}
    if len(seen) > 1 or len(prompts) > 1:
        raise SystemExit(f"the folders hold other prompts or sizes: {seen}")
    about = next(iter(folders.values()))[0].about
    width, height = map(int, about["size"].split("x"))
    return about, Grid(num_frames=about["num_frames"], height=height, width=width)


def moved(lines: Mapping[str, Sequence[int]], pixels: int) -> dict[str, list[int]]:
    return {axis: [line + pixels for line in along] for axis, along in lines.items()}


def summary(found: Sequence[Any]) -> dict[str, Any]:
    values = [finding.value for finding in found]
    clean = [not finding.found for finding in found]
    return {"none found, %": 100 * float(np.mean(clean)), "median, times the usual": float(np.median(values)), "largest": float(np.max(values))}


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
