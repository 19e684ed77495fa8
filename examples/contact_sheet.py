"""A PNG of a few frames of a video, side by side: `python examples/contact_sheet.py out/demo.mp4 out/demo.png`.

Frames are read one at a time, so that the length and size of the video do not matter.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

from muralist.store.video_read import inspect, read_frames

COLUMNS, WIDTH = 4, 640  # frames beside each other, pixels of each


def contact_sheet(video: Path, picture: Path) -> Path:
    """Write `COLUMNS` frames of the video, evenly spread from first to last, as one row."""
    info = inspect(video)
    wanted = [round(i * (info.num_frames - 1) / (COLUMNS - 1)) for i in range(COLUMNS)]
    height = round(WIDTH * info.height / info.width)
    small = [_scaled(frame, height) for number, frame in enumerate(read_frames(video)) if number in wanted]
    row = torch.cat(small, dim=1)  # [H, columns * W, 3]
    Image.fromarray((row * 255).round().to(torch.uint8).numpy()).save(picture)
    return picture


def _scaled(frame: torch.Tensor, height: int) -> torch.Tensor:
    image = frame.permute(2, 0, 1)[None]
    return F.interpolate(image, (height, WIDTH), mode="bilinear", antialias=True, align_corners=False)[0].permute(1, 2, 0).clamp(0, 1)


if __name__ == "__main__":
    print(contact_sheet(Path(sys.argv[1]), Path(sys.argv[2])))
