"""What scenarios of slack-based policies share: exact forecasts in round figures, and workers of two kinds."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from hypothesis import settings

from ds_jax.protocol import Arrived, Instance, Role, Slo
from tests.scheduling.world import World

MS = 10**6


@dataclass(frozen=True)
class RoundFigures:
    """A millisecond a prompt token, ten for a step that decodes."""

    stages: int = 1

    def step_s(self, chunks, batch, context_tokens):
        return 1e-3 * sum(length for _, length in chunks) + 10e-3 * bool(batch)


def foretell(instance: Instance) -> RoundFigures:
    return RoundFigures()


def worker(id: int, role: Role, **changes: Any) -> Instance:
    """Two tokens a page; limits wide unless changed."""
    limits = {"max_step_tokens": 1000, "max_step_sequences": 100, "saturation_tokens": 10, "slots": 8} | changes
    return Instance(**({"id": id, "role": role, "epoch": 0, "pages": 1000, "page_size": 2} | limits))


class Clocked(World):
    """A world whose steps take what is foretold."""

    def after(self, ms: float) -> Clocked:
        self.now_ns += round(ms * MS)
        return self

    def served(self, id: int, prompt: int, tokens: int, *, tpot_ms: int = 50, ttft_ms: int = 10**6) -> None:
        """Bring a sequence to decode, `tokens` tokens in, each 10 ms after the one before."""
        self.arrive(id, prompt, slo=slo(ttft_ms, tpot_ms))
        while self.contract.sequences[id].confirmed < tokens:
            for copy in self.copies():
                self.land(copy)
            for step in self.steps()[:1]:
                self.after(10).finish(step)


def slo(ttft_ms: int, tpot_ms: int) -> Slo:
    return Slo(ttft_ms * MS, tpot_ms * MS)


class WithTargets:
    """A scheduler whose requests have targets by their id: tight, wide or none, in several classes."""

    def __init__(self, scheduler):
        self.scheduler = scheduler

    @property
    def ledgers(self):
        return self.scheduler.ledgers

    def handle(self, event, now_ns):
        if isinstance(event, Arrived):
            targets = (None, Slo(5, 2), Slo(10**6, 10**5), Slo(40, 3), Slo(0, 10**5))[event.request.id % 5]
            event = Arrived(replace(event.request, slo=targets))
        return self.scheduler.handle(event, now_ns)


def fewer(case: Any, examples: int) -> Any:
    """The conformance machine with fewer examples: these policies look at every prompt in line, and take their time."""
    if case.settings.max_examples <= 100:  # not where a longer search was asked for
        case.settings = settings(case.settings, max_examples=examples)
    return case
