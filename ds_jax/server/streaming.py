"""Streams out, hang-ups noticed: server-sent events, and work that ends when nobody waits for it any more."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any

from fastapi.responses import StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from ds_jax.server.errors import describe

log = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"


def event(content: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


async def unless_hung_up[T](receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Do the work; if the client hangs up, cancel it. The request's body must have been read.

    Raises:
        ClientDisconnect: the client is gone, the work is cancelled and has cleaned up.
    """
    task = asyncio.ensure_future(work)
    hung_up = asyncio.ensure_future(_hang_up(receive))
    try:
        await asyncio.wait((task, hung_up), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnect
    finally:
        task.cancel()
        hung_up.cancel()
        await asyncio.gather(task, hung_up, return_exceptions=True)


async def _hang_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(StreamingResponse):
    """Sends events as they come. An error before the first of them still gets a status of its own."""

    def __init__(self, events: AsyncGenerator[bytes, None]):
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_hung_up(receive, self._send(send))
        except ClientDisconnect:
            log.debug("a client hung up on its stream")

    async def _send(self, send: Send) -> None:
        async with aclosing(self._events) as events:
            chunk = await anext(events)
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
            try:
                async for chunk in events:
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
            except Exception as error:  # too late for a status: the error is the last event
                status, body, _ = describe(error)
                if status == 500:
                    log.exception("a stream failed")
                await send({"type": "http.response.body", "body": event(body), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
