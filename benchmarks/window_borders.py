"""Do windows show? What `adherence.py --keep` has painted, looked at along the borders of K x K windows by `diagnose` ("seams at known borders").

    python benchmarks/window_borders.py travel=DIR still=DIR --windows 4 5

The folders hold the same prompts at one size; the middle frame of each is looked at, along the borders at each of the four places of windows that travel (those
that stand still are at the first). As many borders of tokens where no window that stands still ends are looked at too: what is found there with
such windows is the grid of tokens. True renders of the same frames are rows of their own: what is found in them is no seam.
Writes results/window_borders.{json,md}.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import kept
import numpy as np
import torch
from common import write
from judged import seams, window_borders

from muralist.base_info import inspect_base
from muralist.nn.windows import TRAVEL
from muralist.types import Geometry, Grid

TRUE = "true renders"
PLAIN = "no border"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", metavar="NAME=DIR")
    parser.add_argument("--windows", type=int, nargs="+", default=[4], help="along each side; even and odd blocks may differ")
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


def all_borders(geometry: Geometry, grid: Grid, counts: Sequence[int]) -> dict[str, dict[str, list[int]]]:
    """Rows of the table: where windows of each count and place meet in pixels, at places but the first those of either kind of block, and lines
    where none that stand still meet."""
    borders: dict[str, dict[str, list[int]]] = {}
    for count, place in product(counts, range(len(TRAVEL))):
        odd = (False, True) if place else (False,)
        kinds = [window_borders(geometry, grid, count, place=place, shifted=shifted) for shifted in odd]
        borders[f"{count} x {count}, place {place}"] = {axis: sorted({line for kind in kinds for line in kind[axis]}) for axis in kinds[0]}
    still = [window_borders(geometry, grid, count) for count in counts]
    return borders | {f"{PLAIN}, near {count} x {count}": plain(near, still, geometry, grid) for count, near in zip(counts, still)}


def plain(near: Mapping[str, Sequence[int]], still: Sequence[Mapping[str, Sequence[int]]], geometry: Geometry, grid: Grid) -> dict[str, list[int]]:
    """For each line the nearest border of tokens that `still` windows do not have; none twice. Ends the run where there are too few."""
    side, lines = geometry.pixel_multiple, {}
    for axis, length in (("x", grid.width), ("y", grid.height)):
        taken = {line for borders in still for line in borders[axis]}
        free = [line for line in range(side, length, side) if line not in taken]
        if len(free) < len(near[axis]):
            raise SystemExit(f"--windows: of {length // side} tokens along {axis} too few are no window's border")
        lines[axis] = []
        for line in near[axis]:
            lines[axis].append(min(free, key=lambda other: abs(other - line)))
            free.remove(lines[axis][-1])
    return {axis: sorted(along) for axis, along in lines.items()}


def summary(found: Sequence[Any]) -> dict[str, Any]:
    values = [finding.value for finding in found]
    clean = [not finding.found for finding in found]
    return {"none found, %": 100 * float(np.mean(clean)), "median, times the usual": float(np.median(values)), "largest": float(np.max(values))}


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
