"""The goodput of one candidate: the highest rate at which it still meets its targets.

Rates are tried per GPU, so that candidates of different sizes compare, and on one grid for all, so that what a
candidate comes to does not depend on which others were looked at before. A candidate that fails at a rate is taken to
fail at every higher one: arrivals at another rate are the same gaps, scaled, of the same requests.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

LOWEST_RATE = 0.001
"""Requests/s/GPU below which nothing is of use."""

FIRST_GUESS = 0.58
"""Share of a bound that is tried first, where nothing better is known: low rates are long runs."""

NEVER = 2**30
"""Index of no rate: it was not seen to fail."""


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


Trial = Callable[[float, bool], Score]
"""Rate in requests/s/GPU, and whether the share is wanted beside the verdict -> score."""


@dataclass(frozen=True)
class Known:
    """What is known of one candidate, as indices of the grid of rates."""

    passes: int = -1
    """Of the highest rate at which it passed."""
    fails: int = NEVER
    """Of the lowest at which it failed, or that a bound rules out."""
    trials: int = 0


@dataclass(frozen=True)
class Goodput:
    """Of one candidate."""

    per_gpu: float
    """Requests/s/GPU; 0 if it fails at every rate, or cannot reach the rate to beat."""
    trials: int
    below: bool = False
    """It was given up below the rate to beat."""
    exact: bool = True
    """Otherwise a rate that passes, the next one that was tried fails."""
    cached: bool = False
    """It was found by an earlier search."""
    outcome: Any = None
    """The score at the last rate of the grid that it passed."""


def published_rates() -> list[float]:
    """(0, 5] requests/s/GPU in 32 steps: where bisection to at most 0.25 ends (DistServe's public search)."""
    return [5 * step / 32 for step in range(1, 33)]


def fine_rates(highest: float, precision: float) -> list[float]:
    """From LOWEST_RATE to the first rate at or beyond `highest`, each `precision` above the one before."""
    rates = [LOWEST_RATE]
    while rates[-1] < highest:
        rates.append(rates[-1] * (1 + precision))
    return rates


Steps = Generator[tuple[float, bool], Score, tuple[Known, Goodput]]
"""Yields (rate in requests/s/GPU, whether more is wanted than the verdict), is sent the score there."""


def climb(
    rates: Sequence[float],
    known: Known,
    *,
    guess: float,
    share: float | None,
    beat: Callable[[], int] = lambda: -1,
    stride: int = 1,
) -> Steps:
    """Find the last rate of the grid that passes: in growing steps from a guess, then by halves.

    Args:
        rates: ascending, in requests/s/GPU.
        known: what need not be tried.
        guess: rate near which the limit is expected.
        share: interpolate on the attainment curve, between the last rate that passes and the first that fails, to
            where it crosses this share. None: do not.
        beat: index of the rate that it must pass; asked before every trial. It is given up as soon as it cannot.
        stride: end as soon as the limit is known to so many rates.
    """
    low, high = known.passes, min(known.fails, len(rates))
    scores: dict[int, Score] = {}
    index, step, trials, failed = bisect_right(rates, guess) - 1, stride, 0, False

    def sofar() -> Known:
        return Known(low, high if high < len(rates) else known.fails, known.trials + trials)

    while high > 0 and (low < 0 or high - low > stride):
        least = beat()
        if high <= least:
            return sofar(), Goodput(0.0, sofar().trials, below=True)
        filtering = low < least
        index = least if filtering else min(max(index, low + 1), high - 1)
        score = yield rates[index], stride == 1 and not filtering
        trials += 1
        if score.passed:
            low = index
            if not filtering or index >= bisect_right(rates, guess) - 1:
                index = (low + high) // 2 if failed else low + step
                step *= 2
            else:
                index = bisect_right(rates, guess) - 1
        else:
            high, failed = index, True
            index = (low + high) // 2 if low >= 0 else high - step
            step *= 2
        if not filtering:
            scores[high if not score.passed else low] = score
    if low < 0:
        return sofar(), Goodput(0.0, sofar().trials)
    if share is not None:
        for end in (low, high):
            if end not in scores and end < len(rates):
                scores[end] = yield rates[end], True
                trials += 1
    per_gpu, last = rates[low], scores.get(low)
    if share is not None and high < len(rates):
        above, below = scores[low].share, scores[high].share
        fraction = min(max((above - share) / (above - below), 0.0), 1.0) if above > below else 0.0
        per_gpu += fraction * (rates[high] - rates[low])
    return sofar(), Goodput(per_gpu, sofar().trials, exact=stride == 1, outcome=last)


def drive(steps: Steps, trial: Callable[[float, bool], Score]) -> tuple[Known, Goodput]:
    """Run every trial that is asked for."""
    try:
        asked = next(steps)
        while True:
            asked = steps.send(trial(*asked))
    except StopIteration as end:
        return end.value


def goodput(
    trial: Callable[[float, bool], Score],
    rates: Sequence[float],
    *,
    beat: float = 0.0,
    highest: float | None = None,
    share: float | None = None,
) -> Goodput:
    """Of one candidate alone.

    Args:
        rates: ascending, in requests/s/GPU.
        beat: give up unless the candidate passes at the last rate up to this one.
        highest: a bound that no passing rate exceeds.
        share: as in `climb`.
    """
    known = Known() if highest is None else Known(fails=bisect_right(rates, highest))
    least = bisect_right(rates, beat) - 1
    guess = FIRST_GUESS * min(rates[-1], rates[-1] if highest is None else highest)
    return drive(climb(rates, known, guess=guess, share=share, beat=lambda: least), trial)[1]
