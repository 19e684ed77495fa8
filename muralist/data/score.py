"""What a video of the world shows, told from its pixels alone.

`measure` looks at a video and says colour, shape, ground, motion, camera and the number of objects; `score` compares
that with a scene. It knows what the words mean and roughly how objects look (flat colour, dark rim), nothing of how a
scene was rendered, so it judges generated videos as it judges true ones. All work is done on a few frames reduced to
`HEIGHT` rows: a 4K video is judged for what it shows, not for its detail. What is not recognised is None, never a guess.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from muralist.data.score_ground import CameraMove, fit_camera, fit_ground, shows_ground
from muralist.data.score_object import Found, find_objects, half_size, visible_ground
from muralist.data.world import SHAPES, Scene
from muralist.errors import UserError

HEIGHT = 128  # rows at which the frames are judged; an object is 30 to 90 rows high
LOOKS = 7  # frames judged of a clip
STILL, MOVES = 0.12, 0.18  # frame heights of travel over the ground: at most this stays still, at least this moves
MAJORITY = 0.6  # of the frames judged must show an object


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """What was seen; None where nothing was recognised.

    `camera` is "static" for a camera at rest; `motion` is relative to the ground. `confidence` maps "ground", "shape",
    "object" and "camera" to [0, 1]: the margin to the next best answer, for "object" the share of an ideal object's evidence.
    """

    colour: str | None
    shape: str | None
    ground: str | None
    motion: str | None
    camera: str | None
    num_objects: int
    confidence: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """Which parts of the caption the video shows, how many objects there are, and what was seen instead."""

    colour: bool
    shape: bool
    ground: bool
    motion: bool
    camera: bool
    num_objects: int
    seen: Observation

    @property
    def right(self) -> bool:
        """Everything the caption says is there, and there is one object."""
        return self.num_objects == 1 and self.colour and self.shape and self.ground and self.motion and self.camera


def score(video: torch.Tensor, scene: Scene) -> Score:
    """Compare `video` [T, H, W, 3] in [0, 1] with what `scene` says. Raises UserError as `measure` does."""
    return compare(measure(video), scene)


def compare(seen: Observation, scene: Scene) -> Score:
    """What of `scene` is in an observation already made."""
    return Score(
        colour=seen.colour == scene.colour,
        shape=seen.shape == scene.shape,
        ground=seen.ground == scene.ground,
        motion=seen.motion == scene.motion,
        camera=seen.camera == (scene.camera or "static"),
        num_objects=seen.num_objects,
        seen=seen,
    )


def measure(video: torch.Tensor) -> Observation:
    """See what `video` [T, H, W, 3] in [0, 1] shows: any size, T >= 1, evenly spaced frames that span the clip.

    Motion and camera are None for a single frame. Raises UserError where the shape is not that of a pixel video.
    """
    frames = _prepared(video)
    ground = fit_ground(frames)
    found = find_objects(frames, ground)
    grey = half_size(frames.mean(-1))
    visible = visible_ground(found, grey.shape[1:]) * shows_ground(frames, ground)
    camera = fit_camera(grey, visible) if len(frames) > 1 else None
    confidence = {"ground": ground.confidence, "camera": camera.confidence if camera else 0.0}
    seen = {i: hits[0] for i, hits in enumerate(found) if hits}
    num_objects = sorted(len(hits) for hits in found)[len(found) // 2]
    if len(seen) < MAJORITY * len(frames) or not num_objects:
        seen, num_objects = {}, 0
    shape, confidence["shape"] = _shape(seen)
    confidence["object"] = sum(hit.quality for hit in seen.values()) / max(len(seen), 1)
    return Observation(
        colour=_colour(seen),
        shape=shape,
        ground=ground.name,
        motion=_motion(seen, shape, camera, len(frames)),
        camera=camera.name if camera else None,
        num_objects=num_objects,
        confidence=confidence,
    )


def _prepared(video: torch.Tensor) -> torch.Tensor:
    """Up to LOOKS frames [n, HEIGHT, w, 3] float32 spanning the clip, area-averaged, clean of NaN."""
    if video.ndim != 4 or video.shape[-1] != 3 or min(video.shape) < 1:
        raise UserError(f"shape {list(video.shape)}", where="video", fix="pass frames x rows x columns x 3")
    chosen = torch.linspace(0, len(video) - 1, min(len(video), LOOKS)).round().long().unique()
    height, width = video.shape[1:3]
    columns = max(2 * round(HEIGHT * width / height / 2), 2)
    # one frame at a time: seven 4K frames in float32 would be 700 MB
    small = [_reduced(video[i], HEIGHT, columns) for i in chosen.tolist()]
    return torch.stack(small).nan_to_num(0.0, 0.0, 0.0).clamp(0, 1)


def _reduced(frame: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """`frame` [H, W, 3] area-averaged to [height, width, 3]; smaller ones are enlarged."""
    image = frame.permute(2, 0, 1)[None].float()
    shrinks = frame.shape[0] >= height and frame.shape[1] >= width
    image = F.interpolate(image, (height, width), mode="area") if shrinks else F.interpolate(image, (height, width), mode="bilinear")
    return image[0].permute(1, 2, 0)


def _colour(seen: dict[int, Found]) -> str | None:
    """The colour that most frames agree on."""
    names = [hit.colour for hit in seen.values()]
    best = max(names, key=names.count, default=None)
    return best if names.count(best) >= MAJORITY * len(names) else None


def _shape(seen: dict[int, Found]) -> tuple[str | None, float]:
    """The shape with most votes over all frames, and its margin to the next as a share of its votes."""
    if not seen:
        return None, 0.0
    votes = torch.stack([hit.votes for hit in seen.values()]).sum(0)
    (best, second), (index, _) = (t.tolist() for t in votes.topk(2))
    return SHAPES[index], 1 - second / best


def _motion(seen: dict[int, Found], shape: str | None, camera: CameraMove | None, num_frames: int) -> str | None:
    """The object's travel over the ground from the first frame to the last, in words."""
    if shape is None or camera is None or camera.name is None or len(seen) < 2:
        return None
    moment = torch.tensor(list(seen)) / (num_frames - 1)
    centres = torch.stack([hit.centres[SHAPES.index(shape)] for hit in seen.values()])
    path = torch.stack(camera.to_ground(centres[:, 0], centres[:, 1], moment), 1)
    first, second = torch.triu_indices(len(path), len(path), 1)
    speeds = (path[second] - path[first]) / (moment[second] - moment[first])[:, None]
    x, y = speeds.median(0).values.tolist()  # Theil-Sen: a misplaced object in one frame does not matter
    far, near = max(abs(x), abs(y)), min(abs(x), abs(y))
    if far <= STILL:
        return "stays still"
    if far < MOVES or near > 0.6 * far:
        return None
    if abs(x) > abs(y):
        return "moves right" if x > 0 else "moves left"
    return "falls" if y > 0 else "rises"
