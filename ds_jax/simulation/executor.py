"""One more executor: carries a scheduler's commands out in virtual time, on a latency model.

It keeps the contract of `protocol.py` as the engine does: one step at a time on each (instance, lane) with one queued
behind it, a step starting at its Run or when the one before it is done; a sequence that reaches its true length is
`Stopped` at the same time as, and directly after, the StepDone that told its last token; steps in flight may still
name it, and keep no more tokens of it. Copies run side by side with everything.

An instance with several lanes is a pipeline with as many stages: a step takes the same time on each, enters a stage
when it has left the one before it and the stage is free, and waits where it is not: these are the bubbles.

A decode step costs what has changed since the one before it on its lane, not its batch: `simulation.lane`.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from ds_jax.metrics import RequestTimes, StageClock
from ds_jax.protocol import (
    Arrived,
    Command,
    Copy,
    CopyDone,
    Event,
    Instance,
    InstanceLost,
    InstanceUp,
    Reject,
    Run,
    Scheduler,
    SetTimer,
    Step,
    StepDone,
    Stopped,
    Timer,
)
from ds_jax.recorder import Log, Recorder
from ds_jax.simulation.contract import Contract
from ds_jax.simulation.lane import Lane, Pipeline
from ds_jax.simulation.latency import LatencyModel
from ds_jax.simulation.ownership import Violation
from ds_jax.workload import Submission

_LAST = 2**62


@dataclass(frozen=True)
class Simulation:
    """What came of it."""

    times: dict[int, RequestTimes]
    """The life of each sequence, by id."""
    end_ns: int
    """Time of the last event."""
    events: int
    """Events that the scheduler handled."""
    steps: dict[int, list[Step]] | None = None
    """Steps of each instance in the order of their commands, if they were asked for."""
    log: Log | None = None
    """All events and commands, if they were asked for."""


def simulate(
    scheduler: Scheduler,
    instances: Iterable[Instance],
    requests: Iterable[Submission],
    latency: LatencyModel,
    *,
    events: Iterable[tuple[int, Event]] = (),
    steps: bool = False,
    log: bool = False,
    strict: bool = False,
    on_end: Callable[[RequestTimes], None] | None = None,
) -> Simulation:
    """Let the scheduler serve the requests on these instances (all up at time 0) to the end.

    Args:
        requests: a list in any order, or an iterator in order of arrival, of which no more is taken than time has come.
        events: (at_ns, event) of the world outside: Stopped, InstanceLost, InstanceUp, Drain. At the same time they
            come before arrivals, both before the answers to commands, and timers last. A Timer among them is late or
            early on purpose: timers of its key ring then, and not when they were asked for.
        steps: keep all steps.
        log: record all events and commands.
        strict: hold the scheduler to every rule of `Contract`, page by page; slower.
        on_end: called with the life of each sequence as it ends. `times` is empty then, and memory does not grow with
            the number of requests.

    Raises:
        Violation: the scheduler broke the protocol.
        RuntimeError: requests are left and nothing will ever happen.
        ValueError: a request whose output is outside 1 to max_tokens, or an iterator that is not in order.
    """
    recorder = Recorder(2**62) if log else None
    times: dict[int, RequestTimes] = {}

    def keep(one: RequestTimes) -> None:
        times[one.sequence] = one

    world = VirtualTime(scheduler, latency, on_end or keep, recorder=recorder, keep_steps=steps, strict=strict)
    world.run([(0, InstanceUp(instance)) for instance in instances] + list(events), requests)
    living = world.living()
    if living:
        raise RuntimeError(f"{len(living)} sequences never end, the oldest is {living[0]}: no event is left")
    return Simulation(
        dict(sorted(times.items())), world.now_ns, world.events, world.steps, recorder.log() if recorder else None
    )


class VirtualTime:
    """The executor's state; `run` goes through all events in order of time."""

    def __init__(
        self,
        scheduler: Scheduler,
        latency: LatencyModel,
        on_end: Callable[[RequestTimes], None],
        *,
        recorder: Recorder | None = None,
        keep_steps: bool = False,
        strict: bool = False,
    ):
        self.scheduler = scheduler
        self.latency = latency
        self._host_ns: Callable[[Step, int], int] | None = getattr(latency, "host_ns", None)
        self._copies_after_steps: bool = getattr(latency, "copies_after_steps", False)
        self.on_end = on_end
        self.clock = StageClock()
        self.now_ns = 0
        self.events = 0
        self.steps: dict[int, list[Step]] | None = {} if keep_steps else None
        self._listeners = [self.clock.hear]
        if recorder is not None:
            self._listeners.append(recorder.hear)
        if strict:
            self._listeners.insert(0, Contract().hear)
        self._keeps_events = strict or recorder is not None
        """Whether somebody keeps events for later: a mapping that is told must not change any more then."""
        self._timers = 0
        """Timers on the heap: when only they are left and nobody lives, it is over."""
        self._given_timers: set[str] = set()
        self._heap: list[tuple[int, int, Event | Lane]] = []
        self._order = 0
        self._instances: dict[int, Instance] = {}
        self._lanes: dict[tuple[int, int, int], Lane] = {}
        self._copies: dict[int, Copy] = {}
        self._left: dict[int, int] = {}
        """Tokens that each living sequence will still give, until its true length; of one in a running batch, what it
        was when it joined."""
        self._batch_of: dict[int, Lane] = {}
        """The running batch that each sequence is in, as of the last steps launched."""
        self._lane_of: dict[int, Lane] = {}
        """The same as of the last steps done."""
        self._over: list[int] = []
        """Sequences that have ended with the event that is being told."""
        self._stops: set[int] = set()
        """Living sequences whose true length is below their max_tokens."""
        self._context: dict[int, int] = {}
        """Tokens of each living sequence whose KV is planned; of one in a running batch, what it was when it joined."""

    def living(self) -> list[int]:
        """Sequences that have arrived and not ended."""
        return list(self._left)

    def schedule(self, at_ns: int, event: Event) -> None:
        """One more event of the world outside, decided on while the run goes on."""
        if at_ns < self.now_ns:
            raise ValueError(f"{event!r} at {at_ns} ns is in the past: it is {self.now_ns} ns")
        self._at(at_ns, event)

    def run(self, events: Iterable[tuple[int, Event]], requests: Iterable[Submission]) -> None:
        """Deliver the events and arrivals, and answer all commands that follow from them."""
        for at_ns, event in events:
            self._at(at_ns, event)
            if isinstance(event, Timer):
                self._given_timers.add(event.key)
        outside = self._order  # what was on the heap from the start comes before arrivals at the same time
        heap = self._heap
        arrivals = _in_order(requests)
        arrival = next(arrivals, None)
        while arrival is not None or len(heap) > self._timers or (heap and self._left):
            if arrival is not None and (not heap or (arrival.arrival_ns, outside) <= heap[0][:2]):
                self.now_ns = arrival.arrival_ns
                following = next(arrivals, None)
                self._arrive(arrival, following is not None and following.arrival_ns == self.now_ns)
                arrival = following
                continue
            self.now_ns, _, what = heapq.heappop(heap)
            self._timers -= type(what) is Timer
            if type(what) is Lane:
                if what.alive:
                    self._step_done(what)
            elif type(what) is CopyDone:
                if self._copies.pop(what.copy, None) is not None:
                    self._tell(what)
            else:
                self._outside(what)  # type: ignore[arg-type]

    def _at(self, at_ns: int, what: Event | Lane) -> None:
        timer = type(what) is Timer
        heapq.heappush(self._heap, (at_ns, self._order + _LAST * timer, what))
        self._order += 1
        self._timers += timer

    # --- events -------------------------------------------------------------------------------------------------------

    def _arrive(self, submission: Submission, more: bool) -> None:
        request, outputs = submission.request, submission.output_tokens
        each = (outputs,) * request.n if isinstance(outputs, int) else outputs
        for id, output in zip(request.sequences, each, strict=True):
            if not 1 <= output <= request.max_tokens:
                raise ValueError(f"output_tokens = {output} of request {request.id} must be 1 to {request.max_tokens}")
            self._left[id] = output
            if output < request.max_tokens:
                self._stops.add(id)
        self._tell(Arrived(request, more))

    def _outside(self, event: Event) -> None:
        if isinstance(event, Stopped):
            self._end(event.sequence)
            self._tell(event)
        elif isinstance(event, InstanceUp):
            instance = event.instance
            self._instances[instance.id] = instance
            pipeline = Pipeline(instance.lanes)
            for lane in range(instance.lanes):
                place = (instance.id, instance.epoch)
                self._lanes[*place, lane] = Lane(
                    place, pipeline, self._left, self._context, self._batch_of, self._lane_of
                )
            self._tell(event)
        elif isinstance(event, InstanceLost):
            self._lose(event)
        else:
            self._tell(event)

    def _lose(self, event: InstanceLost) -> None:
        dead = (event.instance, event.epoch)
        if not self._lives(*dead):
            return self._tell(event)
        for index in range(self._instances.pop(event.instance).lanes):
            self._lanes.pop((*dead, index)).die()
        broken = [copy for copy in self._copies.values() if dead in (copy.source[:2], copy.destination[:2])]
        for copy in broken:
            del self._copies[copy.id]
        self._tell(event)
        for copy in broken:
            if self._lives(*copy.source[:2]) or self._lives(*copy.destination[:2]):
                self._tell(CopyDone(copy.id, ok=False))

    def _step_done(self, lane: Lane) -> None:
        step = lane.running
        assert step is not None
        others = self._other_lanes(lane) if step.prefills else ()
        if others and any(_names_one_of(step, other) for other in others):
            lane.held = True  # chunks of a prompt in two lanes of a pipeline come out in the order they went in
            return
        for other in others:
            if other.held:
                other.held = False
                self._at(self.now_ns, other)
        if lane.queued is None:
            lane.running = None
        else:
            lane.running, duration_ns, host_ns = lane.queued
            lane.queued = None
            self._at(lane.pipeline.enter(self.now_ns, duration_ns, host_ns), lane)
        emitted, ending = lane.emit(step)
        if ending or step.prefills or self._keeps_events:
            emitted = dict(emitted)  # the lane's own is about to change
        if step.prefills:
            ending = list(ending)
            for work in step.prefills:
                if work.samples and (more := self._sampled_by_prefill(work.sequence)) is not None:
                    emitted[work.sequence] = 1
                    if not more:
                        ending.append(work.sequence)
        if not ending:
            return self._tell(StepDone(step.id, emitted))
        stopped = [sequence for sequence in ending if sequence in self._stops]
        for sequence in ending:
            self._end(sequence)
        self._tell(StepDone(step.id, emitted))
        for sequence in stopped:
            self._tell(Stopped(sequence, "stop"))

    def _sampled_by_prefill(self, sequence: int) -> int | None:
        """Count a token off; the tokens that are left, or None if the sequence is over."""
        if sequence not in self._left:
            return None
        if (lane := self._lane_of.get(sequence)) is not None:
            lane.part(sequence)
        self._left[sequence] -= 1
        return self._left[sequence]

    def _other_lanes(self, lane: Lane) -> list[Lane]:
        lanes = self._instances[lane.place[0]].lanes
        if lanes == 1:
            return []
        return [
            self._lanes[*lane.place, other] for other in range(lanes) if self._lanes[*lane.place, other] is not lane
        ]

    def _end(self, sequence: int) -> None:
        if sequence in self._left:
            if (lane := self._lane_of.get(sequence)) is not None:
                lane.part(sequence)
            del self._left[sequence]
            self._stops.discard(sequence)
            self._over.append(sequence)

    # --- commands -----------------------------------------------------------------------------------------------------

    def _tell(self, event: Event) -> None:
        commands = self.scheduler.handle(event, self.now_ns)
        self.events += 1
        for hear in self._listeners:
            hear(event, commands, self.now_ns)
        for command in commands:
            self._carry_out(command)
        while self._over:
            sequence = self._over[-1]
            if self.clock.ended(sequence):
                self._over.pop()
                if (batch := self._batch_of.get(sequence)) is not None:
                    batch.leave_batch(sequence)
                self._context.pop(sequence, None)
                self.on_end(self.clock.pop(sequence))
            else:
                break  # its Stopped comes next

    def _carry_out(self, command: Command) -> None:
        if isinstance(command, Run):
            self._run(command.step)
        elif isinstance(command, Copy):
            self._copy(command)
        elif isinstance(command, Reject):
            self._end(command.sequence)
        elif isinstance(command, SetTimer):
            if command.key not in self._given_timers:
                self._at(max(command.at_ns, self.now_ns), Timer(command.key))
        else:
            raise Violation(f"{command!r} is no command")

    def _run(self, step: Step) -> None:
        lane = self._lanes.get((step.instance, step.epoch, step.lane))
        if lane is None:
            raise Violation(f"{step}: no such lane lives")
        if lane.queued is not None:
            raise Violation(f"{step}: two steps are in flight on this lane already")
        if self.steps is not None:
            self.steps.setdefault(step.instance, []).append(step)
        for prefill in step.prefills:
            if (batch := self._batch_of.get(prefill.sequence)) is not None:
                batch.leave_batch(prefill.sequence)
            self._context[prefill.sequence] = prefill.start + prefill.length
        context_tokens = 0
        if step.decodes:
            lane.launch(step.decodes)
            context_tokens = lane.context_tokens
        duration_ns = self.latency.step_ns(step, context_tokens)
        host_ns = self._host_ns(step, context_tokens) if self._host_ns is not None else 0
        if lane.running is None:
            lane.running = step
            self._at(lane.pipeline.enter(self.now_ns, duration_ns, host_ns), lane)
        else:
            lane.queued = (step, duration_ns, host_ns)

    def _copy(self, copy: Copy) -> None:
        for place in (copy.source, copy.destination):
            if not self._lives(place.instance, place.epoch):
                raise Violation(f"{copy}: epoch {place.epoch} of instance {place.instance} is not alive")
        self._copies[copy.id] = copy
        begin_ns = self.now_ns
        if self._copies_after_steps and copy.source.instance != copy.destination.instance:
            begin_ns = max(begin_ns, self._lanes[*copy.destination[:2], 0].pipeline.free_ns)
        self._at(begin_ns + self.latency.copy_ns(copy, begin_ns), CopyDone(copy.id, ok=True))

    def _lives(self, instance: int, epoch: int) -> bool:
        return instance in self._instances and self._instances[instance].epoch == epoch


def _names_one_of(step: Step, lane: Lane) -> bool:
    """Whether an earlier step of that lane has a chunk of a sequence of this step."""
    earlier = [other for other in (lane.running, lane.queued and lane.queued[0]) if other and other.id < step.id]
    named = {work.sequence for other in earlier for work in other.prefills}
    return any(work.sequence in named for work in step.prefills)


def _in_order(requests: Iterable[Submission]) -> Iterator[Submission]:
    """A list is sorted; what comes one by one must be in order already."""
    if isinstance(requests, list | tuple):
        yield from sorted(requests, key=lambda request: request.arrival_ns)
        return
    last_ns = 0
    for request in requests:
        if request.arrival_ns < last_ns:
            raise ValueError(
                f"request {request.request.id} arrives at {request.arrival_ns} ns, before the one ahead of it"
            )
        last_ns = request.arrival_ns
        yield request
