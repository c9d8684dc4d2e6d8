"""The comparison of policies: that it runs all of them, and says where ours is not the best."""

from __future__ import annotations

import pytest

from experiments.policies import POLICIES, WORKLOADS, tabulate
from experiments.policy_runs import (
    Bench,
    Setting,
    candidates,
    curve,
    measure,
    requests,
    run,
    scenarios,
    tropical_profile,
)

SETTING = Setting(tropical_profile())


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_serves_a_light_load_inside_its_targets(policy):
    work = scenarios(SETTING, None)["sharegpt"].make(2.0, 60, 1)
    attained = run(SETTING, candidates(policy, SETTING.instances, quick=True)[-1], work, error=0.1)
    assert attained.requests == 60 and attained.shares().both > 0.9


def test_every_workload_has_targets_and_says_what_is_assumed():
    made = scenarios(SETTING, None)
    assert list(made) == list(WORKLOADS)
    for name, scenario in made.items():
        request = next(iter(scenario.make(5.0, 3, 1))).request
        assert request.slo is not None and request.slo.ttft_ns > 0
        assert bool(scenario.assumed) is (name not in ("sharegpt", "bursty"))


def test_the_ttft_target_of_tropical_is_five_times_the_unloaded_prefill():
    """12,000 tokens: 0.019 + 12000 * 83.8 us + 12000^2 * 6.3 ns = 1.93 s on two A100."""
    assert SETTING.unloaded_prefill_s(12_000) == pytest.approx(1.93, abs=0.01)
    assert SETTING.profile.extrapolated


def test_a_point_pools_its_runs_and_none_is_done_twice(tmp_path, monkeypatch):
    scenario = scenarios(SETTING, None)["humaneval"]
    candidate = candidates("chunked", SETTING.instances)[0]
    file = tmp_path / "runs.jsonl"
    point = measure(Bench(SETTING, scenario, file), candidate, 20.0, length_s=1.0, runs=[(1, 0.1), (2, -0.1)])
    assert requests(20.0, 1.0) == 300
    assert 0 <= point.low <= point.both <= point.high <= 1
    assert curve([point], 0.5)[0] == 20.0
    monkeypatch.delattr("experiments.policy_runs.run")
    assert measure(Bench(SETTING, scenario, file), candidate, 20.0, length_s=1.0, runs=[(1, 0.1), (2, -0.1)]) == point


def result(policy, goodput, low, high, workload="sharegpt"):
    named = {"workload": workload, "policy": policy, "configuration": "4M", "assumed": "", "extrapolated": True}
    return named | {"goodput": goodput, "low": low, "high": high, "points": []}


def test_the_table_says_where_ours_is_not_the_best():
    table, verdicts = tabulate([result("chunked", 11.0, 10.5, 11.5), result("deflected", 10.0, 9.5, 10.6)])
    assert "| sharegpt | chunked | 11.00 | 10.50 to 11.50 | 0.91 | 4M |" in table
    assert verdicts == ["sharegpt: chunked serves 1.10x ours, though their intervals overlap"]
    assert "deflected is not the best on:" in table and "extrapolated from published figures" in table
    _, sure = tabulate([result("chunked", 11.0, 10.7, 11.5), result("deflected", 10.0, 9.5, 10.6)])
    assert sure == ["sharegpt: chunked serves 1.10x ours"]
    table, verdicts = tabulate([result("chunked", 9.0, 8.0, 9.5), result("deflected", 10.0, 9.5, 10.6)])
    assert not verdicts and "deflected is the best system on every workload" in table
