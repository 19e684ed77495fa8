"""What changes from frame to frame: the camera's move, and the light that is left when it is accounted for.

Mean colour alone says little, since content enters and leaves the picture. So each frame is registered to the one before it (shift and zoom,
by Gauss-Newton steps on the generalised brightness constancy of Negahdaripour 1998: f'(x) = f(x + u(x)) + c), pixels that do not follow, such
as moving objects, lose their say, and the constant c per colour channel is the change of light. Everything happens on frames of HEIGHT rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

HEIGHT = 128  # rows
STEPS = 5  # Gauss-Newton steps at most; the first guess is the last pair's move
ENOUGH = 2e-4  # frame heights; a smaller step changes nothing
NOISE = 0.5 / 255  # residuals below this are no reason for distrust
LUMA = torch.tensor([0.2126, 0.7152, 0.0722])  # BT.709


def luma(frame: torch.Tensor) -> torch.Tensor:
    """Luma [H, W] of a frame [H, W, 3], BT.709 weights, in [0, 1]."""
    return frame @ LUMA


def reduced(frame: torch.Tensor, height: int = HEIGHT) -> torch.Tensor:
    """`frame` [H, W, 3] area-averaged to [3, height, w], w even; smaller frames keep their size."""
    rows, columns = frame.shape[:2]
    image = frame.permute(2, 0, 1)[None]
    if rows <= height:
        return image[0].contiguous()
    return F.interpolate(image, (height, max(2 * round(height * columns / rows / 2), 2)), mode="area")[0]


@dataclass(slots=True)
class Track:
    """Per pair of consecutive frames: change of colour [3] (values, 0 to 1) and `move` (shift right, shift down, log zoom; in frame heights)."""

    light: list[torch.Tensor] = field(default_factory=list)
    move: list[torch.Tensor] = field(default_factory=list)
    colour: list[torch.Tensor] = field(default_factory=list)  # mean colour [3] of each frame
    _last: torch.Tensor | None = None

    def add(self, small: torch.Tensor) -> None:
        """The next reduced frame [3, h, w]."""
        self.colour.append(small.mean((1, 2)))
        image = _soft(small)
        if self._last is not None:
            start = self.move[-1] if self.move else torch.zeros(3)
            move, light = register(self._last, image, start)
            self.move.append(move)
            self.light.append(light)
        self._last = image


def register(first: torch.Tensor, second: torch.Tensor, start: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Move [3] and change of light [3] from `first` to `second` [3, h, w], smooth images, from the guess `start`."""
    move = start
    for _ in range(STEPS):
        step, light = _step(first, second, move)
        move = (move + step).clamp(-0.3, 0.3)
        if float(step.abs().max()) < ENOUGH:
            break
    return move, light


def _step(first: torch.Tensor, second: torch.Tensor, move: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One Gauss-Newton step on luma, and the change of light at `move`."""
    warped, inside, x, y = _warped(first, move)
    grey = torch.einsum("c,chw->hw", LUMA, warped)
    gy, gx = torch.gradient(grey)
    gx, gy = gx * first.shape[1], gy * first.shape[1]  # per frame height
    residual = torch.einsum("c,chw->hw", LUMA, second) - grey
    weight = _weights(residual, inside)
    columns = torch.stack([-gx, -gy, -(gx * x + gy * y), torch.ones_like(grey)], -1).reshape(-1, 4)
    weighted = columns * weight.reshape(-1, 1)
    normal = weighted.T @ columns + 1e-6 * weight.sum() * torch.eye(4)
    step = torch.linalg.solve(normal, weighted.T @ residual.reshape(-1))[:3]
    light = ((second - warped) * weight).sum((1, 2)) / weight.sum().clamp(min=1e-6)
    return step, light


def _weights(residual: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    """Cauchy weights [h, w] about the median, zero outside."""
    seen = residual[inside]
    if not len(seen):
        return inside.float()
    middle = seen.median()
    spread = 1.48 * (seen - middle).abs().median() + NOISE
    return inside / (1 + ((residual - middle) / (2 * spread)) ** 2) ** 2


def _warped(image: torch.Tensor, move: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`image` [3, h, w] after `move`, where it is known (bool), and the coordinates x, y [h, w] in frame heights from the middle."""
    _, h, w = image.shape
    y, x = torch.meshgrid((torch.arange(h) + 0.5 - h / 2) / h, (torch.arange(w) + 0.5 - w / 2) / h, indexing="ij")
    shrink = torch.exp(-move[2])
    grid = torch.stack([(x * shrink - move[0]) * (2 * h / w), (y * shrink - move[1]) * 2], -1)
    warped = F.grid_sample(image[None], grid[None], padding_mode="border", align_corners=False)[0]
    return warped, (grid.abs() < 1 - 4 / h).all(-1), x, y


def _soft(small: torch.Tensor) -> torch.Tensor:
    """A little blur: bilinear interpolation of fine texture would change its mean contrast."""
    kernel = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
    image = F.pad(small[:, None], (2, 2, 2, 2), mode="replicate")
    return F.conv2d(F.conv2d(image, kernel.view(1, 1, 1, 5)), kernel.view(1, 1, 5, 1))[:, 0]
