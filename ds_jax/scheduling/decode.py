"""FCFS decoding on one instance: pulls, running batches over lanes, preemption (DistServe, section 4.3)."""

from __future__ import annotations

from itertools import chain

from ds_jax.protocol import Copy, Decode, Instance, Step, pages_for
from ds_jax.scheduling.flight import STEPS_PER_LANE, Flight, InstanceState
from ds_jax.scheduling.ledger import Lease
from ds_jax.scheduling.sequence import Phase, Sequence


class DecodeState(InstanceState):
    """The hand-overs that one decode instance has still to pull, and its running batches, one per lane."""

    def __init__(self, instance: Instance, pull_watermark: float):
        super().__init__(instance)
        self.pull_limit = pull_watermark * instance.pages
        self.inbox: dict[int, Sequence] = {}
        """Finished prefills assigned to this instance and not pulled yet, FIFO."""
        self.inbox_pages = 0
        self.landed: dict[int, Sequence] = {}
        """Pulled, waiting for a slot, FIFO."""
        self.waiting_pages = 0
        """Pages of sequences on their way here or landed: pulled, but without a slot."""
        self.batches: list[dict[int, Sequence]] = [{} for _ in range(instance.lanes)]
        self.free_slots = [list(range(instance.slots - 1, -1, -1)) for _ in range(instance.lanes)]

    @property
    def load(self) -> int:
        """Pages in use or promised: what dispatch compares."""
        return self.ledger.used + self.inbox_pages

    # --- hand-over ----------------------------------------------------------------------------------------------------

    def offer(self, sequence: Sequence) -> None:
        """A finished prefill waits to be pulled by this instance."""
        self.inbox[sequence.id] = sequence
        self.inbox_pages += self._pages(sequence)

    def withdraw(self, sequence: Sequence) -> bool:
        """Take an offer back; False if there is none here."""
        if self.inbox.pop(sequence.id, None) is None:
            return False
        self.inbox_pages -= self._pages(sequence)
        return True

    def pull(self, flight: Flight) -> Copy | None:
        """The pull rule: FIFO; while sequences without a slot hold less than the watermark, and the pages are free.

        Asks for room for the token after the prompt too, so that what was pulled can take at least one step. Full
        pages of the prompt that a sequence of the same request has here already are shared, not pulled again.
        """
        sequence = next(iter(self.inbox.values()), None)
        if sequence is None or (self.waiting_pages and self.waiting_pages >= self.pull_limit):
            return None
        relatives = [relative for relative in sequence.family if relative is not sequence]
        if any(relative.copy is not None and self._receives(relative, flight) for relative in relatives):
            return None  # its pages can be shared as soon as they have landed
        shared = next((self._shareable(relative) for relative in relatives if self._holds(relative)), [])
        if not self.ledger.can_take(sequence.tokens, len(shared)):
            return None
        self.withdraw(sequence)
        lease = self.ledger.take(sequence.tokens - 1, shared)
        self.waiting_pages += len(lease.pages)
        copy = flight.launch_copy(sequence, sequence.home, self, lease, len(shared))
        sequence.phase = Phase.COPYING
        return copy

    def expects(self, sequence: Sequence, flight: Flight) -> bool:
        """Whether the sequence's pages are here, on their way here, or to be pulled by this instance."""
        return (
            sequence.id in self.inbox
            or self._holds(sequence)
            or (sequence.copy is not None and self._receives(sequence, flight))
        )

    def _receives(self, sequence: Sequence, flight: Flight) -> bool:
        return flight.copy_of(sequence).destination[0] is self

    def _holds(self, sequence: Sequence) -> bool:
        return sequence.home is self and sequence.phase in (Phase.LANDED, Phase.RUNNING)

    def _shareable(self, sequence: Sequence) -> list[int]:
        """Pages of the sequence that hold nothing but its prompt, and are full: nobody writes to them any more."""
        assert sequence.lease is not None
        return sequence.lease.pages[: sequence.request.prompt_tokens // self.instance.page_size]

    def land(self, sequence: Sequence) -> None:
        """Its pages are here; `lease` and `home` are this instance's from now on."""
        sequence.home = self
        sequence.phase = Phase.LANDED
        self.landed[sequence.id] = sequence

    def forgo(self, lease: Lease) -> None:
        """The pages reserved for a sequence on its way here are not wanted any more."""
        self.waiting_pages -= len(lease.pages)
        self.ledger.drop(lease)

    # --- decoding -----------------------------------------------------------------------------------------------------

    def plan(self, flight: Flight) -> tuple[list[Step], list[Sequence]]:
        """Steps for all lanes that can take one, and the sequences preempted to make room for them."""
        self._admit()
        steps: list[Step] = []
        preempted: list[Sequence] = []
        for lane, batch in enumerate(self.batches):
            while batch and self.in_flight[lane] < STEPS_PER_LANE:
                decodes = self._next_decodes(batch, preempted)
                if not decodes:
                    break
                sequences = [batch[decode.sequence] for decode in decodes]
                for sequence in sequences:
                    sequence.planned += 1
                steps.append(flight.launch(self, lane, sequences, decodes=tuple(decodes)))
        return steps, preempted

    def _admit(self) -> None:
        """Give landed sequences a slot, oldest landing first, in the lane with the smallest batch."""
        while self.landed:
            lane = min(range(len(self.batches)), key=lambda lane: len(self.batches[lane]))
            if not self.free_slots[lane]:
                return
            sequence = self.landed.pop(next(iter(self.landed)))
            assert sequence.lease is not None
            self.waiting_pages -= len(sequence.lease.pages)
            sequence.lane, sequence.slot = lane, self.free_slots[lane].pop()
            sequence.phase = Phase.RUNNING
            self.batches[lane][sequence.id] = sequence

    def _next_decodes(self, batch: dict[int, Sequence], preempted: list[Sequence]) -> list[Decode]:
        page_size = self.instance.page_size
        decodes = []
        for sequence in list(batch.values()):
            request = sequence.request
            # A member may have been preempted in this very loop. One whose last token is in flight has nothing to plan.
            if sequence.phase is not Phase.RUNNING or sequence.emitted + sequence.planned >= request.max_tokens:
                continue
            if request.lockstep and sequence.planned:
                continue
            new_pages: tuple[int, ...] = ()
            assert sequence.lease is not None
            if request.prompt_tokens + sequence.emitted + sequence.planned > len(sequence.lease.pages) * page_size:
                if not self._make_room(sequence, preempted):
                    continue
                new_pages = self.ledger.grow(sequence.lease, 1)
            decodes.append(Decode(sequence.id, sequence.slot, new_pages))
        return [decode for decode in decodes if decode.sequence in batch] if preempted else decodes

    def _make_room(self, sequence: Sequence, preempted: list[Sequence]) -> bool:
        """Free a page for the sequence by preempting the newest; the oldest is never preempted.

        False if it must sit this step out: pages are about to come free, or it was itself the newest.
        """
        while not self.ledger.free:
            if self.ledger.leaving:
                return False
            members = list(chain(self.landed.values(), *(batch.values() for batch in self.batches)))
            victim = max(members, key=lambda member: member.order)
            if len(members) == 1:
                return False  # the rest of the pool is on its way in, and can be preempted once it has landed
            self.evict(victim)
            preempted.append(victim)
            if victim is sequence:
                return False
        return True

    def finish_step(self, sequence: Sequence, emitted: int) -> None:
        """One decode of the sequence is done and `emitted` (0 or 1) tokens of it were kept."""
        sequence.planned -= 1
        sequence.emitted += emitted

    def evict(self, sequence: Sequence) -> None:
        """Take a landed or running sequence out and drop its pages; steps in flight still pin them."""
        assert sequence.lease is not None
        if sequence.phase is Phase.LANDED:
            del self.landed[sequence.id]
            self.waiting_pages -= len(sequence.lease.pages)
        else:
            del self.batches[sequence.lane][sequence.id]
            self.free_slots[sequence.lane].append(sequence.slot)
        self.ledger.drop(sequence.lease)
        sequence.lease = None
        sequence.phase = Phase.LEAVING

    def _pages(self, sequence: Sequence) -> int:
        return pages_for(sequence.tokens, self.instance.page_size)
