"""The conformance machine: events in any order against a scheduler, with a page-owner model of its own.

For a policy of one's own, in a test file::

    from tests.scheduling.machine import conformance

    TestMyPolicy = conformance(lambda: MyPolicy(options))

The scheduler must have `ledgers`: the living instances' page ledgers by id, each with `check()`, which raises when its
own accounts are off, and `references(page)`. Hypothesis draws instances and then events: arrivals of all sizes, stops
from anywhere (late, twice, unknown), deadlines, completions in the order of their lanes, copies that land or fail,
instances that are lost, come back, are added or drained, and what still comes back from the dead. After every event
`Contract` has checked every command, and the ledgers are checked against it. In the end everything is brought up and
completed fairly, while new requests keep coming: then all that was submitted before must end within a bound.
"""

from __future__ import annotations

import unittest
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from ds_jax.metrics import StageClock
from ds_jax.protocol import (
    Arrived,
    Command,
    CopyDone,
    Drain,
    Event,
    Instance,
    InstanceLost,
    InstanceUp,
    Reject,
    Request,
    Role,
    Run,
    SetTimer,
    StepDone,
    Stopped,
    Timer,
    pages_for,
)
from ds_jax.simulation import Contract
from ds_jax.simulation.ownership import Life

MOST_INSTANCES = 7


def conformance(
    make_scheduler: Callable[[], Any],
    *,
    roles: Iterable[Role] = (Role.PREFILL, Role.DECODE),
    first_come_first_served: bool = True,
    max_examples: int = 100,
    steps: int = 50,
) -> type[unittest.TestCase]:
    """A TestCase that puts the scheduler through the machine.

    Args:
        roles: the roles that the policy needs, at least one instance of each.
        first_come_first_served: whether an instance must begin prompts in order of arrival.
    """
    machine = type(
        "Machine",
        (SchedulerMachine,),
        {"make_scheduler": staticmethod(make_scheduler), "roles": tuple(roles), "fcfs": first_come_first_served},
    )
    case = machine.TestCase
    examples = max(max_examples, settings().max_examples)
    case.settings = settings(max_examples=examples, stateful_step_count=steps, report_multiple_bugs=False)
    return case


def instances(role: Role) -> st.SearchStrategy[Instance]:
    """Small instances, so that every limit is met often."""
    return st.builds(
        Instance,
        id=st.just(0),
        role=st.just(role),
        epoch=st.just(0),
        pages=st.integers(3, 12),
        page_size=st.just(2),
        lanes=st.integers(1, 2),
        slots=st.integers(1, 3),
        max_step_tokens=st.integers(2, 12),
        max_step_sequences=st.integers(1, 3),
        saturation_tokens=st.integers(1, 12),
        host_pages=st.sampled_from((0, 2, 5, 12)),
    )


class SchedulerMachine(RuleBasedStateMachine):
    make_scheduler: Callable[[], Any]
    roles: tuple[Role, ...]
    fcfs: bool

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = self.make_scheduler()
        self.contract = Contract()
        self.clock = StageClock()
        self.now_ns = 0
        self.events = 0
        self.rare: Counter[str] = Counter()
        """How often each kind of disturbance has happened."""
        self.broken = False
        self.known: dict[int, Instance] = {}
        """The last life of every instance."""
        self.draining: set[int] = set()
        self.timers: list[SetTimer] = []
        self.stale: list[Event] = []
        """Completions that dead epochs still owe."""
        self.left: dict[int, int] = {}
        """Tokens until the true end of each sequence; 0: it has ended, and the scheduler may not know."""
        self.late_stops: list[int] = []
        self.arrived = 0
        """Sequences, whose ids count from 0."""
        self.arrived_since_change = 0
        """Sequences from this id on have seen no instance come or go."""
        self.begun: dict[int, int] = {}
        """The last sequence that each instance began."""
        self.safe: dict[int, bool] = {}
        """Sequences whose prefill has begun, and whether each was the oldest of all when it last had work."""

    # --- the world ----------------------------------------------------------------------------------------------------

    @initialize(data=st.data())
    def bring_up(self, data: st.DataObject) -> None:
        for role in self.roles:
            for _ in range(data.draw(st.integers(1, 2))):
                self._up(data.draw(instances(role)))

    @rule(
        lengths=st.lists(st.tuples(st.integers(1, 7), st.integers(1, 9), st.integers(1, 12)), min_size=1, max_size=6),
        n=st.integers(-4, 3),
        together=st.booleans(),
    )
    def burst(self, lengths: list[tuple[int, int, int]], n: int, together: bool) -> None:
        for index, (prompt, max_tokens, true_length) in enumerate(lengths):
            self._arrive(prompt, max_tokens, true_length, n=max(1, n), more=together and index + 1 < len(lengths))

    @rule(
        prompt=st.integers(1, 30),
        max_tokens=st.integers(1, 12),
        true_length=st.integers(1, 12),
        deadline_ns=st.one_of(st.none(), st.integers(0, 60)),
        lockstep=st.booleans(),
        n=st.integers(1, 4),
    )
    def arrive(
        self, prompt: int, max_tokens: int, true_length: int, deadline_ns: int | None, lockstep: bool, n: int
    ) -> None:
        self._arrive(prompt, max_tokens, true_length, deadline_ns, lockstep, n)

    def _arrive(
        self,
        prompt: int,
        max_tokens: int,
        true_length: int,
        deadline_ns: int | None = None,
        lockstep: bool = False,
        n: int = 1,
        more: bool = False,
    ) -> None:
        deadline = None if deadline_ns is None else self.now_ns + deadline_ns
        request = Request(self.arrived, prompt, max_tokens, deadline_ns=deadline, lockstep=lockstep, n=n)
        self.arrived += n
        self.left |= {id: min(max_tokens, true_length + index) for index, id in enumerate(request.sequences)}
        impossible = any(
            pools and not any(pages_for(prompt + max_tokens - 1, pool.page_size) <= pool.pages for pool in pools)
            for pools in (
                [pool for pool in self.known.values() if pool.role is not without]
                for without in (Role.DECODE, Role.PREFILL)
            )
        )
        commands = self._tell(Arrived(request, more))
        rejected = {command.sequence for command in commands if isinstance(command, Reject)}
        if (deadline is None or deadline > self.now_ns) and n == 1:  # a policy may have its limit of n
            assert bool(rejected) == impossible, f"{request} is {'im' * impossible}possible, answered by {commands}"
        assert not rejected or rejected >= set(request.sequences), f"{request} is rejected in part: {commands}"

    @precondition(lambda self: self.contract.steps)
    @rule(data=st.data())
    def complete_step(self, data: st.DataObject) -> None:
        """A step at the head of its lane, with no earlier one that names one of its sequences."""
        heads = [lane[0].id for life in self.contract.lives.values() for lane in life.lanes if lane]
        ready = [id for id in heads if all(use[0].sequence.steps[0] == id for use in self.contract.steps[id].uses)]
        self._complete_step(data.draw(st.sampled_from(ready)), data.draw(st.booleans()))

    @rule(count=st.integers(1, 20))
    def complete_in_order(self, count: int) -> None:
        """As a healthy world does, for a while."""
        for _ in range(count):
            self._complete_oldest()

    @precondition(lambda self: self.contract.copies)
    @rule(data=st.data())
    def complete_copy(self, data: st.DataObject) -> None:
        id = data.draw(st.sampled_from(list(self.contract.copies)))
        self._complete_copy(id, data.draw(st.booleans()))

    @precondition(lambda self: self._seldom("stop", 4))
    @rule(sequence=st.integers(0, 40), reason=st.sampled_from(("abort", "stop")))
    def stop_any(self, sequence: int, reason: str) -> None:
        """From whoever noticed: also twice, after the end, and for ids never heard of."""
        self.rare["stop"] += 1
        sequence = sequence if sequence < self.arrived else 10**6 + sequence
        self.left[sequence] = 0
        self._tell(Stopped(sequence, reason))

    @precondition(lambda self: self.late_stops)
    @rule(data=st.data())
    def stop_late(self, data: st.DataObject) -> None:
        self._tell(Stopped(self.late_stops.pop(data.draw(st.integers(0, len(self.late_stops) - 1))), "stop"))

    @precondition(lambda self: self.timers)
    @rule(data=st.data())
    def ring(self, data: st.DataObject) -> None:
        """A timer, on time or late."""
        self._ring(self.timers.pop(data.draw(st.integers(0, len(self.timers) - 1))))

    @precondition(lambda self: self._seldom("change", 10))
    @rule(data=st.data(), what=st.sampled_from(("lose", "come back", "come back", "add", "drain")))
    def change_instances(self, data: st.DataObject, what: str) -> None:
        self.rare["change"] += 1
        lost = [id for id in self.known if id not in self.contract.lives]
        if what == "lose" and self.contract.lives:
            self._lose(data.draw(st.sampled_from(list(self.contract.lives))))
        elif what == "come back" and lost:
            self._come_back(data.draw(st.sampled_from(lost)))
        elif what == "add" and len(self.known) < MOST_INSTANCES:
            self._up(data.draw(instances(data.draw(st.sampled_from(self.roles)))))
        elif what == "drain" and self.known:
            instance = data.draw(st.sampled_from(list(self.known)))
            self.draining.add(instance)
            self._changed()
            self._tell(Drain(instance))

    @precondition(lambda self: self.stale and self._seldom("stale", 10))
    @rule(data=st.data())
    def hear_from_the_dead(self, data: st.DataObject) -> None:
        self.rare["stale"] += 1
        self._tell(data.draw(st.sampled_from(self.stale)))

    @rule(ns=st.integers(1, 20))
    def wait(self, ns: int) -> None:
        self.now_ns += ns

    def _seldom(self, what: str, events: int) -> bool:
        """Once in so many events, so that there is a world for it to disturb."""
        return self.rare[what] * events <= self.events

    # --- how the world does it ----------------------------------------------------------------------------------------

    def _up(self, instance: Instance) -> None:
        self._start(replace(instance, id=len(self.known)))

    def _come_back(self, id: int) -> None:
        self._start(replace(self.known[id], epoch=self.known[id].epoch + 1))

    def _start(self, instance: Instance) -> None:
        self.known[instance.id] = instance
        self.draining.discard(instance.id)
        self._changed()
        self._tell(InstanceUp(instance))

    def _lose(self, id: int) -> None:
        life = self.contract.lives[id]
        for lane in life.lanes:
            for step in lane:
                sampled = [work.sequence for work in step.prefills if work.samples]
                sampled += [work.sequence for work in step.decodes]
                self.stale.append(StepDone(step.id, dict.fromkeys(sampled, 1)))
        copies = set(self.contract.copies)
        self._changed()
        self.safe = dict.fromkeys(self.safe, False)
        self._tell(InstanceLost(id, self.known[id].epoch))
        self.stale += [CopyDone(copy, True) for copy in copies - set(self.contract.copies)]
        self.stale.append(InstanceLost(id, self.known[id].epoch))

    def _changed(self) -> None:
        self.arrived_since_change = self.arrived
        self.begun = {}

    def _complete_step(self, id: int, stop_late: bool) -> None:
        flight = self.contract.steps[id]
        emitted: dict[int, int] = {}
        stopped = []
        for table, _, _, samples in flight.uses:
            sequence = table.sequence.id
            if not samples or not self.left[sequence] or table.sequence.over:
                if samples and not table.sequence.over:
                    self.safe[sequence] = False  # it gives no more tokens; whatever is done with it is no preemption
                continue
            emitted[sequence] = 1
            self.left[sequence] -= 1
            produced = table.sequence.confirmed + 1
            if not self.left[sequence] and produced < table.sequence.request.max_tokens:
                (self.late_stops if stop_late else stopped).append(sequence)
        self._tell(StepDone(id, emitted))
        for sequence in stopped:
            self._tell(Stopped(sequence, "stop"))

    def _complete_copy(self, id: int, ok: bool) -> None:
        flight = self.contract.copies[id]
        ok = ok and flight.destination is not None
        if not ok:
            self.safe[flight.sequence.id] = False
        self._tell(CopyDone(id, ok))

    def _ring(self, timer: SetTimer) -> None:
        self.now_ns = max(self.now_ns, timer.at_ns)
        self._tell(Timer(timer.key))

    def _tell(self, event: Event) -> list[Command]:
        self.events += 1
        self.broken = True  # until all checks have passed
        commands = self.scheduler.handle(event, self.now_ns)
        self.contract.hear(event, commands, self.now_ns)
        self._check_order(commands)
        self.clock.hear(event, commands, self.now_ns)
        self.timers += [command for command in commands if isinstance(command, SetTimer)]
        for command in commands:
            if isinstance(command, Reject):
                self.left[command.sequence] = 0
        self._check_ledgers()
        self.broken = False
        return commands

    # --- what must hold after every event -----------------------------------------------------------------------------

    def _check_ledgers(self) -> None:
        ledgers = self.scheduler.ledgers
        hosts = getattr(self.scheduler, "host_ledgers", {})
        assert ledgers.keys() == self.contract.lives.keys(), "the scheduler has ledgers of other instances than live"
        for id, ledger in ledgers.items():
            life, host = self.contract.lives[id], self.contract.hosts[id]
            quiet = self.contract.quiet(life) and self.contract.quiet(host)
            self._check_ledger(ledger, life, quiet, f"instance {id}")
            if id in hosts:
                self._check_ledger(hosts[id], host, quiet, f"the host of instance {id}")

    def _check_ledger(self, ledger: Any, life: Life, quiet: bool, where: str) -> None:
        ledger.check()
        held = {page for page in range(life.instance.pages) if ledger.references(page)}
        needed = self.contract.needed(life)
        assert needed <= held, f"pages {needed - held} of {where} are free, but still named in flight"
        if quiet:
            leaked = held - self.contract.accounted(life)
            assert not leaked, f"pages {leaked} of {where} leaked: nobody who lives has them"

    def _check_order(self, commands: list[Command]) -> None:
        """Prompts begin in order of arrival, and the oldest sequence of all is never made to begin anew."""
        oldest = next((sequence.id for sequence in self.contract.living()), None)
        for command in commands:
            if not isinstance(command, Run):
                continue
            step = command.step
            for sequence, start, *_ in step.prefills:
                if start == 0 and sequence not in self.safe:
                    last = self.begun.get(step.instance, -1)
                    alone = self.contract.sequences[sequence].request.n == 1  # a leader that ends is replaced
                    if self.fcfs and alone and sequence >= self.arrived_since_change:
                        assert sequence > last, f"{step}: sequence {sequence} begins after {last}, which came later"
                        self.begun[step.instance] = sequence
                elif start == 0:
                    assert not self.safe[sequence], f"{step}: sequence {sequence} begins anew, and was the oldest"
                self.safe[sequence] = sequence == oldest
            for sequence, *_ in step.decodes:
                self.safe[sequence] = sequence == oldest

    # --- the end: everything comes up and is completed fairly ---------------------------------------------------------

    def teardown(self) -> None:
        if not self.broken:
            self._end()

    def _end(self) -> None:
        for id in [id for id in self.known if id not in self.contract.lives]:
            self._come_back(id)
        for id in self.draining.copy():
            self._up(self.known[id])  # somebody may wait for just such an instance
        for sequence in self.late_stops:
            self._tell(Stopped(sequence, "stop"))
        submitted = self.arrived
        self._finish(submitted, newcomers=True)
        self._finish(self.arrived, newcomers=False)
        while self.contract.steps or self.contract.copies:
            self._complete_oldest()
        for id, ledger in [*self.scheduler.ledgers.items(), *getattr(self.scheduler, "host_ledgers", {}).items()]:
            assert not ledger.used, f"all is over, and {ledger.used} pages of instance {id} are still held"
        for sequence in range(self.arrived):
            times = self.clock.pop(sequence)
            assert sum(times.stages_ns) == times.end_ns - times.arrived_ns, times

    def _bound(self) -> int:
        """Completions that are many times enough: each chunk and each token, once and again after a preemption."""
        return 100 + 6 * sum(
            8 + one.request.prompt_tokens + 2 * one.request.max_tokens for one in self.contract.living()
        )

    def _finish(self, before: int, newcomers: bool) -> None:
        """Complete in order of command until all sequences below `before` are over, within a bound."""
        bound = self._bound()
        for _ in range(bound):
            living = [sequence.id for sequence in self.contract.living()]
            if not living or living[0] >= before:
                return
            waiting = sum(sequence >= before and sequence not in self.safe for sequence in living)
            for _ in range(2 * len(self.known) - waiting if newcomers else 0):
                self._arrive(prompt=1 + self.arrived % 3, max_tokens=2, true_length=2)
            if not self._complete_oldest():
                raise AssertionError(f"sequences {living} wait, and nothing is in flight")
        living = [sequence.id for sequence in self.contract.living()]
        raise AssertionError(f"sequences {living} have not ended after {bound} completions")

    def _complete_oldest(self) -> bool:
        """The oldest step and the oldest copy; False if nothing is in flight."""
        step, copy = next(iter(self.contract.steps), None), next(iter(self.contract.copies), None)
        if step is not None:
            self._complete_step(step, stop_late=False)
        if copy is not None and copy in self.contract.copies:
            self._complete_copy(copy, ok=True)
        return step is not None or copy is not None
