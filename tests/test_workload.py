"""Arrivals and lengths."""

from __future__ import annotations

import statistics

import pytest

from ds_jax.protocol import Slo
from ds_jax.workload import evenly, fixed, poisson, submissions, uniform


def test_poisson_arrivals_have_their_rate_and_exponential_gaps():
    arrivals_ns = poisson(50.0, 20_000, seed=3)
    gaps_s = [(after - before) / 1e9 for before, after in zip(arrivals_ns, arrivals_ns[1:], strict=False)]
    assert statistics.mean(gaps_s) == pytest.approx(1 / 50, rel=0.03)
    assert statistics.stdev(gaps_s) == pytest.approx(1 / 50, rel=0.03)
    assert arrivals_ns == sorted(arrivals_ns) == poisson(50.0, 20_000, seed=3) != poisson(50.0, 20_000, seed=4)


def test_even_arrivals_are_even():
    assert evenly(4.0, 3) == [0, 250_000_000, 500_000_000]


def test_uniform_lengths_reach_both_ends():
    lengths = uniform((3, 5), (1, 2), 500, seed=1)
    assert {one.prompt for one in lengths} == {3, 4, 5} and {one.output for one in lengths} == {1, 2}


def test_submissions_join_them():
    one, two = submissions([5, 9], fixed(7, 3, 2), max_tokens=10, slo=Slo(1, 2))
    assert (one.arrival_ns, one.request.prompt_tokens, one.request.max_tokens, one.output_tokens) == (5, 7, 10, 3)
    assert (two.request.id, two.request.slo) == (1, Slo(1, 2))
    assert submissions([5], fixed(7, 3, 1))[0].request.max_tokens == 3


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: poisson(0.0, 3), "rate = 0.0 requests/s must be greater than 0"),
        (lambda: evenly(-1.0, 3), "rate = -1.0 requests/s must be greater than 0"),
        (lambda: uniform((0, 3), (1, 2), 3), r"prompt = \(0, 3\) must be a range"),
        (lambda: uniform((1, 3), (2, 1), 3), r"output = \(2, 1\) must be a range"),
    ],
)
def test_nonsense_is_refused(make, why):
    with pytest.raises(ValueError, match=why):
        make()
