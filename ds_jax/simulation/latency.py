"""How long a step or a copy takes, in virtual time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from ds_jax.protocol import Copy, Step


class LatencyModel(Protocol):
    """Asked once for every step and copy, in the order of their commands."""

    def step_ns(self, step: Step, context_tokens: int) -> int:
        """Nanoseconds that the step runs, through all stages; its decodes attend to `context_tokens` tokens in all."""
        ...

    def copy_ns(self, copy: Copy) -> int:
        """Nanoseconds from the command until the copy has landed."""
        ...


@dataclass(frozen=True)
class LinearLatency:
    """prefill = base + token * prompt tokens; decode = base + context * sum of contexts + sequence * batch;
    copy = base + page * pages. All in nanoseconds. A step with both lists costs both, and the larger base once."""

    prefill_base_ns: float = 5e6
    prefill_token_ns: float = 20e3
    decode_base_ns: float = 10e6
    decode_context_ns: float = 20.0
    decode_sequence_ns: float = 50e3
    copy_base_ns: float = 1e6
    copy_page_ns: float = 20e3

    def step_ns(self, step: Step, context_tokens: int) -> int:
        base = cost = 0.0
        if step.prefills:
            base = self.prefill_base_ns
            cost = self.prefill_token_ns * sum([prefill.length for prefill in step.prefills])
        if step.decodes:
            base = max(base, self.decode_base_ns)
            cost += self.decode_context_ns * context_tokens + self.decode_sequence_ns * len(step.decodes)
        return round(base + cost)

    def copy_ns(self, copy: Copy) -> int:
        return round(self.copy_base_ns + self.copy_page_ns * len(copy.pages))
