"""Copy tensors out of a pickle into a safetensors file, in a process of its own: `python -I pickle_copy.py SOURCE TARGET PLACES`.

A pickle is a program. So this file runs as a child with limits on memory, processor time and written bytes, opens it with torch's reader
for weights only, which runs nothing but the rebuilding of tensors and plain values, and leaves the tensors' data where it is on the disk
until it is copied. It imports nothing of ours: what reads a file of unknown origin shall not have the library at hand.

PLACES is JSON: paths of keys, each leading to a dictionary of tensors, such as [["model", "sd"], []]; the first one that does serves.
Prints one line of JSON: {"tensors": count}, or {"error": text}, with "code" where the file wants a function that tensors do not need.
"""

import json
import os
import re
import resource
import sys

SLACK = 2 << 30  # bytes of address space beyond the file and one copy of it
SECONDS = 900  # of processor time
HEADER = 100 << 20  # bytes, the limit of the safetensors format


def limit(size: int) -> None:
    """Of a source of `size` bytes. Set once torch is loaded, because what that takes differs between its builds by gigabytes."""
    used = SLACK
    if os.path.exists("/proc/self/statm"):  # Linux
        with open("/proc/self/statm", "rb") as handle:
            used = int(handle.read().split()[0]) * resource.getpagesize()
    limits = {
        resource.RLIMIT_AS: used + SLACK + 2 * size,
        resource.RLIMIT_CPU: SECONDS,
        resource.RLIMIT_FSIZE: most_bytes(size) + HEADER,
        resource.RLIMIT_CORE: 0,
    }
    for what, most in limits.items():
        if what == resource.RLIMIT_AS and sys.platform == "darwin":
            continue  # macOS refuses any number: what it shares with every process is larger
        _, hard = resource.getrlimit(what)
        resource.setrlimit(what, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def most_bytes(size: int) -> int:
    """Tensors that share their data are written once each, so twice the file is plausible; more is a small file posing as a large one."""
    return 2 * size + (1 << 20)


def copy(source: str, target: str, places: list) -> dict:
    import torch
    from safetensors.torch import save_file

    size = os.path.getsize(source)
    limit(size)
    tensors = chosen(torch.load(source, map_location="cpu", weights_only=True, mmap=True), places, torch)
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if total > most_bytes(size):
        return {"error": f"its tensors claim {total:,} bytes, the file has {size:,}"}
    save_file(apart(tensors), target)
    return {"tensors": len(tensors)}


def chosen(data: object, places: list, torch) -> dict:
    """The first of the places that holds tensors, as {name: tensor}."""
    for place in places:
        found = data
        for key in place:
            found = found.get(key) if isinstance(found, dict) else None
        tensors = {name: value.detach() for name, value in found.items() if isinstance(value, torch.Tensor)} if isinstance(found, dict) else {}
        for name, tensor in tensors.items():
            if not isinstance(name, str) or tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
                raise TypeError(f"{name!r:.100} is not a plain tensor with a name")
        if tensors:
            return tensors
    keys = ", ".join(repr(key)[:30] for key in list(data)[:8]) if isinstance(data, dict) else type(data).__name__
    raise LookupError(f"no tensors at {' or '.join('/'.join(place) or 'its top' for place in places)}, but {keys}")


def apart(tensors: dict) -> dict:
    """Contiguous, and none sharing its data with another, as the format wants them."""
    seen, result = set(), {}
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        result[name] = tensor.contiguous() if place not in seen else tensor.clone(memory_format=sys.modules["torch"].contiguous_format)
        seen.add(place)
    return result


def main() -> None:
    source, target, places = sys.argv[1:4]
    try:
        answer = copy(source, target, json.loads(places))
    # A hostile file can raise anything through torch's readers: this is the boundary.
    except Exception as error:
        # Of the unpickler's text only the reason: its advice is to open the file without protection.
        reason = re.sub(r"(?s).*(Weights only load failed).*?(WeightsUnpickler error: |$)", "", str(error)) or "not plain tensors"
        wanted = re.search(r"(?i)unsupported (?:global: )?GLOBAL (\S+)", str(error))
        answer = {"error": " ".join(f"{type(error).__name__}: {reason}".split())[:300]} | ({"code": wanted[1][:100]} if wanted else {})
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
