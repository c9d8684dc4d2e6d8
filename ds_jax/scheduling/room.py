"""What one step of a lane has for prompts beside its decodes: the seconds that their slack leaves, and what fits in."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence as Many

from ds_jax.scheduling.slack import Foresight

FLOOR = 0.7
"""A decode that is behind gets at least this share of its SLO_tpot for each token, so that it catches up."""
FEW = 0.1
"""Share of a batch, those with the least slack, that may fall behind for a while for the sake of a prompt,"""
BEHIND = 2.0
"""by a step of at most so many SLO_tpot."""
SMALLEST_CHUNK = 16
"""Tokens; below, a worker takes no further prompts until a chunk of twice as many is safe."""


class Room:
    """What one step of a lane has for prompts beside its decodes."""

    def __init__(self, foresight: Foresight, lane: int, now_ns: int):
        self._foresight = foresight
        self.lane = lane
        self.forecast, self.account = foresight.forecast, foresight.accounts[lane]
        self.free_ns = self.forecast.free_ns(now_ns, lane)
        """When the step begins."""
        self._admitted: dict[float, bool] = {}

    @functools.cached_property
    def strict(self) -> float:
        """Seconds that the step may take for its decodes; inf: nobody minds."""
        return self._seconds(0.0, 0.0)

    @functools.cached_property
    def lenient(self) -> float:
        """The same if a few of them may fall behind."""
        return max(self.strict, self._seconds(FEW, BEHIND))

    def _seconds(self, few: float, behind: float) -> float:
        if not self.account.batch:
            return math.inf
        return (self.account.lenient_due_ns(self.free_ns, FLOOR, few, behind) - self.free_ns) / 1e9

    def chunk_within(self, seconds: float, start: int, most: int, beside: Many[tuple[int, int]] = ()) -> int:
        """As `Forecast.chunk_within`, beside the decodes of the lane."""
        return self.forecast.chunk_within(seconds, start, most, self.account.batch, self.account.context_tokens, beside)

    def admits(self, seconds: float) -> bool:
        """Whether chunks in a step of so many seconds are large enough to begin another prompt with.

        With hysteresis: where they were not when the worker was planned last, they must be twice as large.
        """
        if not self.account.batch:
            return True
        if seconds not in self._admitted:
            enough = SMALLEST_CHUNK if self._foresight.admits else 2 * SMALLEST_CHUNK
            self._admitted[seconds] = self.chunk_within(seconds, 0, enough) >= enough
        return self._admitted[seconds]

    def remember(self) -> None:
        """The step is planned: the next one knows whether there was slack, if that was asked."""
        if self._admitted:
            self._foresight.admits = any(self._admitted.values())
