"""A recorder log as workload and latency model, so that the simulator can relive what the engine did."""

from __future__ import annotations

from collections import defaultdict, deque

from ds_jax.metrics import StageClock
from ds_jax.protocol import (
    Arrived,
    Copy,
    CopyDone,
    Drain,
    Event,
    InstanceLost,
    InstanceUp,
    Reject,
    Run,
    Step,
    StepDone,
    Stopped,
    Timer,
)
from ds_jax.recorder import Log
from ds_jax.workload import Submission

NEVER_NS = 2**62
"""Duration of what was never done: its instance was lost before."""


class RecordedDurations:
    """Gives the n-th step of each (instance, epoch, lane), and the n-th copy, the duration that it has in a log.

    Raises:
        ValueError: the log has dropped entries.
    """

    def __init__(self, log: Log):
        self._steps: defaultdict[tuple[int, int, int], deque[int]] = defaultdict(deque)
        self._ran_ns: dict[int, int] = {}
        clock = StageClock(on_step=self._on_step)
        lanes: dict[int, tuple[int, int, int]] = {}
        copied_at_ns: dict[int, int] = {}
        copies: dict[int, int] = {}
        for now_ns, event, commands in log.whole():
            clock.hear(event, commands, now_ns)
            if isinstance(event, CopyDone) and event.copy in copies:
                copies[event.copy] = now_ns - copied_at_ns[event.copy]
            for command in commands:
                if isinstance(command, Run):
                    lanes[command.step.id] = (command.step.instance, command.step.epoch, command.step.lane)
                elif isinstance(command, Copy):
                    copied_at_ns[command.id], copies[command.id] = now_ns, NEVER_NS
        for step, lane in lanes.items():
            self._steps[lane].append(self._ran_ns.get(step, NEVER_NS))
        self._copies = deque(copies.values())

    def _on_step(self, step: Step, begin_ns: int, end_ns: int, done: bool) -> None:
        if done:
            self._ran_ns[step.id] = end_ns - begin_ns

    def step_ns(self, step: Step, context_tokens: int) -> int:
        """Raises ValueError when the log has no such step any more: the simulation has gone another way."""
        durations = self._steps[step.instance, step.epoch, step.lane]
        if not durations:
            raise ValueError(f"the log has no more steps on instance {step.instance}, lane {step.lane}, but got {step}")
        return durations.popleft()

    def copy_ns(self, copy: Copy, now_ns: int) -> int:
        """Raises ValueError when the log has no such copy any more."""
        if not self._copies:
            raise ValueError(f"the log has no more copies, but got {copy}")
        return self._copies.popleft()


def recorded_workload(log: Log) -> tuple[list[Submission], list[tuple[int, Event]]]:
    """The requests of a log with their true lengths, and the events of the world outside, for `simulate`.

    A sequence that was stopped at the time of the step that told its last token has its true length there. Any other
    Stopped came from outside, as did instances that came, went or were drained, and timers, which ring late.

    Raises:
        ValueError: the log has dropped entries.
    """
    arrived: list[tuple[int, Arrived]] = []
    events: list[tuple[int, Event]] = []
    output: defaultdict[int, int] = defaultdict(int)
    true_length: dict[int, int] = {}
    over: set[int] = set()
    last_step = (-1, StepDone(-1))
    for now_ns, event, commands in log.whole():
        match event:
            case Arrived():
                arrived.append((now_ns, event))
            case StepDone(_, emitted):
                last_step = (now_ns, event)
                for sequence, tokens in emitted.items():
                    output[sequence] += tokens
            case Stopped(sequence) if sequence not in over:
                over.add(sequence)
                if last_step[0] == now_ns and last_step[1].emitted.get(sequence):
                    true_length[sequence] = output[sequence]
                else:
                    events.append((now_ns, event))
            case InstanceUp() | InstanceLost() | Drain() | Timer():
                events.append((now_ns, event))
        over.update(command.sequence for command in commands if isinstance(command, Reject))
    requests = []
    for now_ns, event in arrived:
        request = event.request
        outputs = tuple([true_length.get(sequence, request.max_tokens) for sequence in request.sequences])
        requests.append(Submission(now_ns, request, outputs))
    return requests, events


def steps_of(log: Log) -> dict[int, list[Step]]:
    """Steps of each instance in the order of their commands."""
    steps: dict[int, list[Step]] = {}
    for entry in log.entries:
        for command in entry.commands:
            if isinstance(command, Run):
                steps.setdefault(command.step.instance, []).append(command.step)
    return steps
