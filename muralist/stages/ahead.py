"""Make items ahead of their reader: one thread fills a bounded queue while the reader works on what it has.

Decoding keeps a device busy, encoding a CPU: one after the other each waits for its turn. The items, their order and their bits are the same.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, TypeVar

Item = TypeVar("Item")
_POLL = 0.05  # seconds in which a maker with a full queue notices that its reader has gone


class Stopped(Exception):
    """Raised in the maker when nobody reads any more."""


class Ahead:
    """`count` items are made in advance; 0: each when it is asked for, without a thread. Call it once, with the items."""

    def __init__(self, count: int):
        self.count = count
        self._gone, self._ready = threading.Event(), queue.Queue(max(count, 1))

    @property
    def lag(self) -> int:
        """By how many items the reader may be behind the maker."""
        return self.count + 1 if self.count else 0

    def check(self) -> None:
        """Raise `Stopped` when the reader has gone: for the maker to call in the midst of long work."""
        if self._gone.is_set():
            raise Stopped

    def __call__(self, items: Iterator[Item]) -> Iterator[Item]:
        """The same items. What the maker raises is raised at its place; a reader that leaves waits until the maker has noticed."""
        if not self.count:
            yield from items
            return
        maker = threading.Thread(target=self._make, args=(items,), name="ahead", daemon=True)
        maker.start()
        try:
            while (entry := self._ready.get()) is not None:
                item, error = entry
                if error is not None:
                    raise error
                yield item
        finally:
            self._gone.set()
            maker.join()

    def _make(self, items: Iterator[Any]) -> None:
        try:
            for item in items:
                self._hand((item, None))
            self._hand(None)
        except Stopped:
            pass
        except BaseException as error:  # whatever it is belongs to the reader
            with suppress(Stopped):
                self._hand((None, error))

    def _hand(self, entry: tuple[Any, BaseException | None] | None) -> None:
        while True:
            self.check()
            try:
                return self._ready.put(entry, timeout=_POLL)
            except queue.Full:
                continue
