"""What everybody who asks for step times asks: schedulers a predictor, the simulator its truth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ds_jax.protocol import Instance

Chunk = tuple[int, int]
"""Prompt tokens [start, start + length) of one sequence, as (start, length)."""


class StepTime(Protocol):
    """Step times of one instance with its tensor and pipeline parallelism."""

    @property
    def stages(self) -> int:
        """Pipeline stages (pp)."""
        ...

    def step_s(self, chunks: Sequence[Chunk], batch: int, context_tokens: int) -> float:
        """Seconds that one step takes through all stages together; one stage takes step_s / stages.

        Prompt chunks run beside `batch` decodes, which attend to `context_tokens` tokens in all, their own included.
        Either part may be empty.
        """
        ...


class Predictor(Protocol):
    """What a scheduler that foretells is given."""

    def __call__(self, instance: Instance) -> StepTime | None:
        """Step times of the instance; None: unknown, the scheduler learns or goes without."""
        ...
