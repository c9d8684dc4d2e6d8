"""Run the HTTP server until a signal: the first one drains, a second one stops at once."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn
from fastapi import FastAPI

from ds_jax.server.app import create_app

if TYPE_CHECKING:
    from ds_jax.async_engine import AsyncEngine


def run(
    engine: AsyncEngine, host: str = "127.0.0.1", port: int = 8000, *, listener: socket.socket | None = None
) -> None:
    """Serve the engine until SIGTERM or SIGINT, at the address or on a socket that `listen` gave.

    With the first signal new requests are answered 503, those that run end as usual, and `run` returns. A second
    signal ends the process at once.

    Raises:
        OSError: the address cannot be listened on; one sentence.
    """
    listener = listener or listen(host, port)
    app = create_app(engine)
    config = uvicorn.Config(app, log_level="warning", access_log=False, lifespan="on")
    DrainingServer(config, app, engine, url(listener)).run(sockets=[listener])


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to the address; port 0 picks a free one.

    Raises:
        OSError: one sentence with the address and the reason.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise OSError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
    return listener


def url(listener: socket.socket) -> str:
    """Where a client on this machine finds the server."""
    host, port = listener.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = "localhost"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class DrainingServer(uvicorn.Server):
    """uvicorn, that stops listening only when the engine is done."""

    def __init__(self, config: uvicorn.Config, app: FastAPI, engine: AsyncEngine, url: str):
        super().__init__(config)
        self._app = app
        self._engine = engine
        self._url = url
        self._drain: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start the engine, then listen, then say so."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        if self.started:
            print(self._welcome(), flush=True)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Our own handling: uvicorn's closes the door first, and ends with the signal's exit code."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        signals = (signal.SIGTERM, signal.SIGINT)
        before = {number: signal.signal(number, self._on_signal) for number in signals}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if not self.started or self._app.state.draining:
            # Nothing worth waiting for, or told twice. The default action works whatever hangs.
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self._app.state.draining = True
        self._loop.call_soon_threadsafe(self._begin_to_drain)

    def _begin_to_drain(self) -> None:
        self._drain = asyncio.create_task(self._drain_and_exit())

    async def _drain_and_exit(self) -> None:
        running = self._engine.statistics().get("requests", 0)
        print(f"draining: {running} requests are running; a second signal stops at once", flush=True)
        await self._engine.drain()
        self.should_exit = True  # uvicorn waits until the last answers are sent

    def _welcome(self) -> str:
        body = json.dumps({"model": self._engine.served_name, "prompt": "Once upon a time", "max_tokens": 64})
        return (
            f"DS-JAX serves {self._engine.served_name} at {self._url}/v1 (OpenAI API). Try:\n"
            f"  curl {self._url}/v1/completions -H 'Content-Type: application/json' -d '{body}'"
        )
