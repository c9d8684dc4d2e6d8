"""What is in flight: steps and copies that were commanded and not yet answered, and the leases that they pin."""

from __future__ import annotations

from collections.abc import Sequence as Many
from typing import TYPE_CHECKING, NamedTuple

from ds_jax.protocol import Copy, Decodes, Prefill, Step
from ds_jax.scheduling.ledger import Lease
from ds_jax.scheduling.sequence import Sequence

if TYPE_CHECKING:
    from ds_jax.scheduling.worker import Worker

STEPS_PER_LANE = 2
"""One running, one queued: the device never waits for the scheduler, and plans are at most one step stale."""


class StepInFlight(NamedTuple):
    step: Step
    worker: Worker
    prefills: tuple[tuple[Sequence, Lease], ...]
    """Of each of the step's prefills, the sequence and the lease that it pins. The lane's batch knows the decodes."""


class CopyInFlight(NamedTuple):
    copy: Copy
    sequence: Sequence
    source: tuple[Worker, Lease]
    destination: tuple[Worker, Lease]


class Flight:
    """All steps and copies in flight, by id. Pins at take-off, unpins at landing."""

    def __init__(self) -> None:
        self._steps: dict[int, StepInFlight] = {}
        self._copies: dict[int, CopyInFlight] = {}
        self._next_step = 0
        self._next_copy = 0

    def launch(
        self, worker: Worker, lane: int, prefills: Many[tuple[Sequence, Prefill]] = (), decodes: Decodes | None = None
    ) -> Step:
        """A new step on this lane, of chunks with their sequences, and of what `RunningBatch.decodes` just gave."""
        id = self._next_step
        self._next_step = id + 1
        instance = worker.instance
        work = []
        for sequence, _ in prefills:
            assert sequence.lease is not None
            sequence.steps += 1
            sequence.lease.pins += 1
            work.append((sequence, sequence.lease))
        chunks = tuple([prefill for _, prefill in prefills])
        step = Step(id, instance.id, instance.epoch, lane, chunks, decodes or ())
        if decodes:
            worker.decoding.batches[lane].launched(id)
        self._steps[id] = StepInFlight(step, worker, tuple(work))
        worker.in_flight[lane] += 1
        worker.last_step[lane] = id
        return step

    def land(self, step: int) -> StepInFlight | None:
        """Unpin what the step's chunks named; None if it is unknown or its epoch has died."""
        flight = self._steps.pop(step, None)
        if flight is not None:
            flight.worker.in_flight[flight.step.lane] -= 1
            for sequence, lease in flight.prefills:
                sequence.steps -= 1
                flight.worker.ledger.unpin(lease)
        return flight

    def launch_copy(
        self, sequence: Sequence, source: tuple[Worker, Lease], destination: tuple[Worker, Lease], shared: int = 0
    ) -> Copy:
        """Move the first pages of one lease, as many as the other has, into that; the first `shared` are there."""
        (here, old), (there, new) = source, destination
        pages = tuple(zip(old.pages[shared : len(new.pages)], new.pages[shared:], strict=True))
        held = tuple(new.pages[:shared]) if shared else ()
        id = self._next_copy
        self._next_copy = id + 1
        copy = Copy(id, sequence.id, here.place_of(old), there.place_of(new), pages, shared=held)
        for end in (old, new):
            end.ledger.pin(end)
        self._copies[id] = CopyInFlight(copy, sequence, source, destination)
        sequence.copy = id
        return copy

    def land_copy(self, copy: int) -> CopyInFlight | None:
        """Unpin both ends; None if the copy is unknown or both its ends have died."""
        flight = self._copies.pop(copy, None)
        if flight is not None:
            for _, lease in (flight.source, flight.destination):
                lease.ledger.unpin(lease)
        return flight

    def moves(self, copy: int) -> bool:
        """Whether the copy is in flight."""
        return copy in self._copies

    def copy_of(self, sequence: Sequence) -> CopyInFlight:
        """The copy that moves this sequence now."""
        assert sequence.copy is not None
        return self._copies[sequence.copy]

    def lose(self, worker: Worker) -> None:
        """The worker's epoch dies: its steps will never land, nor copies of which both ends are dead."""
        worker.alive = False
        for id in [id for id, flight in self._steps.items() if flight.worker is worker]:
            del self._steps[id]
        for id, flight in list(self._copies.items()):
            if not flight.source[0].alive and not flight.destination[0].alive:
                del self._copies[id]
