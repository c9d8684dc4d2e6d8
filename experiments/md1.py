"""M/D/1 queues: the formulas of DistServe's section 3.1 for one prefill instance and prompts of one length."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Server:
    """One prefill instance."""

    name: str
    lanes: int
    prefill_s: float
    """Through all stages."""

    @property
    def capacity(self) -> float:
        """Requests/s beyond which the queue grows for ever."""
        return self.lanes / self.prefill_s

    def formula_s(self, rate: float) -> float:
        """Mean TTFT of an M/D/1 queue at the first stage, then the other stages (section 3.1, equations 1 to 3)."""
        stage_s = self.prefill_s / self.lanes
        return self.prefill_s + rate * stage_s**2 / (2 * (1 - rate * stage_s))


def crossing(pipeline: Server, tensor: Server) -> float | None:
    """The rate from which on the pipeline has the lower mean TTFT; None: there is none."""
    low, high = 0.0, min(pipeline.capacity, tensor.capacity) * (1 - 1e-9)
    if pipeline.formula_s(high) >= tensor.formula_s(high):
        return None
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if pipeline.formula_s(middle) < tensor.formula_s(middle) else (middle, high)
    return low
