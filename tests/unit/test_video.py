"""Video files: true colours, true 10 bits, exact geometry, metadata inside, reproducible bytes, and one line for every broken file."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path

import av
import pytest
import torch

from muralist.errors import UserError
from muralist.stages.encode import EncodeOptions, encode, live_path, next_frame, sidecar_path
from muralist.store.colour import planes_to_rgb, rgb_to_planes
from muralist.store.run import RunDirectory
from muralist.store.video_read import inspect, read_frames, repair
from muralist.store.video_write import SegmentEncoder
from muralist.types import FrameChunk, Grid

# SMPTE-like bars at 100 % and 75 %, greys
BARS = [(r, g, b) for level in (1.0, 0.75) for r in (0, level) for g in (0, level) for b in (0, level)] + [(x / 8,) * 3 for x in range(1, 8)]
CODECS = [("h264", 8), ("h264", 10), ("h265", 8), ("h265", 10)]


def bars(height: int = 64, stripe: int = 16) -> torch.Tensor:
    """One frame [height, stripe * bars, 3] of vertical colour bars."""
    return torch.tensor(BARS).repeat_interleave(stripe, dim=0).expand(height, -1, -1).contiguous().float()


def moving(grid: Grid) -> torch.Tensor:
    """A smooth pattern [T, H, W, 3] that moves."""
    t, y, x = torch.meshgrid(torch.arange(grid.num_frames), torch.arange(grid.height), torch.arange(grid.width), indexing="ij")
    return torch.stack([0.5 + 0.4 * torch.sin((x * a + y * b) / 23 + t * 0.3) for a, b in ((1, 0.5), (0.3, 1), (-0.7, 0.6))], dim=-1)


def chunks(video: torch.Tensor, size: int = 4, start: int = 0):
    for first in range(start, len(video), size):
        yield FrameChunk(video[first : first + size], first)


def make(path: Path, grid: Grid, options: EncodeOptions | None = None, **more) -> Path:
    return encode(chunks(moving(grid)), grid, path, options, **more)


SMALL = Grid(num_frames=9, height=64, width=96)


# --- colour -------------------------------------------------------------------------------------------------------------------------


def test_code_values_of_the_standard():
    """BT.709-6 limited range, 8 bits: the known codes of 100 % bars."""
    known = {(1, 1, 1): (235, 128, 128), (0, 0, 0): (16, 128, 128), (1, 0, 0): (63, 102, 240), (0, 1, 0): (173, 42, 26), (0, 0, 1): (32, 240, 118)}
    for rgb, codes in known.items():
        planes = rgb_to_planes(torch.tensor(rgb).float().expand(4, 4, 3), 8)
        assert tuple(int(p[0, 0]) for p in planes) == codes
        ten = rgb_to_planes(torch.tensor(rgb).float().expand(4, 4, 3), 10)
        assert all(abs(int(p[0, 0]) - 4 * code) <= 2 for p, code in zip(ten, codes))


@pytest.mark.parametrize("depth, bound", [(8, 0.0064), (10, 0.0016)])
def test_conversion_error_is_half_a_code(depth, bound):
    """Any colour survives to half a code in luma and chroma: at most 0.5/219 + 1.8556 * 0.5/224 at 8 bits, a quarter of it at 10."""
    colours = torch.rand(4000, 3, generator=torch.Generator().manual_seed(0))
    frame = colours.repeat_interleave(2, 0)[None].expand(2, -1, -1)
    back = planes_to_rgb(*(p.repeat_interleave(2, 0).repeat_interleave(2, 1) if k else p for k, p in enumerate(rgb_to_planes(frame, depth))), depth)
    assert (back - frame).abs().max() <= bound


def test_ten_bits_are_ten_true_bits():
    ramp = torch.linspace(0, 1, 4096)[None, :, None].expand(2, -1, 3)
    assert rgb_to_planes(ramp, 10)[0].unique().numel() == 877 and rgb_to_planes(ramp, 8)[0].unique().numel() == 220


def test_bands_halves_and_out_of_range():
    frame = torch.rand(70, 6, 3, generator=torch.Generator().manual_seed(0)) * 3 - 1
    whole, halves = rgb_to_planes(frame, 10), [rgb_to_planes(frame[:34], 10), rgb_to_planes(frame[34:], 10)]
    assert all(torch.equal(w, torch.cat(h)) for w, h in zip(whole, zip(*halves)))
    assert whole[0].min() >= 64 and whole[0].max() <= 940 and whole[1].min() >= 64 and whole[2].max() <= 960
    assert all(p.shape == s for p, s in zip(rgb_to_planes(frame.bfloat16(), 8), ((70, 6), (35, 3), (35, 3))))


@pytest.mark.parametrize("codec, depth", CODECS)
def test_colour_bars_through_the_codec(tmp_path, codec, depth):
    """Bars come back to 0.012 (8 bits) and 0.006 (10 bits) inside each bar at CRF 16, by our reader and by swscale from the tags alone."""
    frame, bound = bars(), {8: 0.012, 10: 0.006}[depth]
    grid = Grid(num_frames=2, height=frame.shape[0], width=frame.shape[1])
    path = encode(iter([FrameChunk(frame.expand(2, -1, -1, -1), 0)]), grid, tmp_path / "bars.mp4", EncodeOptions(codec=codec, bit_depth=depth))
    inner = (slice(8, -8), torch.arange(frame.shape[1]).view(-1, 16)[:, 4:12].flatten())
    ours = [f for f in read_frames(path)]
    assert len(ours) == 2 and max((f[inner] - frame[inner]).abs().max() for f in ours) <= bound
    with av.open(str(path)) as container:
        theirs = torch.from_numpy(next(container.decode(video=0)).to_ndarray(format="rgb48le").astype("float32")) / 65535
    assert (theirs[inner] - frame[inner]).abs().max() <= bound + 0.004


def test_tags_and_defaults(tmp_path):
    info = inspect(make(tmp_path / "a.mp4", SMALL, EncodeOptions(codec="h265")))
    assert (info.codec, info.tag, info.bit_depth, info.pixel_format) == ("h265", "hvc1", 10, "yuv420p10le")
    assert (info.primaries, info.transfer, info.matrix, info.range) == ("bt709", "bt709", "bt709", "limited")
    info = inspect(make(tmp_path / "b.mp4", SMALL))
    assert (info.codec, info.tag, info.bit_depth, info.matrix, info.range) == ("h264", "avc1", 8, "bt709", "limited")
    for size, codec, depth in (((2160, 3840), "h265", 10), ((3840, 2160), "h265", 10), ((1080, 1920), "h264", 8)):
        settings = EncodeOptions().resolve(Grid(num_frames=5, height=size[0], width=size[1]))
        assert (settings.codec, settings.bit_depth) == (codec, depth)


# --- geometry, frames, metadata -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frames", [1, 2, 5, 12, 13])
@pytest.mark.parametrize("codec", ["h264", "h265"])
def test_every_frame_in_order_and_close(tmp_path, codec, frames):
    grid = Grid(num_frames=frames, height=64, width=96, fps=23.976)
    path = make(tmp_path / "a.mp4", grid, EncodeOptions(codec=codec, gop=5))
    info, video, read = inspect(path, decode=True), moving(grid), torch.stack(list(read_frames(path)))
    assert (info.num_frames, info.width, info.height) == (frames, 96, 64) and info.fps == pytest.approx(23.976, abs=1e-3)
    assert all((read[k] - video).abs().mean((1, 2, 3)).argmin() == k for k in range(frames)) and (read - video).abs().mean() < 0.015
    with av.open(str(path)) as container:
        times = [float(f.time) for f in container.decode(video=0)]
        assert container.duration / 1e6 == pytest.approx(frames * 1001 / 24000, abs=1e-3)
    assert times == pytest.approx([k * 1001 / 24000 for k in range(frames)], abs=1e-6)


def test_surplus_rows_and_columns_are_cropped(tmp_path):
    video = moving(Grid(num_frames=5, height=96, width=128))
    grid = Grid(num_frames=5, height=90, width=100)
    read = list(read_frames(encode(chunks(video), grid, tmp_path / "a.mp4")))
    assert read[0].shape == (90, 100, 3) and (read[0] - video[0, :90, :100]).abs().mean() < 0.02


def test_metadata_in_the_file_and_beside_it(tmp_path):
    metadata = {
        "emoji": ["\U0001f3a8" * 4096] * 2,
        "prompt": 'quote " newline \n é 日本 \ud800 ' + "long " * 5000,
        "seed": 2**63,
        "recipe": "cascade",
        "nested": {"a": [1, None, 0.5]},
    }
    path = make(tmp_path / "a.mp4", SMALL, metadata=metadata)
    beside = json.loads(sidecar_path(path).read_text())
    assert inspect(path).metadata == metadata == beside["metadata"]
    assert beside["video"]["codec"] == "h264" and len(beside["video"]["sha256"]) == 64
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.mp4", "a.mp4.json"]


@pytest.mark.parametrize("codec", ["h264", "h265"])
def test_bytes_are_reproducible_and_independent_of_threads_chunks_and_names(tmp_path, codec):
    video, files = moving(SMALL), []
    for k, (pools, size) in enumerate(((1, 4), (4, 1), (3, 9), (None, 2))):
        path = encode(chunks(video, size), SMALL, tmp_path / f"{k}.mp4", EncodeOptions(codec=codec, gop=4, pools=pools), metadata={"seed": 0})
        files.append(path.read_bytes())
    assert files[1:] == files[:-1]


def test_index_comes_first(tmp_path):
    data = make(tmp_path / "a.mp4", SMALL).read_bytes()
    assert 0 < data.index(b"moov") < data.index(b"mdat")


# --- mistakes -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, grid, where",
    [
        ({"codec": "av1"}, SMALL, "codec"),
        ({"bit_depth": 12}, SMALL, "bit_depth"),
        ({"bit_depth": 0}, SMALL, "bit_depth"),
        ({"crf": -1}, SMALL, "crf"),
        ({"crf": float("nan")}, SMALL, "crf"),
        ({"preset": "placebo; rm"}, SMALL, "preset"),
        ({"gop": 0}, SMALL, "gop"),
        ({}, Grid(num_frames=5, height=65, width=96), "size"),
        ({}, Grid(num_frames=5, height=2, width=96), "size"),
        ({}, Grid(num_frames=5, height=64, width=96, fps=0), "fps"),
        ({}, Grid(num_frames=5, height=64, width=96, fps=float("nan")), "fps"),
    ],
)
def test_impossible_options_are_one_line_before_any_frame(tmp_path, options, grid, where):
    with pytest.raises(UserError, match=rf"^{where}: "):
        encode(iter(()), grid, tmp_path / "a.mp4", EncodeOptions(**options))
    assert not list(tmp_path.iterdir())


def test_bad_frames_name_the_frame(tmp_path):
    video = moving(SMALL)
    bad = video.clone()
    bad[6, 3, 4, 1] = float("nan")
    with pytest.raises(FloatingPointError, match="frame 6"):
        encode(chunks(bad), SMALL, tmp_path / "a.mp4")
    with pytest.raises(ValueError, match="too early"):
        encode(chunks(video[:7]), SMALL, tmp_path / "a.mp4")
    with pytest.raises(ValueError, match="frame 0 is missing"):
        encode(chunks(video, start=4), SMALL, tmp_path / "a.mp4")
    with pytest.raises(ValueError, match="does not fit"):
        encode(iter([FrameChunk(torch.cat([video, video[:1]]), 0)]), SMALL, tmp_path / "a.mp4")
    with pytest.raises(ValueError, match="does not fit"):
        encode(chunks(video[:, :32]), SMALL, tmp_path / "a.mp4")
    assert not (tmp_path / "a.mp4").exists()


# --- resume -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["h264", "h265"])
def test_resume_from_every_frame_gives_the_same_bytes(tmp_path, codec):
    options, video = EncodeOptions(codec=codec, gop=4), moving(SMALL)
    whole = encode(chunks(video), SMALL, tmp_path / "whole.mp4", options).read_bytes()
    for stop in (0, 3, 4, 5, 8, 9):
        with RunDirectory.create(tmp_path / str(stop), {}) as run:
            if stop < 9:
                with pytest.raises(ValueError, match="too early"):
                    encode(chunks(video[:stop]), SMALL, tmp_path / "a.mp4", options, run)
                assert next_frame(run) == stop // 4 * 4
            wanted = next_frame(run)
            encode(chunks(video, start=wanted), SMALL, tmp_path / "a.mp4", options, run)
            assert next_frame(run) == 9 and (tmp_path / "a.mp4").read_bytes() == whole
            assert not live_path(tmp_path / "a.mp4").exists()
            assert encode(iter(()), SMALL, tmp_path / "b.mp4", options, run).read_bytes() == whole  # nothing is asked for twice


def test_damaged_segment_is_encoded_again_and_other_options_are_refused(tmp_path):
    options, video = EncodeOptions(gop=3), moving(SMALL)
    with RunDirectory.create(tmp_path / "run", {}) as run:
        whole = encode(chunks(video), SMALL, tmp_path / "a.mp4", options, run).read_bytes()
        path = run.scratch("encode") / "segment-000003" / "segment.mp4"
        path.write_bytes(path.read_bytes()[:-1] + b"\0")
        assert next_frame(run) == 3
        assert encode(chunks(video, start=3), SMALL, tmp_path / "a.mp4", options, run).read_bytes() == whole
        with pytest.raises(UserError, match=r"crf = 16\.0, now it is 20"):
            encode(chunks(video), SMALL, tmp_path / "a.mp4", EncodeOptions(gop=3, crf=20), run)
        assert (tmp_path / "a.mp4").read_bytes() == whole


# --- reading what others wrote, or broke --------------------------------------------------------------------------------------------


def test_segments_are_closed_groups(tmp_path):
    encoder = SegmentEncoder(EncodeOptions(codec="h265", gop=9).resolve(SMALL), start=0)
    for frame in moving(SMALL):
        encoder.add(frame)
    segment = encoder.finish()
    with av.open(io.BytesIO(segment.data)) as container:
        keys = [p.is_keyframe for p in container.demux(video=0) if p.size]
    assert keys == [True] + [False] * 8 and (segment.start, segment.frames) == (0, 9)


@pytest.mark.parametrize("codec, pixels", [("mpeg4", "yuv420p"), ("ffv1", "yuv444p"), ("ffv1", "gray"), ("ffv1", "yuv422p10le"), ("ffv1", "bgr0")])
def test_other_formats_are_read(tmp_path, codec, pixels):
    grey = av.VideoFrame.from_ndarray((torch.ones(64, 96, 3) * 128).to(torch.uint8).numpy(), format="rgb24")
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = 96, 64, pixels
        for _ in range(3):
            container.mux(stream.encode(grey.reformat(format=pixels)))
        container.mux(stream.encode(None))
    frames = list(read_frames(tmp_path / "a.mkv"))
    assert len(frames) == 3 and frames[0].shape == (64, 96, 3) and (frames[0] - 128 / 255).abs().max() < 0.02


def test_40_broken_files_are_one_line_or_whole(tmp_path):
    good = make(tmp_path / "good.mp4", SMALL, EncodeOptions(gop=4)).read_bytes()
    rng, bad, refused = random.Random(0), tmp_path / "bad.mp4", 0
    others = [b"", b"\0" * 100, b"#EXTM3U\nfile:///etc/passwd\n", b"ffconcat version 1.0\nfile /etc/passwd\n", b"<html>", b"PK\3\4" * 9, b"\xff" * 5000]
    cuts = [good[: len(good) * k // 14] for k in range(1, 14)]
    flips = []
    for _ in range(20):
        data = bytearray(good)
        for _ in range(rng.choice((1, 5, 50))):
            data[rng.randrange(len(data))] = rng.randrange(256)
        flips.append(bytes(data))
    for data in others + cuts + flips:
        bad.write_bytes(data)
        try:
            info = inspect(bad, decode=True, timeout=20)
        except UserError as error:
            refused += 1
            assert len(str(error).splitlines()) == 1 and "Traceback" not in str(error)
        else:
            assert data in flips and info.num_frames > 0
    assert refused >= len(others) + len(cuts)
    for path in (tmp_path / "missing.mp4", tmp_path, Path("a\0.mp4")):
        for reader in (inspect, repair, lambda p: next(read_frames(p))):
            with pytest.raises(UserError, match="no such file"):
                reader(path)


def test_repair_needs_something_to_save(tmp_path):
    path = make(tmp_path / "a.mp4", SMALL)
    whole = path.read_bytes()
    assert repair(path) == 0 and path.read_bytes() == whole
    path.write_bytes(b"no video at all")
    with pytest.raises(UserError, match="no complete fragment"):
        repair(path)
    assert path.read_bytes() == b"no video at all"
