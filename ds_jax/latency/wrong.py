"""Predictions that are off by a factor: to see what a scheduler makes of them. Never the simulator's truth."""

from __future__ import annotations

from collections.abc import Sequence

from ds_jax.latency.step_time import Chunk, Predictor, StepTime
from ds_jax.protocol import Instance


class Scaled:
    """A `StepTime` times a factor."""

    def __init__(self, step_time: StepTime, factor: float):
        if not factor > 0:
            raise ValueError(f"factor = {factor} must be greater than 0")
        self._step_time, self._factor = step_time, factor

    @property
    def stages(self) -> int:
        return self._step_time.stages

    def step_s(self, chunks: Sequence[Chunk], batch: int, context_tokens: int) -> float:
        """As `StepTime.step_s`."""
        return self._factor * self._step_time.step_s(chunks, batch, context_tokens)


def wrong_by(predictor: Predictor, factor: float) -> Predictor:
    """A predictor that foretells `factor` times what the given one does, of whatever that one knows."""

    def predict(instance: Instance) -> StepTime | None:
        step_time = predictor(instance)
        return None if step_time is None else Scaled(step_time, factor)

    return predict
