"""Attention: which keys a query sees (`full`, `window`), how it is computed (`backends`), and the plain truth (`reference`)."""

from muralist.nn.attention.full import FullAttention, attend_full
from muralist.nn.attention.window import attend_windows
from muralist.nn.windows import WindowAttention

__all__ = ["FullAttention", "WindowAttention", "attend_full", "attend_windows"]
