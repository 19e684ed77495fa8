"""The report: template, style, script and data become one HTML file that needs nothing else to be read (videos lie beside it)."""

from __future__ import annotations

import json
import os
from importlib import resources
from typing import Any
from urllib.parse import quote

from muralist.compare.media import Media


def render(results: dict[str, Any], media: list[Media | None]) -> str:
    """The page.

    Args:
        results: the content of results.json; its `cells` are in the order of `media`.
        media: pictures and files of each cell, None where there is no video.
    """
    cells = [cell | {"media": shown and _media(shown)} for cell, shown in zip(results["cells"], media, strict=True)]
    page = _part("page.html")
    for name, text in (("style", _part("page.css")), ("script", _part("page.js")), ("data", _json(results | {"cells": cells}))):
        page = page.replace(f"/*{{{name}}}*/", text)  # the data comes last: nothing in it is taken for a place to fill
    return page


def _part(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text("utf-8")


def _json(data: Any) -> str:
    """JSON that cannot end the element it stands in, whatever a prompt says: `<`, `>` and `&` only occur escaped."""
    text = json.dumps(data, allow_nan=False, ensure_ascii=True, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _media(media: Media) -> dict[str, str]:
    return {"video": quote(os.fsencode(media.video)), "still": quote(os.fsencode(media.still)), "thumb": media.thumb, "crop": media.crop}
