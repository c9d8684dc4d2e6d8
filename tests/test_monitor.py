"""The workload monitor and its shift test."""

from __future__ import annotations

import numpy as np
import pytest

from ds_jax.workload import Submission, workload
from ds_jax.workload.monitor import Observation, Shift, ShiftTest, WorkloadMonitor
from ds_jax.workload.unfinished import finished, kaplan_meier

SECOND = 10**9
TOKEN = 30_000_000
"""Nanoseconds that a token takes: a request is over so much later, and only then is its output known."""


def _told(requests: list[Submission]) -> list[Shift]:
    test = ShiftTest()
    heard = []
    for index, one in enumerate(requests):
        heard.append((one.arrival_ns, 0, index, one.request.prompt_tokens))
        heard.append((one.arrival_ns + TOKEN * one.output_tokens, 1, index, one.output_tokens))
    tests = (test.arrived, test.ended)
    told = [tests[ended](index, at_ns, tokens) for at_ns, ended, index, tokens in sorted(heard)]
    return [shift for shift in told if shift is not None]


def _then(first: list[Submission], second: list[Submission]) -> list[Submission]:
    end_ns = first[-1].arrival_ns
    return first + [one._replace(arrival_ns=end_ns + one.arrival_ns) for one in second]


@pytest.mark.parametrize("cv", [1.0, 4.0])
def test_a_stationary_workload_is_never_told_to_have_shifted_over_100_seeds(cv):
    alarms = {seed: _told(list(workload("sharegpt", rate=5, cv=cv, count=2500, seed=seed))) for seed in range(100)}
    assert {seed: shifts for seed, shifts in alarms.items() if shifts} == {}


@pytest.mark.parametrize(
    ("name", "rate", "changed", "within"),
    [
        ("sharegpt", 10.0, {"rate"}, 500),
        ("sharegpt", 2.5, {"rate"}, 700),
        ("longbench", 5.0, {"prompt_tokens"}, 400),
        ("humaneval", 5.0, {"prompt_tokens"}, 300),
    ],
)
def test_a_shift_is_told_once_and_soon_with_the_pattern_before_and_after_it(name, rate, changed, within):
    for seed in range(5):
        before = list(workload("sharegpt", rate=5, count=1500, seed=seed))
        requests = _then(before, list(workload(name, rate=rate, count=2000, seed=100 + seed)))
        (shift,) = _told(requests)
        seen_after = sum(before[-1].arrival_ns < one.arrival_ns <= shift.at_ns for one in requests)
        assert 0 < seen_after <= within
        assert changed <= set(shift.what)
        assert shift.before.rate == pytest.approx(5, rel=0.15)
        if "rate" not in changed:
            assert shift.after.rate == pytest.approx(5, rel=0.4)


def test_a_workload_that_shifts_back_is_told_twice():
    there = list(workload("sharegpt", rate=4, count=1500, seed=3))
    away = list(workload("sharegpt", rate=9, count=2500, seed=4))
    back = list(workload("sharegpt", rate=4, count=1500, seed=5))
    shifts = _told(_then(_then(there, away), back))
    assert [shift.what for shift in shifts] == [("rate",), ("rate",)]


def test_longer_outputs_alone_are_told_when_requests_have_ended():
    before = list(workload("200/100", rate=5, count=1500, seed=0))
    requests = _then(before, list(workload("200/250", rate=5, count=2500, seed=1)))
    (shift,) = _told(requests)
    assert shift.what == ("output_tokens",)
    later_s = (shift.at_ns - before[-1].arrival_ns) / SECOND
    assert 250 * TOKEN / SECOND < later_s < 150
    assert abs(shift.since_ns - before[-1].arrival_ns) < 30 * SECOND


def test_a_sure_but_small_change_is_not_told():
    """Lengths without any spread: a change of a tenth is certain, and below the least change that matters."""
    test = ShiftTest()
    for second in range(3000):
        assert test.arrived(second, second * SECOND, 100 if second < 1000 else 110) is None
        assert test.ended(second, second * SECOND, 50) is None


def test_requests_that_are_refused_have_no_output():
    test = ShiftTest()
    for second in range(2000):
        assert test.arrived(second, second * SECOND, 100) is None
        assert test.ended(second, second * SECOND, 50 if second < 1000 or second % 3 else 0) is None
    assert {one.output_tokens for one in test.history(0)} == {50, None}


def test_the_monitor_gives_the_pattern_of_its_window():
    monitor = WorkloadMonitor(window=4)
    for second in range(10):
        monitor.arrived(second, second * SECOND, 10 * second)
        if second != 7:
            monitor.ended(second, second)
    pattern = monitor.pattern()
    assert (pattern.requests, pattern.rate, pattern.prompt_tokens) == (4, 1.0, 75.0)
    assert pattern.output_tokens == (6 + 8 + 9) / 3  # the seventh still runs
    assert monitor.pattern(since_ns=8 * SECOND).prompt_tokens == 85.0
    with pytest.raises(ValueError, match="1 requests are too few"):
        monitor.pattern(since_ns=9 * SECOND)


def test_the_share_of_longer_requests_is_kaplan_and_meiers_estimate():
    """By hand: of five at risk one ends at 1; of three at risk (one gave 2 so far) one at 3; the last at 6 is alone."""
    assert kaplan_meier([1, 3, 6], [2, 5]) == ([1, 3, 6], pytest.approx([0.8, 0.8 * 2 / 3, 0.0]))
    assert kaplan_meier([1, 3], [2, 5]) == ([1, 3], pytest.approx([0.75, 0.375]))


def test_lengths_of_requests_that_run_are_drawn_from_what_is_longer():
    random = np.random.default_rng(0)
    lengths = random.geometric(1 / 300, 4000)
    looked_at = random.integers(0, 1500, 4000)  # tokens that each could have given by now
    requests = [
        Observation(id, id, 10, int(length) if length <= seen else None)
        for id, (length, seen) in enumerate(zip(lengths, looked_at, strict=True))
    ]
    assert 0.1 < sum(one.output_tokens is None for one in requests) / 4000 < 0.5
    drawn, unknown = finished(requests, lambda id: int(looked_at[id]))
    assert np.mean([one.output for one in drawn]) == pytest.approx(300, rel=0.06)
    assert unknown < 0.02
    assert all(one.output >= looked_at[id] for id, one in enumerate(drawn) if requests[id].output_tokens is None)
    assert finished([Observation(0, 0, 10)], lambda id: 7) == ([(10, 7)], 1.0)
