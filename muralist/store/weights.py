"""Model folders: where they are, and whether they can be trusted and are whole, judged from names, sizes and headers alone.

Nothing here reads a tensor. Pickles are refused wherever they lie: a model folder holds JSON and safetensors.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from importlib import resources
from pathlib import Path
from typing import Any

from muralist.errors import UserError
from muralist.store.paths import typed_path

EMBEDDED = {"miniature": "assets/miniature"}
PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}
SAMPLES, SAMPLE_BYTES = 64, 4096
MAX_HEADER = 100 * 2**20  # bytes, the format's own limit
HUB_PATTERNS = ["*.json", "*.safetensors", "*.txt", "*.model"]


def locate(model: str, revision: str | None = None) -> Path:
    """The folder of a model: an embedded name, a path, or a hub id with a revision (downloaded, safetensors only)."""
    if model in EMBEDDED:
        if revision is not None:
            raise UserError(f"{model!r} is inside the package, which has no revisions", where="revision", fix="leave it out")
        return Path(str(resources.files("muralist"))) / EMBEDDED[model]
    path = typed_path(model, "model")
    if path.is_dir():
        if revision is not None:
            raise UserError(f"{model!r} is a folder, which has no revisions", where="revision", fix="leave it out")
        return path
    if path.exists():
        raise UserError(f"{model!r} is a file", where="model", fix="give the folder that holds model_index.json")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model) or model.startswith("."):
        raise UserError(f"no folder {model!r}", where="model", fix=f"give {', '.join(EMBEDDED)}, a diffusers folder, or a hub id with --revision")
    if revision is None:
        raise UserError(f"no folder {model!r}, and a hub id needs a revision", where="model", fix="add --revision COMMIT to pin what is downloaded")
    if not re.fullmatch(r"[0-9a-f]{40}", revision):
        raise UserError(f"{revision!r:.50} pins nothing", where="revision", fix="give the commit, 40 hexadecimal digits, as the hub's history shows it")
    return _download(model, revision)


def is_here(model: str) -> bool:
    """Whether a model is in the package or in a folder, so that nothing is downloaded for it. Raises UserError for what no file system could hold."""
    return model in EMBEDDED or typed_path(model, "model").is_dir()


def folder_of(model: str) -> str | None:
    """The folder that a model is named by, from the root; None for what has the same name everywhere, though a folder here may be called so.

    Raises UserError for what no file system could hold.
    """
    path = typed_path(model, "model")
    return str(path.absolute()) if model not in EMBEDDED and path.is_dir() else None


def _download(model: str, revision: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=HUB_PATTERNS))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"{model}@{revision} cannot be downloaded ({type(error).__name__})", where="model", fix="check the id, the revision and the network"
        ) from None


def read_config(path: Path) -> dict[str, Any]:
    """A JSON object of a model folder; one line of error when it is missing or broken."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path.name} is missing in {path.parent}", where="model", fix="give a complete diffusers folder") from None
    except (OSError, ValueError):
        raise UserError(f"{path} is not readable JSON", where="model", fix="download the file again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object", where="model", fix="download the file again")
    return value


def check_component(folder: Path) -> int:
    """Bytes of the weights of one component folder, after checking that there are no pickles and that every file is whole."""
    if not folder.is_dir():
        raise UserError(f"component {folder.name} is missing in {folder.parent}", where="model", fix="give a complete diffusers folder")
    if pickles := sorted(p.name for p in folder.iterdir() if p.suffix.lower() in PICKLES):
        raise UserError(f"{folder.name}/{pickles[0]} is a pickle, which can run code", where="model", fix="use safetensors weights and remove the pickles")
    files = _weight_files(folder)
    for file in files:
        check_safetensors(file)
    return sum(file.stat().st_size for file in files)


def _weight_files(folder: Path) -> list[Path]:
    if indices := sorted(folder.glob("*.safetensors.index.json")):
        mapping = read_config(indices[0]).get("weight_map")
        names = sorted(set(mapping.values())) if isinstance(mapping, dict) else []
        if not names or any(not isinstance(n, str) or Path(n).name != n for n in names):
            raise UserError(f"{indices[0]} names no shards", where="model", fix="download the file again")
        if missing := [n for n in names if not (folder / n).is_file()]:
            raise UserError(f"shard {folder.name}/{missing[0]} is missing", where="model", fix="download it again")
        if stray := sorted(p.name for p in folder.glob("*.safetensors") if p.name not in names):
            raise UserError(f"{folder.name} holds {stray[0]} beside the shards of its index", where="model", fix="remove the one or the other")
        return [folder / n for n in names]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"no safetensors in {folder}", where="model", fix="give a folder with safetensors weights")
    return files


# Of a configuration's values, versions of libraries, places, and what only a loader goes by: they change nothing that is computed.
TOLD = ("_diffusers_version", "transformers_version", "_name_or_path", "architectures", "dtype", "torch_dtype")
READ = (".json", ".model", ".txt")  # by tokenizers


def fingerprint(folder: Path) -> str:
    """A digest of a component's weights that costs milliseconds: every file's size, header, and 64 samples of 4 KiB spread over it."""
    digest = hashlib.sha256()
    for file in _weight_files(folder):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with open(file, "rb") as handle:
            for start in sorted({0, *(size * i // SAMPLES for i in range(SAMPLES)), max(size - SAMPLE_BYTES, 0)}):
                handle.seek(start)
                digest.update(handle.read(SAMPLE_BYTES))
    return digest.hexdigest()


def digest_of_tokenizer(folder: Path) -> str:
    """A digest of all files that a tokenizer can be read from, by their suffixes; hidden files and others count for nothing."""
    files = sorted(path for path in folder.iterdir() if path.suffix in READ and not path.name.startswith(".") and path.is_file())
    return hashlib.sha256(b"".join(file.name.encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest() for file in files)).hexdigest()


def digest_of_config(folder: Path) -> str:
    """A digest of what a component's configuration says of what it computes; of none where there is no file. A default that is said and one that is
    left out are two."""
    file = folder / "config.json"
    values = read_config(file) if file.is_file() else {}
    same = {name: value for name, value in values.items() if name not in TOLD}
    return hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a component, from the headers."""
    headers = (check_safetensors(file) for file in _weight_files(folder))
    return {name: tuple(entry["shape"]) for header in headers for name, entry in header.items() if name != "__metadata__"}


def check_safetensors(path: Path) -> dict[str, Any]:
    """The header of a safetensors file whose size agrees with it; a truncated file, a pointer or anything else is refused."""
    try:
        return _header(path)
    except OSError as error:  # a link into a cache that is gone, a folder of that name
        raise UserError(f"{path.parent.name}/{path.name} cannot be read ({error.strerror})", where="model", fix="download it again") from None


def _header(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    with open(path, "rb") as handle:
        start = handle.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(MAX_HEADER, size - 8):
            raise UserError(f"{path.parent.name}/{path.name} is not a safetensors file", where="model", fix="download it again (a git-lfs pointer?)")
        try:
            header = json.loads(handle.read(length))
            entries = [entry for name, entry in header.items() if name != "__metadata__"]
            ends = [int(entry["data_offsets"][1]) for entry in entries]
            if any(not all(isinstance(side, int) for side in entry["shape"]) for entry in entries):
                raise TypeError("shape")
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError):
            raise UserError(f"the header of {path.parent.name}/{path.name} is damaged", where="model", fix="download it again") from None
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        raise UserError(f"{path.parent.name}/{path.name} has {size} bytes instead of {expected}", where="model", fix="download it again")
    return header
