"""Threads that wait for devices, so that the dispatch thread need not."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from typing import Any

log = logging.getLogger(__name__)

CLOSE_S = 30
"""Longest wait for a device at the end, in seconds."""


class Reader:
    """A thread that makes calls in the order in which they were put, and may wait in them."""

    def __init__(self, name: str):
        self._calls: queue.SimpleQueue[tuple[Callable[..., None], tuple[Any, ...]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def put(self, call: Callable[..., None], *args: Any) -> None:
        self._calls.put((call, args))

    def close(self) -> None:
        """Make the calls that were put, then end the thread; a device that hangs is not waited for."""
        self._calls.put(None)
        self._thread.join(CLOSE_S)
        if self._thread.is_alive():
            log.error("%s still waits for a device after %d s; left behind", self._thread.name, CLOSE_S)

    def _work(self) -> None:
        while (item := self._calls.get()) is not None:
            call, args = item
            call(*args)
            del item, call, args  # they hold arrays
