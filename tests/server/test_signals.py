"""Signals to a serving process: the first drains, a second one ends it at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.scripted import until

CHECKOUT = Path(__file__).resolve().parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(CHECKOUT)}
SCRIPTED = """
from ds_jax.server import serve
from tests.server.scripted import ScriptedEngine, Output
engine = ScriptedEngine()
engine.script, engine.pause_s = [Output(0, [5], "a")] * 40 + [Output(0, [5], "", "length")], 0.05
serve.run(engine, "127.0.0.1", 0)
"""
REAL = [
    "-m",
    "experiments.serve",
    "--config=configs/story.py",
    "--port=0",
    f"--config.model.path={CHECKOUT / 'tests' / 'goldens' / 'llama_gqa'}",
    "--config.model.served_name=tiny",
    "--config.prefill.token_buckets=64",
    "--config.prefill.max_step_tokens=64",
]


class Server:
    """A serving process."""

    def __init__(self, *arguments: str):
        self.process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=CHECKOUT,
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.lines: list[str] = []
        threading.Thread(target=self._read, daemon=True).start()
        until(lambda: self.process.poll() is not None or any(" at http://" in line for line in self.lines), 120)
        [ready] = [line for line in self.lines if " at http://" in line] or pytest.fail("".join(self.lines))
        self.url = ready.split(" at ")[1].split("/v1")[0]

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)

    def ends_with(self) -> int:
        return self.process.wait(30)


@contextmanager
def process(*arguments: str) -> Iterator[Server]:
    server = Server(*arguments)
    try:
        yield server
    finally:
        server.process.kill()
        server.process.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_lets_running_requests_end_and_refuses_new_ones(number: int) -> None:
    with process("-c", SCRIPTED) as server, httpx.Client(base_url=server.url, timeout=30) as client:
        assert any(f"curl {server.url}/v1/completions" in line for line in server.lines)
        with client.stream("POST", "/v1/completions", json={"prompt": "a", "stream": True}) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.process.send_signal(number)
            until(lambda: httpx.get(f"{server.url}/health").status_code == 503)
            refused = httpx.post(f"{server.url}/v1/completions", json={"prompt": "a"})
            assert refused.status_code == 503 and refused.json()["error"]["message"] == "the server is shutting down"
            rest = [line for line in lines if line]
        assert len(rest) == 41 and rest[-1] == "data: [DONE]" and '"length"' in rest[-2]
        assert server.ends_with() == 0
        assert not any("Traceback" in line for line in server.lines)


def test_a_second_signal_ends_the_process_at_once() -> None:
    with process("-c", SCRIPTED.replace("0.05", "1000")) as server:
        failures: list[Any] = []

        def ask() -> None:
            try:
                httpx.post(f"{server.url}/v1/completions", json={"prompt": "a"}, timeout=30)
            except httpx.HTTPError as error:
                failures.append(error)

        waiting = threading.Thread(target=ask)
        waiting.start()
        server.process.send_signal(signal.SIGTERM)
        until(lambda: any("draining" in line for line in server.lines))
        server.process.send_signal(signal.SIGTERM)
        assert server.ends_with() == -signal.SIGTERM
        waiting.join(30)
        assert failures


def test_a_port_in_use_is_one_sentence() -> None:
    with process("-c", SCRIPTED) as server:
        again = SCRIPTED.replace(", 0)", f", {server.url.rpartition(':')[2]})")
        second = subprocess.run(
            [sys.executable, "-c", again], cwd=CHECKOUT, env=ENVIRONMENT, capture_output=True, text=True
        )
        assert second.returncode == 1
        assert f"cannot listen on {server.url.removeprefix('http://')}: " in second.stderr.splitlines()[-1]


def test_the_launcher_drains_the_real_engine() -> None:
    with process(*REAL) as server, httpx.Client(base_url=server.url, timeout=30) as client:
        body = {"prompt": "Once upon", "max_tokens": 100, "stream": True, "ignore_eos": True}
        with client.stream("POST", "/v1/completions", json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]" and '"length"' in rest[-2]
        assert server.ends_with() == 0, "".join(server.lines)
        assert not any("Traceback" in line for line in server.lines)
