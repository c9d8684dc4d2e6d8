"""What all policies share: a sequence's life, from any instance to any other, whatever comes and goes meanwhile.

A policy is a `Policy` with decisions of its own, of which only `plan` has no default:

* `place_prompt`: on which instance a prompt is prefilled, or None to let it wait;
* `place_decode`: which instance decodes a finished prefill: where it is (no copy), another one (which pulls it), none;
* `plan`: the next steps of one instance: which chunks, with or without the decodes of the lane;
* `dispatch`: called after every event, for who keeps prompts waiting in `waiting` until something has changed;
* `admit`: who of those whose pages have landed gets a slot;
* `on_timer`: what is to be done at a time that the policy has asked for.

The rest is here, once: replays, several outputs of one prompt, deadlines, copies that fail, preemption, and instances
that come, go and drain. `Worker` is what the decisions look at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Many
from typing import TYPE_CHECKING, Any, ClassVar

from ds_jax.config import SchedulerConfig
from ds_jax.protocol import (
    Arrived,
    Command,
    CopyDone,
    Decodes,
    Drain,
    Event,
    Instance,
    InstanceLost,
    InstanceUp,
    Prefill,
    Reject,
    Role,
    Run,
    SetTimer,
    Step,
    StepDone,
    Stopped,
    Timer,
)
from ds_jax.scheduling.flight import CopyInFlight, Flight
from ds_jax.scheduling.ledger import PageLedger
from ds_jax.scheduling.sequence import Phase, Sequence
from ds_jax.scheduling.worker import Worker

if TYPE_CHECKING:
    from ds_jax.latency import Predictor


class Policy:
    """A scheduler but for its decisions. `now_ns` is the time of the event that is being handled."""

    roles: ClassVar[frozenset[Role]] = frozenset(Role)
    """Roles of the instances that it works with; others are refused."""
    pulls_at_once: ClassVar[bool] = True
    """Whether hand-overs are pulled as soon as the pull rule allows; otherwise `plan` does it."""

    def __init__(self, options: SchedulerConfig | None = None, predictor: Predictor | None = None):
        self.options = options or SchedulerConfig()
        self.predictor = predictor
        self.now_ns = 0
        self.sequences: dict[int, Sequence] = {}
        """Every living sequence."""
        self.workers: dict[int, Worker] = {}
        """Every living instance, by id."""
        self.waiting: dict[int, Sequence] = {}
        """WAITING for an instance to prefill them, or READY and waiting for one to decode them, in order of coming."""
        self._known: dict[int, Instance] = {}
        """The last life of every instance ever seen: what a request could possibly run on."""
        self._any_holds = 0
        """Tokens that some known instance holds that prefills, and some that decodes: whoever needs no more can run."""
        self._flight = Flight()
        self._arrivals = 0
        self._touched: dict[Worker, None] = {}
        """Workers for which the event may have made a step or a pull possible."""
        self._commands: list[Command] = []

    # --- decisions ----------------------------------------------------------------------------------------------------

    def place_prompt(self, sequence: Sequence) -> Worker | None:
        """Where a prompt (or a replay: prompt and confirmed output) is to be prefilled. None: it waits in `waiting`.

        As given: the least prompt tokens waiting, of the workers that may run prompts.
        """
        candidates = self.candidates(sequence, prefill=True)
        return min(candidates, key=lambda worker: worker.prompts.load, default=None)

    def place_decode(self, sequence: Sequence) -> Worker | None:
        """Which worker decodes a finished prefill, whose pages are on `sequence.home`. None: it waits in `waiting`.

        As given: where it is, if that worker decodes; else the worker with the least pages in use or promised.
        """
        if sequence.home.decodes:
            return sequence.home
        candidates = self.candidates(sequence, prefill=False)
        return min(candidates, key=lambda worker: worker.ledger.used + worker.decoding.inbox_pages, default=None)

    def plan(self, worker: Worker) -> None:
        """Give the worker, by `run`, the steps that it can take now. Called when anything may have changed for it."""
        raise NotImplementedError

    def admit(self, worker: Worker) -> None:
        """Give slots to those whose pages are on the worker. As given: to all, while there are slots."""
        worker.decoding.admit()

    def dispatch(self) -> None:
        """Called after each event (of arrivals that come together, after the last), before the workers are planned: the
        place to `assign` those in `waiting`."""

    def on_timer(self, key: str) -> None:
        """A timer that the policy has set itself is due."""

    # --- what decisions are made with ---------------------------------------------------------------------------------

    def candidates(self, sequence: Sequence, *, prefill: bool) -> list[Worker]:
        """Workers that take new work, can hold the sequence whole, and may prefill it (or else decode it)."""
        return [
            worker
            for worker in self.workers.values()
            if (worker.prefills if prefill else worker.decodes)
            and not worker.draining
            and _fits(sequence, worker.instance, prefill)
        ]

    def run(
        self, worker: Worker, lane: int, prefills: Many[tuple[Sequence, Prefill]] = (), decodes: Decodes | None = None
    ) -> Step:
        """Command a step on an open lane.

        Args:
            prefills: what `worker.prompts.chunk` gave, of one or more sequences.
            decodes: what `worker.next_decodes(lane)` gave just now; None or empty for a step without decodes.
        """
        step = self._flight.launch(worker, lane, prefills, decodes)
        self._commands.append(Run(step))
        return step

    def assign(self, sequence: Sequence, worker: Worker, *, replay: bool = False) -> None:
        """Let the worker prefill a WAITING sequence of `waiting`: at the end of its queue, or ahead of it."""
        self.waiting.pop(sequence.id, None)
        sequence.home = worker
        worker.prompts.enqueue(sequence, replay)
        self.touch(worker)

    def reject(self, sequence: Sequence, why: str, retry_after_s: float | None = None) -> None:
        """End a sequence, and tell whoever asked for it why."""
        self._commands.append(Reject(sequence.id, why, retry_after_s))
        self._end(sequence.id)

    def set_timer(self, key: str, at_ns: int) -> None:
        """Ask for `on_timer(key)`; a key must not begin with `deadline:`."""
        self._commands.append(SetTimer(key, at_ns))

    def touch(self, worker: Worker) -> None:
        """Plan the worker when the event has been taken in."""
        self._touched[worker] = None

    # --- events -------------------------------------------------------------------------------------------------------

    @property
    def ledgers(self) -> dict[int, PageLedger]:
        """Page ledgers of the living instances, by id."""
        return {id: worker.ledger for id, worker in self.workers.items()}

    @property
    def host_ledgers(self) -> dict[int, PageLedger]:
        """Those of their host memory."""
        return {id: worker.host for id, worker in self.workers.items()}

    def handle(self, event: Event, now_ns: int) -> list[Command]:
        """Take one event in, then plan whatever it made possible, unless more arrivals follow at once."""
        self.now_ns = now_ns
        commands = self._commands = list[Command]()
        self._HEAR[type(event)](self, event)
        if type(event) is Arrived and event.more:
            return commands
        self.dispatch()
        self._plan()
        return commands

    def _plan(self) -> None:
        """Give every touched worker the work that it can take now."""
        while self._touched:
            worker = next(iter(self._touched))
            del self._touched[worker]
            if not worker.alive:
                continue
            decoding = worker.decoding
            while decoding.siblings and (copy := decoding.separate(self._flight)) is not None:
                self._commands.append(copy)
            if decoding.landed:
                self.admit(worker)
            self.plan(worker)
            if worker.preempted:  # slots came free: who waits for one goes before the next pull
                preempted, worker.preempted = worker.preempted, []
                for sequence in preempted:
                    self._replay_if_left(sequence)
                self.touch(worker)
                continue
            while decoding.swapped and (copy := decoding.swap_in(self._flight)) is not None:
                self._commands.append(copy)
            while self.pulls_at_once and decoding.inbox and (copy := decoding.pull(self._flight)) is not None:
                self._commands.append(copy)

    # --- requests come and go -----------------------------------------------------------------------------------------

    def _on_arrived(self, event: Arrived) -> None:
        request = event.request
        family = [Sequence(request, self._arrivals + index, id) for index, id in enumerate(request.sequences)]
        self._arrivals += request.n
        leader, *forks = family
        self._lead(leader, forks)
        if why := self._cannot_ever_run(leader):
            self._commands.extend(Reject(sequence.id, why) for sequence in family)
            return
        for sequence in family:
            sequence.family = family
            sequence.arrived_ns = self.now_ns
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
        """A sequence must fit whole into a pool that prefills (it may be replayed) and into one that decodes."""
        if sequence.most_tokens <= self._any_holds and not sequence.forks:
            return None
        for prefill, without in ((True, Role.DECODE), (False, Role.PREFILL)):
            if any(i.role is not without and _fits(sequence, i, prefill) for i in self._known.values()):
                continue
            pools = [instance for instance in self._known.values() if instance.role is not without]
            if pools and not any(_holds(sequence, instance) for instance in pools):
                largest = max(instance.pages * instance.page_size for instance in pools)
                roles = " or ".join(sorted({str(instance.role) for instance in pools}, reverse=True))
                return (
                    f"prompt and max_tokens ask for KV pages of {sequence.most_tokens} tokens; "
                    f"the largest {roles} pool holds {largest}"
                )
            if pools:
                rows = max(instance.max_step_sequences for instance in pools if _holds(sequence, instance))
                return f"n = {sequence.request.n} must be at most {rows}, the prompts that one prefill step holds"
        return None

    def _on_timer(self, event: Timer) -> None:
        kind, _, sequence = event.key.partition(":")
        if kind != "deadline":
            self.on_timer(event.key)
        elif int(sequence) in self.sequences:
            self.reject(self.sequences[int(sequence)], "the deadline has passed")

    def _on_stopped(self, event: Stopped) -> None:
        self._end(event.sequence)

    def _end(self, id: int) -> None:
        """The sequence is over, wherever it is. What is in flight still pins its pages."""
        sequence = self.sequences.pop(id, None)
        if sequence is None:
            return
        self._take_out(sequence)
        if sequence.lease is not None:
            sequence.lease.ledger.drop(sequence.lease)
            sequence.lease = None
        sequence.phase = Phase.ENDED
        if sequence.forks:  # it was to lead them through prefill: the oldest does so now
            leader, *forks = sequence.forks
            sequence.forks = []
            self._lead(leader, forks)
            self._wait_for_prefill(leader, replay=True)

    def _take_out(self, sequence: Sequence) -> None:
        """Remove the sequence from whatever queue or batch it is in."""
        if isinstance(sequence.home, Worker):
            self.touch(sequence.home)
        match sequence.phase:
            case Phase.RUNNING | Phase.LANDED:
                sequence.home.decoding.remove(sequence)
            case Phase.FOLLOWING:
                sequence.home.forks.remove(sequence)
            case Phase.WAITING:
                if self.waiting.pop(sequence.id, None) is None:
                    sequence.home.prompts.dequeue(sequence)
            case Phase.PREFILLING:
                sequence.home.prompts.abandon(sequence)
            case Phase.READY:
                self._withdraw(sequence)
            case Phase.COPYING:
                self._cancel_copy(self._flight.copy_of(sequence))
            case Phase.LEAVING:
                self._give_up_swap(sequence)
            case Phase.SWAPPED:
                del sequence.home.decoding.swapped[sequence.id]

    # --- steps --------------------------------------------------------------------------------------------------------

    def _wait_for_prefill(self, sequence: Sequence, replay: bool) -> None:
        worker = self.place_prompt(sequence)
        if worker is None:
            sequence.home = None
            sequence.phase = Phase.WAITING
            self.waiting[sequence.id] = sequence
        else:
            self.assign(sequence, worker, replay=replay)

    def _replay(self, sequence: Sequence) -> None:
        """Run prompt + confirmed output through prefill again; that samples the next token, never an old one."""
        sequence.counted = sequence.emitted
        sequence.steady = False
        sequence.batch = sequence.lease = sequence.pinned = sequence.copy = sequence.swap = None
        sequence.ticks = []
        sequence.steps = sequence.sampling = sequence.prefilled = 0
        self._wait_for_prefill(sequence, replay=True)

    def _replay_if_left(self, sequence: Sequence) -> None:
        """A preempted sequence replays, or is swapped out, once its last steps in flight have told their tokens."""
        if sequence.phase is Phase.LEAVING and not sequence.in_flight:
            if sequence.swap is not None:
                self._commands.append(sequence.home.decoding.swap_out(sequence, self._flight))
            else:
                self._replay(sequence)

    def _give_up_swap(self, sequence: Sequence) -> None:
        """What is in its pages is of no use any more."""
        if sequence.swap is not None:
            device, host = sequence.swap
            sequence.swap = None
            device.ledger.unpin(device)
            host.ledger.drop(host)

    def _on_step_done(self, event: StepDone) -> None:
        flight = self._flight.land(event.step)
        if flight is None:
            return
        step, worker, prefills = flight
        emitted = event.emitted
        self._touched[worker] = None
        others = 0
        for chunk, (sequence, lease) in zip(step.prefills, prefills, strict=True):
            if chunk.samples:
                others += sequence.id in emitted
                kept = emitted.get(sequence.id, 0)
                if sequence.lease is lease or sequence.phase is Phase.LEAVING:
                    sequence.sampling = 0
                    sequence.counted += kept
                    if kept and sequence.first_ns is None:
                        sequence.first_ns = self.now_ns
                if sequence.lease is lease:
                    worker.prompts.land(sequence)
                    self._after_prefill(sequence, kept)
                    continue
            self._after_decode(sequence, 1)
        if step.decodes:
            for sequence, kept in worker.decoding.batches[step.lane].land(step.decodes, emitted, others):
                self._after_decode(sequence, kept)

    def _after_prefill(self, sequence: Sequence, kept: int) -> None:
        if sequence.counted >= sequence.request.max_tokens:
            self._end(sequence.id)
        elif kept:
            self._hand_over(sequence)
        else:  # the token was lost, and with it the sense of what follows
            sequence.home.ledger.drop(sequence.lease)
            self._replay(sequence)

    def _after_decode(self, sequence: Sequence, kept: int) -> None:
        if sequence.phase is Phase.ENDED:
            return
        if sequence.emitted >= sequence.request.max_tokens:
            self._end(sequence.id)
        elif not kept and sequence.phase is Phase.RUNNING:
            sequence.home.evict(sequence)
        elif not kept and sequence.phase is Phase.LEAVING:
            self._give_up_swap(sequence)
        self._replay_if_left(sequence)

    # --- hand-over ----------------------------------------------------------------------------------------------------

    def _hand_over(self, sequence: Sequence) -> None:
        """A finished prefill goes on where it is, or waits to be pulled by another worker."""
        sequence.phase = Phase.READY
        sequence.copy = None
        worker = self._with_family(sequence) or self.place_decode(sequence)
        if worker is None:
            self.waiting[sequence.id] = sequence
            return
        if worker is sequence.home:
            worker.decoding.stay(sequence)
        else:
            worker.decoding.offer(sequence)
        self.touch(worker)

    def _with_family(self, sequence: Sequence) -> Worker | None:
        """The worker that has, or will have, a sequence of the same request, whose pages can be shared."""
        if len(sequence.family) == 1 or sequence.home.decodes:
            return None  # workers that both prefill must not wait for each other's pages
        for worker in self.candidates(sequence, prefill=False):
            for relative in sequence.family:
                if relative is not sequence and worker.decoding.expects(relative, self._flight):
                    return worker
        return None

    def _withdraw(self, sequence: Sequence) -> None:
        """Take a READY sequence back from whoever was to pull it."""
        if (
            self.waiting.pop(sequence.id, None) is None
            and sequence.home.decoding.siblings.pop(sequence.id, None) is None
        ):
            any(worker.decoding.withdraw(sequence) for worker in self.workers.values())

    def _cancel_copy(self, flight: CopyInFlight) -> None:
        """Let the destination's pages go; if the copy is still in flight it pins both ends until it has landed."""
        worker, lease = flight.destination
        worker.decoding.forgo(lease)
        worker.decoding.swapped.pop(flight.sequence.id, None)
        flight.sequence.copy = None
        self.touch(worker)

    def _on_copy_done(self, event: CopyDone) -> None:
        flight = self._flight.land_copy(event.copy)
        if flight is None:
            return
        sequence, (source, source_lease), (destination, lease) = flight.sequence, flight.source, flight.destination
        self.touch(source)
        self.touch(destination)
        if sequence.copy != event.copy:
            return  # the sequence ended, or lost one end, while the copy was in flight
        if event.ok:
            if source_lease.held:  # those of a sequence that is swapped out were given up before
                source_lease.ledger.drop(source_lease)
            destination.decoding.receive(sequence, lease)
        else:
            self._cancel_copy(flight)
            if sequence.lease is None:
                self._replay(sequence)
            elif sequence.lease.ledger is source.host:
                source.decoding.return_to_host(sequence)
            else:
                self._hand_over(sequence)

    # --- instances come and go ----------------------------------------------------------------------------------------

    def _on_instance_up(self, event: InstanceUp) -> None:
        instance = event.instance
        if instance.role not in self.roles:
            name = type(self).__name__.lower()
            raise ValueError(f"policy {name} has no use for instance {instance.id} of role {instance.role}")
        if (old := self.workers.get(instance.id)) is not None:
            self._lose(instance.id, old.instance.epoch)
        self._known[instance.id] = instance
        prefill = [i for i in self._known.values() if i.role is not Role.DECODE and i.max_step_sequences]
        decode = [i for i in self._known.values() if i.role is not Role.PREFILL]
        self._any_holds = min(max([i.pages * i.page_size for i in side], default=0) for side in (prefill, decode))
        options = self.options
        self.workers[instance.id] = worker = Worker(
            instance, options.pull_watermark, options.steps_per_lane, options.preemption == "swap"
        )
        self.touch(worker)
        for sequence in _by_age(self.waiting.values()):
            if why := self._cannot_ever_run(sequence):
                for doomed in [*sequence.forks, sequence]:
                    self.reject(doomed, why)
            else:
                del self.waiting[sequence.id]
                if sequence.phase is Phase.READY:
                    self._hand_over(sequence)
                else:
                    self._wait_for_prefill(sequence, replay=True)

    def _on_instance_lost(self, event: InstanceLost) -> None:
        self._lose(event.instance, event.epoch)

    def _lose(self, instance: int, epoch: int) -> None:
        lost = self.workers.get(instance)
        if lost is None or lost.instance.epoch != epoch:
            return
        del self.workers[instance]
        lost.alive = False
        for sequence in _by_age(self.sequences.values()):
            self._survive(sequence, lost)
        self._flight.lose(lost)

    def _survive(self, sequence: Sequence, lost: Worker) -> None:
        """What a lost instance means for one sequence: a replay if its pages are gone, else another destination."""
        if sequence.phase is Phase.COPYING:
            flight = self._flight.copy_of(sequence)
            if lost is flight.source[0]:
                self._cancel_copy(flight)
                self._replay(sequence)
            elif lost is flight.destination[0]:
                self._cancel_copy(flight)
                self._hand_over(sequence)
        elif sequence.home is lost:
            if sequence.phase is Phase.READY:
                self._withdraw(sequence)
            self._replay(sequence)
        elif sequence.phase is Phase.READY and lost.decoding.withdraw(sequence):
            self._hand_over(sequence)

    def _on_drain(self, event: Drain) -> None:
        """No new work; what waits here moves to another instance, if there is one."""
        worker = self.workers.get(event.instance)
        if worker is None:
            return
        worker.draining = True
        for sequence in list(worker.prompts.waiting()):
            if (other := self.place_prompt(sequence)) is not None:
                worker.prompts.dequeue(sequence)
                self.assign(sequence, other, replay=True)
        for sequence in list(worker.decoding.inbox.values()):
            if self.candidates(sequence, prefill=False):
                worker.decoding.withdraw(sequence)
                self._hand_over(sequence)

    _HEAR: ClassVar[dict[type[Event], Callable[[Policy, Any], None]]] = {
        Arrived: _on_arrived,
        Stopped: _on_stopped,
        StepDone: _on_step_done,
        CopyDone: _on_copy_done,
        InstanceUp: _on_instance_up,
        InstanceLost: _on_instance_lost,
        Drain: _on_drain,
        Timer: _on_timer,
    }


def _holds(sequence: Sequence, instance: Instance) -> bool:
    return sequence.most_tokens <= instance.pages * instance.page_size


def _fits(sequence: Sequence, instance: Instance, prefill: bool) -> bool:
    """Its pages fit into the pool and, where it is prefilled, its forks beside it into one step."""
    return sequence.most_tokens <= instance.pages * instance.page_size and (
        not prefill or len(sequence.forks) < instance.max_step_sequences
    )


def _by_age(sequences: Iterable[Sequence]) -> list[Sequence]:
    return sorted(sequences, key=lambda sequence: sequence.order)
