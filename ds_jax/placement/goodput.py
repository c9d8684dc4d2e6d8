"""The goodput of one candidate: the highest rate at which it still meets its targets.

Rates are tried per GPU, so that candidates of different sizes compare, and on one grid for all, so that what a
candidate comes to does not depend on which others were looked at before. A candidate that fails at a rate is taken to
fail at every higher one: arrivals at another rate are the same gaps, scaled, of the same requests.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

LOWEST_RATE = 0.001
"""Requests/s/GPU below which nothing is of use."""

FIRST_GUESS = 0.7
"""Share of what is known to be too much that is tried next."""


class Score(Protocol):
    """What a trial at one rate came to."""

    @property
    def passed(self) -> bool:
        """Whether the targets are met."""
        ...

    @property
    def share(self) -> float:
        """Share of requests inside the targets; a bound from above where the trial was cut short."""
        ...


Trial = Callable[[float], Score]
"""Rate in requests/s/GPU -> score."""


@dataclass(frozen=True)
class Goodput:
    """Of one candidate."""

    per_gpu: float
    """Requests/s/GPU; 0 if it fails at every rate, or cannot reach the rate to beat."""
    trials: int
    below: bool = False
    """It was given up below the rate to beat."""


def published_rates() -> list[float]:
    """(0, 5] requests/s/GPU in 32 steps: where bisection to at most 0.25 ends (DistServe's public search)."""
    return [5 * step / 32 for step in range(1, 33)]


def fine_rates(highest: float, precision: float) -> list[float]:
    """From LOWEST_RATE to the first rate at or beyond `highest`, each `precision` above the one before."""
    rates = [LOWEST_RATE]
    while rates[-1] < highest:
        rates.append(rates[-1] * (1 + precision))
    return rates


def goodput(
    trial: Trial, rates: Sequence[float], *, beat: float = 0.0, highest: float | None = None, share: float | None = None
) -> Goodput:
    """Bisect the grid for the last rate that passes.

    Args:
        rates: ascending, in requests/s/GPU.
        beat: give up unless the candidate passes at the last rate up to this one.
        highest: a bound that no passing rate exceeds.
        share: interpolate on the attainment curve, between the last rate that passes and the first that fails, to
            where it crosses this share.
    """
    low, high = -1, len(rates) if highest is None else bisect_right(rates, highest)
    least = bisect_right(rates, beat) - 1
    scores: dict[int, Score] = {}

    def passes(index: int) -> bool:
        if index not in scores:
            scores[index] = trial(rates[index])
        return scores[index].passed

    if least >= 0:
        if least >= high or not passes(least):
            return Goodput(0.0, len(scores), below=True)
        low = least
        step = 1
        while low + step < high:  # it is likely to be near: upwards in growing steps
            if not passes(low + step):
                high = low + step
                break
            low, step = low + step, 2 * step
    else:
        target = rates[high - 1] if high else 0.0
        while high > 0:  # downwards from the bound: the low rates are long runs, and seldom where the limit is
            target *= FIRST_GUESS
            middle = max(bisect_right(rates, target) - 1, 0)
            if middle < high and passes(middle):
                low = middle
                break
            high = min(high, middle)
    while high - low > 1:
        middle = (low + high) // 2
        if passes(middle):
            low = middle
        else:
            high = middle
    if low < 0:
        return Goodput(0.0, len(scores))
    if share is None or high >= len(rates):
        return Goodput(rates[low], len(scores))
    passes(low), passes(high)
    above, below = scores[low].share, scores[high].share
    fraction = (above - share) / (above - below) if above > below else 0.0
    return Goodput(rates[low] + fraction * (rates[high] - rates[low]), len(scores))
