"""Sketches: leaps over many steps come to what the steps come to, one by one."""

from __future__ import annotations

import random

import pytest

from ds_jax.placement.hardware import Pace
from ds_jax.placement.layouts import Group, Shape
from ds_jax.placement.sketch import _Batch
from ds_jax.protocol import Role

BASE, CONTEXT, SEQUENCE = 0.02, 3e-6, 2e-4


def pace(slots: int = 1000, kv_tokens: int = 10**9) -> Pace:
    decode = (BASE, CONTEXT, SEQUENCE)
    return Pace((0.0, 0.0, 0.0), decode, decode, 10**9, 2048, 16, slots, kv_tokens, ahead=1)


def step_by_step(arrivals: list[float], prompts: list[int], outputs: list[int], slots: int, room: int) -> list[float]:
    """When each has its last token: the first is there on arrival, the others come with a step each."""
    now, index, ends = 0.0, 0, [0.0] * len(arrivals)
    waiting: list[int] = []
    running: dict[int, int] = {}  # request -> tokens that it attended to in its last step
    left = dict(enumerate(outputs))
    while index < len(arrivals) or waiting or running:
        if not running and not waiting:
            now = max(now, arrivals[index])
        while index < len(arrivals) and arrivals[index] <= now:
            waiting.append(index)
            left[index] -= 1
            index += 1
        while waiting and (
            not running or (len(running) < slots and sum(running.values()) + prompts[waiting[0]] < room)
        ):
            one = waiting.pop(0)
            running[one] = prompts[one]
        for one in running:
            running[one] += 1
            left[one] -= 1
        now += BASE + CONTEXT * sum(running.values()) + SEQUENCE * len(running)
        for one in [one for one in running if not left[one]]:
            ends[one] = now
            del running[one]
    return ends


@pytest.mark.parametrize(("slots", "room"), [(1000, 10**9), (3, 10**9), (1000, 900)])
@pytest.mark.parametrize("seed", range(4))
def test_a_batch_leaps_to_where_its_steps_lead(seed, slots, room):
    chance = random.Random(seed)
    count = 40
    arrivals = sorted(chance.uniform(0, 12) for _ in range(count))
    prompts = [chance.randint(1, 400) for _ in range(count)]
    outputs = [chance.randint(2, 60) for _ in range(count)]
    batch = _Batch(pace(slots, room), Group(Role.DECODE, Shape(1, 1)), prompts, outputs)
    ends = [0.0] * count
    for index, arrival in enumerate(arrivals):
        batch.run_until(arrival, ends)
        batch.add(index)
    batch.run_until(float("inf"), ends)
    assert ends == pytest.approx(step_by_step(arrivals, prompts, outputs, slots, room), rel=1e-9)
