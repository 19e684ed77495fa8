"""Look into a video file of unknown origin, in a process of its own: `python -I video_probe.py PATH packets|decode`.

Demuxers and decoders are large C programs with a history of memory errors, and hostile files can ask for hours or terabytes. So this
file runs as a child with limits on memory, processor time and written bytes, opens local files of known containers only (no playlists,
no network), and prints one line of JSON: facts, or {"error": text}. It imports nothing but PyAV: it starts in a fraction of a second.
"""

import json
import resource
import sys

MEMORY = 6 << 30  # address space in bytes: 8K H.265 with its reference frames, one thread
SECONDS = 600
FRAMES = 1_000_000
TEXT = 1 << 16  # characters of one metadata value
OPEN = {"protocol_whitelist": "file", "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,ivf"}
LAYOUT = ("width", "height", "pix_fmt", "color_primaries", "color_trc", "colorspace", "color_range")


def limit() -> None:
    for what, most in ((resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_CPU, SECONDS), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)):
        _, hard = resource.getrlimit(what)
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(what, (most, hard))


def probe(path: str, mode: str) -> dict:
    """Facts of the first video stream; counts every packet, decodes the first frame or (mode 'decode') all frames."""
    import av

    with av.open("file:" + path, options=OPEN, timeout=SECONDS) as container:
        if not container.streams.video:
            return {"error": "no video stream"}
        stream = container.streams.video[0]
        context = stream.codec_context
        context.thread_count = 1
        packets = decoded = damaged = 0
        for packet in container.demux(stream):
            packets += bool(packet.size)
            damaged += packet.is_corrupt
            if mode == "decode" or not decoded:
                decoded += len(packet.decode())
            if packets > FRAMES:
                return {"error": f"more than {FRAMES} frames"}
        if not decoded and packets:
            decoded = len(context.decode(None))
        facts = {name: getattr(context, name) for name in LAYOUT}
        facts |= {"packets": packets, "decoded": decoded, "damaged": damaged, "claimed": stream.frames, "codec": context.name, "tag": context.codec_tag}
        facts |= {"bits": max(component.bits for component in context.format.components), "rate": str(stream.average_rate or stream.guessed_rate)}
        facts["tags"] = {str(key)[:TEXT]: str(value)[:TEXT] for key, value in list(container.metadata.items())[:100]}
        return facts


def main() -> None:
    limit()
    try:
        facts = probe(sys.argv[1], sys.argv[2])
    # A hostile file may raise IndexError or UnicodeDecodeError through PyAV besides its own errors: this is the boundary.
    except Exception as error:
        facts = {"error": f"{type(error).__name__}: {error}"[:300]}
    print(json.dumps(facts, default=int))


if __name__ == "__main__":
    main()
