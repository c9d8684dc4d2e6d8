"""Candidates race for the highest goodput: sketches put them into an order, and trials leave out who is beaten."""

from __future__ import annotations

import gc
import os
import sys
from bisect import bisect_right
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any

from ds_jax.placement.bounds import Bound
from ds_jax.placement.goodput import (
    FIRST_GUESS,
    Goodput,
    Known,
    Score,
    Steps,
    climb,
    drive,
    fine_rates,
    goodput,
    published_rates,
)
from ds_jax.placement.layouts import Unit
from ds_jax.placement.sketch import MARGIN, SKETCHED, Sketches, worth
from ds_jax.placement.trial import BOTH, Outcome, Trials, Until
from ds_jax.plan import PlanConfig
from ds_jax.protocol import Role

if TYPE_CHECKING:
    from ds_jax.placement.search import PlacementSearch

HIGHEST_RATE = 1000.0
"""Requests/s/GPU beyond which nobody looks."""

TELLING = 1.1
"""A sketch that is so many times as good as another tells enough: the other is not sketched to its end, for now."""

STRIDE = 4
"""Rates that are left out where goodputs are wanted coarsely only."""


@dataclass(frozen=True)
class Candidate:
    """A unit under a policy, or one phase of it alone."""

    unit: Unit
    policy: str
    phases: tuple[Role, ...] = BOTH


@dataclass(frozen=True)
class Judged:
    """What the search knows of a candidate."""

    candidate: Candidate
    bound: Bound
    goodput: Goodput | None
    """None: ruled out by its bound or a sketch, without a simulation."""


def rates_of(plan: PlanConfig) -> list[float]:
    """The grid of rates by the plan's rule, in requests/s/GPU."""
    if plan.search.rule == "published":
        return published_rates()
    return fine_rates(HIGHEST_RATE, plan.search.precision)


def find_goodput(trials: Trials, candidate: Candidate, beat: float, highest: float | None) -> Goodput:
    """One candidate's goodput by the plan's rule, without a race.

    Args:
        beat: give up unless it reaches this.
        highest: a bound that it cannot pass.
    """
    share = None if trials.plan.search.rule == "published" else trials.plan.search.attainment

    def trial(per_gpu: float, whole: bool) -> Outcome:
        until = Until.HOPELESS if whole else Until.DECIDED
        return trials.run(candidate.unit, candidate.policy, per_gpu * candidate.unit.gpus, candidate.phases, until)

    return goodput(trial, rates_of(trials.plan), beat=beat, highest=highest, share=share)


class Race:
    """One race."""

    def __init__(
        self,
        search: PlacementSearch,
        pool: Pool,
        candidates: Sequence[Candidate],
        within: float,
        exact: bool,
        tell: Callable[[int, int], None],
    ):
        """
        Args:
            within: all that reach this share of the best one's goodput stay in the race.
            exact: otherwise goodputs are found in steps of STRIDE rates, and not interpolated.
            tell: told (candidates that are done with, candidates that have come).
        """
        plan = search.plan
        self.candidates, self.pool, self.cache, self._within, self._tell = candidates, pool, search.cache, within, tell
        self.bounds = [search.bound(candidate) for candidate in candidates]
        self.rates = rates_of(plan)
        self._sketches = search.sketches
        self._sketched: dict[int, Known] = {}
        """What sketches have told; those that were given up pass nowhere."""
        self._prune, self._stride = plan.search.prune, 1 if exact else STRIDE
        self._share = None if plan.search.rule == "published" or not exact else plan.search.attainment
        self.found: dict[int, Goodput] = {}
        """Goodputs that are known to the end."""
        self.known: list[Known] = []
        self._guesses: list[float] = []
        self._passed: dict[int, float] = {}
        """The highest rate that each was seen to pass."""
        for index, (candidate, limit) in enumerate(zip(candidates, self.bounds, strict=True)):
            known, found = self.cache.get(candidate)
            if found is not None:
                self.found[index], self._passed[index] = found, found.per_gpu
            elif known.passes >= 0:
                self._passed[index] = self.rates[known.passes]
            fails = min(known.fails, self._index(limit.per_gpu)) if self._prune else known.fails
            self.known.append(replace(known, fails=fails))
            self._guesses.append(FIRST_GUESS * min(limit.per_gpu, HIGHEST_RATE))
        self._alive = [index for index, limit in enumerate(self.bounds) if limit.per_gpu > 0]
        tell(len(candidates) - len(self._alive), len(candidates))

    def run(self) -> list[Judged]:
        """All candidates, in the order given."""
        if len(self._alive) > 1:
            self._sketch()
        self._try()
        return [self._judged(index) for index in range(len(self.candidates))]

    def sketched(self) -> list[Judged]:
        """All candidates, in the order given, by their sketches alone."""
        self._sketch()
        for index in self._alive:
            passes = self._sketched.get(index, Known()).passes
            if passes >= 0:
                self.found.setdefault(index, Goodput(self.rates[passes], 0, exact=False))
        self._tell(len(self._alive), 0)
        return [self._judged(index) for index in range(len(self.candidates))]

    def _judged(self, index: int) -> Judged:
        known, found = self.known[index], self.found.get(index)
        self.cache.put(self.candidates[index], known, found)
        return Judged(self.candidates[index], self.bounds[index], found)

    def _index(self, rate: float) -> int:
        """Of the first rate of the grid beyond this one."""
        return bisect_right(self.rates, rate)

    def _sketch(self) -> None:
        """An order, guesses where to begin, and limits: no trial yet."""
        best = 0.0
        left = [index for index in self._alive if self.candidates[index].policy in SKETCHED and index not in self.found]
        queue = sorted(left, key=lambda index: -self._guesses[index])
        flying: dict[Future[Known], int] = {}
        while queue or flying:
            while queue and len(flying) < self.pool.workers:
                index = queue.pop(0)
                limit = Known(fails=self._index(self.bounds[index].per_gpu))
                beat = self._index(best * self._within / TELLING / worth(self.candidates[index].unit)) - 1
                call = _sketch, self.candidates[index], limit, beat, self._guesses[index], self._stride
                flying[self.pool.submit(*call)] = index
            for future in wait(flying, return_when=FIRST_COMPLETED)[0]:
                index, known = flying.pop(future), future.result()
                last = self.rates[max(0, min(known.fails, len(self.rates)) - 1)]
                self._guesses[index] = last * worth(self.candidates[index].unit)
                self._sketched[index] = known
                if known.passes < 0:
                    self._guesses[index] /= TELLING
                else:
                    best = max(best, self._guesses[index])
                if known.fails < len(self.rates) and self._prune:
                    # Who fails alone, at the lowest rate, fails by more than the rate.
                    fails = self._index(MARGIN * self.rates[known.fails]) if known.fails else 0
                    self.known[index] = replace(self.known[index], fails=min(self.known[index].fails, fails))

    def _sketch_fails(self, index: int, least: int) -> bool:
        """Whether a candidate that was not sketched to the end fails a sketch for the rate that it must pass."""
        if index not in self._sketched or self._sketched[index].passes >= 0 or least < 0:
            return False
        candidate, per_gpu = self.candidates[index], self.rates[least] / MARGIN
        rate = per_gpu * candidate.unit.gpus
        return not self._sketches.run(candidate.unit, candidate.policy, rate, candidate.phases).passed

    def _try(self) -> None:
        """Trials, several at a time, of the most promising that are not beaten yet."""
        queue = sorted(self._alive, key=lambda index: -self._guesses[index])
        flying: dict[Future[Outcome], tuple[int, Steps, float]] = {}
        ready: list[tuple[int, Steps, tuple[float, bool]]] = []
        while queue or ready or flying:
            while (queue or ready) and len(flying) < self.pool.workers:
                if not ready:
                    self._begin(queue.pop(0), ready)
                    continue
                index, steps, (per_gpu, whole) = ready.pop(0)
                until = Until.HOPELESS if whole else Until.DECIDED
                alone = not (queue or ready or flying)
                future = self.pool.submit(_trial, self.candidates[index], per_gpu, until, here=alone)
                flying[future] = index, steps, per_gpu
            for future in wait(flying, return_when=FIRST_COMPLETED)[0] if flying else ():
                index, steps, per_gpu = flying.pop(future)
                outcome = future.result()
                if outcome.passed:
                    self._passed[index] = max(per_gpu, self._passed.get(index, 0.0))
                self._go_on(index, steps, outcome, ready)

    def _begin(self, index: int, ready: list[tuple[int, Steps, tuple[float, bool]]]) -> None:
        least = self._beat(index)
        if index in self.found or self.known[index].fails <= max(least, 0) or self._sketch_fails(index, least):
            self._tell(1, 0)
            return
        steps = climb(
            self.rates,
            self.known[index],
            guess=self._guesses[index],
            share=self._share,
            beat=lambda: self._beat(index),
            stride=self._stride,
        )
        self._go_on(index, steps, None, ready)

    def _go_on(
        self, index: int, steps: Steps, outcome: Outcome | None, ready: list[tuple[int, Steps, tuple[float, bool]]]
    ) -> None:
        try:
            ready.append((index, steps, next(steps) if outcome is None else steps.send(outcome)))
            ready.sort(key=lambda one: -self._guesses[one[0]])
        except StopIteration as end:
            self.known[index], self.found[index] = end.value
            self._passed[index] = self.found[index].per_gpu
            self._tell(1, 0)

    def _beat(self, index: int) -> int:
        """Index of the rate that this candidate must pass to stay in the race; -1: any will do."""
        if not self._prune:
            return -1
        best = max((rate for other, rate in self._passed.items() if other != index), default=0.0)
        return self._index(best * self._within) - 1


class Pool:
    """Processes that try candidates; they are started when first needed."""

    def __init__(self, trials: Trials, sketches: Sketches, workers: int = 0):
        self.workers = workers or os.cpu_count() or 1
        self._given = (trials, sketches)
        self._processes: ProcessPoolExecutor | None = None

    def submit(self, function: Callable[..., Any], *arguments: Any, here: bool = False) -> Future[Any]:
        """`function(trials, sketches, *arguments)`, in a process of its own unless it is to be `here`."""
        if here or self.workers == 1:
            future: Future[Any] = Future()
            future.set_result(function(*self._given, *arguments))
            return future
        if self._processes is None:
            # Workers that are forked have all that this process has read; with jax loaded that would not be safe.
            method = "fork" if sys.platform == "linux" and "jax" not in sys.modules else "spawn"
            self._processes = ProcessPoolExecutor(
                self.workers, get_context(method), initializer=_remember, initargs=self._given
            )
        return self._processes.submit(_call, function, arguments)

    def close(self) -> None:
        if self._processes is not None:
            self._processes.shutdown(wait=False, cancel_futures=True)
            self._processes = None


_given: tuple[Any, ...] = ()
"""What a worker process was given."""


def _remember(*given: Any) -> None:
    global _given
    _given = given
    gc.freeze()


def _call(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    return function(*_given, *arguments)


def _sketch(
    trials: Trials, sketches: Sketches, candidate: Candidate, known: Known, beat: int, guess: float, stride: int
) -> Known:
    def trial(per_gpu: float, whole: bool) -> Score:
        return sketches.run(candidate.unit, candidate.policy, per_gpu * candidate.unit.gpus, candidate.phases)

    steps = climb(rates_of(trials.plan), known, guess=guess, share=None, beat=lambda: beat, stride=stride)
    return drive(steps, trial)[0]


def _trial(trials: Trials, sketches: Sketches, candidate: Candidate, per_gpu: float, until: Until) -> Outcome:
    unit = candidate.unit
    return trials.run(unit, candidate.policy, per_gpu * unit.gpus, candidate.phases, until)
