"""What is in flight: steps and copies that were commanded and not yet answered, and the leases that they pin."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from ds_jax.protocol import Copy, Decode, Instance, Place, Prefill, Step
from ds_jax.scheduling.ledger import Lease, PageLedger
from ds_jax.scheduling.sequence import Sequence

STEPS_PER_LANE = 2
"""One running, one queued: the device never waits for the scheduler, and plans are at most one step stale."""


class InstanceState:
    """One living epoch of an instance: its pages and the steps in flight on each lane."""

    def __init__(self, instance: Instance):
        self.instance = instance
        self.ledger = PageLedger(instance.pages, instance.page_size)
        self.in_flight = [0] * instance.lanes
        self.alive = True
        self.draining = False

    @property
    def place(self) -> Place:
        return Place(self.instance.id, self.instance.epoch)

    def free_lane(self) -> int | None:
        """The lane with the fewest steps in flight, if it may have another."""
        lane = min(range(len(self.in_flight)), key=self.in_flight.__getitem__)
        return lane if self.in_flight[lane] < STEPS_PER_LANE else None


@dataclass(frozen=True, slots=True)
class StepInFlight:
    """`work` has, in the order of the step's prefills then decodes, the sequence and the lease that it pins.

    `state`, here and in a copy, is an InstanceState of whatever kind the policy made.
    """

    step: Step
    state: Any
    work: tuple[tuple[Sequence, Lease], ...]


class CopyInFlight(NamedTuple):
    copy: Copy
    sequence: Sequence
    source: tuple[Any, Lease]
    destination: tuple[Any, Lease]


class Flight:
    """All steps and copies in flight, by id. Pins at take-off, unpins at landing."""

    def __init__(self) -> None:
        self._steps: dict[int, StepInFlight] = {}
        self._copies: dict[int, CopyInFlight] = {}
        self._next_step = 0
        self._next_copy = 0

    def launch(
        self,
        state: InstanceState,
        lane: int,
        sequences: Iterable[Sequence],
        prefills: tuple[Prefill, ...] = (),
        decodes: tuple[Decode, ...] = (),
    ) -> Step:
        """A new step on this lane; `sequences` in the order of its prefills then decodes."""
        step = Step(self._next_step, state.instance.id, state.instance.epoch, lane, prefills, decodes)
        self._next_step += 1
        work = []
        for sequence in sequences:
            assert sequence.lease is not None
            sequence.steps += 1
            sequence.lease.pins += 1
            work.append((sequence, sequence.lease))
        self._steps[step.id] = StepInFlight(step, state, tuple(work))
        state.in_flight[lane] += 1
        return step

    def land(self, step: int) -> StepInFlight | None:
        """Unpin what the step named; None if it is unknown or its epoch has died."""
        flight = self._steps.pop(step, None)
        if flight is not None:
            flight.state.in_flight[flight.step.lane] -= 1
            for sequence, lease in flight.work:
                sequence.steps -= 1
                flight.state.ledger.unpin(lease)
        return flight

    def launch_copy(
        self, sequence: Sequence, source: InstanceState, destination: InstanceState, lease: Lease, shared: int = 0
    ) -> Copy:
        """Move the pages of the sequence's lease into `lease` at the destination; the first `shared` are there."""
        assert sequence.lease is not None
        pages = tuple(zip(sequence.lease.pages, lease.pages, strict=True))[shared:]
        held = tuple(lease.pages[:shared])
        copy = Copy(self._next_copy, sequence.id, source.place, destination.place, pages, shared=held)
        self._next_copy += 1
        flight = CopyInFlight(copy, sequence, (source, sequence.lease), (destination, lease))
        for state, end in (flight.source, flight.destination):
            state.ledger.pin(end)
        self._copies[copy.id] = flight
        sequence.copy = copy.id
        return copy

    def land_copy(self, copy: int) -> CopyInFlight | None:
        """Unpin both ends; None if the copy is unknown or both its ends have died."""
        flight = self._copies.pop(copy, None)
        if flight is not None:
            for state, lease in (flight.source, flight.destination):
                state.ledger.unpin(lease)
        return flight

    def copy_of(self, sequence: Sequence) -> CopyInFlight:
        """The copy that moves this sequence now."""
        assert sequence.copy is not None
        return self._copies[sequence.copy]

    def lose(self, state: InstanceState) -> None:
        """The state's epoch dies: its steps will never land, nor copies of which both ends are dead."""
        state.alive = False
        for id in [id for id, flight in self._steps.items() if flight.state is state]:
            for sequence, _ in self._steps.pop(id).work:
                sequence.steps -= 1
        for id, flight in list(self._copies.items()):
            if not flight.source[0].alive and not flight.destination[0].alive:
                del self._copies[id]
