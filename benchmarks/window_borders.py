"""Do windows show? What `adherence.py --keep` has painted by `ultragen`, looked at along the borders of its windows by `diagnose` ("seams at known borders").

    python benchmarks/window_borders.py travel=DIR still=DIR --windows 4

The folders hold the same prompts at one size; the middle frame of each is looked at. A row for each kind of fine window: K x K of even blocks, one
more along each side of odd ones, where they stand still and at each of the other three places of windows that travel. Lines of tokens where no window that
stands still ends, nor one of those of pooled tokens, are looked at too: what is found there is the grid of tokens. Each row has as many lines, those
nearest to the middle, since more of them stand out further. True renders of the same frames are rows of their own: what is found in them is no seam.
Only what runs along half of a picture and more is found, not an object that is cut: that is to be looked at.
Writes results/window_borders.{json,md}, with what each folder was painted from.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import kept
import numpy as np
import torch
from common import write
from judged import seams, window_borders

from muralist.base_info import inspect_base
from muralist.nn.attention import BranchedWindows
from muralist.nn.windows import TRAVEL
from muralist.types import Geometry, Grid

TRUE = "true renders"
PLAIN = "no border of windows that stand still"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", metavar="NAME=DIR")
    parser.add_argument("--windows", type=int, default=4, help="along each side, in even blocks")
    parser.add_argument("--model", default="miniature")
    options = parser.parse_args()
    folders = {name: kept.read(Path(folder)) for name, folder in (given.split("=", 1) for given in options.folders)}
    about, grid = of_all(folders)
    geometry = inspect_base(options.model).geometry
    borders = all_borders(geometry, grid, options.windows)
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
    cases += [{"painted": name, "about": clips[0].about} for name, clips in folders.items()]
    settings = "; ".join(f"{name}: {', '.join(clips[0].about.get('settings', ['as the recipe says']))}" for name, clips in folders.items())
    note = f"{len(true)} held-out prompts, {about['recipe']}, {about['size']} x {about['num_frames']}, middle frames; {settings}"
    write("window_borders", rows, note, cases)


def of_all(folders: Mapping[str, Sequence[kept.Kept]]) -> tuple[dict[str, Any], Grid]:
    """What all have in common, and their grid. Ends the run for folders of other prompts, sizes or seeds, and for one of several ways."""
    seen = {(clip.about["size"], clip.about["num_frames"], clip.about["recipe"], clip.about["seed"]) for clips in folders.values() for clip in clips}
    if mixed := [name for name, clips in folders.items() if any(clip.about != clips[0].about for clip in clips)]:
        raise SystemExit(f"{mixed[0]}: its clips were painted in different ways")
    prompts = {tuple(clip.row["prompt"] for clip in clips) for clips in folders.values()}
    if len(seen) > 1 or len(prompts) > 1:
        raise SystemExit(f"the folders hold other prompts, sizes or seeds: {seen}")
    about = next(iter(folders.values()))[0].about
    width, height = map(int, about["size"].split("x"))
    return about, Grid(num_frames=about["num_frames"], height=height, width=width)


def all_borders(geometry: Geometry, grid: Grid, windows: int) -> dict[str, dict[str, list[int]]]:
    """Where windows of either kind of block meet at each place, and lines where none that stand still meet; in pixels, of all as many."""
    if windows < 2:
        raise SystemExit(f"--windows {windows}: from 2, one has no border")
    kinds = BranchedWindows(windows).kinds
    still = [window_borders(geometry, grid, count) for count, _ in kinds]
    borders = {f"{count} x {count}, standing still": lines for (count, _), lines in zip(kinds, still)}
    for place, (count, shifted) in product(range(1, len(TRAVEL)), kinds):
        borders[f"{count} x {count}, place {place}"] = window_borders(geometry, grid, count, place=place, shifted=shifted)
    coarse = [window_borders(geometry, grid, count, pooled=2) for count in (windows // 2, windows // 2 + 1)]
    borders[PLAIN] = plain(still + coarse, geometry, grid)
    lengths = {"x": grid.width, "y": grid.height}
    most = {axis: min(len(lines[axis]) for lines in borders.values()) for axis in lengths}
    if not all(most.values()):
        raise SystemExit(f"--windows {windows}: they have no borders, or there is no line between them, at {grid.width}x{grid.height}")
    return {name: {axis: inner(lines[axis], length, most[axis]) for axis, length in lengths.items()} for name, lines in borders.items()}


def inner(lines: Sequence[int], length: int, most: int) -> list[int]:
    """The `most` lines nearest to the middle of a side."""
    return sorted(sorted(lines, key=lambda line: abs(line - length / 2))[:most])


def plain(still: Sequence[Mapping[str, Sequence[int]]], geometry: Geometry, grid: Grid) -> dict[str, list[int]]:
    """In the middle of each gap between borders of `still` windows that has a line of tokens in it, that line."""
    side, lines = geometry.pixel_multiple, {}
    for axis, length in (("x", grid.width), ("y", grid.height)):
        taken = sorted({0, length, *(line for borders in still for line in borders[axis])})
        middles = [(start + stop) // 2 // side * side for start, stop in pairwise(taken)]
        lines[axis] = [middle for middle in middles if middle not in taken]
    return lines


def summary(found: Sequence[Any]) -> dict[str, Any]:
    values = [finding.value for finding in found]
    clean = [not finding.found for finding in found]
    return {"none found, %": 100 * float(np.mean(clean)), "median, times the usual": float(np.median(values)), "largest": float(np.max(values))}


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
