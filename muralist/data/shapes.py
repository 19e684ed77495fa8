"""Signed distances and shading of the world's shapes, in units of the shape's radius (y down).

Distances are exact, so that half a pixel of ramp around zero is the area average of a sharp edge at any size.
"""

from __future__ import annotations

import math

import torch


def _polygon(radii: tuple[float, ...]) -> tuple[tuple[float, float], ...]:
    """Corners at equal angles, the first one pointing up."""
    n = len(radii)
    return tuple((r * math.sin(2 * math.pi * i / n), -r * math.cos(2 * math.pi * i / n)) for i, r in enumerate(radii))


TRIANGLE = tuple((x * 1.15, y * 1.15 + 0.15) for x, y in _polygon((1.0, 1.0, 1.0)))
STAR = _polygon((1.12, 0.5) * 5)
# a box in cabinet projection: a square front, a strip of top and a strip of right side
CUBE = ((-0.85, 0.85), (-0.85, -0.5), (-0.5, -0.85), (0.85, -0.85), (0.85, 0.5), (0.5, 0.85))
REACH = 1.12  # no shape goes further from its centre along x or y (the tips of a star)


def distance_and_shade(shape: str, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Signed distance (negative inside) and brightness in [0.7, 1] at x [1, w] and y [h, 1]; both [h, w]."""
    if shape == "ball":
        r = torch.hypot(x, y)
        return r - 1, 1 - 0.2 * (((x + 0.3) ** 2 + (y + 0.3) ** 2) / 2).clamp(0, 1)
    if shape == "ring":
        r = torch.hypot(x, y)
        return (r - 0.72).abs() - 0.33, torch.ones_like(r)
    if shape == "cube":
        return _polygon_distance(CUBE, x, y), _cube_shade(x, y)
    if shape == "star":
        return _polygon_distance(STAR, x, y), torch.where(y + 0 * x < 0, 0.9, 1.0)
    return _polygon_distance(TRIANGLE, x, y), (1 - 0.1 * (y + x * 0)).clamp(0.85, 1)


def _cube_shade(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    front = (x < 0.5) & (y > -0.5)
    top = ~front & (x - 0.5 < -y - 0.5 + 0 * x)
    return torch.where(front, 1.0, torch.where(top, 0.88, 0.76))


def _polygon_distance(corners, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Signed distance to a simple polygon: distance to the nearest edge, the sign by the even-odd rule."""
    nearest = torch.full((y.shape[0], x.shape[1]), math.inf)
    inside = torch.zeros(y.shape[0], x.shape[1], dtype=torch.bool)
    for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1]):
        ex, ey = bx - ax, by - ay
        along = (((x - ax) * ex + (y - ay) * ey) / (ex * ex + ey * ey)).clamp_(0, 1)
        nearest = torch.minimum(nearest, (x - ax - ex * along) ** 2 + (y - ay - ey * along) ** 2)
        crosses = ((ay > y) != (by > y)) & (x < ex * (y - ay) / (ey or 1e-12) + ax)
        inside ^= crosses
    distance = nearest.sqrt_()
    return torch.where(inside, -distance, distance)
