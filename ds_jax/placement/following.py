"""A trace is served by a fleet that follows it: monitor, planner and changes inside one simulation.

What the monitor hears, it hears when a running system would: a prompt when it arrives, an output when it has ended.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from ds_jax.metrics import RequestTimes
from ds_jax.placement.changeover import Change, ChangeCost, Changeover, Fleet
from ds_jax.placement.layouts import Group
from ds_jax.placement.replanning import Replanner
from ds_jax.protocol import Arrived, Command, Event, InstanceUp, Scheduler
from ds_jax.scheduling import create_scheduler
from ds_jax.simulation import VirtualTime
from ds_jax.workload import Submission
from ds_jax.workload.monitor import Shift, ShiftTest
from ds_jax.workload.unfinished import finished

SETTLE = 200
"""Requests of the new pattern that a plan is made from, at least."""
ENDED = 100
"""Of them, those that have ended, at least."""
UNKNOWN = 0.1
"""Share of outputs that may be longer than all that have ended."""


@dataclass
class Followed:
    """What came of it."""

    times: dict[int, RequestTimes] = field(default_factory=dict)
    shifts: list[Shift] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)
    stays: list[tuple[Shift, int]] = field(default_factory=list)
    """Shifts after which the plan was to change nothing, and when that was known."""
    planning_s: list[float] = field(default_factory=list)
    """What each plan took in real time on this machine."""

    @property
    def replayed(self) -> int:
        """Sequences whose prompt and output so far were computed again."""
        return sum(one.replays > 0 for one in self.times.values())


def follow(
    replanner: Replanner,
    trace: Sequence[Submission],
    first: Fleet,
    *,
    replan: bool = True,
    test: ShiftTest | None = None,
    cost: ChangeCost | None = None,
    strict: bool = False,
) -> Followed:
    """Serve the trace, beginning with a fleet; with `replan` the fleet follows the requests.

    Args:
        strict: hold the scheduler to every rule of the protocol; slower.
    """
    return _Follower(replanner, first, replan, test or ShiftTest(), cost, strict).run(trace)


class _Follower:
    """A scheduler, whose events are heard on their way to the one that it wraps."""

    def __init__(
        self, replanner: Replanner, first: Fleet, replan: bool, test: ShiftTest, cost: ChangeCost | None, strict: bool
    ):
        self.replanner, self.test, self.replan = replanner, test, replan
        self.changeover = Changeover(first, replanner.hardware, cost)
        self.scheduler: Scheduler = create_scheduler("disaggregated")
        self.gpus = {id: shape.gpus for id, (_, shape) in self.changeover.kinds.items()}
        steps = {id: replanner.hardware.step_time(Group(*kind)) for id, kind in self.changeover.kinds.items()}
        self.latency = replanner.hardware.placed(steps, self.gpus)
        self.world = VirtualTime(self, self.latency, self._ended, strict=strict)
        self.followed = Followed()
        self.pending: Shift | None = None

    def run(self, trace: Sequence[Submission]) -> Followed:
        self.world.run([(0, InstanceUp(one)) for one in self.changeover.instances], trace)
        if living := self.world.living():
            raise RuntimeError(f"{len(living)} requests never end, the oldest is {living[0]}")
        return self.followed

    def _place(self) -> None:
        """Step times of instances that are new."""
        for id, kind in self.changeover.kinds.items():
            if id not in self.gpus:
                self.gpus[id] = kind[1].gpus
                self.latency.place(id, self.replanner.hardware.step_time(Group(*kind)))

    def handle(self, event: Event, now_ns: int) -> list[Command]:
        commands = self.scheduler.handle(event, now_ns)
        if isinstance(event, Arrived) and self.replan:
            self._told(self.test.arrived(event.request.id, now_ns, event.request.prompt_tokens))
            self._consider(now_ns)
        return commands

    def _ended(self, times: RequestTimes) -> None:
        self.followed.times[times.sequence] = times
        if self.replan:
            tokens = 0 if times.rejected else times.output_tokens
            self._told(self.test.ended(times.sequence, times.end_ns, tokens))

    def _told(self, shift: Shift | None) -> None:
        if shift is not None:
            self.pending = shift
            self.followed.shifts.append(shift)

    def _consider(self, now_ns: int) -> None:
        """Plan as soon as enough is known of the requests since the shift, and the last change is over."""
        if self.pending is None or now_ns < self.changeover.up_ns:
            return
        history = self.test.history(self.pending.since_ns)
        if len(history) < SETTLE or sum(one.output_tokens is not None for one in history) < ENDED:
            return
        lengths, unknown = finished(history, self.world.clock.produced)
        if unknown > UNKNOWN:
            return
        shift, self.pending = self.pending, None
        rate = (len(history) - 1) / (history[-1].at_ns - history[0].at_ns) * 1e9
        begin = time.perf_counter()
        wanted = self.replanner.fleet(lengths, rate, self.changeover.fleet)
        self.followed.planning_s.append(time.perf_counter() - begin)
        if wanted == self.changeover.fleet:
            self.followed.stays.append((shift, now_ns))
            return
        change, events = self.changeover.change(wanted, shift, now_ns)
        self.followed.changes.append(change)
        self._place()
        for at_ns, event in events:
            self.world.schedule(at_ns, event)
