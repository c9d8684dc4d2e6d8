"""The HTTP application: routes, the size limit of bodies, the engine's life."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ds_jax.errors import Draining
from ds_jax.server import chat, completions, errors
from ds_jax.server.generation import check_model

if TYPE_CHECKING:
    from ds_jax.async_engine import AsyncEngine

MAX_BODY_BYTES = 16 * 2**20


def create_app(engine: AsyncEngine, *, max_body_bytes: int = MAX_BODY_BYTES) -> FastAPI:
    """The application around an engine, which it starts and closes with itself.

    `app.state.draining` set to True makes /health say so; the engine's own drain refuses new requests.
    """

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        await engine.start()
        yield
        await engine.close()

    app = FastAPI(title="DS-JAX", lifespan=life, redirect_slashes=False)
    app.state.engine = engine
    app.state.draining = False
    created = int(time.time())

    def model() -> dict[str, Any]:
        return {
            "id": engine.served_name,
            "object": "model",
            "created": created,
            "owned_by": "ds-jax",
            "max_model_len": engine.max_model_len,
        }

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        """The one model that is served."""
        return {"object": "list", "data": [model()]}

    @app.get("/v1/models/{name:path}")
    async def retrieve_model(name: str) -> dict[str, Any]:
        """The model, if it has this name."""
        check_model(engine, name)
        return model()

    @app.get("/health")
    async def health(request: Request) -> Response:
        """200 while requests are served, 503 otherwise."""
        if request.app.state.draining:
            raise Draining("the server is shutting down")
        if not engine.healthy:
            raise Draining("the engine is not healthy: an instance is missing")
        return JSONResponse({"status": "ok"})

    app.include_router(completions.router)
    app.include_router(chat.router)
    errors.install(app)
    app.add_middleware(BodyLimit, limit=max_body_bytes)
    return app


class BodyLimit:
    """Refuses a body that is too large, by its announced size or as soon as it has grown past the limit."""

    def __init__(self, app: ASGIApp, limit: int):
        self._app = app
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        if announced.isdigit() and int(announced) > self._limit:
            error = self._too_large(int(announced))
            status, body, _ = errors.describe(error)
            return await JSONResponse(body, status, {"Connection": "close"})(scope, receive, send)
        received = 0

        async def limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._limit:
                raise self._too_large(received)
            return message

        await self._app(scope, limited, send)

    def _too_large(self, size: int) -> HTTPException:
        return HTTPException(
            413, f"the body has {size} bytes or more; the limit is {self._limit}", {"Connection": "close"}
        )
