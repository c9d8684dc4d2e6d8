"""The worked example of docs/policies.md: it runs, it passes its test, and it does what it says."""

from __future__ import annotations

import importlib
import re
import unittest
from pathlib import Path

import pytest

from ds_jax.protocol import Request
from ds_jax.scheduling import POLICIES, create_scheduler
from ds_jax.simulation import LinearLatency, simulate
from ds_jax.workload import Submission
from tests.scheduling.test_colocated import instance

PAGE = Path(__file__).parents[2] / "docs" / "policies.md"


@pytest.fixture
def test_of_the_page(tmp_path, monkeypatch):
    """The page's two blocks as files; the second one's namespace."""
    policy, test = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (tmp_path / "shortest.py").write_text(policy)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    namespace: dict = {}
    exec(compile(test, str(PAGE), "exec"), namespace)
    return namespace


def test_every_policy_is_on_the_page():
    assert set(re.findall(r"^\| `(\w+)` \|", PAGE.read_text(), re.MULTILINE)) >= set(POLICIES)


def test_the_example_passes_the_conformance_machine(test_of_the_page):
    suite = unittest.defaultTestLoader.loadTestsFromTestCase(test_of_the_page["TestShortest"])
    result = unittest.TestResult()
    suite.run(result)
    assert result.testsRun == 1 and result.wasSuccessful(), result.failures + result.errors


def test_the_example_runs_the_shortest_prompt_first_and_nobody_waits_for_ever(test_of_the_page):
    scheduler = create_scheduler("shortest:Scheduler")
    prompts = (50, 50, 90, 20, 35, *[5] * 20)
    work = [Submission(0, Request(id, prompt, 2), 2) for id, prompt in enumerate(prompts)]
    one = instance(max_step_sequences=1, slots=40, pages=1000)
    times = simulate(scheduler, [one], work, LinearLatency(), strict=True).times
    first = sorted(times, key=lambda id: times[id].first_token_ns or 0)
    assert first.index(3) < first.index(4) < first.index(2), "20, 35 and 90 tokens"
    assert first.index(2) < len(prompts) - 1, "the last of the short ones must not overtake it"
