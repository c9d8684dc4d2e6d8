"""What a run was worth: shares of requests inside their targets, how sure they are, and whether it would have lasted.

`Attainment` takes the requests of a run as they end. Goodput (DistServe, section 1) is the rate at which 90 % of the
requests meet both targets, read off the attainments at several rates. A share without an interval, or of a system whose
queue grows the longer one looks, says little: 300 requests gave 90.7 % where 600 gave 60.7 %, on the same machines at
the same rate. So each share has an interval from batch means, and `drift` says whether the queue grew.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ds_jax.metrics import RequestTimes
from ds_jax.protocol import Slo

BATCHES = 20
"""Batch means are taken over 20 to 39 batches: Schmeiser (1982) finds no use in more than 30."""

_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
      2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)  # fmt: skip
"""Student's t at 97.5 %, for 1 to 30 degrees of freedom."""


class Interval(NamedTuple):
    """Where a figure lies, with 95 % confidence."""

    low: float
    high: float


class Share:
    """A share of requests, 0 to 1, counted one by one in constant memory.

    The outcomes of requests near each other depend on the same queue. So the interval is from the means of batches of
    neighbours; whenever there are 40 batches, pairs of them become one, so that batches grow with the run.
    """

    __slots__ = ("_batch", "_batches", "_open", "_size", "count", "inside")

    def __init__(self) -> None:
        self.count = 0
        self.inside = 0
        self._size = 1
        self._batch = 0
        self._open = 0
        self._batches: list[int] = []

    def add(self, inside: bool) -> None:
        self.count += 1
        self.inside += inside
        self._batch += inside
        self._open += 1
        if self._open == self._size:
            self._batches.append(self._batch)
            self._batch = self._open = 0
            if len(self._batches) == 2 * BATCHES:
                pairs = iter(self._batches)
                self._batches = [first + second for first, second in zip(pairs, pairs, strict=True)]
                self._size *= 2

    @property
    def value(self) -> float:
        """The share; of nothing, NaN."""
        return self.inside / self.count if self.count else math.nan

    def interval(self) -> Interval:
        """Of batch means, and no narrower than Wilson's for independent requests (which has a width at 0 and 1)."""
        if not self.count:
            return Interval(0.0, 1.0)
        share, z2 = self.value, 1.96**2 / self.count
        middle = (share + z2 / 2) / (1 + z2)
        half = math.sqrt(z2 * (share * (1 - share) + z2 / 4)) / (1 + z2)
        low, high = middle - half, middle + half
        if len(self._batches) >= BATCHES:
            mean, width = _mean_and_half_width([inside / self._size for inside in self._batches])
            low, high = min(low, mean - width), max(high, mean + width)
        return Interval(max(0.0, low), min(1.0, high))


class Percentiles(NamedTuple):
    p50: float
    p90: float
    p99: float


class Drift(NamedTuple):
    """How fast unfinished requests pile up, as a share of the arrivals: 0 if stable, 1 if nothing is served."""

    slope: float
    interval: Interval

    @property
    def stable(self) -> bool:
        """Unless it is sure that more than 1 % of the arrivals pile up."""
        return not self.interval.low > 0.01


@dataclass(frozen=True)
class Shares:
    """Attainment of a class of requests, or of all."""

    requests: int
    both: float
    both_interval: Interval
    ttft: float
    tpot: float
    rejected: float


class Attainment:
    """The requests of a run, added as they end.

    A request without targets is inside as soon as it has ended by itself; one that was rejected, or gave no token, is
    outside of everything.
    """

    def __init__(self) -> None:
        self._shares: dict[str, tuple[Share, Share, Share, Share]] = {}
        self._all = (Share(), Share(), Share(), Share())
        self._ttft_s = array("d")
        self._tpot_s = array("d")
        self._arrived_s = array("d")
        self._ended_s = array("d")

    def add(self, times: RequestTimes, slo: Slo | None = None, label: str = "") -> None:
        """One request, with the targets it brought and the class it is of."""
        ttft_ns, tpot_ns = times.ttft_ns, times.tpot_ns
        served = not times.rejected and ttft_ns is not None and tpot_ns is not None
        fast_start = served and (slo is None or ttft_ns <= slo.ttft_ns)  # type: ignore[operator]
        fast_tokens = served and (slo is None or tpot_ns <= slo.tpot_ns)  # type: ignore[operator]
        if label not in self._shares:
            self._shares[label] = (Share(), Share(), Share(), Share())
        for both, ttft, tpot, rejected in (self._shares[label], self._all):
            both.add(fast_start and fast_tokens)
            ttft.add(fast_start)
            tpot.add(fast_tokens)
            rejected.add(times.rejected)
        if served:
            assert ttft_ns is not None and tpot_ns is not None
            self._ttft_s.append(ttft_ns / 1e9)
            if times.output_tokens > 1:
                self._tpot_s.append(tpot_ns / 1e9)
        self._arrived_s.append(times.arrived_ns / 1e9)
        self._ended_s.append(times.end_ns / 1e9)

    @property
    def requests(self) -> int:
        return self._all[0].count

    def shares(self, label: str | None = None) -> Shares:
        """Of all requests, or of one class.

        Raises:
            ValueError: there are no requests, of this class.
        """
        found = self._all if label is None else self._shares.get(label)
        if found is None or not found[0].count:
            raise ValueError("attainment needs at least one request" + (f" of class {label!r}" if label else ""))
        both, ttft, tpot, rejected = found
        return Shares(both.count, both.value, both.interval(), ttft.value, tpot.value, rejected.value)

    @property
    def labels(self) -> list[str]:
        """The classes, in the order in which they were first seen."""
        return list(self._shares)

    def ttft_s(self) -> Percentiles:
        """Of the requests that were served."""
        return _percentiles(self._ttft_s)

    def tpot_s(self) -> Percentiles:
        """Of the requests that gave more than one token."""
        return _percentiles(self._tpot_s)

    def drift(self) -> Drift:
        """Least-squares slope of the number of unfinished requests, over the second half of the arrivals.

        The half is cut into batches of equal time; the slope is through their means and its interval from their
        scatter, because the number at one moment says little that the moment before did not.

        Raises:
            ValueError: fewer than 40 requests, or all came at once.
        """
        arrived, ended = np.sort(self._arrived_s), np.sort(self._ended_s)
        if len(arrived) < 2 * BATCHES or arrived[-1] == arrived[len(arrived) // 2]:
            raise ValueError(f"drift needs 40 requests or more that do not come all at once, got {len(arrived)}")
        first, last = float(arrived[len(arrived) // 2]), float(arrived[-1])
        edges = np.linspace(first, last, BATCHES + 1)
        means = _integral(arrived, edges) - _integral(ended, edges)
        means = np.diff(means) / np.diff(edges)
        at = (edges[:-1] + edges[1:]) / 2 - (first + last) / 2
        slope = float(at @ means / (at @ at))
        scatter = means - means.mean() - slope * at
        error = math.sqrt(float(scatter @ scatter) / (BATCHES - 2) / float(at @ at))
        rate = (len(arrived) - len(arrived) // 2) / (last - first)
        width = _t(BATCHES - 2) * error
        return Drift(slope / rate, Interval((slope - width) / rate, (slope + width) / rate))


def goodput(rates: Sequence[float], attainments: Sequence[float], share: float = 0.9) -> float:
    """The rate up to which the attainment stays at `share` or above, linear between the rates that were measured.

    0 if it is below at the lowest rate already, the highest rate if it never falls below: then measure there too.

    Raises:
        ValueError: no rates, not as many attainments, rates that do not grow, or a share outside 0 to 1.
    """
    if not rates or len(rates) != len(attainments):
        raise ValueError(f"goodput needs an attainment for each rate, got {len(rates)} and {len(attainments)}")
    if any(not before < after for before, after in zip(rates, rates[1:], strict=False)):
        raise ValueError(f"rates = {list(rates)} must grow")
    if not 0 < share <= 1:
        raise ValueError(f"share = {share} must be greater than 0, at most 1")
    if attainments[0] < share:
        return 0.0
    for index in range(1, len(rates)):
        low, high = attainments[index - 1], attainments[index]
        if high < share:
            return rates[index - 1] + (rates[index] - rates[index - 1]) * (low - share) / (low - high)
    return rates[-1]


def _integral(times: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Integral of the number of `times` (sorted) up to t, from the first of them to each edge."""
    sums = np.concatenate([[0.0], np.cumsum(times)])
    counts = np.searchsorted(times, edges, side="right")
    return counts * edges - sums[counts]


def _mean_and_half_width(values: Sequence[float]) -> tuple[float, float]:
    mean = math.fsum(values) / len(values)
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, _t(len(values) - 1) * math.sqrt(variance / len(values))


def _t(degrees: int) -> float:
    return _T[degrees - 1] if degrees <= len(_T) else 1.96 + 2.5 / degrees


def _percentiles(values: array[float]) -> Percentiles:
    """The smallest values that at least 50, 90 and 99 % do not exceed; NaN of nothing."""
    if not values:
        return Percentiles(math.nan, math.nan, math.nan)
    ordered = np.sort(values)
    return Percentiles(*(float(ordered[math.ceil(share * len(ordered)) - 1]) for share in (0.5, 0.9, 0.99)))
