"""Is 4K output true 4K? Radial power spectra of the cascade's frames, of true renders of the same captions, and of an enlargement.

    python benchmarks/spectrum.py --count 4
    python benchmarks/spectrum.py --kept FOLDER      # of `adherence.py --size 3840x2160 --keep FOLDER`: nothing is painted again at 4K

Writes results/spectrum.{json,md} (difference to the true renders in dB, per octave) and a plot.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import kept
import matplotlib
import numpy as np
import torch
from adherence import scenes
from common import write
from PIL import Image

import muralist
from muralist.data import world

matplotlib.use("Agg")
from matplotlib import pyplot

WIDTH, HEIGHT = 3840, 2160
MIDDLE = kept.middle(29, HEIGHT)
OCTAVES = [(2.0**-k / 2, 2.0**-k) for k in range(8, 0, -1)]  # cycles a pixel, the last one up to Nyquist


def spectrum(frame: torch.Tensor, bins: int = 128) -> np.ndarray:
    """Mean power of the luma in `bins` rings from 0 to Nyquist, of the middle 2048x2048 of a frame [H, W, 3] under a Hann window."""
    luma = (frame @ torch.tensor([0.2126, 0.7152, 0.0722]))[(HEIGHT - 2048) // 2 :][:2048, (WIDTH - 2048) // 2 :][:, :2048]
    window = torch.hann_window(2048, periodic=False)
    power = torch.fft.rfft2((luma - luma.mean()) * window * window[:, None]).abs().square().numpy()
    radius = np.hypot(np.fft.fftfreq(2048)[:, None], np.fft.rfftfreq(2048)[None])
    ring = np.minimum((radius * 2 * bins).astype(int), bins)
    return np.bincount(ring.ravel(), power.ravel(), bins + 1)[:bins] / np.bincount(ring.ravel(), minlength=bins + 1)[:bins]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=4)
    parser.add_argument("--model", default="miniature")
    parser.add_argument("--plot", type=Path, default=Path(__file__).parent / "results" / "spectrum.png")
    parser.add_argument("--kept", type=Path, help="a folder of clips that adherence.py has painted and judged")
    parser.add_argument("--frames", type=Path, help="a folder for PNGs of the frames compared")
    options = parser.parse_args()
    curves = {"muralist": [], "true render": [], "bicubic of 448x256": []}
    cases = painted_before(options.kept) if options.kept else [(scene, None) for scene in scenes(options.count, seed=1)]
    for scene, large in cases:
        for name, frame in pictures(scene, options.model, large).items():
            curves[name].append(np.log(spectrum(frame) + 1e-12))
            if options.frames:
                options.frames.mkdir(parents=True, exist_ok=True)
                Image.fromarray((frame * 255).byte().numpy()).save(options.frames / f"{world.caption(scene)} {name}.png".replace(" ", "-"))
    means = {name: 10 / np.log(10) * np.mean(values, axis=0) for name, values in curves.items()}
    frequency = (np.arange(128) + 0.5) / 256
    rows = []
    for low, high in OCTAVES:
        band = (frequency >= low) & (frequency < high)
        if band.any():
            rows.append(
                {"octave": f"{low:.4f}-{high:.4f}"}
                | {f"{name} minus true, dB": float((means[name] - means["true render"])[band].mean()) for name in means if name != "true render"}
            )
    print(rows)
    write("spectrum", rows, note=f"{len(cases)} held-out captions at {WIDTH}x{HEIGHT}, middle frame, log radial power of the luma; octaves in cycles a pixel")
    draw(frequency, means, options.plot)


def painted_before(folder: Path) -> list[tuple[world.Scene, torch.Tensor]]:
    """Scenes and middle frames that `adherence.py` has painted."""
    clips = kept.read(folder)
    for about in (clip.about for clip in clips):
        if (about["size"], about["recipe"], about["num_frames"]) != (f"{WIDTH}x{HEIGHT}", "cascade", 29):
            raise SystemExit(f"{folder} holds {about}: keep clips of {WIDTH}x{HEIGHT}, cascade, 29 frames")
    return [(clip.scene, clip.frame) for clip in clips]


def pictures(scene: world.Scene, model: str, large: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """The middle frame of each of the three, [H, W, 3] in [0, 1]; `large`: the first of them, if it is there."""

    def painted(recipe: str, width: int, height: int) -> torch.Tensor:
        with tempfile.TemporaryDirectory() as folder:
            pipe, options = muralist.load(model, recipe=recipe), {"num_frames": 29, "seed": scene.seed, "run_dir": Path(folder) / "run"}
            return middle(pipe(world.caption(scene), width=width, height=height, **options))

    large = painted("cascade", WIDTH, HEIGHT) if large is None else large
    small = painted("direct", 448, 256)
    enlarged = torch.nn.functional.interpolate(small.permute(2, 0, 1)[None], size=(HEIGHT, WIDTH), mode="bicubic")[0].permute(1, 2, 0).clamp(0, 1)
    frames = {"muralist": large, "true render": kept.true_middle(scene, 29, HEIGHT, WIDTH), "bicubic of 448x256": enlarged}
    return {name: kept.of_eight_bits(frame) for name, frame in frames.items()}


def middle(video) -> torch.Tensor:
    """The middle frame of a lazy video."""
    for chunk in video:
        if chunk.start <= MIDDLE < chunk.start + len(chunk.frames):
            return chunk.frames[MIDDLE - chunk.start].clone()
    raise AssertionError("the video has no middle")


def draw(frequency: np.ndarray, means: dict[str, np.ndarray], path: Path) -> None:
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for name, values in means.items():
        axes.plot(frequency, values, label=name)
    axes.set(xscale="log", xlabel="cycles a pixel", ylabel="power, dB")
    axes.legend()
    figure.savefig(path, dpi=110, bbox_inches="tight")


if __name__ == "__main__":
    main()
