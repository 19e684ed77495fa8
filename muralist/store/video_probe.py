"""Look into a video file of unknown origin, in a process of its own: `python -I video_probe.py PATH packets|decode|frames [SECONDS]`.

Demuxers and decoders are large C programs with a history of memory errors, and hostile files can ask for hours or terabytes. So this
file runs as a child with limits on memory, processor time, written bytes and pixels, opens local files of known containers only (no
playlists, no network), and imports nothing but PyAV: it starts in a fraction of a second.

`packets` and `decode` print one line of JSON: facts, or {"error": text}. `frames` prints, for every frame, a line of JSON that describes
its planes and then their bytes, and at the end {"decoded": count} or {"error": text}. Damage that decoders would conceal is an error.
"""

import json
import os
import resource
import signal
import sys

MEMORY = 6 << 30  # address space in bytes: 8K H.265 with its reference frames
SECONDS = 600  # of processor time
PATIENCE = 60  # seconds for one frame
FRAMES = 1_000_000
PIXELS = 8192 * 8192  # of one frame
TEXT = 1 << 16  # characters of one metadata value
COMMENT = 1 << 20  # of the tag that holds our JSON: two prompts of 4096 characters, each up to 12 characters of JSON, need 1 << 17
OPEN = {"protocol_whitelist": "file", "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,ivf"}
STRICT = {"err_detect": "crccheck+bitstream+buffer+explode", "max_pixels": str(PIXELS)}
LAYOUT = ("width", "height", "pix_fmt", "color_primaries", "color_trc", "colorspace", "color_range")


def limit(seconds: int) -> None:
    for what, most in ((resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_CPU, seconds), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)):
        if what == resource.RLIMIT_AS and sys.platform == "darwin":
            continue  # macOS refuses any number: what it shares with every process is larger
        _, hard = resource.getrlimit(what)
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(what, (most, hard))


def opened(path: str, threads: int):
    """The container and its first video stream, whose decoder stops at damage instead of inventing pixels."""
    import av
    import av.logging

    av.logging.set_level(av.logging.ERROR)  # so that `complaint` hears of them
    container = av.open("file:" + path, options=OPEN, timeout=SECONDS)
    if not container.streams.video:
        raise LookupError("no video stream")
    context = container.streams.video[0].codec_context
    context.thread_count, context.options = threads, STRICT
    return container, container.streams.video[0]


def probe(path: str, mode: str) -> dict:
    """Facts of the first video stream; counts every packet, decodes the first frame or (mode 'decode') all frames."""
    container, stream = opened(path, threads=1)
    with container:
        context = stream.codec_context
        packets = decoded = damaged = 0
        matrix = None
        for packet in container.demux(stream):
            packets += bool(packet.size)
            damaged += packet.is_corrupt
            if mode == "decode" or not decoded:
                frames = packet.decode()
                matrix = display_matrix(frames[0]) if frames and not decoded else matrix
                decoded += len(frames)
            if packets > FRAMES:
                return {"error": f"more than {FRAMES} frames"}
        if not decoded and packets:
            decoded = len(context.decode(None))
        facts = {name: getattr(context, name) for name in LAYOUT}
        facts |= {"packets": packets, "decoded": decoded, "damaged": damaged, "claimed": stream.frames, "codec": context.name, "tag": context.codec_tag}
        facts |= {"bits": max(component.bits for component in context.format.components), "rate": str(stream.average_rate or stream.guessed_rate)}
        facts |= {"matrix": matrix}
        limits = {"comment": COMMENT}
        facts["tags"] = {str(key)[:TEXT]: str(value)[: limits.get(key, TEXT)] for key, value in list(container.metadata.items())[:100]}
        return facts


def display_matrix(frame) -> list | None:
    """(a, b, c, d) of the display matrix in units of 1, by which a player turns the picture; None where there is none."""
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return None
    numbers = memoryview(bytes(data)).cast("i")
    return [numbers[i] / 65536 for i in (0, 1, 3, 4)]


def send_frames(path: str, out) -> dict:
    """Write every frame to the pipe; returns the last line. The parent reads at its own pace: waiting for it costs no patience."""
    container, stream = opened(path, threads=min(os.cpu_count() or 1, 4))
    decoded, end = 0, 0
    with container:
        for packet in container.demux(stream):
            signal.alarm(PATIENCE)
            if packet.is_corrupt:
                return {"error": f"packet damaged after {decoded} frames"}
            if packet.size and packet.pts is not None:
                end = max(end, packet.pts + (packet.duration or 0))
            for frame in packet.decode():
                signal.alarm(0)
                if frame.is_corrupt:
                    return {"error": f"frame {decoded} is damaged"}
                send(frame, out)
                decoded += 1
        signal.alarm(0)
        missing = seconds_missing(container, stream, end)
        wrong = f"{missing:.2f} s are missing at the end" if missing else complaint()
        return {"error": wrong} if wrong else {"decoded": decoded}


def send(frame, out) -> None:
    """One frame: planar Y'CbCr and grey as they are, RGB of any kind as 16 bits; anything else is refused."""
    kind = frame.format
    if kind.is_rgb:
        frame, names = frame.reformat(format="rgb48le"), "rgb48le"
    elif kind.name.startswith(("yuv", "gray")) and kind.is_planar | kind.name.startswith("gray") and not kind.name.endswith(("be", "f32le", "f16le")):
        names = kind.name
    else:
        raise ValueError(f"pixels in the form {kind.name} are not read")
    planes = [frame.planes[i] for i in range(min(len(frame.planes), 3))]
    shapes = [(plane.height, plane.width, plane.line_size) for plane in planes]
    header = {"format": names, "bits": 16 if kind.is_rgb else kind.components[0].bits, "planes": shapes}
    out.write(json.dumps(header).encode() + b"\n")
    for plane in planes:
        out.write(memoryview(plane))
    out.flush()


def seconds_missing(container, stream, end: int) -> float:
    """By how much the last frame ends before the container says; only where it says so of this stream alone and counts no frames."""
    if stream.frames or container.duration is None or len(container.streams) > 1 or "mpegts" in container.format.name:
        return 0.0
    missing = container.duration / 1e6 - float(end * stream.time_base)
    return missing if missing > 1.5 / float(stream.average_rate or stream.guessed_rate or 1) else 0.0


def main() -> None:
    path, mode = sys.argv[1:3]
    limit(int(sys.argv[3]) if len(sys.argv) > 3 else SECONDS)
    try:
        answer = send_frames(path, sys.stdout.buffer) if mode == "frames" else probe(path, mode)
    except BrokenPipeError:
        os._exit(0)  # the parent wants no more
    # A hostile file may raise IndexError or UnicodeDecodeError through PyAV besides its own errors: this is the boundary.
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {error}"[:300]}
    sys.stdout.buffer.write(json.dumps(answer, default=int).encode() + b"\n")
    sys.stdout.flush()


def complaint() -> str:
    """What a library reported as an error without failing, such as a file that ends early."""
    import av.logging

    count, last = av.logging.get_last_error()
    return f"{last[1]}: {last[2].strip()}"[:300] if count and last else ""


if __name__ == "__main__":
    main()
