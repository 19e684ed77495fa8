"""Kill the writer, fill its disk: the file plays, nothing finished is lost, and the resumed result is the same to the last bit."""

from __future__ import annotations

import errno
import io
import os
import random
import resource
import signal
import time
from pathlib import Path

import av
import pytest
import torch

from muralist.errors import UserError
from muralist.stages.encode import EncodeOptions, encode, live_path, next_frame
from muralist.store import atomic
from muralist.store.run import RunDirectory
from muralist.store.video_read import inspect, repair
from muralist.store.video_write import SegmentEncoder
from muralist.types import FrameChunk, Grid

GRID = Grid(num_frames=33, height=128, width=192)
TINY = Grid(num_frames=5, height=32, width=48)


def frame(k: int, grid: Grid = GRID) -> torch.Tensor:
    """Frame k [H, W, 3]: moving waves under fine texture."""
    y, x = torch.meshgrid(torch.arange(grid.height), torch.arange(grid.width), indexing="ij")
    waves = [0.5 + 0.3 * torch.sin((x * a + y * b) / 11 + k * 0.4) + 0.1 * torch.sin(x * 1.7 + y * y * 0.3 + a) for a, b in ((1, 0.4), (0.2, 1), (-0.6, 0.7))]
    return torch.stack(waves, dim=-1)


def frames(grid: Grid = GRID, start: int = 0, tell: int | None = None):
    """One chunk a frame; each is reported as a byte on the pipe `tell` before it is handed over."""
    for k in range(start, grid.num_frames):
        if tell is not None:
            os.write(tell, b".")
        yield FrameChunk(frame(k, grid)[None], k)


def child(work) -> int:
    """Fork and run `work`; returns the child's id. It exits 0, or 7 after a UserError."""
    pid = os.fork()
    if pid:
        return pid
    code = 9
    try:
        torch.set_num_threads(1)  # an OpenMP pool does not survive a fork
        work()
        code = 0
    except UserError as error:
        code = 7 if len(str(error).splitlines()) == 1 and "bytes free" in str(error) else 8
    finally:
        os._exit(code)


def killed_at(count: int, rng: random.Random, work) -> tuple[bool, int]:
    """Run `work(tell)` in a child and kill it a moment after it has reported `count` frames: counted in frames, not in seconds, so that a
    busy machine changes nothing. Returns whether it was killed before it ended, and how many frames it had reported."""
    hear, tell = os.pipe()
    pid = child(lambda: work(tell))
    os.close(tell)
    given = 0
    while given < count and (data := os.read(hear, 1)):
        given += len(data)
    time.sleep(rng.choice((0, 0, 0.002, 0.01, 0.03)))
    os.kill(pid, signal.SIGKILL)
    killed = os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    given += len(os.read(hear, 10_000))
    os.close(hear)
    return killed, given


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The bytes of an uninterrupted run, by codec."""
    root = tmp_path_factory.mktemp("whole")
    return {codec: encode(frames(), GRID, root / f"{codec}.mp4", EncodeOptions(codec=codec, gop=8)).read_bytes() for codec in ("h264", "h265")}


@pytest.mark.parametrize("codec", ["h264", "h265"])
def test_the_live_file_plays_after_any_kill(tmp_path, codec):
    """12 kills: what is left always decodes, and lacks at most one group and the frame that waits for its successor."""
    rng, gop, options = random.Random(codec), 8, EncodeOptions(codec=codec, gop=8)
    for k in range(12):
        output = tmp_path / f"{k}.mp4"
        killed, given = killed_at(rng.randint(gop + 2, GRID.num_frames), rng, lambda tell, output=output: encode(frames(tell=tell), GRID, output, options))
        if output.exists():
            assert inspect(output, decode=True).num_frames == GRID.num_frames
        else:  # the last frame reported may not have reached the encoder
            assert killed and inspect(live_path(output), decode=True).num_frames >= given - 1 - gop - 1


@pytest.mark.parametrize("codec", ["h264", "h265"])
def test_killed_again_and_again_the_result_is_bit_identical(tmp_path, codec, whole):
    """Kill, resume, kill ...: never a finished group lost, in the end the same bytes."""
    rng, output, done, killed, kills = random.Random(codec), tmp_path / "out.mp4", 0, True, 0
    options = EncodeOptions(codec=codec, gop=8)

    def work(tell):
        with RunDirectory.create(tmp_path / "run", {"codec": codec}) as run:
            encode(frames(start=next_frame(run), tell=tell), GRID, output, options, run)

    while killed:
        killed, given = killed_at(rng.randint(1, 14), rng, work)
        kills += killed
        with RunDirectory.create(tmp_path / "run", {"codec": codec}) as run:
            assert next_frame(run) >= max(done, min(done + given, GRID.num_frames) - 1 - 8)
            done = next_frame(run)
        if live_path(output).exists():
            assert inspect(live_path(output)).num_frames >= done - 9
        if kills == 10:
            work(os.open(os.devnull, os.O_WRONLY))
            break
    assert kills >= 3 and output.read_bytes() == whole[codec]
    assert not list(tmp_path.rglob("*.tmp")) and not live_path(output).exists()


def at_call(name: str, call: int, act) -> None:
    """In this process, make the `call`-th call of one of the five disk functions do `act` first."""
    original, left = getattr(atomic, name), call

    def replacement(*args):
        nonlocal left
        left -= 1
        if left == 0:
            act()
        return original(*args)

    setattr(atomic, name, replacement)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fill() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    "act, name", [(die, n) for n in ("open_new", "write", "sync", "publish", "remove")] + [(fill, n) for n in ("write", "sync", "publish")]
)
def test_death_or_full_disk_at_every_disk_call(tmp_path, act, name):
    """Every call of a whole small encoding in turn; after it, the resumed file is the same, and a full disk was one line."""
    options = EncodeOptions(codec="h264", gop=2)
    whole = encode(frames(TINY), TINY, tmp_path / "whole.mp4", options).read_bytes()
    for call in range(1, 60):
        output, root = tmp_path / f"{call}.mp4", tmp_path / f"run{call}"

        def work(call=call, output=output, root=root):
            with RunDirectory.create(root, {}) as run:
                at_call(name, call, act)
                encode(frames(TINY, next_frame(run)), TINY, output, options, run)

        status = os.waitpid(child(work), 0)[1]
        assert output.exists() <= (not output.exists() or inspect(output).num_frames == 5)
        with RunDirectory.create(root, {}) as run:
            assert encode(frames(TINY, next_frame(run)), TINY, output, options, run).read_bytes() == whole
        if status == 0:
            break
        assert os.WIFSIGNALED(status) if act is die else os.waitstatus_to_exitcode(status) == 7
    assert status == 0 and call > 3


@pytest.mark.parametrize("limit", [1, 3_000, 20_000, 45_000, 70_000])
def test_real_file_size_limit_is_one_line_and_resumes(tmp_path, limit, whole):
    """The kernel refuses bytes past `limit` (as a full disk or quota does), wherever that falls: segment, live file or final file."""
    output = tmp_path / "out.mp4"

    def work():
        with RunDirectory.create(tmp_path / "run", {}) as run:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            encode(frames(start=next_frame(run)), GRID, output, EncodeOptions(codec="h264", gop=8), run)

    code = os.waitstatus_to_exitcode(os.waitpid(child(work), 0)[1])
    assert code == (7 if limit < len(whole["h264"]) else 0)
    with RunDirectory.create(tmp_path / "run", {}) as run:
        assert encode(frames(start=next_frame(run)), GRID, output, EncodeOptions(codec="h264", gop=8), run).read_bytes() == whole["h264"]


@pytest.mark.parametrize("flags", ["frag_keyframe+empty_moov+default_base_moof", "hybrid_fragmented"])
def test_repair_saves_files_of_writers_that_do_not_flush(tmp_path, flags):
    """Killed with libavformat's default buffering, such files are unreadable; cut behind the last complete fragment they play."""
    saved = 0
    for cut in (0.45, 0.6, 0.75, 0.9, 0.99):
        path = default_flush(tmp_path / f"{cut}.mp4", flags, cut)
        repair(path)
        saved += inspect(path, decode=True).num_frames >= 1
    assert saved == 5


def default_flush(path: Path, flags: str, cut: float) -> Path:
    """A fragmented mp4 that stops at a fraction of its bytes, before its index is written."""
    grid = Grid(num_frames=24, height=64, width=96)
    with av.open(str(path), "w", format="mp4", options={"movflags": flags, "flush_packets": "1"}) as container:
        for start in range(0, 24, 4):
            encoder = SegmentEncoder(EncodeOptions(codec="h264").resolve(grid), start)
            for k in range(start, start + 4):
                encoder.add(frame(k, grid))
            with av.open(io.BytesIO(encoder.finish().data)) as source:
                stream = container.streams.video[0] if container.streams.video else container.add_stream_from_template(source.streams.video[0])
                for packet in source.demux(video=0):
                    if packet.size:
                        packet.stream, packet.pts, packet.dts = stream, packet.pts + start * 1024, packet.dts + start * 1024
                        container.mux(packet)
        data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * cut)])
    return path
