"""Does `diagnose` find what was planted, and nothing in clean renders? The full table.

    python benchmarks/diagnose.py --count 100 --jobs 2

Each case is a random scene of the world at 896x512 x 29, rounded to 8 bits. Writes results/diagnose.{json,md}.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch
from common import write

from muralist.eval.diagnose.plant import PLANTINGS, clean, find, make_case

CLEAN = 0.0  # the size of an artifact that is not there


def one(seed: int, done: set[tuple], weaker_below: int) -> list[dict]:
    """What is not `done` yet of one case: the clean render, every kind at its stated size and, for the first seeds, at weaker ones."""
    torch.set_num_threads(1)
    case, moving = make_case(seed), make_case(seed, moving=True)
    moving = case if moving.scene == case.scene else moving
    rows = []
    for kind, size in wanted(seed, done, weaker_below):
        if size == CLEAN:
            rows += [row(seed, name, CLEAN, finding) for name, findings in clean(case).items() for finding in findings]
        else:
            rows += [row(seed, kind, size, finding) for finding in find(kind, moving if PLANTINGS[kind].moving else case, size)]
    return rows


def wanted(seed: int, done: set[tuple], weaker_below: int) -> Iterator[tuple[str, float]]:
    if (seed, next(iter(PLANTINGS)), CLEAN) not in done:
        yield "", CLEAN
    for kind, planting in PLANTINGS.items():
        for size in (planting.size, *(planting.weaker if seed < weaker_below else ())):
            if (seed, kind, size) not in done:
                yield kind, size


def row(seed: int, kind: str, size: float, finding) -> dict:
    return {"seed": seed, "kind": kind, "finding": finding.name, "size": size, "value": finding.value, "threshold": finding.threshold, "found": finding.found}


def main() -> None:
    options = arguments()
    rows = [json.loads(line) for line in options.cases.read_text().splitlines()] if options.cases.exists() else []
    done = {(r["seed"], r["kind"], r["size"]) for r in rows}
    left = [seed for seed in range(options.count) if any(wanted(seed, done, options.weaker))]
    with ProcessPoolExecutor(options.jobs) as pool, options.cases.open("a") as log:
        for new in pool.map(partial(one, done=done, weaker_below=options.weaker), left):
            rows += new
            log.writelines(json.dumps(r) + "\n" for r in new)
            log.flush()
            print(new[0]["seed"], [(r["kind"], r["size"], r["value"]) for r in new if bool(r["found"]) == (r["size"] == CLEAN)], flush=True)
    rows = [r for r in rows if r["seed"] < options.count]
    write(
        "diagnose",
        table(rows),
        note="Scenes at 896x512 x 29, 8 bits; proxies 448x256. Found: of those planted. Flagged: of clean renders. Weakest: of the sizes tried.",
    )


def table(rows: list[dict]) -> list[dict]:
    """Found of planted, flagged of clean, and the weakest size of which 95 % were found, by kind and finding."""
    result = []
    for kind, planting in PLANTINGS.items():
        for name in planting.findings:
            counts = {size: counted(rows, kind, name, size) for size in (planting.size, *planting.weaker, CLEAN)}
            good = [size for size in (planting.size, *planting.weaker) if counts[size][1] and counts[size][0] >= 0.95 * counts[size][1]]
            weakest = f"{good[-1]:g} ({counts[good[-1]][0]} of {counts[good[-1]][1]})" if good else "-"
            stated, untouched = counts[planting.size], counts[CLEAN]
            result.append({
                "artifact": kind, "finding": name, "size": f"{planting.size:g} {planting.unit}", "found": f"{stated[0]} of {stated[1]}",
                "flagged clean": f"{untouched[0]} of {untouched[1]}", "weakest found at 95 %": weakest,
            })  # fmt: skip
    return result


def counted(rows: list[dict], kind: str, name: str, size: float) -> tuple[int, int]:
    """How many were found, of how many."""
    found = [bool(r["found"]) for r in rows if r["kind"] == kind and r["finding"] == name and r["size"] == size]
    return sum(found), len(found)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--weaker", type=int, default=40, help="cases in which weaker sizes are tried too")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--cases", type=Path, default=Path("diagnose-cases.jsonl"), help="log of single cases; what is in it is not run again")
    return parser.parse_args()


if __name__ == "__main__":
    main()
