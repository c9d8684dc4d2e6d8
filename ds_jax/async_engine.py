"""The engine for asyncio front ends: text streams, aborts by hanging up, back-pressure by exceptions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ds_jax.config import Config, SloConfig
from ds_jax.engine import Engine, Update
from ds_jax.errors import Draining, Overloaded, RequestError
from ds_jax.sampling import SamplingParams, TokenLogprobs
from ds_jax.text import TextStream

__all__ = ["AsyncEngine", "Draining", "Output", "Overloaded", "RequestError"]


@dataclass(frozen=True)
class Output:
    """What came since the last one."""

    index: int = 0
    """Which of the request's n outputs this belongs to."""
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    """stop, length, abort, deadline or error, with the last output."""
    stages_s: dict[str, float] | None = None
    """Seconds in each of the five stages, with the last output."""
    error: str | None = None
    retry_after_s: float | None = None
    """With an error that trying again later may help."""
    logprobs: list[TokenLogprobs] | None = None
    """One for each of `token_ids`, if they were asked for."""
    prompt_logprobs: list[TokenLogprobs] | None = None
    """One for each token of the prompt but the first, with the first output, if they were asked for."""


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
        self.sampling_defaults = self._engine.executor.checkpoint.sampling_defaults
        """What the checkpoint's generation_config.json asks for where a request says nothing."""
        self.config = config
        self._queues: dict[int, asyncio.Queue[Update]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None

    async def start(self) -> None:
        """Begin to serve on the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._engine.start()

    async def generate(
        self,
        prompt_token_ids: list[int],
        params: SamplingParams,
        deadline_s: float | None = None,
        slo: SloConfig | None = None,
    ) -> AsyncIterator[Output]:
        """Stream the `params.n` outputs of a prompt. Closing or cancelling the iterator aborts what still runs.

        `deadline_s` and `slo` are as `Engine.submit` takes them.

        Raises:
            RequestError: the request can never run; Overloaded: try later; Draining: shutting down.
        """
        sequences = self._engine.submit(prompt_token_ids, params, deadline_s, slo)
        queue: asyncio.Queue[Update] = asyncio.Queue()
        self._queues.update(dict.fromkeys(sequences, queue))
        streams = {id: TextStream(self.tokenizer, params.stop) for id in sequences}
        living = set(sequences)
        try:
            while living:
                for id, updates in _by_sequence(await queue.get(), queue).items():
                    output = self._output(id - sequences.start, streams[id], id, updates)
                    if output is not None:
                        if output.finish_reason is not None:
                            living.remove(id)
                        yield output
        finally:
            for id in sequences:
                del self._queues[id]
            for id in living:
                self._engine.stop(id, "abort")

    def _output(self, index: int, stream: TextStream, id: int, updates: list[Update]) -> Output | None:
        """What the updates of one sequence add; None if nothing does, because its text was complete before."""
        last = updates[-1]
        was_complete = stream.stopped
        token_ids: list[int] = []
        text = ""
        for token in (token for update in updates for token in update.token_ids):
            if stream.stopped:
                break  # what comes behind the stop string is nobody's
            token_ids.append(token)
            text += stream.push((token,))
        reason = last.finish_reason
        if stream.stopped:
            if reason is not None:
                reason = "stop"
            elif was_complete:
                return None
            else:
                self._engine.stop(id, "stop")  # the answer to this brings the stages
        elif reason is not None:
            text += stream.finish()
        stages_s = None if last.times is None else last.times.stages_s()
        found = [one for update in updates for one in update.logprobs or ()][: len(token_ids)]
        logprobs = None if was_complete or all(update.logprobs is None for update in updates) else found
        prompt_logprobs = next((one.prompt_logprobs for one in updates if one.prompt_logprobs is not None), None)
        return Output(
            index, token_ids, text, reason, stages_s, last.error, last.retry_after_s, logprobs, prompt_logprobs
        )

    def _listen(self, updates: list[Update]) -> None:
        """On the dispatch thread: one wake-up of the event loop per step."""
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(self._distribute, updates)
        except RuntimeError:
            assert self._loop.is_closed()  # nobody is left to listen

    def _distribute(self, updates: list[Update]) -> None:
        for update in updates:
            if (queue := self._queues.get(update.sequence)) is not None:
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


def _by_sequence(first: Update, queue: asyncio.Queue[Update]) -> dict[int, list[Update]]:
    """Everything that has come by now, so that a slow reader catches up in one piece."""
    updates = {first.sequence: [first]}
    while not queue.empty():
        update = queue.get_nowait()
        updates.setdefault(update.sequence, []).append(update)
    return updates
