"""The workload monitor and its shift test."""

from __future__ import annotations

import pytest

from ds_jax.workload import Lengths, Submission, workload
from ds_jax.workload.monitor import Shift, ShiftTest, WorkloadMonitor

SECOND = 10**9


def _told(requests: list[Submission]) -> list[Shift]:
    test = ShiftTest()
    told = [test.observe(one.arrival_ns, Lengths(one.request.prompt_tokens, one.output_tokens)) for one in requests]
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


def test_a_sure_but_small_change_is_not_told():
    """Lengths without any spread: a change of a tenth is certain, and below the least change that matters."""
    requests = [(second * SECOND, Lengths(100 if second < 1000 else 110, 50)) for second in range(3000)]
    test = ShiftTest()
    assert [test.observe(*one) for one in requests] == [None] * 3000


def test_the_monitor_gives_the_pattern_of_its_window():
    monitor = WorkloadMonitor(window=4)
    for second in range(10):
        monitor.observe(second * SECOND, Lengths(10 * second, second))
    pattern = monitor.pattern()
    assert (pattern.requests, pattern.rate, pattern.prompt_tokens, pattern.output_tokens) == (4, 1.0, 75.0, 7.5)
    assert monitor.pattern(since_ns=8 * SECOND).prompt_tokens == 85.0
    with pytest.raises(ValueError, match="1 requests are too few"):
        monitor.pattern(since_ns=9 * SECOND)
