"""DistServe (OSDI'24): prefill and decoding on different instances, FCFS in both (section 4.3).

A request is dispatched to the least loaded prefill instance, prefilled in one step (or in chunks, if it is longer than
a step), then *pulled* by the least loaded decode instance as soon as that one has room, and decoded to its end. Bursts
queue in the memory of the prefill instances. `prefill.py` and `decode.py` have the rules of one instance; here is what
joins them: dispatch, hand-over, endings, and what to do when instances come and go.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from ds_jax.config import SchedulerConfig
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
from ds_jax.scheduling.decode import DecodeState
from ds_jax.scheduling.flight import CopyInFlight, Flight, InstanceState
from ds_jax.scheduling.ledger import PageLedger
from ds_jax.scheduling.prefill import PrefillState
from ds_jax.scheduling.sequence import Phase, Sequence

if TYPE_CHECKING:
    from ds_jax.latency import Predictor


class Disaggregated:
    """The scheduler of DistServe over n prefill and m decode instances."""

    def __init__(self, options: SchedulerConfig | None = None, predictor: Predictor | None = None):
        self.options = options or SchedulerConfig()
        self.sequences: dict[int, Sequence] = {}
        """Every living sequence."""
        self._prefill: dict[int, PrefillState] = {}
        self._decode: dict[int, DecodeState] = {}
        self._known: dict[int, Instance] = {}
        """The last life of every instance ever seen: what a request could possibly run on."""
        self._flight = Flight()
        self._homeless: dict[int, Sequence] = {}
        """Waiting for a prefill instance, or READY and waiting for a decode instance, to exist."""
        self._arrivals = 0
        self._touched: dict[InstanceState, None] = {}
        """Instances for which the event may have made a step or a pull possible."""
        self._commands: list[Command] = []

    @property
    def ledgers(self) -> dict[int, PageLedger]:
        """Page ledgers of the living instances, by id."""
        return {id: state.ledger for id, state in (self._prefill | self._decode).items()}

    def handle(self, event: Event, now_ns: int) -> list[Command]:
        """Take one event in, then plan whatever it made possible."""
        self._commands = []
        match event:
            case StepDone(step, emitted):
                self._on_step_done(step, emitted)
            case Arrived(request):
                self._on_arrived(request)
            case Stopped(sequence):
                self._end(sequence)
            case CopyDone(copy, ok):
                self._on_copy_done(copy, ok)
            case InstanceUp(instance):
                self._on_instance_up(instance)
            case InstanceLost(instance, epoch):
                self._on_instance_lost(instance, epoch)
            case Drain(instance):
                self._on_drain(instance)
            case Timer(key):
                self._on_timer(key)
        self._plan()
        return self._commands

    # --- requests come and go -----------------------------------------------------------------------------------------

    def _on_arrived(self, request: Request) -> None:
        family = [Sequence(request, self._arrivals + index, id) for index, id in enumerate(request.sequences)]
        self._arrivals += request.n
        leader, *forks = family
        self._lead(leader, forks)
        if why := self._cannot_ever_run(leader):
            self._commands.extend(Reject(sequence.id, why) for sequence in family)
            return
        for sequence in family:
            sequence.family = family
            self.sequences[sequence.id] = sequence
            if request.deadline_ns is not None:
                self._commands.append(SetTimer(f"deadline:{sequence.id}", request.deadline_ns))
        self._wait_for_prefill(leader, replay=False)

    def _lead(self, leader: Sequence, forks: list[Sequence]) -> None:
        """The forks wait for the leader's prefill."""
        leader.forks = forks
        for fork in forks:
            fork.phase = Phase.FOLLOWING
            fork.home = leader

    def _cannot_ever_run(self, sequence: Sequence) -> str | None:
        """A sequence must fit whole into a prefill pool (it may have to be replayed) and into a decode pool."""
        for role in (Role.PREFILL, Role.DECODE):
            pools = [instance for instance in self._known.values() if instance.role is role]
            if pools and not any(_holds(sequence, instance) for instance in pools):
                largest = max(instance.pages * instance.page_size for instance in pools)
                return (
                    f"prompt and max_tokens ask for KV pages of {sequence.most_tokens} tokens; "
                    f"the largest {role} pool holds {largest}"
                )
            if pools and not any(_fits(sequence, instance) for instance in pools):
                rows = max(instance.max_step_sequences for instance in pools if _holds(sequence, instance))
                return f"n = {sequence.request.n} must be at most {rows}, the prompts that one prefill step holds"
        return None

    def _on_timer(self, key: str) -> None:
        kind, _, sequence = key.partition(":")
        if kind == "deadline" and int(sequence) in self.sequences:
            self._commands.append(Reject(int(sequence), "the deadline has passed"))
            self._end(int(sequence))

    def _end(self, id: int) -> None:
        """The sequence is over, wherever it is. What is in flight still pins its pages."""
        sequence = self.sequences.pop(id, None)
        if sequence is None:
            return
        self._take_out(sequence)
        if sequence.lease is not None:
            sequence.home.ledger.drop(sequence.lease)
            sequence.lease = None
        sequence.phase = Phase.ENDED
        if sequence.forks:  # it was to lead them through prefill: the oldest does so now
            leader, *forks = sequence.forks
            sequence.forks = []
            self._lead(leader, forks)
            self._wait_for_prefill(leader, replay=True)

    def _take_out(self, sequence: Sequence) -> None:
        """Remove the sequence from whatever queue or batch it is in."""
        if isinstance(sequence.home, InstanceState):
            self._touch(sequence.home)
        match sequence.phase:
            case Phase.FOLLOWING:
                sequence.home.forks.remove(sequence)
            case Phase.WAITING:
                if self._homeless.pop(sequence.id, None) is None:
                    sequence.home.dequeue(sequence)
            case Phase.PREFILLING:
                sequence.home.abandon(sequence)
            case Phase.READY:
                self._withdraw(sequence)
            case Phase.COPYING:
                self._cancel_copy(self._flight.copy_of(sequence))
            case Phase.LANDED | Phase.RUNNING:
                sequence.home.evict(sequence)

    # --- prefill ------------------------------------------------------------------------------------------------------

    def _wait_for_prefill(self, sequence: Sequence, replay: bool) -> None:
        """Dispatch to the prefill instance with the least unfinished work."""
        state = _least_loaded(self._prefill.values(), sequence)
        if state is None:
            sequence.home = None
            sequence.phase = Phase.WAITING
            self._homeless[sequence.id] = sequence
        else:
            state.enqueue(sequence, replay)
            self._touch(state)

    def _replay(self, sequence: Sequence) -> None:
        """Run prompt + confirmed output through prefill again; that samples the next token, never an old one."""
        sequence.lease = None
        sequence.planned = 0
        sequence.copy = None
        self._wait_for_prefill(sequence, replay=True)

    def _on_step_done(self, step: int, emitted: Mapping[int, int]) -> None:
        flight = self._flight.land(step)
        if flight is None:
            return
        self._touch(flight.state)
        prefills = flight.step.prefills
        for prefill, (sequence, lease) in zip(prefills, flight.work[: len(prefills)], strict=True):
            if prefill.samples and sequence.lease is lease:
                flight.state.land(sequence, emitted.get(sequence.id, 0))
                self._after_prefill(sequence, emitted.get(sequence.id, 0))
        for sequence, _ in flight.work[len(prefills) :]:
            if sequence.phase is not Phase.ENDED:
                flight.state.finish_step(sequence, emitted.get(sequence.id, 0))
                self._after_decode(sequence, emitted.get(sequence.id, 0))

    def _after_prefill(self, sequence: Sequence, emitted: int) -> None:
        if not sequence.has_more:
            self._end(sequence.id)
        elif emitted:
            self._offer(sequence)
        else:  # the token was lost, and with it the sense of what follows
            sequence.home.ledger.drop(sequence.lease)
            self._replay(sequence)

    def _after_decode(self, sequence: Sequence, emitted: int) -> None:
        if sequence.emitted >= sequence.request.max_tokens:
            self._end(sequence.id)
        elif not emitted and sequence.phase is Phase.RUNNING:
            sequence.home.evict(sequence)
        self._replay_if_left(sequence)

    def _replay_if_left(self, sequence: Sequence) -> None:
        """An evicted sequence replays once its last steps in flight have told their tokens."""
        if sequence.phase is Phase.LEAVING and not sequence.steps:
            self._replay(sequence)

    # --- hand-over ----------------------------------------------------------------------------------------------------

    def _offer(self, sequence: Sequence) -> None:
        """Let the least loaded decode instance pull the sequence."""
        sequence.phase = Phase.READY
        sequence.copy = None
        state = self._with_family(sequence) or _least_loaded(self._decode.values(), sequence)
        if state is None:
            self._homeless[sequence.id] = sequence
        else:
            state.offer(sequence)
            self._touch(state)

    def _with_family(self, sequence: Sequence) -> DecodeState | None:
        """The decode instance that has, or will have, a sequence of the same request, whose pages can be shared."""
        if len(sequence.family) == 1:
            return None
        for state in self._decode.values():
            if not state.draining and _fits(sequence, state.instance):
                for relative in sequence.family:
                    if relative is not sequence and state.expects(relative, self._flight):
                        return state
        return None

    def _withdraw(self, sequence: Sequence) -> None:
        """Take a READY sequence back from whoever was to pull it."""
        if self._homeless.pop(sequence.id, None) is None:
            any(state.withdraw(sequence) for state in self._decode.values())

    def _cancel_copy(self, flight: CopyInFlight) -> None:
        """Let the destination's pages go; if the copy is still in flight it pins both ends until it has landed."""
        state, lease = flight.destination
        state.forgo(lease)
        flight.sequence.copy = None
        self._touch(state)

    def _on_copy_done(self, copy: int, ok: bool) -> None:
        flight = self._flight.land_copy(copy)
        if flight is None:
            return
        sequence, (source, source_lease), (destination, lease) = flight.sequence, flight.source, flight.destination
        self._touch(source)
        self._touch(destination)
        if sequence.copy != copy:
            return  # the sequence ended, or lost one end, while the copy was in flight
        if ok:
            source.ledger.drop(source_lease)
            sequence.lease, sequence.copy = lease, None
            destination.land(sequence)
        else:
            self._cancel_copy(flight)
            self._offer(sequence)

    # --- instances come and go ----------------------------------------------------------------------------------------

    def _on_instance_up(self, instance: Instance) -> None:
        if (old := self._state(instance.id)) is not None:
            self._on_instance_lost(instance.id, old.instance.epoch)
        self._known[instance.id] = instance
        match instance.role:
            case Role.PREFILL:
                self._prefill[instance.id] = PrefillState(instance)
            case Role.DECODE:
                self._decode[instance.id] = DecodeState(instance, self.options.pull_watermark)
            case _:
                raise ValueError(f"policy disaggregated has no use for instance {instance.id} of role {instance.role}")
        for sequence in _by_age(self._homeless.values()):
            if why := self._cannot_ever_run(sequence):
                for doomed in [*sequence.forks, sequence]:
                    self._commands.append(Reject(doomed.id, why))
                    self._end(doomed.id)
            else:
                del self._homeless[sequence.id]
                if sequence.phase is Phase.READY:
                    self._offer(sequence)
                else:
                    self._wait_for_prefill(sequence, replay=True)

    def _on_instance_lost(self, instance: int, epoch: int) -> None:
        lost = self._state(instance)
        if lost is None or lost.instance.epoch != epoch:
            return
        (self._prefill if lost.instance.role is Role.PREFILL else self._decode).pop(instance)
        self._flight.lose(lost)
        for sequence in _by_age(self.sequences.values()):
            self._survive(sequence, lost)

    def _survive(self, sequence: Sequence, lost: InstanceState) -> None:
        """What a lost instance means for one sequence: a replay if its pages are gone, else another destination."""
        if sequence.phase is Phase.COPYING:
            flight = self._flight.copy_of(sequence)
            if lost is flight.source[0]:
                self._cancel_copy(flight)
                self._replay(sequence)
            elif lost is flight.destination[0]:
                self._cancel_copy(flight)
                self._offer(sequence)
        elif sequence.home is lost:
            if sequence.phase is Phase.READY:
                self._withdraw(sequence)
            self._replay(sequence)
        elif sequence.phase is Phase.READY and isinstance(lost, DecodeState) and lost.withdraw(sequence):
            self._offer(sequence)

    def _on_drain(self, instance: int) -> None:
        """No new work; what waits here moves to another instance, if there is one."""
        state = self._state(instance)
        if state is None:
            return
        state.draining = True
        if isinstance(state, PrefillState):
            for sequence in state.waiting():
                if _least_loaded(self._prefill.values(), sequence) is not None:
                    state.dequeue(sequence)
                    self._wait_for_prefill(sequence, replay=True)
        elif isinstance(state, DecodeState):
            for sequence in list(state.inbox.values()):
                if _least_loaded(self._decode.values(), sequence) is not None:
                    state.withdraw(sequence)
                    self._offer(sequence)

    # --- planning -----------------------------------------------------------------------------------------------------

    def _state(self, instance: int) -> PrefillState | DecodeState | None:
        return self._prefill.get(instance) or self._decode.get(instance)

    def _touch(self, state: InstanceState) -> None:
        self._touched[state] = None

    def _plan(self) -> None:
        """Give every touched instance the work that it can take now."""
        while self._touched:
            state = next(iter(self._touched))
            del self._touched[state]
            if not state.alive:
                continue
            if isinstance(state, PrefillState):
                while (step := state.plan(self._flight)) is not None:
                    self._commands.append(Run(step))
            elif isinstance(state, DecodeState):
                steps, preempted = state.plan(self._flight)
                self._commands.extend(map(Run, steps))
                for sequence in preempted:
                    self._replay_if_left(sequence)
                if preempted:  # slots came free: who waits for one goes before the next pull
                    self._touch(state)
                    continue
                while (copy := state.pull(self._flight)) is not None:
                    self._commands.append(copy)


def _holds(sequence: Sequence, instance: Instance) -> bool:
    return pages_for(sequence.most_tokens, instance.page_size) <= instance.pages


def _fits(sequence: Sequence, instance: Instance) -> bool:
    """Its pages fit into the pool and, where it is prefilled, its forks beside it into one step."""
    rows = 1 + len(sequence.forks)
    return _holds(sequence, instance) and (instance.role is Role.DECODE or rows <= instance.max_step_sequences)


def _by_age(sequences: Iterable[Sequence]) -> list[Sequence]:
    return sorted(sequences, key=lambda sequence: sequence.order)


def _least_loaded[State: (PrefillState, DecodeState)](states: Iterable[State], sequence: Sequence) -> State | None:
    """The instance with the least work, of those that take new work and can hold the sequence whole."""
    candidates = [state for state in states if not state.draining and _fits(sequence, state.instance)]
    return min(candidates, key=lambda state: state.load, default=None)
