"""FCFS prefill on one instance (DistServe, sections 3.1 and 4.3)."""

from __future__ import annotations

import bisect

from ds_jax.protocol import Instance, Prefill, Step
from ds_jax.scheduling.flight import Flight, InstanceState
from ds_jax.scheduling.sequence import Phase, Sequence


class PrefillState(InstanceState):
    """The queue of one prefill instance, and how batches are cut from its head."""

    def __init__(self, instance: Instance):
        super().__init__(instance)
        self.replays: list[Sequence] = []
        """Preempted and orphaned sequences, oldest first: they run ahead of new arrivals."""
        self.queue: dict[int, Sequence] = {}
        """New arrivals, first come first served."""
        self.partial: Sequence | None = None
        """A prompt longer than a step, some of whose chunks are still to be planned."""
        self.load = 0
        """Tokens whose prefill was asked for and is not done: what dispatch compares."""

    def enqueue(self, sequence: Sequence, replay: bool) -> None:
        sequence.home = self
        sequence.phase = Phase.WAITING
        sequence.prefilled = 0
        sequence.charged = sequence.tokens
        self.load += sequence.charged
        if replay:
            bisect.insort(self.replays, sequence, key=lambda waiting: waiting.order)
        else:
            self.queue[sequence.id] = sequence

    def dequeue(self, sequence: Sequence) -> None:
        """Take out a sequence that waits."""
        if self.queue.pop(sequence.id, None) is None:
            self.replays.remove(sequence)
        self._discharge(sequence)

    def waiting(self) -> list[Sequence]:
        return [*self.replays, *self.queue.values()]

    def plan(self, flight: Flight) -> Step | None:
        """The next step, if a lane is free and there is work that fits."""
        lane = self.free_lane()
        if lane is None:
            return None
        batch = [self.partial] if self.partial is not None else self._next_batch()
        if not batch:
            return None
        sequences: list[Sequence] = []
        prefills: list[Prefill] = []
        for sequence in batch:
            sequences.append(sequence)
            prefills.append(self._next_chunk(sequence))
            if prefills[-1].samples:
                for fork in self._fork(sequence):
                    sequences.append(fork)
                    prefills.append(Prefill(fork.id, sequence.prefilled, 0, True))
        return flight.launch(self, lane, sequences, prefills=tuple(prefills))

    def _next_batch(self) -> list[Sequence]:
        """Strict head of line: stop at the first prompt that breaks one of the three limits.

        Prompts share a step up to L_m tokens together, where the devices are saturated; a longer one runs alone.
        Pages of finished prefills that were not pulled yet are still leased, so that the third limit is also the
        back-pressure: this pool is the queue for bursts.
        """
        instance = self.instance
        limit = min(instance.saturation_tokens, instance.max_step_tokens)
        batch: list[Sequence] = []
        tokens = rows = 0
        while (head := self._head()) is not None:
            rows += 1 + len(head.forks)
            room = rows <= instance.max_step_sequences
            if not room or (batch and tokens + head.tokens > limit) or not self.ledger.can_take(head.tokens):
                break
            if self.queue.pop(head.id, None) is None:
                self.replays.pop(0)
            head.phase = Phase.PREFILLING
            head.lease = self.ledger.take(head.tokens)
            batch.append(head)
            tokens += head.tokens
            if tokens > instance.max_step_tokens:
                self.partial = head
                break
        return batch

    def _head(self) -> Sequence | None:
        if self.replays:
            return self.replays[0]
        return next(iter(self.queue.values()), None)

    def _next_chunk(self, sequence: Sequence) -> Prefill:
        assert sequence.lease is not None
        start = sequence.prefilled
        length = min(sequence.tokens - start, self.instance.max_step_tokens)
        samples = start + length == sequence.tokens
        sequence.prefilled += length
        if samples:
            sequence.planned += 1
            if self.partial is sequence:
                self.partial = None
        pages = () if start else tuple(sequence.lease.pages)
        return Prefill(sequence.id, start, length, samples, pages)

    def _fork(self, leader: Sequence) -> list[Sequence]:
        """The sequences that follow the leader sample beside it, and hold the same pages."""
        forks, leader.forks = leader.forks, []
        assert leader.lease is not None
        for fork in forks:
            fork.home = self
            fork.phase = Phase.PREFILLING
            fork.planned += 1
            fork.lease = self.ledger.take(leader.tokens, leader.lease.pages)
        return forks

    def land(self, sequence: Sequence, emitted: int) -> None:
        """The sequence's last chunk is done and `emitted` (0 or 1) tokens of it were kept."""
        self._discharge(sequence)
        sequence.planned -= 1
        sequence.emitted += emitted
        sequence.phase = Phase.READY

    def abandon(self, sequence: Sequence) -> None:
        """Let go of a sequence whose prefill is planned and not done."""
        assert sequence.lease is not None
        self._discharge(sequence)
        if self.partial is sequence:
            self.partial = None
        self.ledger.drop(sequence.lease)
        sequence.lease = None

    def _discharge(self, sequence: Sequence) -> None:
        self.load -= sequence.charged
        sequence.charged = 0
