"""The comparison of policies: that it runs all of them, and says where ours is not the best."""

from __future__ import annotations

import dataclasses
import json

import pytest

from experiments.policies import POLICIES, WORKLOADS, tabulate
from experiments.policy_runs import (
    PART,
    Bench,
    Point,
    Setting,
    bracketed,
    candidates,
    check,
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
    found = curve([point], 0.5)
    assert found.rate == 20.0 and found.clipped and (found.ttft, found.tpot) == (point.ttft, point.tpot)
    monkeypatch.delattr("experiments.policy_runs.run")
    assert measure(Bench(SETTING, scenario, file), candidate, 20.0, length_s=1.0, runs=[(1, 0.1), (2, -0.1)]) == point


def test_rates_are_added_until_the_attainment_crosses_the_share_or_the_result_says_that_it_did_not():
    made = []

    def measured(rate):
        """Attainment falls from 1 at 10 requests/s to 0 at 20, with an interval of 5 points to either side."""
        made.append(rate)
        both = min(1.0, max(0.0, 2 - rate / 10))
        shares = {"both": both, "low": both - 0.05, "high": both + 0.05, "ttft": 1.0, "tpot": both}
        return Point(rate=rate, piling=rate / 100, ttft_p90_s=1.0, tpot_p90_s=0.1, labels={}, **shares)

    for first in ([5.0], [40.0], [10.5, 11.0, 11.5]):
        found = curve(bracketed(measured, first, 0.9, 12), 0.9)
        assert found.rate == pytest.approx(11, rel=0.1) and found.low < found.rate < found.high
        assert not found.clipped and not found.missing and found.tpot == pytest.approx(0.9) and found.ttft == 1
        assert found.piling < 0.12
    assert curve(bracketed(measured, [5.0], 0.9, 2), 0.9).clipped
    assert curve(bracketed(measured, [40.0], 0.9, 2), 0.9).missing


def test_what_an_instance_cannot_hold_is_refused_before_anything_is_run():
    made = [scenarios(SETTING, None)["mooncake"]]
    small = dataclasses.replace(SETTING, profile=dataclasses.replace(SETTING.profile, kv_tokens={"2,1": 9000}))
    with pytest.raises(ValueError, match=r"mooncake: 90 % of .* need KV pages of up to \d+ tokens.* holds 9000"):
        check(small, made, [0, 1], 0.9)
    with pytest.raises(ValueError, match="has no kv_tokens for tp,pp = 3,1: it has "):
        check(dataclasses.replace(SETTING, tp=3), made, [0], 0.9)
    check(SETTING, made, [0, 1], 0.9)


def test_a_bad_line_of_a_trace_and_a_seed_beyond_it_are_refused_with_file_and_line(tmp_path):
    trace = tmp_path / "trace.jsonl"
    row = {"timestamp": 0, "input_length": 100, "output_length": 10}
    lines = [json.dumps(row | {"timestamp": 3000 * index}) for index in range(PART + 5)]
    trace.write_text("\n".join([*lines, "{"]) + "\n")
    made = [scenarios(SETTING, str(trace))["mooncake"]]
    check(SETTING, made, [0], 0.9)
    with pytest.raises(ValueError, match=f"mooncake, seed 1: .*trace.jsonl, line {PART + 6}"):
        check(SETTING, made, [1], 0.9)
    trace.write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match=f"seed 1: .* has 5 requests after the first {PART}, {PART} needed"):
        check(SETTING, made, [1], 0.9)


def test_the_truth_notes_what_it_is_asked_beyond_its_range_and_the_forecast_does_not():
    fits = {2: dataclasses.replace(SETTING.profile.fit_of(2), prompt_tokens=(1, 100))}
    narrow = dataclasses.replace(SETTING, profile=dataclasses.replace(SETTING.profile, fits=fits, outside={}))
    narrow.foretold().step_s([(0, 200)], 0, 0)
    assert not narrow.profile.outside
    with pytest.warns(RuntimeWarning, match="200 is outside the measured 1 to 100"):
        narrow.step_time().step_s([(0, 200)], 0, 0)
    assert narrow.profile.outside


def result(policy, goodput, low, high, workload="sharegpt", **rest):
    named = {"workload": workload, "policy": policy, "configuration": "4M", "assumed": "", "extrapolated": True}
    alone = {"ttft": 0.91, "tpot": 0.99, "piling": 0.004, "clipped": False, "missing": False, "points": [{"rate": 5.0}]}
    return named | alone | {"goodput": goodput, "low": low, "high": high} | rest


def test_the_table_says_where_ours_is_not_the_best():
    table, verdicts = tabulate([result("chunked", 11.0, 10.5, 11.5), result("deflected", 10.0, 9.5, 10.6)])
    assert "| sharegpt | chunked | 11.00 | 10.50 to 11.50 | 0.91 | 91.0 % | 99.0 % | 0.4 % | 4M |" in table
    assert verdicts == ["sharegpt: chunked serves 1.10x ours, though their intervals overlap"]
    assert "deflected is not the best on:" in table and "extrapolated from published figures" in table
    _, sure = tabulate([result("chunked", 11.0, 10.7, 11.5), result("deflected", 10.0, 9.5, 10.6)])
    assert sure == ["sharegpt: chunked serves 1.10x ours"]
    table, verdicts = tabulate([result("chunked", 9.0, 8.0, 9.5), result("deflected", 10.0, 9.5, 10.6)])
    assert not verdicts and "deflected is the best system on every workload" in table


def test_the_table_says_what_is_a_bound_and_nothing_where_nothing_was_compared():
    table, verdicts = tabulate([result("deflected", 10.0, 9.5, 10.0, clipped=True)])
    assert "| ≥ 10.00 | 9.50 to ≥ 10.00 |" in table and "best" not in table.split("|---")[1] and not verdicts
    none = result("deflected", 0.0, 0.0, 0.0, missing=True)
    table, verdicts = tabulate([result("chunked", 9.0, 8.0, 9.5), none])
    assert "| deflected | < 5.00 |" in table and verdicts == ["sharegpt: chunked serves some, ours none"]
