"""Whether the workload has shifted: rate and lengths of recent requests against those that the plan was made for.

DistServe replans when the pattern of requests changes (section 4.3); the paper leaves open how that is seen. Here every
block of requests gives three numbers: the mean gap between arrivals and the mean lengths of prompts and outputs. Each
is held against the reference by a two-sided CUSUM (Page, 1954), the quickest detector of a lasting change at a given
rate of false alarms. A change is only told if it is large enough to matter.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from ds_jax.workload.lengths import Lengths


@dataclass(frozen=True)
class Pattern:
    """What a stretch of requests looks like."""

    requests: int
    rate: float
    """Requests/s."""
    prompt_tokens: float
    """Mean."""
    output_tokens: float
    """Mean."""

    def __str__(self) -> str:
        return f"{self.rate:.3g} requests/s of {self.prompt_tokens:.0f} / {self.output_tokens:.0f} tokens"


@dataclass(frozen=True)
class Shift:
    """The workload has changed."""

    at_ns: int
    """When it was seen."""
    since_ns: int
    """When, as far as can be told, it began."""
    what: tuple[str, ...]
    """Of rate, prompt_tokens and output_tokens, those that changed."""
    before: Pattern
    after: Pattern


@dataclass(frozen=True)
class Observation:
    """One request of the past. Its output length may be told when it is known: at its end."""

    at_ns: int
    lengths: Lengths


class WorkloadMonitor:
    """Keeps the last requests, by number."""

    def __init__(self, window: int = 2000):
        self._requests: deque[Observation] = deque(maxlen=window)

    def observe(self, at_ns: int, lengths: Lengths) -> None:
        """A request that arrived at `at_ns`; to be told in order of arrival."""
        self._requests.append(Observation(at_ns, lengths))

    def since(self, at_ns: int) -> list[Observation]:
        """The requests in the window that arrived at `at_ns` or later."""
        return [one for one in self._requests if one.at_ns >= at_ns]

    def pattern(self, since_ns: int = 0) -> Pattern:
        """Rate and mean lengths of the requests in the window from `since_ns` on.

        Raises:
            ValueError: there are fewer than two.
        """
        return pattern_of(self.since(since_ns))


def pattern_of(requests: list[Observation]) -> Pattern:
    """Rate and mean lengths of these requests."""
    count = len(requests)
    if count < 2:
        raise ValueError(f"{count} requests are too few to tell their pattern: there must be at least 2")
    span_s = max(requests[-1].at_ns - requests[0].at_ns, 1) / 1e9
    return Pattern(
        count,
        (count - 1) / span_s,
        sum(one.lengths.prompt for one in requests) / count,
        sum(one.lengths.output for one in requests) / count,
    )


@dataclass
class _Cusum:
    """Sums of what exceeds `slack` standard deviations, upwards and downwards."""

    mean: float
    deviation: float
    slack: float
    up: float = 0.0
    down: float = 0.0

    def add(self, value: float) -> None:
        z = (value - self.mean) / self.deviation
        self.up = max(0.0, self.up + z - self.slack)
        self.down = max(0.0, self.down - z - self.slack)

    @property
    def height(self) -> float:
        return max(self.up, self.down)


_QUANTITIES = ("rate", "prompt_tokens", "output_tokens")


@dataclass
class ShiftTest:
    """Tells of a lasting change of rate or lengths.

    The first `reference_blocks` blocks are the reference; after a shift, the blocks since it began are the beginning of
    the next one.
    """

    block: int = 50
    """Requests that are averaged: over so many, means are close to normal."""
    reference_blocks: int = 10
    """Blocks that make the reference."""
    threshold: float = 18.0
    """Height at which a sum tells, in standard deviations of a block's mean."""
    slack: float = 0.75
    """Standard deviations per block that are let pass: half of the smallest change to be seen soon."""
    least_change: float = 0.2
    """Relative change of a mean below which nothing is told, however sure it is."""
    _monitor: WorkloadMonitor = field(default_factory=lambda: WorkloadMonitor(100_000), repr=False)
    _block: list[Observation] = field(default_factory=list, repr=False)
    _blocks: list[tuple[int, tuple[float, float, float]]] = field(default_factory=list, repr=False)
    """Start and means of every block since the reference began."""
    _sums: tuple[_Cusum, ...] = field(default=(), repr=False)
    _last_ns: int | None = None
    _began_ns: int = 0

    def observe(self, at_ns: int, lengths: Lengths) -> Shift | None:
        """Take in one request, in order of arrival; a shift if this one settles that there was one."""
        self._monitor.observe(at_ns, lengths)
        self._block.append(Observation(at_ns, lengths))
        if len(self._block) < self.block:
            return None
        requests, self._block = self._block, []
        begin_ns = requests[0].at_ns if self._last_ns is None else self._last_ns
        gaps = len(requests) - (self._last_ns is None)
        self._last_ns = requests[-1].at_ns
        count = len(requests)
        means = (
            math.log(max(self._last_ns - begin_ns, 1) / gaps / 1e9),
            math.log(sum(one.lengths.prompt for one in requests) / count),
            math.log(sum(one.lengths.output for one in requests) / count),
        )
        self._blocks.append((begin_ns, means))
        if not self._sums:
            if len(self._blocks) >= self.reference_blocks:
                self._sums = self._reference()
            return None
        for total, value in zip(self._sums, means, strict=True):
            total.add(value)
        if max(total.height for total in self._sums) < self.threshold:
            return None
        return self._tell(at_ns)

    def history(self, since_ns: int) -> list[Observation]:
        """The requests since then: what a new plan is made for."""
        return self._monitor.since(since_ns)

    def _reference(self) -> tuple[_Cusum, ...]:
        """Mean and deviation of each quantity's block means.

        The deviation is the larger of two estimates: from the blocks (sees bursts longer than a block), and from single
        requests, cv / sqrt(block) (surer). The mean is itself uncertain, which adds 1 / blocks of the variance.
        """
        count = len(self._blocks)
        requests = self._monitor.since(self._blocks[0][0])
        times = [one.at_ns for one in requests]
        single = (
            [after - before for before, after in zip(times, times[1:], strict=False)],
            [one.lengths.prompt for one in requests],
            [one.lengths.output for one in requests],
        )
        sums = []
        for index, values in enumerate(single):
            means = [block[index] for _, block in self._blocks]
            mean = sum(means) / count
            between = math.sqrt(sum((value - mean) ** 2 for value in means) / (count - 1))
            deviation = max(between, _cv(values) / math.sqrt(self.block), 0.02)
            sums.append(_Cusum(mean, deviation * math.sqrt(1 + 1 / count), self.slack))
        return tuple(sums)

    def _tell(self, at_ns: int) -> Shift | None:
        loudest = max(range(len(_QUANTITIES)), key=lambda index: self._sums[index].height)
        fresh = self._blocks[self._change(loudest) :]
        since_ns = fresh[0][0]
        changed = []
        for index, (name, total) in enumerate(zip(_QUANTITIES, self._sums, strict=True)):
            change = abs(sum(means[index] for _, means in fresh) / len(fresh) - total.mean)
            if total.height >= self.threshold / 2 and change >= math.log1p(self.least_change):
                changed.append(name)
        if not changed:
            for total in self._sums:  # sure, but too small to matter: from now on it is watched anew
                if total.height >= self.threshold:
                    total.up = total.down = 0.0
            return None
        before = [one for one in self._monitor.since(self._began_ns) if one.at_ns < since_ns]
        shift = Shift(at_ns, since_ns, tuple(changed), pattern_of(before), self._monitor.pattern(since_ns))
        self._blocks = fresh
        self._began_ns = since_ns
        self._sums = ()
        return shift

    def _change(self, quantity: int) -> int:
        """The block with which the change most likely began: (sum of what comes from it on)^2 / blocks is largest."""
        mean = self._sums[quantity].mean
        best, begin, total = 0.0, len(self._blocks) - 1, 0.0
        for index in range(len(self._blocks) - 1, -1, -1):
            total += self._blocks[index][1][quantity] - mean
            if (score := total * total / (len(self._blocks) - index)) > best:
                best, begin = score, index
        return begin


def _cv(values: Sequence[int]) -> float:
    """Standard deviation over mean."""
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / len(values)) / mean if mean > 0 else 0.0
