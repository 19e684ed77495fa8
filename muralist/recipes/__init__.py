"""Recipes: functions from a base to a configuration. A method's name lives here and nowhere else in the library."""

from __future__ import annotations

from collections.abc import Callable

from muralist.base_info import BaseInfo
from muralist.config import Config
from muralist.errors import UserError
from muralist.recipes.atlasvid import atlasvid
from muralist.recipes.baselines import cascade, direct
from muralist.recipes.luve import luve
from muralist.recipes.pixelwizard import pixelwizard
from muralist.recipes.ultragen import ultragen

Recipe = Callable[[BaseInfo], Config]

RECIPES: dict[str, Recipe] = {"cascade": cascade, "direct": direct, "luve": luve, "ultragen": ultragen, "atlasvid": atlasvid, "pixelwizard": pixelwizard}
DEFAULT = "cascade"


def find(name: str) -> Recipe:
    """The recipe of that name; UserError names the known ones."""
    if name not in RECIPES:
        raise UserError(f"unknown recipe {name!r}", where="recipe", fix=f"use one of {', '.join(RECIPES)}")
    return RECIPES[name]


def summary(name: str) -> str:
    """The first line of a recipe's docstring."""
    return (RECIPES[name].__doc__ or "").strip().splitlines()[0]
