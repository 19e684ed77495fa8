"""How a base's tokenizer reads a prompt, without the seconds that transformers takes to import."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Reading:
    """Number of tokens, with the end mark, and the words that the tokenizer does not know."""

    num_tokens: int
    unknown: tuple[str, ...]


def read_prompt(tokenizer: Path, text: str) -> Reading | None:
    """By the tokenizer's `tokenizer.json`; None where the folder has none."""
    file = tokenizer / "tokenizer.json"
    if not file.is_file():
        return None
    found = _tokenizer(file)
    encoded = found.encode(text)
    unknown = {found.token_to_id(name) for name in ("<unk>", "[UNK]")} - {None}
    words = dict.fromkeys(text[start:end].strip() for number, (start, end) in zip(encoded.ids, encoded.offsets) if number in unknown)
    return Reading(len(encoded.ids), tuple(word for word in words if word))


@lru_cache(maxsize=2)  # Wan's has 16 MB, and a comparison asks for every cell
def _tokenizer(file: Path) -> Any:
    from tokenizers import Tokenizer

    found = Tokenizer.from_file(str(file))
    found.no_truncation()
    found.no_padding()
    return found
