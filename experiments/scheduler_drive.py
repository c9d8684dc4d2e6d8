"""A scheduler driven in virtual time, with the processor time inside it measured."""

from __future__ import annotations

import heapq
import itertools
import time
from dataclasses import dataclass
from typing import Any

from ds_jax.config import ROLES, SchedulerConfig
from ds_jax.latency import FittedStepTime, StepFit
from ds_jax.protocol import (
    Arrived,
    Command,
    Copy,
    CopyDone,
    Event,
    Instance,
    InstanceUp,
    Reject,
    Request,
    Role,
    Run,
    SetTimer,
    Slo,
    Step,
    StepDone,
    Stopped,
    Timer,
)
from ds_jax.scheduling import create_scheduler

PROMPT_TOKENS, MOST_TOKENS, PAGE_SIZE = 256, 4096, 16
FIT = StepFit(tp=1, prefill=(0.018, 1e-4, 7e-9), decode=(0.020, 6e-7, 4e-5))
FIT_TIMES = FittedStepTime(FIT)
"""Step times, about those of a 13B model on one A100."""
TPOT, TTFT_S = 2, 0.05
"""Targets, where requests have any: so many decode steps of all running requests for each token, and so many seconds
for each request that comes before. About the half of them can be in time while they all come at once."""
COPY_NS = 200_000
CHURN = 4
"""Decode steps between two endings, each followed by an arrival."""
STRETCH = 10 * CHURN
"""Steps that are timed together; the fastest stretch is what the machine does undisturbed."""


@dataclass
class Spent:
    """Time inside the scheduler."""

    seconds: float = 0.0
    events: int = 0
    steps: int = 0
    tokens: int = 0

    def row(self) -> dict[str, float]:
        return {
            "us_per_event": self.seconds / max(1, self.events) * 1e6,
            "us_per_step": self.seconds / max(1, self.steps) * 1e6,
            "us_per_token": self.seconds / max(1, self.tokens) * 1e6,
            "events": self.events,
            "steps": self.steps,
        }


class Drive:
    """Carries out whatever a scheduler commands, in virtual time; everything succeeds."""

    def __init__(self, policy: str, requests: int, targets: bool = False):
        options = SchedulerConfig(token_budget=requests + 4096)
        self.scheduler = create_scheduler(policy, options, (lambda instance: FIT_TIMES) if targets else None)
        step_s = FIT.step_s([], requests, requests * 2 * PROMPT_TOKENS)
        self._slo = Slo(round(requests * TTFT_S * 1e9), round(TPOT * step_s * 1e9)) if targets else None
        self.now_ns = 0
        self.spent = Spent()
        self.decoding: dict[int, int] = {}
        """Sequence -> tokens decoded so far, in order of their first decode."""
        self.rejected = 0
        self._due: list[tuple[int, int, Event]] = []
        self._order = itertools.count()
        self._busy_until: dict[Any, int] = {}
        self._over: set[int] = set()
        self._ids = itertools.count()
        pages = (requests + 64) * ((PROMPT_TOKENS + MOST_TOKENS) // PAGE_SIZE)
        for id, role in enumerate(sorted(ROLES[policy])):
            prefills, decodes = role != Role.DECODE, role != Role.PREFILL
            self.tell(
                InstanceUp(
                    Instance(
                        id=id,
                        role=role,
                        epoch=0,
                        pages=pages,
                        page_size=PAGE_SIZE,
                        slots=(requests + 64) * decodes,
                        max_step_tokens=8192 * prefills,
                        max_step_sequences=64 * prefills,
                        saturation_tokens=2048 * prefills,
                    )
                )
            )

    def arrive(self) -> None:
        self.tell(Arrived(Request(next(self._ids), PROMPT_TOKENS, MOST_TOKENS, slo=self._slo)))

    def end_oldest(self) -> None:
        """The longest running sequence meets its stop token."""
        sequence = next(iter(self.decoding))
        del self.decoding[sequence]
        self._over.add(sequence)
        self.tell(Stopped(sequence, "stop"))

    def advance(self) -> bool:
        """The next thing happens; False if nothing is due."""
        if not self._due:
            return False
        self.now_ns, _, event = heapq.heappop(self._due)
        self.tell(event)
        return True

    def tell(self, event: Event) -> None:
        start = time.process_time()
        commands = self.scheduler.handle(event, self.now_ns)
        self.spent.seconds += time.process_time() - start
        self.spent.events += 1
        for command in commands:
            self._carry_out(command)

    def _carry_out(self, command: Command) -> None:
        match command:
            case Run(step):
                self.spent.steps += 1
                event = StepDone(step.id, self._emitted(step))
                self._after((step.instance, step.lane), event, round(1e9 * self._seconds(step)))
            case Copy(id=id):
                self._after("link", CopyDone(id, True), COPY_NS)
            case SetTimer(key, at_ns):
                heapq.heappush(self._due, (max(at_ns, self.now_ns + 1), next(self._order), Timer(key)))
            case Reject():
                self.rejected += 1

    def _emitted(self, step: Step) -> dict[int, int]:
        for work in step.decodes:
            if work.sequence not in self._over:
                self.decoding[work.sequence] = self.decoding.get(work.sequence, 0) + 1
        sampled = [work.sequence for work in step.decodes]
        sampled += [work.sequence for work in step.prefills if work.samples]
        self.spent.tokens += len(sampled)
        return dict.fromkeys((id for id in sampled if id not in self._over), 1)

    def _seconds(self, step: Step) -> float:
        """As foretold, but for the tokens decoded so far."""
        chunks = [(chunk.start, chunk.length) for chunk in step.prefills]
        return FIT.step_s(chunks, len(step.decodes), len(step.decodes) * 2 * PROMPT_TOKENS)

    def _after(self, line: Any, event: Event, duration_ns: int) -> None:
        """Things of one line happen one after the other."""
        at = self._busy_until[line] = max(self._busy_until.get(line, 0), self.now_ns) + duration_ns
        heapq.heappush(self._due, (at, next(self._order), event))


def measure(policy: str, requests: int, steps: int, targets: bool = False) -> dict[str, Any]:
    """Both phases of one policy.

    Args:
        targets: requests have latency targets, and the scheduler a forecast of step times.

    Raises:
        RuntimeError: the requests do not all come to decode.
    """
    drive = Drive(policy, requests, targets)
    drive.spent = Spent()
    for _ in range(requests):
        drive.arrive()
    while len(drive.decoding) < requests:
        if not drive.advance() or drive.rejected:
            raise RuntimeError(f"{policy}: only {len(drive.decoding)} of {requests} requests came to decode")
    filling, drive.spent = drive.spent, Spent()
    begun = 0
    marks = [(0, 0.0)]
    while drive.spent.steps < steps:
        drive.advance()
        if drive.spent.steps >= begun + CHURN:
            begun = drive.spent.steps
            drive.end_oldest()
            drive.arrive()
        if drive.spent.steps >= marks[-1][0] + STRETCH:
            marks.append((drive.spent.steps, drive.spent.seconds))
    stretches = [(later - earlier) / (last - first) for (first, earlier), (last, later) in itertools.pairwise(marks)]
    steady = drive.spent.row()
    steady["us_per_step_undisturbed"] = min(stretches) * 1e6 if stretches else steady["us_per_step"]
    return {"policy": policy, "targets": targets, "running": requests, "filling": filling.row(), "steady": steady}
