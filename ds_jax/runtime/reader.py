"""Threads that wait for devices, so that the dispatch thread need not."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any


class Reader:
    """A thread that makes calls in the order in which they were put, and may wait in them."""

    def __init__(self, name: str):
        self._calls: queue.SimpleQueue[tuple[Callable[..., None], tuple[Any, ...]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def put(self, call: Callable[..., None], *args: Any) -> None:
        self._calls.put((call, args))

    def close(self) -> None:
        """Make the calls that were put, then end the thread."""
        self._calls.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (item := self._calls.get()) is not None:
            call, args = item
            call(*args)
            del item, call, args  # they hold arrays
