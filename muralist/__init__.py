"""Ultra-high-resolution, long video generation on Wan2.1 and Wan2.2.

    import muralist
    pipe = muralist.load("miniature", recipe="cascade")
    pipe("a red ball moves right over grass", width=3840, height=2160, num_frames=29, seed=0).save("out.mp4")

Importing the package is instant and touches neither the network nor torch: names are resolved when they are used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from muralist.errors import UserError

if TYPE_CHECKING:
    from muralist.api import Pipeline, Video, load

__all__ = ["Pipeline", "UserError", "Video", "__version__", "load"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in ("Pipeline", "Video", "load"):
        from muralist import api

        return getattr(api, name)
    raise AttributeError(f"module 'muralist' has no attribute {name!r}")
