"""Why a request was not taken."""

from __future__ import annotations


class RequestError(ValueError):
    """The request can never be served as it is; `param` names the field at fault, as in the OpenAI API."""

    def __init__(self, message: str, param: str | None = None):
        super().__init__(message)
        self.param = param


class Overloaded(Exception):
    """The waiting queue is full, or the scheduler turned the request away; try again after `retry_after_s`."""

    def __init__(self, message: str, retry_after_s: float):
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Draining(Exception):
    """The engine is shutting down and takes no new requests."""
