"""When requests arrive: streams of times in nanoseconds, from 0 on and never going back.

Each takes a `count`; without one it never ends. Times are drawn in blocks, so that no stream grows with its length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import count as naturals
from itertools import islice

import numpy as np

BLOCK = 4096
"""Numbers that are drawn at once: the speed of numpy, and memory that does not depend on the length."""


def poisson(rate: float, count: int | None = None, seed: int = 0) -> Iterator[int]:
    """A Poisson process of `rate` requests/s.

    Raises:
        ValueError: the rate is not above 0.
    """
    mean_s = 1 / _positive("rate", rate, " requests/s")
    random = np.random.default_rng(seed)
    return islice(_sums(lambda: random.exponential(mean_s, BLOCK)), count)


def gamma(rate: float, cv: float, count: int | None = None, seed: int = 0) -> Iterator[int]:
    """Gaps of a Gamma distribution with mean 1/rate and this coefficient of variation: 1 is Poisson, above is bursty.

    Raises:
        ValueError: rate or cv is not above 0.
    """
    shape = _positive("cv", cv, "") ** -2
    mean_s = 1 / _positive("rate", rate, " requests/s")
    random = np.random.default_rng(seed)
    return islice(_sums(lambda: random.gamma(shape, mean_s / shape, BLOCK)), count)


def evenly(rate: float, count: int | None = None) -> Iterator[int]:
    """One request every 1/rate seconds, the first at 0.

    Raises:
        ValueError: the rate is not above 0.
    """
    gap_s = 1 / _positive("rate", rate, " requests/s")
    return (round(index * gap_s * 1e9) for index in islice(naturals(), count))


def at_times(times_s: Iterable[float]) -> Iterator[int]:
    """Fixed times in seconds, as given.

    Raises:
        ValueError: (while read) a time is below 0 or before the one ahead of it.
    """
    before_s = 0.0
    for time_s in times_s:
        if not time_s >= before_s:
            raise ValueError(f"arrival at {time_s} s comes before the arrival or the start at {before_s} s")
        before_s = time_s
        yield round(time_s * 1e9)


def _sums(draw: Callable[[], np.ndarray]) -> Iterator[int]:
    end_s = 0.0
    while True:
        times_s = end_s + np.cumsum(draw())
        end_s = float(times_s[-1])
        yield from (times_s * 1e9).astype(np.int64).tolist()


def _positive(name: str, value: float, unit: str) -> float:
    if not value > 0:
        raise ValueError(f"{name} = {value}{unit} must be greater than 0")
    return value
