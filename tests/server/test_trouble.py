"""Engines that fail and clients that hang up."""

from __future__ import annotations

import time
from typing import Any

import pytest

from ds_jax.errors import Draining, Overloaded
from tests.server.client import BODY, CHAT, COMPLETIONS, Client, error_of
from tests.server.scripted import HELLO, Output, until

both = pytest.mark.parametrize("path", [COMPLETIONS, CHAT])


@both
@pytest.mark.parametrize("stream", [False, True])
def test_errors_before_the_first_token_have_a_status_also_in_streams(client: Client, path: str, stream: bool) -> None:
    cases: list[tuple[Any, int, str]] = [
        (Overloaded("1024 requests are waiting already", 2.5), 429, "3"),
        (Draining("the server is shutting down"), 503, "1"),
        (Output(0, [], "", "error", None, "ttft 3.1 s is too late", retry_after_s=2.1), 429, "3"),
        (Output(0, [], "", "error", None, "the pool is gone"), 500, ""),
        (RuntimeError("a secret detail"), 500, ""),
    ]
    for failure, status, retry_after in cases:
        client.engine.script = [failure]
        answer = client.ask(path, stream=stream)
        assert answer.status_code == status and answer.headers.get("retry-after", "") == retry_after
        message = error_of(answer)["message"]
        assert "secret" not in message and (status != 500 or "pool" in message or "log" in message)


@both
def test_an_error_within_a_stream_is_its_last_event(client: Client, path: str) -> None:
    for failure in (Output(0, [], "", "error", None, "the pool is gone"), RuntimeError("a secret detail")):
        client.engine.script = [HELLO[0], failure]
        *_, last = client.events(path)
        assert set(last) == {"error"} and "secret" not in last["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_one_refused_prompt_refuses_all_and_aborts_the_others(client: Client, stream: bool) -> None:
    client.engine.forever, client.engine.pause_s = True, 0.005
    error = client.refused(COMPLETIONS, prompt=[[5], [6], [999]], stream=stream)
    assert error["message"].startswith("prompt[2] has token id 999")
    until(lambda: client.engine.running == 0)


@both
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("count", [1, 3])
def test_a_client_that_hangs_up_aborts_its_request(client: Client, path: str, stream: bool, count: int) -> None:
    client.engine.forever, client.engine.pause_s = True, 0.005
    more = {"prompt": ["a"] * count} if path == COMPLETIONS else {}
    expected = count if path == COMPLETIONS else 1
    with client.raw(path, BODY[path] | {"stream": stream} | more) as connection:
        if stream:
            assert connection.recv(1000).startswith(b"HTTP/1.1 200")
        until(lambda: client.engine.running == expected)
    until(lambda: client.engine.running == 0)
    assert client.engine.aborted == expected


def test_a_client_that_stops_reading_and_hangs_up_aborts_its_request(client: Client) -> None:
    client.engine.script, client.engine.forever = [Output(0, [5], "x" * 100_000)], True
    with client.raw(COMPLETIONS, {"prompt": "a", "stream": True}):
        until(lambda: client.engine.running == 1)
        time.sleep(0.2)  # buffers are full now, the server waits for us
    until(lambda: client.engine.running == 0)
