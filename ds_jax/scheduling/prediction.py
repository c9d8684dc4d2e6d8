"""What a slack-based policy foretells: how long steps will take on one worker, and when those in flight will be done.

Tropical predicts from fits made beforehand: T_prefill = a L^2 + b L + c, T_decode = a context + b (section 4.1). Here
such fits come as a `StepTime`, and are not believed: every step that lands says how long it really took, so that a
prediction that is wrong by a factor is put right, and the scatter that remains becomes the margin of `safe_s`. With no
`StepTime` at all the same two forms are learned from the worker's own steps, by recursive least squares on the
relative error.

A step begins when it is commanded or when the one before it on its lane is done, whichever is later; it ends when its
StepDone is heard. All state is plain numbers: the same events give the same predictions.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from ds_jax.latency import Chunk, StepTime

LONGEST_MEMORY = 64
"""Steps over which a correction is averaged: about as long as a load stays as it is."""

FIRST_MARGIN = 0.1
"""Relative error that is feared before any step was seen."""


class Launched(NamedTuple):
    at_ns: int
    raw_s: float
    """What the prediction says without its correction."""
    work: tuple[Sequence[Chunk], int, int]


class Correction:
    """The mean ratio of real to predicted durations, and the scatter around it, of one kind of step."""

    __slots__ = ("ratio", "scatter", "seen")

    def __init__(self) -> None:
        self.ratio = 1.0
        self.scatter = FIRST_MARGIN
        self.seen = 0

    def learn(self, ratio: float) -> None:
        """One more step took `ratio` times what was predicted; a single outlier counts at most double or half."""
        ratio = min(max(ratio, self.ratio / 2), self.ratio * 2) if self.seen else ratio
        self.seen += 1
        weight = 1 / min(self.seen, LONGEST_MEMORY)
        self.scatter += (abs(ratio / self.ratio - 1) - self.scatter) / min(self.seen + 4, LONGEST_MEMORY)
        self.ratio += (ratio - self.ratio) * weight


class Learned:
    """Step times learned from the worker's own steps: base + token + squared token + sequence + context.

    Recursive least squares on (predicted / real - 1), so that short steps count as much as long ones.
    """

    stages = 1
    _SCALES = (1.0, 1e-3, 1e-6, 1e-2, 1e-5)
    """Bring the five features to about one."""

    def __init__(self) -> None:
        self.steps = 0
        self._weights = [0.0] * 5
        self._covariance = [[1e4 * (row == column) for column in range(5)] for row in range(5)]

    def step_s(self, chunks: Sequence[Chunk], batch: int, context_tokens: int) -> float:
        """As `StepTime.step_s`; 0 before anything was learned."""
        if not chunks and not batch:
            return 0.0
        features = self._features(chunks, batch, context_tokens)
        return max(0.0, sum([weight * one for weight, one in zip(self._weights, features, strict=True)]))

    def learn(self, work: tuple[Sequence[Chunk], int, int], seconds: float) -> None:
        """A step of this work took so long."""
        if seconds <= 0:
            return
        self.steps += 1
        x = [one / seconds for one in self._features(*work)]
        px = [sum([row[i] * x[i] for i in range(5)]) for row in self._covariance]
        gain = 1 / (1 + sum([x[i] * px[i] for i in range(5)]))
        error = 1 - sum([self._weights[i] * x[i] for i in range(5)])
        for i in range(5):
            self._weights[i] += gain * px[i] * error
            row = self._covariance[i]
            for j in range(5):
                row[j] -= gain * px[i] * px[j]

    def _features(self, chunks: Sequence[Chunk], batch: int, context_tokens: int) -> tuple[float, ...]:
        tokens = sum([length for _, length in chunks])
        squares = sum([length * (2 * start + length) for start, length in chunks])
        one, token, square, sequence, context = self._SCALES
        return one, token * tokens, square * squares, sequence * batch, context * context_tokens


class Forecast:
    """Predictions for one worker, corrected by what its steps have taken."""

    def __init__(self, step_time: StepTime | None, lanes: int = 1):
        self._learned = Learned() if step_time is None else None
        self._step_time: StepTime = step_time or self._learned  # type: ignore[assignment]
        self._corrections = (Correction(), Correction())
        """Of steps that only decode, and of those with prompt chunks."""
        self._lanes: list[deque[Launched]] = [deque() for _ in range(lanes)]
        self._done_ns = [0] * lanes

    # --- asking -------------------------------------------------------------------------------------------------------

    def step_s(self, chunks: Sequence[Chunk], batch: int = 0, context_tokens: int = 0) -> float:
        """Seconds that a step is expected to take."""
        return self._step_time.step_s(chunks, batch, context_tokens) * self._corrections[bool(chunks)].ratio

    def safe_s(self, chunks: Sequence[Chunk], batch: int = 0, context_tokens: int = 0) -> float:
        """Seconds that a step hardly exceeds: twice the mean scatter above what is expected."""
        correction = self._corrections[bool(chunks)]
        return self._step_time.step_s(chunks, batch, context_tokens) * correction.ratio * (1 + 2 * correction.scatter)

    def prefill_s(self, tokens: int, start: int, most: int) -> float:
        """Seconds to run the rest of a prompt of `tokens` tokens from `start` on, alone and in chunks of `most`."""
        rest = tokens - start
        if rest <= 0:
            return 0.0
        further = -(-rest // max(1, most)) - 1
        whole = self._step_time.step_s([(start, rest)], 0, 0)
        each = self._step_time.step_s([(0, 1)], 0, 0) if further else 0.0
        return (whole + further * each) * self._corrections[True].ratio

    def free_ns(self, now_ns: int, lane: int | None = None) -> int:
        """When the steps in flight on the lane are expected to be done: now or later. None: on the soonest free."""
        if lane is None:
            if len(self._lanes) > 1:
                return min([self.free_ns(now_ns, one) for one in range(len(self._lanes))])
            lane = 0
        flight = self._lanes[lane]
        if not flight:
            return now_ns
        end_ns = max(flight[0].at_ns, self._done_ns[lane]) + self._expected_ns(flight[0])
        end_ns = max(now_ns, end_ns)
        for index in range(1, len(flight)):
            end_ns += self._expected_ns(flight[index])
        return end_ns

    def chunk_within(
        self, seconds: float, start: int, most: int, batch: int, context_tokens: int, beside: Sequence[Chunk] = ()
    ) -> int:
        """Most tokens, up to `most`, of a prompt from `start` on in a step that hardly exceeds `seconds`; 0: none.

        By interpolation between a size that fits and one that does not: with more tokens a step takes longer, whatever
        the form of its time. `beside` are other chunks.
        """
        if most <= 0 or seconds == math.inf:
            return max(0, most)

        def over_s(tokens: int) -> float:
            return self.safe_s([*beside, (start, tokens)], batch, context_tokens) - seconds

        if (above := over_s(most)) <= 0:
            return most
        if (below := over_s(1)) > 0:
            return 0
        low, high = 1, most
        for _ in range(8):
            if high - low <= max(1, low // 32):
                break
            middle = min(max(low + int((high - low) * below / (below - above)), low + 1), high - 1)
            if (over := over_s(middle)) <= 0:
                low, below = middle, over
                if over > -seconds / 64:
                    break
            else:
                high, above = middle, over
        return low

    # --- learning -----------------------------------------------------------------------------------------------------

    def launched(self, lane: int, now_ns: int, chunks: Sequence[Chunk], batch: int, context_tokens: int) -> None:
        """A step was commanded."""
        work = (chunks, batch, context_tokens)
        self._lanes[lane].append(Launched(now_ns, self._step_time.step_s(*work), work))

    def landed(self, lane: int, now_ns: int) -> None:
        """The oldest step in flight on the lane is done."""
        at_ns, raw_s, work = self._lanes[lane].popleft()
        seconds = (now_ns - max(at_ns, self._done_ns[lane])) / 1e9
        self._done_ns[lane] = now_ns
        if self._learned is not None:
            raw_s = self._learned.step_s(*work) if self._learned.steps >= 5 else 0.0
            self._learned.learn(work, seconds)
        if raw_s > 0 and seconds > 0:
            self._corrections[bool(work[0])].learn(seconds / raw_s)

    def _expected_ns(self, launched: Launched) -> int:
        return round(launched.raw_s * self._corrections[bool(launched.work[0])].ratio * 1e9)
