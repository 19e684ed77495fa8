"""`muralist recipes`: the methods there are, one line each."""

from __future__ import annotations

from muralist.cli import _show
from muralist.cli._options import Json


def command(json: Json = False) -> int:
    """List the recipes."""
    from muralist.recipes import DEFAULT, RECIPES, summary

    if json:
        for name in RECIPES:
            _show.emit({"event": "recipe", "name": name, "summary": summary(name), "default": name == DEFAULT})
        return 0
    _show.table("", ["recipe", "what it does"], [(name + (" (default)" if name == DEFAULT else ""), summary(name)) for name in RECIPES])
    return 0
