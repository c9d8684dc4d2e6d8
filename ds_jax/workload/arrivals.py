"""When requests arrive."""

from __future__ import annotations

import numpy as np


def poisson(rate: float, count: int, seed: int = 0) -> list[int]:
    """Arrival times in ns of a Poisson process of `rate` requests/s, from 0 on.

    Raises:
        ValueError: the rate is not above 0.
    """
    gaps_s = np.random.default_rng(seed).exponential(1 / _positive(rate), count)
    return [int(at_ns) for at_ns in np.cumsum(gaps_s) * 1e9]


def evenly(rate: float, count: int) -> list[int]:
    """Arrival times in ns of one request every 1/rate seconds, the first at 0.

    Raises:
        ValueError: the rate is not above 0.
    """
    gap_s = 1 / _positive(rate)
    return [round(index * gap_s * 1e9) for index in range(count)]


def _positive(rate: float) -> float:
    if not rate > 0:
        raise ValueError(f"rate = {rate} requests/s must be greater than 0")
    return rate
