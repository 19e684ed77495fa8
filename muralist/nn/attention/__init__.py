"""Attention: which keys a query sees (`full`, `window`, `guided`, `branched`, `close_remote`), how it is computed (`backends`), the plain truth
(`reference`)."""

from muralist.nn.attention.branched import BranchedWindows
from muralist.nn.attention.close_remote import CloseRemote
from muralist.nn.attention.full import FullAttention, attend_full
from muralist.nn.attention.guided import GuidedWindows, Middle, Near, ProxyMemory, Within
from muralist.nn.attention.window import attend_windows
from muralist.nn.windows import WindowAttention

__all__ = [
    "BranchedWindows",
    "CloseRemote",
    "FullAttention",
    "GuidedWindows",
    "Middle",
    "Near",
    "ProxyMemory",
    "WindowAttention",
    "Within",
    "attend_full",
    "attend_windows",
]
