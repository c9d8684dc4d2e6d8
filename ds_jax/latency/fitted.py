"""The three-coefficient form of step times, as DistServe's public simulator has it.

    prefill = a + b sum(l) + c sum(l^2)                   l: tokens of each prompt in the step
    decode  = a + b sum(context) + c batch                context: tokens that each decode attends to, its own included

with one set of decode coefficients up to `large_batch` sequences and another above. All seconds, all stages together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ds_jax.latency.step_time import Chunk

Three = tuple[float, float, float]
Interval = tuple[float, float]
ANY: Interval = (0.0, math.inf)


@dataclass(frozen=True)
class StepFit:
    """Coefficients in seconds of an instance with this tensor parallelism, and where they were measured."""

    tp: int
    prefill: Three
    """Per step, per token, per squared token."""
    decode: Three
    """Per step, per token of context, per sequence."""
    decode_large: Three | None = None
    """The same for steps of more than `large_batch` sequences."""
    large_batch: int = 95
    mixed_s: float = 0.0
    """What a step with chunks and decodes takes beyond what `step_s` makes of the two."""
    prompt_tokens: Interval = ANY
    """Measured range of the prompt tokens of a step."""
    batch: Interval = ANY
    """Measured range of the decodes of a step."""
    context_tokens: Interval = ANY
    """Measured range of the tokens that the decodes of a step attend to."""
    prefill_error: float | None = None
    """Mean relative error of the fit over its own measurements; None: not known."""
    decode_error: float | None = None
    mixed_error: float | None = None

    def step_s(self, chunks: Sequence[Chunk], batch: int, context_tokens: int) -> float:
        """Seconds of one step.

        A chunk that starts at s costs the attention of its own tokens to the s before them: c ((s + l)^2 - s^2).
        In a mixed step the decodes' tokens ride along in the chunks' matrix products: the larger of the two bases, then
        both parts' own costs.
        """
        decode = 0.0
        if batch:
            base, per_context, per_sequence = self.decode
            if batch > self.large_batch and self.decode_large is not None:
                base, per_context, per_sequence = self.decode_large
            decode = base + per_context * context_tokens + per_sequence * batch
            if not chunks:
                return decode
        a, b, c = self.prefill
        tokens = squares = 0
        for start, length in chunks:
            tokens += length
            squares += length * (2 * start + length)
        prefill = a + b * tokens + c * squares
        if not batch:
            return prefill if chunks else 0.0
        return max(prefill, base) + (decode - base) + self.mixed_s

    def saturation_tokens(self, share: float = 0.9) -> int:
        """L_m: the shortest prompt that runs at `share` of the best throughput in tokens/s (DistServe, section 3.1).

        l / (a + b l + c l^2) is best at l = sqrt(a / c); the prompt is the smaller root of
        c l^2 + (b - 1 / (share best)) l + a = 0.
        """
        a, b, c = self.prefill
        slowest = b + 2 * math.sqrt(a * c) if a > 0 and c > 0 else b  # seconds per token at the best length
        if a <= 0 or slowest <= 0:
            return 1
        p = slowest / share - b
        if c <= 0:
            return math.ceil(a / p) if p > 0 else 1
        root = p * p - 4 * a * c
        return math.ceil((p - math.sqrt(max(root, 0.0))) / (2 * c))


class FittedStepTime:
    """A `StepTime` from a `StepFit`; `outside(kind, sentence)` is told once of each quantity that leaves its range."""

    def __init__(self, fit: StepFit, stages: int = 1, outside: Callable[[str, str], None] | None = None):
        self.fit = fit
        self.stages = stages
        self._outside = outside
        self._ranges = {
            "prompt tokens in a step": list(fit.prompt_tokens),
            "sequences in a decode step": list(fit.batch),
            "context tokens in a decode step": list(fit.context_tokens),
        }
        self._prompt, self._batch, self._context = self._ranges.values()

    def step_s(self, chunks: Sequence[Chunk], batch: int, context_tokens: int) -> float:
        """As `StepTime.step_s`."""
        if chunks:
            tokens = sum([length for _, length in chunks])
            if not self._prompt[0] <= tokens <= self._prompt[1]:
                self._left("prompt tokens in a step", tokens)
        if batch:
            if not self._batch[0] <= batch <= self._batch[1]:
                self._left("sequences in a decode step", batch)
            if not self._context[0] <= context_tokens <= self._context[1]:
                self._left("context tokens in a decode step", context_tokens)
        return self.fit.step_s(chunks, batch, context_tokens)

    def _left(self, quantity: str, value: int) -> None:
        measured = self._ranges[quantity]
        if self._outside is not None:
            low, high = measured
            kind = f"tp = {self.fit.tp}: {quantity}"
            self._outside(kind, f"{kind}: {value} is outside the measured {low:g} to {high:g}")
        measured[:] = ANY
