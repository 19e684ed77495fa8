"""Does the video show what its caption says? Only where the caption is one of the world's, whose words can be judged from pixels.

`world_adherence` is 1 if colour, shape, ground, motion and camera are the caption's and there is one object, else 0; the parts are given
beside it, each 0 or 1. Judged by `muralist.data.score` on 7 frames evenly spread over the clip, reduced to 128 rows. Higher is better.
The caption is the prompt in the file's metadata, or the one given for the file.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from muralist.data import score, world
from muralist.errors import UserError
from muralist.eval.registry import Metric, Setup, Unavailable, register
from muralist.eval.source import Source

PARTS = ("colour", "shape", "ground", "motion", "camera")


class WorldAdherence:
    """Keeps the small frames that the judge wants."""

    def __init__(self, scene: world.Scene, num_frames: int):
        self._scene, self._seen, self._frames = scene, 0, []
        self._wanted = set(torch.linspace(0, num_frames - 1, min(num_frames, score.LOOKS)).round().long().tolist())

    def add(self, frame: torch.Tensor) -> None:
        if self._seen in self._wanted:
            self._frames.append(_small(frame.cpu()))
        self._seen += 1

    def result(self) -> dict[str, float]:
        found = score.score(torch.stack(self._frames), self._scene)
        parts = {f"world_adherence.{name}": float(getattr(found, name)) for name in PARTS} | {"world_adherence.one_object": float(found.num_objects == 1)}
        return {"world_adherence": float(found.right)} | parts


def _small(frame: torch.Tensor) -> torch.Tensor:
    """[128, w, 3], as the judge would reduce it: seven 4K frames are 700 MB otherwise."""
    height, width, _ = frame.shape
    if height <= score.HEIGHT:
        return frame.clone()
    size = (score.HEIGHT, max(2 * round(score.HEIGHT * width / height / 2), 2))
    return F.interpolate(frame.permute(2, 0, 1)[None], size, mode="area")[0].permute(1, 2, 0)


def _start(setup: Setup, source: Source) -> WorldAdherence:
    prompt = source.prompt or setup.prompts.get(source.path)
    if not prompt:
        raise Unavailable("the file's metadata names no prompt")
    try:
        scene = world.parse(prompt)
    except UserError:
        raise Unavailable("its prompt is not a caption of the world") from None
    return WorldAdherence(scene, source.info.num_frames)


register(
    Metric(
        name="world_adherence",
        kind="video",
        summary="the video shows what its caption of the world says",
        unit="",
        better="higher",
        origin="ours, muralist.data.score",
        start=_start,
    )
)
