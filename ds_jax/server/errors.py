"""Every error as OpenAI's error body: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from ds_jax.errors import Draining, Overloaded, RequestError

_INVALID = "invalid_request_error"
_SHORT = reprlib.Repr(maxlist=4, maxdict=4, maxstring=60, maxother=60, maxlong=60)
_CLIENT_CLOSED_REQUEST = 499
"""nginx's number for a client that has hung up; nobody reads it."""


class ModelNotFound(Exception):
    """The request names a model that is not served."""


class GenerationFailed(Exception):
    """The engine gave a request up."""


def error_body(message: str, type: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """OpenAI's error object."""
    return {"error": {"message": message, "type": type, "param": param, "code": code}}


def describe(error: Exception) -> tuple[int, dict[str, Any], dict[str, str]]:
    """HTTP status, body and headers that tell the client of an error; nothing of our own bugs leaks."""
    match error:
        case RequestValidationError():
            message, param = _sentence(error.errors())
            return 400, error_body(message, _INVALID, param), {}
        case RequestError():
            return 400, error_body(str(error), _INVALID, error.param), {}
        case ModelNotFound():
            return 404, error_body(str(error), _INVALID, "model", "model_not_found"), {}
        case Overloaded():
            after = str(max(1, math.ceil(error.retry_after_s)))
            return 429, error_body(str(error), "rate_limit_error", code="overloaded"), {"Retry-After": after}
        case Draining():
            return 503, error_body(str(error), "server_error", code="unavailable"), {"Retry-After": "1"}
        case GenerationFailed():
            return 500, error_body(str(error), "server_error", code="generation_failed"), {}
        case HTTPException():
            kind = _INVALID if error.status_code < 500 else "server_error"
            return error.status_code, error_body(str(error.detail), kind), dict(error.headers or {})
        case _:
            # uvicorn closes the connection behind an exception: the client must not reuse it
            body = error_body("the server failed; its log says why", "server_error", code="internal")
            return 500, body, {"Connection": "close"}


def install(app: FastAPI) -> None:
    """Answer every exception of the application with an error body."""
    for kind in (
        RequestValidationError,
        RequestError,
        ModelNotFound,
        Overloaded,
        Draining,
        GenerationFailed,
        Exception,
    ):
        app.add_exception_handler(kind, _answer)
    app.add_exception_handler(HTTPException, _answer_http)
    app.add_exception_handler(ClientDisconnect, _answer_nobody)


async def _answer(_: Request, error: Exception) -> Response:
    status, body, headers = describe(error)
    return JSONResponse(body, status, headers)


async def _answer_http(request: Request, error: Exception) -> Response:
    """Errors of the framework itself: a path, or a method on it, that does not exist."""
    status, body, headers = describe(error)
    if body["error"]["message"] == HTTPStatus(status).phrase:
        what = {404: "there is no", 405: "the path does not take"}.get(status)
        if what is not None:
            body["error"]["message"] = f"{what} {request.method} {request.url.path}"
    return JSONResponse(body, status, headers)


async def _answer_nobody(_: Request, error: Exception) -> Response:
    return Response(status_code=_CLIENT_CLOSED_REQUEST)


def _sentence(errors: Sequence[Any]) -> tuple[str, str | None]:
    """The first mistake that validation found, as a sentence, and the field's name as OpenAI writes it."""
    first = errors[0]
    where = list(first["loc"])
    if where[:1] == ["body"]:
        where = where[1:]
    if first["type"] == "json_invalid":
        return f"the body is not valid JSON: {first['ctx']['error']} at character {where[-1]}", None
    if not where:
        if first["type"] == "missing":
            return "the body is empty: a JSON object is needed", None
        return "the body must be a JSON object, sent with Content-Type: application/json", None
    field = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in where).lstrip(".")
    if first["type"] == "missing":
        return f"{field} is missing", field
    problem = first["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    return f"{field} = {shown(first['input'])} is refused: {problem}", field


def shown(value: object) -> str:
    """A value for a message: not more of it than a line holds."""
    return _SHORT.repr(value)
