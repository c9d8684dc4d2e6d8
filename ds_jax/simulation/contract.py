"""The contract between schedulers and executors, checked against a model of pages that trusts neither.

`Contract` hears what a scheduler hears and answers, and keeps its own table of who owns which page and what is in
flight. It knows nothing of a scheduler's ledger. The simulator runs under it in strict mode, the tests' machine always,
and a recorded log of the engine can be read through it.

A page is held by the page table that it was last given to, and by tables of the same request that share it. A step
reads the pages of its sequence's table up to its last position and writes those of its own tokens; a copy reads its
source pages and writes its destination pages; both pin them from the command to the completion. Giving away a pinned
page is an error at once. Giving away a page of a living sequence is not (it may have been preempted), but then the
tables that held it must never be used again; and so where a page is written that others hold too.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, replace

from ds_jax.protocol import (
    Arrived,
    Command,
    Copy,
    CopyDone,
    Decode,
    Decodes,
    Event,
    Instance,
    InstanceLost,
    InstanceUp,
    Medium,
    Place,
    Prefill,
    Reject,
    Role,
    Run,
    Step,
    StepDone,
    Stopped,
    pages_for,
)
from ds_jax.simulation.ownership import Life, Sequence, Table, Violation

STEPS_PER_LANE = 2


@dataclass(eq=False, slots=True)
class StepInFlight:
    life: Life
    step: Step
    uses: list[tuple[Table, int, int, bool]]
    """Table, pages pinned from its start, tokens written when done, whether it samples."""


@dataclass(eq=False, slots=True)
class CopyInFlight:
    copy: Copy
    sequence: Sequence
    source: Life | None
    destination: Life | None
    table: Table
    origin: Table


class Contract:
    """Raises `Violation` at the first event or command that breaks the protocol."""

    def __init__(self) -> None:
        self.now_ns: int | None = None
        self.sequences: dict[int, Sequence] = {}
        self.lives: dict[int, Life] = {}
        self.hosts: dict[int, Life] = {}
        """The pages in host memory of each living instance."""
        self.steps: dict[int, StepInFlight] = {}
        self.copies: dict[int, CopyInFlight] = {}
        self._epochs: dict[int, int] = {}

    def hear(self, event: Event, commands: Iterable[Command], now_ns: int) -> None:
        """One call of `Scheduler.handle` and its answer."""
        if self.now_ns is not None and now_ns < self.now_ns:
            raise Violation(f"the clock went back from {self.now_ns} to {now_ns} at {event}")
        self.now_ns = now_ns
        self._event(event)
        for command in commands:
            match command:
                case Run(step):
                    self._run(step)
                case Copy():
                    self._copy(command)
                case Reject(sequence):
                    if self._sequence(sequence, command).over:
                        raise Violation(f"{command}: the sequence is over already")
                    self._over(self.sequences[sequence])

    def living(self) -> list[Sequence]:
        """Sequences that have arrived and not ended, oldest first."""
        return [sequence for sequence in self.sequences.values() if not sequence.over]

    def needed(self, life: Life) -> set[int]:
        """Pages that must not be free: something in flight names them."""
        return {page for page, pins in enumerate(life.pins) if pins}

    def accounted(self, life: Life) -> set[int]:
        """Pages that may be held while nothing is in flight there: those of living sequences."""
        holders = enumerate(life.holders)
        return {page for page, tables in holders if any(not table.sequence.over for table in tables)}

    def quiet(self, life: Life) -> bool:
        """Whether nothing is in flight there."""
        copies = self.copies.values()
        return not any(life.lanes) and not any(life in (copy.source, copy.destination) for copy in copies)

    # --- events: what an executor owes --------------------------------------------------------------------------------

    def _event(self, event: Event) -> None:
        match event:
            case StepDone():
                self._step_done(event)
            case CopyDone(copy, ok):
                self._copy_done(copy, ok)
            case Arrived(request):
                for id in request.sequences:
                    if id in self.sequences:
                        raise Violation(f"{event}: sequence {id} has arrived before")
                    self.sequences[id] = Sequence(id, request)
            case Stopped(sequence):
                if (stopped := self.sequences.get(sequence)) is not None:
                    self._over(stopped)
            case InstanceUp(instance):
                self._up(instance)
            case InstanceLost(instance, epoch):
                self._lost(instance, epoch)

    def _up(self, instance: Instance) -> None:
        if instance.id in self.lives:
            raise Violation(f"instance {instance.id} comes up while its epoch {self._epochs[instance.id]} lives")
        if instance.epoch <= self._epochs.get(instance.id, -1):
            raise Violation(f"instance {instance.id} comes up with the used epoch {instance.epoch}")
        self._epochs[instance.id] = instance.epoch
        lanes: list[deque[Step]] = [deque() for _ in range(instance.lanes)]
        host = replace(instance, pages=instance.host_pages)
        self.lives[instance.id] = Life(instance, [[] for _ in range(instance.pages)], [0] * instance.pages, lanes)
        self.hosts[instance.id] = Life(host, [[] for _ in range(host.pages)], [0] * host.pages, [])

    def _lost(self, instance: int, epoch: int) -> None:
        life = self.lives.get(instance)
        if life is None or life.instance.epoch != epoch:
            return
        host = self.hosts.pop(instance)
        del self.lives[instance]
        for table in [*life.tables, *host.tables]:
            table.unusable = f"instance {instance} was lost"
            if table.sequence.tables.get(table.life) is table:
                del table.sequence.tables[table.life]
        for id, flight in list(self.steps.items()):
            if flight.life is life:
                del self.steps[id]
                for table, _, _, samples in flight.uses:
                    table.sequence.steps.remove(id)
                    table.sequence.sampling -= samples
        for id, copy in list(self.copies.items()):
            copy.source = None if copy.source in (life, host) else copy.source
            copy.destination = None if copy.destination in (life, host) else copy.destination
            if copy.source is None and copy.destination is None:
                del self.copies[id]

    def _step_done(self, event: StepDone) -> None:
        flight = self.steps.pop(event.step, None)
        if flight is None:
            return
        lane = flight.life.lanes[flight.step.lane]
        if lane[0] is not flight.step:
            raise Violation(f"{event}: step {lane[0].id} is ahead of it on instance {flight.step.instance}")
        lane.popleft()
        sampled = {table.sequence.id for table, _, _, samples in flight.uses if samples}
        if stray := event.emitted.keys() - sampled:
            raise Violation(f"{event}: the step samples nothing for sequences {sorted(stray)}")
        for table, pages, tokens, samples in flight.uses:
            for page in table.pages[:pages]:
                flight.life.pins[page] -= 1
            table.written = max(table.written, tokens)
            sequence = table.sequence
            if sequence.steps.pop(0) != event.step:
                raise Violation(f"{event}: another step that names sequence {sequence.id} is ahead of it")
            if samples:
                emitted = event.emitted.get(sequence.id, 0)
                if emitted not in (0, 1) or (emitted and sequence.over):
                    raise Violation(f"{event}: {emitted} tokens kept of sequence {sequence.id}, which is over")
                sequence.sampling -= 1
                sequence.confirmed += emitted
                if sequence.confirmed >= sequence.request.max_tokens:
                    self._over(sequence)

    def _copy_done(self, id: int, ok: bool) -> None:
        flight = self.copies.pop(id, None)
        if flight is None:
            return
        for life, side in ((flight.source, 0), (flight.destination, 1)):
            if life is not None:
                for pair in flight.copy.pages:
                    life.pins[pair[side]] -= 1
        table, origin = flight.table, flight.origin
        inside = flight.copy.source.instance == flight.copy.destination.instance
        table.landing -= 1
        if not ok:
            table.unusable = table.unusable or f"copy {id} into it failed"
            if table.life is origin.life and not origin.unusable and table.sequence.tables.get(origin.life) is table:
                table.sequence.tables[origin.life] = origin
        elif flight.destination is None:
            raise Violation(f"copy {id} landed on a dead epoch of instance {flight.copy.destination.instance}")
        elif table.source is None and not table.landing:
            table.written = table.planned
            if inside:
                origin.unusable = "its sequence has moved"
                if origin.life is not table.life and table.sequence.tables.get(origin.life) is origin:
                    del table.sequence.tables[origin.life]

    def _over(self, sequence: Sequence) -> None:
        sequence.over = True
        sequence.forget("the sequence is over")

    # --- commands: what a scheduler owes ------------------------------------------------------------------------------

    def _sequence(self, id: int, what: object) -> Sequence:
        if id not in self.sequences:
            raise Violation(f"{what}: sequence {id} never arrived")
        return self.sequences[id]

    def _life(self, place: Place, what: object) -> Life:
        life = self.lives.get(place.instance)
        if life is None or life.instance.epoch != place.epoch:
            raise Violation(f"{what}: epoch {place.epoch} of instance {place.instance} is not alive")
        return life if place.medium is Medium.DEVICE else self.hosts[place.instance]

    def _run(self, step: Step) -> None:
        life = self._life(Place(step.instance, step.epoch), step)
        instance = life.instance
        if step.id in self.steps:
            raise Violation(f"{step}: a step of this id is in flight")
        if not 0 <= step.lane < instance.lanes:
            raise Violation(f"{step}: the instance has {instance.lanes} lanes")
        if len(life.lanes[step.lane]) >= STEPS_PER_LANE:
            raise Violation(f"{step}: {STEPS_PER_LANE} steps are in flight on this lane already")
        self._limits(step, instance)
        uses: list[tuple[Table, int, int, bool]] = []
        for prefill in step.prefills:
            uses.append(self._prefill(step, life, prefill) if prefill.length else self._fork(step, life, prefill, uses))
        uses += [self._decode(step, life, decode) for decode in step.decodes]
        if step.decodes:
            self._said(step, life.decodes.get(step.lane))
            life.decodes[step.lane] = step
        for table, pages, _, samples in uses:
            table.sequence.steps.append(step.id)
            table.sequence.sampling += samples
            for page in table.pages[:pages]:
                life.pins[page] += 1
        life.lanes[step.lane].append(step)
        self.steps[step.id] = StepInFlight(life, step, uses)

    def _said(self, step: Step, before: Step | None) -> None:
        """What `Decodes` says of itself must be so."""
        decodes = step.decodes
        fresh = {decode.sequence for decode in decodes if decode.new_pages}
        if before is not None and before.decodes is decodes and fresh:
            raise Violation(f"{step}: the same decodes as in step {before.id} have new pages")
        if not isinstance(decodes, Decodes) or (before is not None and before.decodes is decodes):
            return
        if decodes.grown is not None and [one.sequence for one in decodes.grown if one not in decodes] + [
            id for id in fresh if id not in {one.sequence for one in decodes.grown}
        ]:
            raise Violation(f"{step}: grown are {sorted(fresh)}, not {decodes.grown}")
        if decodes.after is not None:
            if before is None or before.id != decodes.after:
                raise Violation(f"{step}: the last step with decodes is {before and before.id}, not {decodes.after}")
            stayed = {one.sequence: one.slot for one in before.decodes if one.sequence not in decodes.parted}
            if stayed.keys() & set(decodes.joined) or not set(decodes.parted) <= {
                one.sequence for one in before.decodes
            }:
                raise Violation(
                    f"{step}: parted {decodes.parted} and joined {decodes.joined} do not follow step {before.id}"
                )
            said = [*stayed, *decodes.joined]
            if sorted(said) != sorted(one.sequence for one in decodes) or any(
                stayed.get(one.sequence, one.slot) != one.slot for one in decodes
            ):
                raise Violation(f"{step}: with parted and joined, step {before.id} gives {said}")

    def _limits(self, step: Step, instance: Instance) -> None:
        named = [work.sequence for work in step.prefills] + [work.sequence for work in step.decodes]
        if not named or len(set(named)) < len(named):
            raise Violation(f"{step}: a step names at least one sequence, and none twice")
        if step.prefills and instance.role is Role.DECODE:
            raise Violation(f"{step}: prefills on a decode instance")
        if step.decodes and instance.role is Role.PREFILL:
            raise Violation(f"{step}: decodes on a prefill instance")
        if len(step.prefills) > instance.max_step_sequences > 0:
            raise Violation(f"{step}: more than {instance.max_step_sequences} prompts")
        if sum(prefill.length for prefill in step.prefills) > instance.max_step_tokens > 0:
            raise Violation(f"{step}: more than {instance.max_step_tokens} prompt tokens")
        slots = [decode.slot for decode in step.decodes]
        if len(set(slots)) < len(slots) or not all(0 <= slot < instance.slots for slot in slots):
            raise Violation(f"{step}: slots must be distinct and below {instance.slots}")

    def _prefill(self, step: Step, life: Life, prefill: Prefill) -> tuple[Table, int, int, bool]:
        sequence = self._may_run(step, life, prefill)
        known = sequence.request.prompt_tokens + sequence.confirmed
        end = prefill.start + prefill.length
        if prefill.length < 1 or end > known:
            raise Violation(f"{step}: {prefill} is not inside the {known} tokens that are known")
        if prefill.samples != (end == known):
            raise Violation(f"{step}: {prefill} must sample exactly when it reaches token {known}")
        if prefill.start == 0:
            if sequence.steps:
                raise Violation(f"{step}: {prefill} begins while steps of the sequence are in flight")
            sequence.forget("the sequence began anew")
            table = Table(sequence, life)
            life.tables.add(table)
            sequence.tables[life] = table
        else:
            table = self._table(step, life, sequence)
        if prefill.start != table.planned:
            raise Violation(f"{step}: {prefill} starts at {prefill.start}, the tokens before it end at {table.planned}")
        if sequence.sampling:
            raise Violation(f"{step}: {prefill} goes on after its last chunk")
        return self._use(step, life, table, prefill.new_pages, end, prefill.samples, -1)

    def _fork(
        self, step: Step, life: Life, fork: Prefill, before: list[tuple[Table, int, int, bool]]
    ) -> tuple[Table, int, int, bool]:
        sequence = self._may_run(step, life, fork)
        if not before or before[-1][0].sequence.request is not sequence.request:
            raise Violation(f"{step}: {fork} does not follow a sequence of the same request")
        leader, pages, end, samples = before[-1]
        if not samples or not fork.samples or fork.start != end or fork.new_pages:
            raise Violation(f"{step}: {fork} must sample, as the one before it, from {end} tokens in the same pages")
        if sequence.confirmed or sequence.steps or end != sequence.request.prompt_tokens:
            raise Violation(f"{step}: {fork} is not at its beginning")
        sequence.forget("the sequence began anew")
        table = Table(sequence, life, planned=end)
        life.tables.add(table)
        sequence.tables[life] = table
        table.join(leader.pages)
        sequence.last = (life, step.lane, -1)
        return table, pages, end, True

    def _decode(self, step: Step, life: Life, decode: Decode) -> tuple[Table, int, int, bool]:
        sequence = self._may_run(step, life, decode)
        table = self._table(step, life, sequence)
        if table.landing or table.source is not None:
            raise Violation(f"{step}: {decode} runs before its pages have landed")
        outputs = sequence.confirmed + sequence.sampling
        if outputs >= sequence.request.max_tokens:
            raise Violation(f"{step}: {decode} goes beyond max_tokens = {sequence.request.max_tokens}")
        fed = sequence.request.prompt_tokens + outputs - 1
        if not outputs or table.planned != fed:
            raise Violation(f"{step}: {decode} feeds token {fed}, the tokens before it end at {table.planned}")
        if sequence.sampling and (sequence.last != (life, step.lane, decode.slot)):
            raise Violation(f"{step}: {decode} feeds a token that is in flight elsewhere")
        return self._use(step, life, table, decode.new_pages, fed + 1, True, decode.slot)

    def _may_run(self, step: Step, life: Life, work: Prefill | Decode) -> Sequence:
        sequence = self._sequence(work.sequence, step)
        if sequence.over:
            raise Violation(f"{step}: sequence {work.sequence} is over")
        if sequence.request.lockstep and sequence.sampling:
            raise Violation(f"{step}: sequence {work.sequence} is lockstep, and its last token is not known yet")
        return sequence

    def _table(self, what: Step | Copy, life: Life, sequence: Sequence) -> Table:
        table = sequence.tables.get(life)
        if table is None:
            raise Violation(f"{what}: sequence {sequence.id} has no pages on instance {life.instance.id}")
        if table.unusable:
            raise Violation(f"{what}: the pages of sequence {sequence.id} cannot be used: {table.unusable}")
        return table

    def _use(
        self, step: Step, life: Life, table: Table, new: Iterable[int], end: int, samples: bool, slot: int
    ) -> tuple[Table, int, int, bool]:
        table.give(new, step)
        pages = pages_for(end, life.instance.page_size)
        if len(table.pages) < pages:
            raise Violation(f"{step}: {end} tokens of sequence {table.sequence.id} in {len(table.pages)} pages")
        for page in table.pages[table.planned // life.instance.page_size : pages]:
            for held in life.holders[page]:
                if held is not table:
                    held.unusable = held.unusable or f"page {page} was written for sequence {table.sequence.id}"
        table.planned = end
        if samples:
            table.sequence.last = (life, step.lane, slot)
        return table, pages, end, samples

    def _copy(self, copy: Copy) -> None:
        sequence = self._sequence(copy.sequence, copy)
        if sequence.over:
            raise Violation(f"{copy}: the sequence is over")
        if copy.id in self.copies:
            raise Violation(f"{copy}: a copy of this id is in flight")
        if Medium.HOST in (copy.source.medium, copy.destination.medium) and copy.shared:
            raise Violation(f"{copy}: pages are shared on devices only")
        source, destination = self._life(copy.source, copy), self._life(copy.destination, copy)
        origin = self._table(copy, source, sequence)
        table = sequence.tables.get(destination)
        if table is None or table.source is None or table.unusable:  # no series is open: a new table begins
            table = Table(sequence, destination, source=origin)
            destination.tables.add(table)
            sequence.tables[destination] = table
            table.share(copy)
        elif copy.shared:
            raise Violation(f"{copy}: only the first copy of a series shares pages")
        done, count = len(table.pages), len(copy.pages)
        if table.source is not origin or [page for page, _ in copy.pages] != origin.pages[done : done + count]:
            raise Violation(f"{copy}: the source pages must be {origin.pages[done:]} in this order")
        covered = (done + count) * source.instance.page_size
        if (copy.last and (origin.written < origin.planned or covered < origin.planned)) or (
            not copy.last and covered > origin.written
        ):
            raise Violation(f"{copy}: {covered} tokens, of {origin.planned} planned and {origin.written} written")
        table.give([page for _, page in copy.pages], copy)
        for page, landing in copy.pages:
            source.pins[page] += 1
            destination.pins[landing] += 1
        table.landing += 1
        if copy.last:
            table.planned = origin.planned
            table.source = None
        self.copies[copy.id] = CopyInFlight(copy, sequence, source, destination, table, origin)
