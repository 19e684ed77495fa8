"""The grid of a comparison: one run for each recipe, prompt and seed, made one after another, each by the command line that the report shows.

    DIR/cells/RECIPE-WORDS-s0-1f3a2b4c/    one cell; its name ends in a digest of the complete request, so another size is another cell
        cell.json       what was asked, and the command (to be typed inside this directory)
        run/            the run directory: latents of every stage
        video.mp4 .mp4.json what came out
        journal.jsonl   the run's own events: times and peaks of its stages
        outcome.json    done, or failed and why

Killed at any time, the same comparison finds the finished cells and goes on inside the one that was interrupted. A failed cell is tried
again by the next start and never stops the others.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from muralist.compare import child
from muralist.compare.journal import Costs, Journal, read_costs
from muralist.config import Request
from muralist.errors import UserError
from muralist.stages.encode import sidecar_path
from muralist.store import atomic

CELLS, VIDEO, RUN = "cells", "video.mp4", "run"
_WORDS = 32  # characters of the prompt in a cell's name
_LARGEST = 4 << 20  # bytes of a file of prompts


@dataclass(frozen=True, slots=True)
class Side:
    """A column of the report: a recipe as it is, or with settings (`NAME=VALUE`) under a name of its own."""

    name: str
    recipe: str
    settings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Cell:
    """One run: the side that it belongs to, the complete request, the fingerprint of the weights, and the words of `muralist generate` that ask for it
    besides prompt and output."""

    side: str
    request: Request
    weights: str
    options: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Readable, safe as a file name, and different for every request and for other weights."""
        words = re.sub(r"[^a-z0-9]+", "-", self.request.prompt.lower())[:_WORDS].strip("-")
        asked = atomic.json_bytes({"request": self.request.record(), "weights": self.weights, "options": self.options})
        return f"{self.request.recipe}-{words}-s{self.request.seed}-{hashlib.sha256(asked).hexdigest()[:8]}"

    @property
    def arguments(self) -> tuple[str, ...]:
        """What follows `muralist` on the command line inside the cell's directory. The prompt comes last, where it may begin with a dash."""
        return ("generate", *self.options, "--output", VIDEO, "--run-dir", RUN, "--keep-run", "--", self.request.prompt)

    def record(self) -> dict[str, Any]:
        return {"request": self.request.record(), "command": shlex.join(("muralist", *self.arguments))}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a cell: its video, or the reason why there is none, and what it cost."""

    cell: Cell
    folder: Path
    failure: str | None
    costs: Costs

    @property
    def video(self) -> Path:
        return self.folder / VIDEO


def run_grid(cells: Sequence[Cell], root: Path, *, tell: Callable[[int, Outcome], object], runner: child.Runner | None = None) -> list[Outcome]:
    """Make every cell that is not done yet, in order; `tell` hears of each (number from 0, outcome). `runner`: a process a run by default."""
    outcomes = []
    for number, cell in enumerate(cells):
        folder = root / CELLS / cell.name
        failure = None if _is_done(folder) else _make(cell, folder, runner or child.run)
        outcomes.append(Outcome(cell, folder, failure, read_costs(folder / "journal.jsonl")))
        tell(number, outcomes[-1])
    return outcomes


def _make(cell: Cell, folder: Path, runner: child.Runner) -> str | None:
    """Run the cell or go on with it; the reason in one line if it failed."""
    with atomic.reported(folder):
        folder.mkdir(parents=True, exist_ok=True)
    atomic.write_json(folder / "cell.json", cell.record())
    # A begun run is resumed by what it has recorded: the memory that is free today must not change its plan.
    begun = (folder / RUN / "request.json").is_file()
    arguments = ("resume", RUN, "--keep-run", *_where(cell)) if begun else cell.arguments
    failure = runner((*arguments[:1], "--json", *arguments[1:]), folder, Journal(folder / "journal.jsonl"))
    if failure is None and not (folder / VIDEO).is_file():
        failure = "the run ended well but left no video"
    atomic.write_json(folder / "outcome.json", {"failure": failure, "video": None if failure else _stamp(folder / VIDEO)})
    return failure


def _where(cell: Cell) -> Iterator[str]:
    """The options that say where a run computes and in how much memory: a run does not record them, each start is told anew."""
    for word, value in zip(cell.options, cell.options[1:]):
        if word in ("--device", "--memory", "--vram-limit"):
            yield from (word, value)


def _is_done(folder: Path) -> bool:
    """Whether the outcome is a video, and the video is still the one that was written."""
    try:
        outcome = atomic.read_json(folder / "outcome.json")
        return outcome["failure"] is None and outcome["video"] == _stamp(folder / VIDEO)
    except (UserError, KeyError, TypeError, OSError):
        return False


def _stamp(video: Path) -> dict[str, Any]:
    """Enough to notice that a file was exchanged or cut, without reading all of it again."""
    return {"size": video.stat().st_size, "sha256": atomic.read_json(sidecar_path(video))["video"]["sha256"]}


# --- what a person typed ----------------------------------------------------------------------------------------------------------


def read_prompts(path: Path) -> list[str]:
    """One prompt a line; empty lines and those that begin with # are left out, and so are repetitions."""

    def refused(why: str) -> UserError:
        return UserError(f"{path} {why}", where="prompts", fix="give a text file with one prompt a line")

    try:
        if not path.is_file() or path.stat().st_size > _LARGEST:
            raise refused("is too large" if path.is_file() else "is no file")
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise refused(f"cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise refused("is not a text in UTF-8") from None
    prompts = list(dict.fromkeys(line.strip() for line in text.split("\n") if line.strip() and not line.lstrip().startswith("#")))
    if not prompts:
        raise refused("holds no prompt")
    if not all(line.isprintable() for line in prompts):
        raise refused("holds control characters")
    return prompts


def read_seeds(text: str) -> list[int]:
    """Seeds of `0,1,2` or `0-3`."""
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,19})(?:-(\d{1,19}))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, -1)
        if not first <= last < first + 1000:
            raise UserError(f"{part!r} is no seed", where="seeds", fix="use whole numbers from 0, such as 0,1 or 0-3")
        seeds += range(first, last + 1)
    return list(dict.fromkeys(seeds))


def read_sides(recipes: str | None, variants: Sequence[str]) -> list[Side]:
    """Recipes, separated by commas, and variants; whether a recipe exists is for the registry to say."""
    names = [] if recipes is None else dict.fromkeys(name.strip() for name in recipes.split(","))
    sides = [Side(name, name) for name in names] + [_variant(text) for text in variants]
    for number, side in enumerate(sides):
        if side.name in [earlier.name for earlier in sides[:number]]:
            raise UserError(f"{side.name!r} is named twice", where="variant", fix="give each a name of its own")
    return sides


def _variant(text: str) -> Side:
    """`NAME: RECIPE SETTING=VALUE ...`: a value is JSON, which may hold spaces, or a word."""
    name, colon, rest = text.partition(":")
    recipe, rest = (*rest.split(maxsplit=1), "", "")[:2]
    settings = _settings(rest)
    if not (colon and name.strip() and name.isprintable() and re.fullmatch(r"[\w.-]+", recipe)) or settings is None:
        fix = "write NAME: RECIPE SETTING=VALUE ..., such as '20 steps: direct refine.num_inference_steps=20'"
        raise UserError(f"{text!r:.80} is no variant", where="variant", fix=fix)
    return Side(name.strip(), recipe, settings)


def _settings(text: str) -> tuple[str, ...] | None:
    """The settings that `text` consists of, as they are; None if there is more in it."""
    found = []
    while text:
        name = re.match(r"[\w.]+=", text)
        if name is None:
            return None
        end = name.end() + _value_length(text[name.end() :])
        found.append(text[:end])
        text = text[end:].lstrip()
    return tuple(found)


def _value_length(text: str) -> int:
    """Characters of the value that `text` begins with: JSON up to a space or the end, else a word."""
    try:
        _, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):  # what is nested too deep is told where the value is read
        end = 0
    word = len(text.split(maxsplit=1)[0]) if text[:1].strip() else 0
    return end if end and not text[end : end + 1].strip() else word
