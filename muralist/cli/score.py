"""`muralist score`: fill the score column of a folder of footage, so that training can choose by it."""

from __future__ import annotations

from typing import Annotated

import typer

from muralist.cli._options import Debug


def command(
    folder: Annotated[str, typer.Argument(help="A folder with videos.csv: columns file and caption.")],
    metric: Annotated[str, typer.Option("--metric", help="Any metric of a single video that `muralist eval` knows.")] = "hpsv3",
    debug: Debug = False,
) -> int:
    """Score footage for training: a number for every clip of videos.csv that has none yet. It can be stopped and started again."""
    from muralist.cli._show import Interrupted
    from muralist.data.sources import MANIFEST, read_footage
    from muralist.eval.score_footage import score_footage
    from muralist.store.paths import typed_path

    root = typed_path(folder, "folder")
    footage = read_footage(root)
    try:
        scored, missing = score_footage(root / MANIFEST, footage, metric, tell=lambda line: print(line, flush=True))
    except KeyboardInterrupt:
        raise Interrupted(f"; scores so far are in {root / MANIFEST}, the same command goes on") from None
    print(f"{scored} clips scored by {metric} in {root / MANIFEST}" + (f", {missing} could not be" if missing else ""))
    return 0
