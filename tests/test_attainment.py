"""Attainment, its interval, stability and goodput."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ds_jax.attainment import Attainment, Share, goodput
from ds_jax.metrics import RequestTimes
from ds_jax.protocol import Slo

S = 10**9


def life(id=0, arrived_s=0.0, ttft_s=1.0, tpot_s=0.1, output=11, end="stop", rejected=False):
    arrived = round(arrived_s * S)
    first = None if rejected else arrived + round(ttft_s * S)
    ended = arrived if first is None else first + round(tpot_s * S * (output - 1))
    return RequestTimes(id, 5, 0 if rejected else output, arrived, first, ended, (ended - arrived, 0, 0, 0, 0), end,
                        rejected)  # fmt: skip


def test_shares_are_counted_jointly_and_per_target():
    run = Attainment()
    slo = Slo(2 * S, S // 5)
    for ttft_s, tpot_s in ((1, 0.1), (3, 0.1), (1, 0.3), (3, 0.3), (2, 0.2)):
        run.add(life(ttft_s=ttft_s, tpot_s=tpot_s), slo)
    run.add(life(rejected=True), slo)
    run.add(life(output=1), Slo(2 * S, 0))  # one token has no time between tokens
    shares = run.shares()
    assert (shares.requests, shares.both, shares.ttft, shares.tpot) == (7, 3 / 7, 4 / 7, 4 / 7)
    assert shares.rejected == 1 / 7


def test_classes_are_told_apart_and_each_request_has_its_own_targets():
    run = Attainment()
    run.add(life(ttft_s=3), Slo(2 * S, S), "chat")
    run.add(life(ttft_s=3), Slo(9 * S, S), "summary")
    run.add(life(ttft_s=3), None, "batch")
    assert run.labels == ["chat", "summary", "batch"]
    assert [run.shares(label).both for label in run.labels] == [0, 1, 1]
    with pytest.raises(ValueError, match="at least one request of class 'code'"):
        run.shares("code")


def test_percentiles_are_of_the_served_and_tpot_of_those_with_two_tokens():
    run = Attainment()
    for n in range(1, 101):
        run.add(life(ttft_s=n, tpot_s=n / 100))
    run.add(life(rejected=True))
    run.add(life(ttft_s=1, output=1))
    assert run.ttft_s() == (50, 90, 99)
    assert run.tpot_s() == (0.5, 0.9, 0.99)


def test_nothing_has_no_percentiles():
    assert math.isnan(Attainment().ttft_s().p50)


def test_the_interval_of_independent_requests_is_the_binomial_one():
    """Half width 1.96 * sqrt(0.9 * 0.1 / 40000) = 0.0029; 30 batches or so estimate it to about 15 %."""
    random = np.random.default_rng(0)
    share = Share()
    for inside in random.random(40_000) < 0.9:
        share.add(bool(inside))
    low, high = share.interval()
    assert low <= 0.9 <= high
    assert (high - low) / 2 == pytest.approx(0.0029, rel=0.4)


def test_the_interval_covers_the_truth_of_requests_that_fail_in_bursts():
    """Runs of 50 equal outcomes: 400 runs are worth 400 requests, not 20,000."""
    covered = 0
    for seed in range(200):
        random = np.random.default_rng(seed)
        share = Share()
        for inside in np.repeat(random.random(400) < 0.9, 50):
            share.add(bool(inside))
        low, high = share.interval()
        covered += low <= 0.9 <= high
        assert high - low > 0.03, "1.96 * sqrt(0.09 / 400) = 0.029 on either side"
    assert covered >= 0.88 * 200


@pytest.mark.parametrize("count", [1, 7, 1000])
def test_the_interval_has_a_width_where_all_are_inside(count):
    share = Share()
    for _ in range(count):
        share.add(True)
    low, high = share.interval()
    assert share.value == 1 and high == 1
    assert low == pytest.approx(1 / (1 + 1.96**2 / count))


def lindley(load, count, seed=0):
    """A single server with unit service and Poisson arrivals: what a queue does, at once and exactly."""
    run, free = Attainment(), 0.0
    at = np.cumsum(np.random.default_rng(seed).exponential(1 / load, count))
    for id, arrived in enumerate(at):
        free = max(free, arrived) + 1.0
        run.add(life(id, arrived_s=arrived, ttft_s=free - arrived, output=1))
    return run


@pytest.mark.parametrize("load", [0.5, 0.9])
def test_a_queue_below_saturation_is_stable(load):
    assert all(lindley(load, 4000, seed).drift().stable for seed in range(5))


@pytest.mark.parametrize("load", [1.1, 1.5])
def test_a_queue_above_saturation_drifts_by_the_arrivals_it_cannot_serve(load):
    """Of `load` arrivals a second 1 is served: a share of 1 - 1 / load piles up."""
    drift = lindley(load, 4000).drift()
    assert not drift.stable
    assert drift.slope == pytest.approx(1 - 1 / load, abs=0.05)
    assert drift.interval.low < drift.slope < drift.interval.high


def test_drift_of_a_handful_is_refused():
    with pytest.raises(ValueError, match="drift needs 40 requests or more"):
        lindley(0.5, 39).drift()


def test_goodput_is_read_off_between_the_rates_on_either_side():
    rates, attainments = [1.0, 2.0, 3.0, 4.0], [1.0, 0.95, 0.75, 0.5]
    assert goodput(rates, attainments) == pytest.approx(2.25)
    assert goodput(rates, attainments, 0.99) == pytest.approx(1.2)
    assert goodput(rates, attainments, 0.5) == 4.0
    assert goodput(rates, [0.89, 0.95, 0.9, 0.9]) == 0.0
    assert goodput([1.0, 2.0, 3.0], [0.95, 0.85, 0.95]) == pytest.approx(1.5), "the first fall counts"


@pytest.mark.parametrize(
    ("rates", "attainments", "share", "why"),
    [
        ([], [], 0.9, "goodput needs an attainment for each rate"),
        ([1.0], [1.0, 0.5], 0.9, "goodput needs an attainment for each rate"),
        ([2.0, 1.0], [1.0, 0.5], 0.9, "must grow"),
        ([1.0], [1.0], 90, "share = 90 must be greater than 0, at most 1"),
    ],
)
def test_nonsense_is_refused(rates, attainments, share, why):
    with pytest.raises(ValueError, match=why):
        goodput(rates, attainments, share)
