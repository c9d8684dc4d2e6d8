"""An engine that says what it is told, for tests of the wire format, and a server around any engine."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from ds_jax.async_engine import Output
from ds_jax.config import Config, SloConfig
from ds_jax.errors import Draining, RequestError
from ds_jax.sampling import SamplingParams
from ds_jax.server.app import create_app
from ds_jax.server.serve import listen, url
from ds_jax.text import Tokenizer
from tests.text.tokenizers_for_tests import byte_level

HELLO = [
    Output(0, [5], "Hel"),
    Output(0, [6], ""),
    Output(0, [7], "lö 🦊"),
    Output(0, [8], "", "stop", {"prefill_queueing": 0.5}),
]


class ScriptedEngine:
    """`script` are the outputs for every prompt, an exception among them is raised; `forever` repeats them."""

    def __init__(self) -> None:
        self.tokenizer = Tokenizer(byte_level())
        self.max_model_len = 64
        self.served_name = "scripted"
        self.sampling_defaults: dict[str, float] = {}
        self.healthy = True
        self.script: list[Output | Exception] = list(HELLO)
        self.forever = False
        self.pause_s = 0.0
        self.calls: list[tuple[list[int], SamplingParams]] = []
        self.limits: list[tuple[float | None, SloConfig | None]] = []
        """Deadline and latency targets of each call."""
        self.config = Config(slo=SloConfig(ttft_s=0.5, tpot_s=0.1))
        self.running = 0
        self.aborted = 0
        self.started = self.closed = self.draining = False

    async def start(self) -> None:
        self.started = True

    async def close(self) -> None:
        self.closed = True

    async def drain(self) -> bool:
        self.draining = True
        while self.running:
            await asyncio.sleep(0.005)
        return True

    def statistics(self) -> dict[str, Any]:
        return {"requests": self.running}

    async def generate(
        self,
        prompt: list[int],
        params: SamplingParams,
        deadline_s: float | None = None,
        slo: SloConfig | None = None,
    ) -> AsyncIterator[Output]:
        self.calls.append((prompt, params))
        self.limits.append((deadline_s, slo))
        if self.draining:
            raise Draining("the server is shutting down")
        if len(prompt) >= self.max_model_len:
            raise RequestError(f"prompt has {len(prompt)} tokens; the model allows 64 with the output", "prompt")
        if len(prompt) + params.max_tokens > self.max_model_len:
            raise RequestError(f"max_tokens = {params.max_tokens} exceeds what is left of 64", "max_tokens")
        if not all(0 <= token < 500 for token in prompt):
            raise RequestError(f"prompt has token id {max(prompt)}; the vocabulary is 0 to 499", "prompt")
        self.running += 1
        try:
            while True:
                for item in self.script:
                    await asyncio.sleep(self.pause_s)
                    if isinstance(item, Exception):
                        raise item
                    yield item
                if not self.forever:
                    return
        except (GeneratorExit, asyncio.CancelledError):
            self.aborted += 1
            raise
        finally:
            self.running -= 1


@contextmanager
def serving(engine: Any, **options: Any) -> Iterator[str]:
    """Serve the engine on a thread; gives the URL."""
    listener = listen("127.0.0.1", 0)
    app = create_app(engine, **options)
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="on"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    until(lambda: server.started or not thread.is_alive())
    try:
        yield url(listener)
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    """Wait for something that must come."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)
