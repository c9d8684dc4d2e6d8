"""Sarathi-Serve, SplitFuse and vLLM v1, in steps that one can check by eye against the papers' rules."""

from __future__ import annotations

from typing import Any

import pytest

from ds_jax.config import SchedulerConfig
from ds_jax.protocol import Step
from ds_jax.scheduling.chunked import Chunked
from tests.scheduling.test_colocated import instance
from tests.scheduling.world import World, decoded, prefilled

ORDERS = ("sarathi", "splitfuse", "vllm_v1")


def world(order: str, budget: int, **changes: Any) -> World:
    return World(Chunked(SchedulerConfig(chunk_order=order, token_budget=budget)), instance(**changes))


def shown(step: Step) -> tuple[list[tuple[int, int]], list[int]]:
    """((sequence, tokens) of its chunks, sequences of its decodes)."""
    return [(id, length) for id, _, length in prefilled(step)], decoded(step)


def advance(w: World, steps: int) -> list[tuple[list[tuple[int, int]], list[int]]]:
    seen = []
    for _ in range(steps):
        seen.append(shown(w.steps()[0]))
        w.finish(w.steps()[0])
    return seen


@pytest.mark.parametrize("order", ORDERS)
def test_prompts_fill_what_the_decodes_leave_of_the_budget(order):
    w = world(order, budget=8)
    w.arrive(0, 3)
    w.arrive(1, 20)
    w.arrive(2, 4)
    assert advance(w, 6) == [
        ([(0, 3)], []),
        ([(1, 8)], []),
        ([(1, 7)], [0]),
        ([(1, 5), (2, 2)], [0]),
        ([(2, 2)], [0]),
        ([], [0, 1]),
    ]


@pytest.mark.parametrize("order", ORDERS)
def test_a_prompt_begins_only_when_pages_for_all_of_it_are_free(order):
    w = world(order, budget=8, pages=8)
    w.arrive(0, 8, max_tokens=4)  # four pages of eight, and a fifth later
    w.arrive(1, 12, max_tokens=2)  # six pages
    seen = []
    while w.steps():
        seen += [id for id, _ in shown(w.steps()[0])[0]]
        done = w.contract.sequences[0].over
        assert done or 1 not in seen
        w.finish(w.steps()[0])
    assert seen == [0, 1, 1]


def begun_younger_and_older_replay(order: str) -> World:
    """A long prompt has begun on an instance to which an older sequence then moves."""
    w = world(order, budget=8)
    w.arrive(1, 40)
    w.scheduler.sequences[1].order = 5
    w.arrive(0, 6)
    w.scheduler.sequences[0].order = 1
    return w


@pytest.mark.parametrize(("order", "chunks"), [("sarathi", [(1, 8)]), ("splitfuse", [(0, 6), (1, 2)])])
def test_sarathi_goes_on_with_what_has_begun_and_splitfuse_in_order_of_arrival(order, chunks):
    w = begun_younger_and_older_replay(order)
    w.finish(w.steps()[0])
    assert shown(w.steps()[-1])[0] == chunks


@pytest.mark.parametrize("order", ORDERS)
def test_out_of_pages_the_last_that_came_is_preempted_and_begins_anew_first(order):
    w = world(order, budget=8, pages=7, slots=3)
    for id in range(4):
        w.arrive(id, 4, max_tokens=6)  # two pages each, one is left
    begun = []
    while w.steps():
        begun += [id for id, start, _ in prefilled(w.steps()[0]) if start == 0]
        w.finish(w.steps()[0])
    assert begun[:3] == [0, 1, 2] and begun.count(0) == 1, "the oldest is never preempted"
    assert begun[3] in (1, 2) and begun[-1] == 3 and begun.count(2) >= 2, "3 waits for those that came before it"


def test_vllm_v1_begins_nothing_while_one_that_runs_waits_for_a_page():
    w = world("vllm_v1", budget=8)
    w.arrive(0, 4)
    w.arrive(1, 30)
    w.scheduler.workers[0].ledger.promised = 1
    w.arrive(2, 1)
    assert all(shown(step)[0] == [(0, 4)] or [id for id, _ in shown(step)[0]] == [1] for step in w.steps())
    w.finish(w.steps()[0])
    assert 2 not in {id for step in w.steps() for id, _ in shown(step)[0]}


@pytest.mark.parametrize("order", ORDERS)
def test_all_decodes_run_in_every_step_even_when_they_are_more_than_the_budget(order):
    w = world(order, budget=2, slots=4)
    for id in range(3):
        w.arrive(id, 1, max_tokens=9)
    while len(decoded(w.steps()[0])) < 3:
        w.finish(w.steps()[0])
    w.arrive(3, 4)
    assert advance(w, 3) == [([], [0, 1, 2])] * 3
