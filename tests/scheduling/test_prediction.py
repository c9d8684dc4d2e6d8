"""What is foretold of a worker's steps, and how that is put right."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest

from ds_jax.latency import StepFit
from ds_jax.scheduling.prediction import Forecast

FIT = StepFit(tp=1, prefill=(0.018, 1e-4, 7e-9), decode=(0.020, 6e-7, 4e-5))


@dataclass
class Wrong:
    """FIT, wrong by a factor."""

    factor: float
    stages: int = 1

    def step_s(self, chunks, batch, context_tokens):
        return self.factor * FIT.step_s(chunks, batch, context_tokens)


def drive(forecast, steps, noise=0.0, seed=0):
    """Let the worker run steps one after the other, as FIT has them."""
    drawn = random.Random(seed)
    now_ns = 0
    for _ in range(steps):
        start, length, batch = drawn.randrange(0, 2000), drawn.randrange(1, 2000), drawn.randrange(1, 80)
        work = ([(start, length)] * drawn.randrange(2), batch, batch * drawn.randrange(1, 1500))
        forecast.launched(0, now_ns, *work)
        now_ns += round(FIT.step_s(*work) * drawn.uniform(1 - noise, 1 + noise) * 1e9)
        forecast.landed(0, now_ns)
    return now_ns


WORK = ([(512, 700)], 20, 9000)


@pytest.mark.parametrize("factor", [0.9, 1.1, 2.0])
def test_a_prediction_that_is_wrong_by_a_factor_is_put_right(factor):
    forecast = Forecast(Wrong(factor))
    assert forecast.step_s(*WORK) == pytest.approx(factor * FIT.step_s(*WORK))
    drive(forecast, 60)
    assert forecast.step_s(*WORK) == pytest.approx(FIT.step_s(*WORK), rel=0.01)
    assert forecast.step_s([], 20, 9000) == pytest.approx(FIT.step_s([], 20, 9000), rel=0.01)


def test_the_margin_shrinks_to_the_scatter_that_is_seen():
    sure, unsure = Forecast(Wrong(1.0)), Forecast(Wrong(1.0))
    assert sure.safe_s(*WORK) == pytest.approx(1.2 * FIT.step_s(*WORK))
    drive(sure, 1000)
    drive(unsure, 1000, noise=0.2)  # uniform within 20 %: 10 % off on average
    assert sure.safe_s(*WORK) == pytest.approx(FIT.step_s(*WORK), rel=0.01)
    assert unsure.safe_s(*WORK) == pytest.approx(1.2 * FIT.step_s(*WORK), rel=0.06)


def test_with_no_prediction_at_all_step_times_are_learned():
    forecast = Forecast(None)
    assert forecast.step_s(*WORK) == 0
    drive(forecast, 300, noise=0.05)
    for work in (WORK, ([], 70, 80_000), ([(0, 64)], 0, 0)):
        assert forecast.step_s(*work) == pytest.approx(FIT.step_s(*work), rel=0.25)


def test_a_whole_prompt_costs_its_chunks():
    """Chunks of 500 of a prompt of 1200: 3 bases, 1200 tokens, squares up to 1200^2."""
    chunks = sum(FIT.step_s([chunk], 0, 0) for chunk in ((0, 500), (500, 500), (1000, 200)))
    assert Forecast(Wrong(1.0)).prefill_s(1200, 0, 500) == pytest.approx(chunks, rel=0.01)
    assert Forecast(Wrong(1.0)).prefill_s(1200, 1200, 500) == 0


def test_the_largest_chunk_is_the_largest():
    forecast = Forecast(Wrong(1.0))
    most = forecast.chunk_within(0.1, 300, 4000, 20, 9000)
    assert forecast.safe_s([(300, most)], 20, 9000) <= 0.1 < forecast.safe_s([(300, round(most * 1.08))], 20, 9000)
    assert forecast.chunk_within(0.1, 0, 10, 20, 9000) == 10
    assert forecast.chunk_within(0.01, 0, 10, 20, 9000) == 0


def test_steps_in_flight_end_one_after_the_other():
    forecast = Forecast(Wrong(1.0))
    assert forecast.free_ns(5) == 5
    forecast.launched(0, 0, [(0, 100)], 0, 0)
    forecast.launched(0, 0, [(0, 200)], 0, 0)
    each_ns = [round(FIT.step_s([(0, tokens)], 0, 0) * 1e9) for tokens in (100, 200)]
    assert forecast.free_ns(1000) == sum(each_ns)
    assert forecast.free_ns(10**9) == 10**9 + each_ns[1], "the first is late: it may end any moment"
    forecast.landed(0, 10**9)
    assert forecast.free_ns(10**9) == pytest.approx(10**9 + each_ns[1] * 10**9 / each_ns[0], rel=0.01)
