"""A client of the scripted engine's server."""

from __future__ import annotations

import json
import socket
from typing import Any

import httpx

from tests.server.scripted import ScriptedEngine

TEXT = "Hellö 🦊"
USER = [{"role": "user", "content": "Hi"}]
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
BODY = {COMPLETIONS: {"prompt": "Once"}, CHAT: {"messages": USER}}
LIMIT = 10_000


class Client(httpx.Client):
    """A client of a server of its own, with that server's engine."""

    engine: ScriptedEngine

    def ask(self, path: str, /, **fields: Any) -> httpx.Response:
        return self.post(path, json=BODY[path] | fields)

    def events(self, path: str, /, **fields: Any) -> list[Any]:
        answer = self.ask(path, stream=True, **fields)
        assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.text.split("\n\n") if line]
        assert all(line.startswith("data: ") for line in lines)
        assert answer.text.endswith("\n\n")
        contents = [line.removeprefix("data: ") for line in lines]
        return [content if content == "[DONE]" else json.loads(content) for content in contents]

    def raw(self, path: str, body: dict[str, Any]) -> socket.socket:
        """A request on a connection of its own, that can be dropped at will."""
        connection = socket.create_connection((self.base_url.host, self.base_url.port))
        content = json.dumps(body).encode()
        header = f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
        connection.sendall(header.encode() + b"\r\n\r\n" + content)
        return connection

    def refused(self, path: str, /, **fields: Any) -> dict[str, Any]:
        answer = self.ask(path, **fields)
        assert answer.status_code == 400, answer.text
        return error_of(answer)


def error_of(answer: httpx.Response) -> dict[str, Any]:
    assert set(answer.json()) == {"error"}
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "\n" not in error["message"] and "Traceback" not in answer.text
    return error
