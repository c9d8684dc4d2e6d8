from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.server.client import LIMIT, Client
from tests.server.scripted import ScriptedEngine, serving


@pytest.fixture(scope="module")
def shared() -> Iterator[Client]:
    engine = ScriptedEngine()
    with serving(engine, max_body_bytes=LIMIT) as url, Client(base_url=url, timeout=20) as client:
        client.engine = engine
        yield client
    assert engine.started and engine.closed


@pytest.fixture
def client(shared: Client) -> Client:
    fresh = ScriptedEngine()
    fresh.started = True
    shared.engine.__dict__.update(fresh.__dict__)
    return shared
