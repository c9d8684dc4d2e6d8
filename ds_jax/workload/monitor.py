"""Whether the workload has shifted: rate and lengths of recent requests against those that the plan was made for.

DistServe replans when the pattern of requests changes (section 4.3); the paper leaves open how that is seen. Here every
block of requests gives three numbers: the mean gap between arrivals and the mean lengths of prompts and outputs. Each
is held against the reference by a two-sided CUSUM (Page, 1954), the quickest detector of a lasting change at a given
rate of false alarms. A change is only told if it is large enough to matter.

Prompts are known when requests arrive, outputs only when they end: a block's outputs are looked at when the last of its
requests has ended. Those that happen to end first are the short ones, and would seem to be a shift.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Pattern:
    """What a stretch of requests looks like."""

    requests: int
    rate: float
    """Requests/s."""
    prompt_tokens: float
    """Mean."""
    output_tokens: float
    """Mean of those that have ended; nan if none has."""

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


@dataclass(slots=True)
class Observation:
    """One request, as far as it is known by now."""

    id: int
    at_ns: int
    """When it arrived."""
    prompt_tokens: int
    output_tokens: int | None = None
    """None until it has ended."""


class WorkloadMonitor:
    """Keeps the last requests, by number."""

    def __init__(self, window: int = 2000):
        self._requests: deque[Observation] = deque(maxlen=window)
        self._running: dict[int, Observation] = {}

    def arrived(self, id: int, at_ns: int, prompt_tokens: int) -> None:
        """A request that arrived at `at_ns`; to be told in order of arrival."""
        self._running[id] = one = Observation(id, at_ns, prompt_tokens)
        self._requests.append(one)

    def ended(self, id: int, output_tokens: int) -> None:
        """It has ended with so many tokens. Without any (it was refused) its output stays unknown."""
        one = self._running.pop(id, None)
        if one is not None and output_tokens:
            one.output_tokens = output_tokens

    def since(self, at_ns: int) -> list[Observation]:
        """The requests in the window that arrived at `at_ns` or later."""
        return [one for one in self._requests if one.at_ns >= at_ns]

    def pattern(self, since_ns: int = 0) -> Pattern:
        """Rate and mean lengths of the requests in the window from `since_ns` on.

        Raises:
            ValueError: there are fewer than two.
        """
        return pattern_of(self.since(since_ns))


def pattern_of(requests: Sequence[Observation]) -> Pattern:
    """Rate and mean lengths of these requests."""
    count = len(requests)
    if count < 2:
        raise ValueError(f"{count} requests are too few to tell their pattern: there must be at least 2")
    span_s = max(requests[-1].at_ns - requests[0].at_ns, 1) / 1e9
    outputs = [one.output_tokens for one in requests if one.output_tokens is not None]
    return Pattern(
        count,
        (count - 1) / span_s,
        sum(one.prompt_tokens for one in requests) / count,
        sum(outputs) / len(outputs) if outputs else math.nan,
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
_OUTPUT = 2


@dataclass
class _Block:
    """Requests that arrived one after another."""

    begin_ns: int
    values: tuple[list[int], list[int], list[int]] = field(default_factory=lambda: ([], [], []))
    """Gaps in ns, prompts and outputs in tokens."""
    running: int = 0
    full: bool = False

    def known(self, quantity: int) -> bool:
        return self.full and (quantity != _OUTPUT or not self.running)


@dataclass
class _Watch:
    """One quantity: the logarithms of its block means and, when there are enough for a reference, the sums."""

    means: list[tuple[int, float]] = field(default_factory=list)
    """With the number of the block."""
    single: list[int] = field(default_factory=list)
    """Of the requests of the reference."""
    sums: _Cusum | None = None
    seen: int = 0
    """Blocks that were taken in."""

    @property
    def height(self) -> float:
        return self.sums.height if self.sums else 0.0

    def change(self) -> int:
        """The block with which the change most likely began: (sum of what comes from it on)^2 / blocks is largest."""
        assert self.sums is not None
        best, begin, total = 0.0, self.means[-1][0], 0.0
        for count, (index, mean) in enumerate(reversed(self.means), start=1):
            total += mean - self.sums.mean
            if (score := total * total / count) > best:
                best, begin = score, index
        return begin


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
    _blocks: list[_Block] = field(default_factory=list, repr=False)
    """Since the reference began; the last one may be filling."""
    _block_of: dict[int, _Block] = field(default_factory=dict, repr=False)
    """Of each request that runs."""
    _watches: tuple[_Watch, ...] = field(default_factory=lambda: tuple(_Watch() for _ in _QUANTITIES), repr=False)
    _last_ns: int | None = None
    _began_ns: int = 0

    def arrived(self, id: int, at_ns: int, prompt_tokens: int) -> Shift | None:
        """Take in one request, in order of arrival; a shift if this one settles that there was one."""
        self._monitor.arrived(id, at_ns, prompt_tokens)
        if not self._blocks or self._blocks[-1].full:
            self._blocks.append(_Block(at_ns if self._last_ns is None else self._last_ns))
        block = self._blocks[-1]
        gaps, prompts, _ = block.values
        if self._last_ns is not None:
            gaps.append(at_ns - self._last_ns)
        prompts.append(prompt_tokens)
        block.running += 1
        self._block_of[id] = block
        self._last_ns = at_ns
        block.full = len(prompts) == self.block
        return self._advance(at_ns) if block.full else None

    def ended(self, id: int, at_ns: int, output_tokens: int) -> Shift | None:
        """A request has ended, with so many tokens, or with none because it was refused."""
        self._monitor.ended(id, output_tokens)
        block = self._block_of.pop(id, None)
        if block is None:
            return None
        block.running -= 1
        if output_tokens:
            block.values[_OUTPUT].append(output_tokens)
        return self._advance(at_ns) if block.known(_OUTPUT) else None

    def history(self, since_ns: int) -> list[Observation]:
        """The requests that arrived since then: what a new plan is made for."""
        return self._monitor.since(since_ns)

    def _advance(self, at_ns: int) -> Shift | None:
        """Take in what has become known."""
        for quantity, watch in enumerate(self._watches):
            while watch.seen < len(self._blocks) and self._blocks[watch.seen].known(quantity):
                self._take(watch, self._blocks[watch.seen].values[quantity])
                if watch.height >= self.threshold:
                    return self._tell(watch, at_ns)
        return None

    def _take(self, watch: _Watch, values: list[int]) -> None:
        index, watch.seen = watch.seen, watch.seen + 1
        if not values:
            return  # all of its requests were refused
        mean = math.log(max(sum(values), 1) / len(values))
        watch.means.append((index, mean))
        if watch.sums is not None:
            watch.sums.add(mean)
            return
        watch.single += values
        if len(watch.means) >= self.reference_blocks:
            watch.sums = self._reference(watch)

    def _reference(self, watch: _Watch) -> _Cusum:
        """Mean and deviation of a quantity's block means.

        The deviation is the larger of two estimates: from the blocks (sees bursts longer than a block), and from single
        requests, cv / sqrt(block) (surer). The mean is itself uncertain: that adds 1 / blocks of the variance, and so
        much of a lasting difference, 1 / sqrt(blocks) deviations, is let pass beside the slack.
        """
        means = [mean for _, mean in watch.means]
        count = len(means)
        mean = sum(means) / count
        between = math.sqrt(sum((value - mean) ** 2 for value in means) / (count - 1))
        deviation = max(between, _cv(watch.single) / math.sqrt(self.block), 0.02)
        return _Cusum(mean, deviation * math.sqrt(1 + 1 / count), self.slack + 1 / math.sqrt(count))

    def _tell(self, loudest: _Watch, at_ns: int) -> Shift | None:
        begin = loudest.change()
        since_ns = self._blocks[begin].begin_ns
        changed = []
        for name, watch in zip(_QUANTITIES, self._watches, strict=True):
            fresh = [mean for index, mean in watch.means if index >= begin]
            if watch.sums is None or not fresh or watch.height < self.threshold / 2:
                continue
            if abs(sum(fresh) / len(fresh) - watch.sums.mean) >= math.log1p(self.least_change):
                changed.append(name)
        if not changed:
            for watch in self._watches:  # sure, but too small to matter: from now on it is watched anew
                if watch.sums is not None and watch.height >= self.threshold:
                    watch.sums.up = watch.sums.down = 0.0
            return None
        before = [one for one in self._monitor.since(self._began_ns) if one.at_ns < since_ns]
        shift = Shift(at_ns, since_ns, tuple(changed), pattern_of(before), self._monitor.pattern(since_ns))
        self._blocks = self._blocks[begin:]
        self._began_ns = since_ns
        self._watches = tuple(_Watch() for _ in _QUANTITIES)
        self._advance(at_ns)
        return shift


def _cv(values: Sequence[int]) -> float:
    """Standard deviation over mean."""
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / len(values)) / mean if mean > 0 else 0.0
