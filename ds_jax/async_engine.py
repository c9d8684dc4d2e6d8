"""The engine for asyncio front ends: text streams, aborts by hanging up, back-pressure by exceptions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ds_jax.config import Config
from ds_jax.engine import Engine, Update
from ds_jax.errors import Draining, Overloaded, RequestError
from ds_jax.sampling import SamplingParams
from ds_jax.text import TextStream

__all__ = ["AsyncEngine", "Draining", "Output", "Overloaded", "RequestError"]


@dataclass(frozen=True)
class Output:
    """What came since the last one."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    """stop, length, abort, deadline or error, with the last output."""
    stages_s: dict[str, float] | None = None
    """Seconds in each of the five stages, with the last output."""
    error: str | None = None


class AsyncEngine:
    """Builds the engine (slow: weights, compilation) and serves it to coroutines of one event loop.

    Raises:
        ValueError, FileNotFoundError: config, checkpoint and devices do not fit together; one sentence.
    """

    def __init__(self, config: Config, *, devices: Any = None, progress: bool = True):
        self._engine = Engine(config, self._listen, devices=devices, progress=progress)
        self.tokenizer = self._engine.tokenizer
        self.served_name = config.model.served_name or Path(self._engine.executor.checkpoint.folder).resolve().name
        self.max_model_len = self._engine.max_model_len
        self.config = config
        self._queues: dict[int, asyncio.Queue[Update]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None

    async def start(self) -> None:
        """Begin to serve on the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._engine.start()

    async def generate(
        self, prompt_token_ids: list[int], params: SamplingParams, deadline_s: float | None = None
    ) -> AsyncIterator[Output]:
        """Stream a completion. Closing or cancelling the iterator aborts the request.

        Raises:
            RequestError: the request can never run; Overloaded: try later; Draining: shutting down.
        """
        request = self._engine.submit(prompt_token_ids, params, deadline_s)
        updates = self._queues[request] = asyncio.Queue()
        stream = TextStream(self.tokenizer, params.stop)
        over = False
        try:
            while not over:
                update = await updates.get()
                token_ids, reason = update.token_ids, update.finish_reason
                while reason is None and not updates.empty():  # catch up in one piece when the reader was slow
                    update = updates.get_nowait()
                    token_ids, reason = token_ids + update.token_ids, update.finish_reason
                text = stream.push(token_ids)
                if stream.stopped and reason in (None, "length"):
                    # The text is complete. Stages come with the answer to the stop.
                    self._engine.stop(request, "stop")
                    while update.finish_reason is None:
                        update = await updates.get()
                    reason = "stop"
                over = reason is not None
                if over and not stream.stopped:
                    text += stream.finish()
                stages_s = None if update.times is None else update.times.stages_s()
                yield Output(token_ids, text, reason, stages_s, update.error)
        finally:
            del self._queues[request]
            if not over:
                self._engine.stop(request, "abort")

    def _listen(self, updates: list[Update]) -> None:
        """On the dispatch thread: one wake-up of the event loop per step."""
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(self._distribute, updates)
        except RuntimeError:
            assert self._loop.is_closed()  # nobody is left to listen

    def _distribute(self, updates: list[Update]) -> None:
        for update in updates:
            if (queue := self._queues.get(update.request)) is not None:
                queue.put_nowait(update)

    @property
    def healthy(self) -> bool:
        """Whether every role of the config has a living instance and the engine itself is well."""
        return self._engine.healthy

    def statistics(self) -> dict[str, Any]:
        """Counters and gauges of the moment."""
        return self._engine.statistics()

    async def drain(self, timeout_s: float | None = None) -> bool:
        """Take no new requests and wait until all are done; False if that took longer than `timeout_s`."""
        return await asyncio.to_thread(self._engine.drain, timeout_s)

    async def close(self) -> None:
        """Abort what still runs and free the devices."""
        await asyncio.to_thread(self._engine.close)
