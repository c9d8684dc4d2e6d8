"""What one instance decodes: hand-overs that it has still to pull, what has landed, and the batches of its lanes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import TYPE_CHECKING

from ds_jax.protocol import Copy, pages_for
from ds_jax.scheduling.batch import RunningBatch
from ds_jax.scheduling.flight import Flight
from ds_jax.scheduling.ledger import Lease
from ds_jax.scheduling.sequence import Phase, Sequence

if TYPE_CHECKING:
    from ds_jax.scheduling.worker import Worker


class Decoding:
    """First come, first served on one instance (DistServe, section 4.3): pulls, and slots in the lanes."""

    def __init__(self, worker: Worker, pull_watermark: float):
        instance = worker.instance
        self.inbox: dict[int, Sequence] = {}
        """Finished prefills of other instances, assigned to this one and not pulled yet, FIFO."""
        self.inbox_pages = 0
        self.siblings: dict[int, Sequence] = {}
        """Prefilled here beside others of their request: each needs a last page of its own before it can decode."""
        self.swapped: dict[int, Sequence] = {}
        """Preempted, their pages in host memory or on their way there, FIFO."""
        self.landed: dict[int, Sequence] = {}
        """Their pages are here; they wait for a slot, FIFO."""
        self.waiting_pages = 0
        """Pages of sequences on their way here or landed: without a slot."""
        self.batches = [RunningBatch(instance.slots, worker.ledger) for _ in range(instance.lanes)]
        self._worker = worker
        self._ledger = worker.ledger
        self._page_size = instance.page_size
        self._pull_limit = pull_watermark * instance.pages

    @property
    def running(self) -> Iterator[Sequence]:
        """All that have a slot."""
        return chain.from_iterable(batch.sequences.values() for batch in self.batches)

    @property
    def count(self) -> int:
        """Sequences that decode here, or will when they get a slot."""
        return len(self.landed) + len(self.siblings) + sum([len(batch.sequences) for batch in self.batches])

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

    @property
    def full(self) -> bool:
        """Whether sequences without a slot hold so much that nothing is pulled."""
        return self.waiting_pages > 0 and self.waiting_pages >= self._pull_limit

    def pull(self, flight: Flight) -> Copy | None:
        """The pull rule: FIFO; while sequences without a slot hold less than the watermark, and the pages are free.

        Asks for room for the token after the prompt too, so that what was pulled can take at least one step. Full
        pages of the prompt that a sequence of the same request has here already are shared, not pulled again. Leaves
        pages for an older prompt that waits here to be prefilled: hand-overs could keep it from them for ever.
        """
        if not self.inbox or self.swapped or self.full:
            return None
        sequence = next(iter(self.inbox.values()))
        prompt = self._worker.prompts.head if self._worker.prefills else None
        if prompt is not None and prompt.order < sequence.order:
            pages = self._pages(prompt) + self._pages(sequence)
            if pages + self._ledger.promised > self._ledger.free:
                return None
        shared: list[int] = []
        if len(sequence.family) > 1:
            relatives = [relative for relative in sequence.family if relative is not sequence]
            if any(relative.copy is not None and self._receives(relative, flight) for relative in relatives):
                return None  # its pages can be shared as soon as they have landed
            shared = next((self._shareable(relative) for relative in relatives if self._holds(relative)), [])
        if not self._ledger.can_take(sequence.tokens, len(shared)):
            return None
        self.withdraw(sequence)
        return self._begin_copy(sequence, shared, flight)

    def expects(self, sequence: Sequence, flight: Flight) -> bool:
        """Whether the sequence's pages are here, on their way here, or to be pulled by this instance."""
        return (
            sequence.id in self.inbox
            or self._holds(sequence)
            or (sequence.copy is not None and self._receives(sequence, flight))
        )

    def stay(self, sequence: Sequence) -> None:
        """A finished prefill of this instance goes on here, where its pages are."""
        if len(sequence.family) == 1 or self._owns_last_page(sequence):
            self.land(sequence)
        else:
            self.siblings[sequence.id] = sequence

    def separate(self, flight: Flight) -> Copy | None:
        """Give a sibling a last page of its own. The last one left has the old page to itself, and lands as it is."""
        for sequence in list(self.siblings.values()):
            if sequence.id not in self.siblings:
                continue  # preempted for the one before it
            full = self._shareable(sequence)
            if self._owns_last_page(sequence):
                del self.siblings[sequence.id]
                self.land(sequence)
            elif not any(relative.id in self.siblings for relative in sequence.family if relative is not sequence):
                continue  # the page will be its own when the copies of the others have landed
            elif self._ledger.free or self._worker.find_page(sequence):
                del self.siblings[sequence.id]
                return self._begin_copy(sequence, full, flight)
        return None

    def _begin_copy(self, sequence: Sequence, shared: list[int], flight: Flight) -> Copy:
        lease = self._ledger.take(sequence.tokens - 1, shared)
        self.waiting_pages += len(lease.pages)
        assert sequence.lease is not None
        copy = flight.launch_copy(sequence, (sequence.home, sequence.lease), (self._worker, lease), len(shared))
        sequence.phase = Phase.COPYING
        return copy

    def _owns_last_page(self, sequence: Sequence) -> bool:
        """Whether nobody else holds a page to which it will write."""
        assert sequence.lease is not None
        pages = sequence.lease.pages
        return not any(self._ledger.shared(page) for page in pages[len(self._shareable(sequence)) :])

    def _receives(self, sequence: Sequence, flight: Flight) -> bool:
        return flight.copy_of(sequence).destination[0] is self._worker

    def _holds(self, sequence: Sequence) -> bool:
        return sequence.home is self._worker and sequence.phase in (Phase.LANDED, Phase.RUNNING)

    def _shareable(self, sequence: Sequence) -> list[int]:
        """Pages of the sequence that hold nothing but its prompt, and are full: nobody writes to them any more."""
        assert sequence.lease is not None
        return sequence.lease.pages[: sequence.request.prompt_tokens // self._page_size]

    def land(self, sequence: Sequence) -> None:
        """Its pages are here, and counted in `waiting_pages` from now on; it waits for a slot."""
        assert sequence.lease is not None
        sequence.home = self._worker
        sequence.phase = Phase.LANDED
        self.landed[sequence.id] = sequence
        self.waiting_pages += len(sequence.lease.pages)

    def receive(self, sequence: Sequence, lease: Lease) -> None:
        """The copy of its pages into this lease has landed."""
        sequence.lease, sequence.copy = lease, None
        if lease.ledger is self._ledger:
            self.waiting_pages -= len(lease.pages)
            self.land(sequence)
        else:
            sequence.phase = Phase.SWAPPED

    def forgo(self, lease: Lease) -> None:
        """The pages reserved for a sequence on its way here are not wanted any more."""
        if lease.ledger is self._ledger:
            self.waiting_pages -= len(lease.pages)
        lease.ledger.drop(lease)

    # --- swap ---------------------------------------------------------------------------------------------------------

    def swap_out(self, sequence: Sequence, flight: Flight) -> Copy:
        """Its last steps are done: move what is in its pages to host memory."""
        assert sequence.swap is not None
        device, host = sequence.swap
        copy = flight.launch_copy(sequence, (self._worker, device), (self._worker, host))
        self._ledger.unpin(device)
        sequence.swap = None
        sequence.phase = Phase.COPYING
        self.swapped[sequence.id] = sequence
        return copy

    def swap_in(self, flight: Flight) -> Copy | None:
        """Bring the first that was swapped out back, if its pages are free: before any pull, and before any prompt."""
        sequence = next(iter(self.swapped.values()), None)
        if sequence is None or sequence.phase is not Phase.SWAPPED or not self._ledger.can_take(sequence.tokens):
            return None
        del self.swapped[sequence.id]
        return self._begin_copy(sequence, [], flight)

    def return_to_host(self, sequence: Sequence) -> None:
        """Its pages are in host memory; it is the first to come back if the copy that failed was to bring it."""
        sequence.phase = Phase.SWAPPED
        if sequence.id not in self.swapped:
            others = dict(self.swapped)
            self.swapped.clear()
            self.swapped[sequence.id] = sequence
            self.swapped.update(others)

    # --- slots --------------------------------------------------------------------------------------------------------

    def admit(self) -> None:
        """Give landed sequences a slot, oldest landing first, in the lane with the smallest batch."""
        while self.landed:
            batch = min(self.batches, key=lambda batch: len(batch.sequences))
            if not batch.slots:
                return
            self.seat(next(iter(self.landed.values())), batch)

    def seat(self, sequence: Sequence, batch: RunningBatch) -> None:
        """Give a landed sequence a slot in this batch, which has one."""
        assert sequence.lease is not None
        del self.landed[sequence.id]
        self.waiting_pages -= len(sequence.lease.pages)
        batch.join(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take a landed or running sequence or a sibling out; its pages are the caller's to drop."""
        if sequence.phase is Phase.RUNNING:
            assert sequence.batch is not None
            sequence.batch.leave(sequence)
        elif self.siblings.pop(sequence.id, None) is None:
            assert sequence.lease is not None
            del self.landed[sequence.id]
            self.waiting_pages -= len(sequence.lease.pages)

    def _pages(self, sequence: Sequence) -> int:
        return pages_for(sequence.tokens, self._page_size)
