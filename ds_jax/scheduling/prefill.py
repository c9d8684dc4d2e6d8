"""The prompts of one instance: those that wait, and those whose chunks are being planned."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Mapping
from itertools import chain, islice

from ds_jax.protocol import Instance, Prefill
from ds_jax.scheduling.ledger import PageLedger
from ds_jax.scheduling.sequence import Phase, Sequence


class Prompts:
    """Waiting prompts first come, first served; pages for a whole prompt are taken when its first chunk is planned.

    A policy asks `head` and `can_start`, acts with `start`, and then takes `chunk` after `chunk`.
    """

    def __init__(self, instance: Instance, ledger: PageLedger, swapped: Mapping[int, Sequence]):
        self.instance = instance
        self._swapped = swapped
        """Those come back before any prompt starts (vLLM, and DistServe's decode rule)."""
        self.replays: list[Sequence] = []
        """Preempted and orphaned sequences, oldest first: they run ahead of new arrivals."""
        self.queue: dict[int, Sequence] = {}
        """New arrivals in the order in which they were placed here."""
        self.partial: dict[int, Sequence] = {}
        """Started, with chunks still to be planned, in order of their start."""
        self.load = 0
        """Tokens whose prefill was asked for and is not done: what dispatch compares."""
        self.running = 0
        """Sequences that are being prefilled: started, and their last chunks not done."""
        self._ledger = ledger

    # --- waiting ------------------------------------------------------------------------------------------------------

    def enqueue(self, sequence: Sequence, replay: bool) -> None:
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
        self._remove(sequence)
        self._discharge(sequence)

    def waiting(self) -> Iterator[Sequence]:
        """All that wait, in order. The queue must not change meanwhile."""
        return chain(self.replays, self.queue.values())

    def first(self, count: int) -> list[Sequence]:
        """The first so many that wait."""
        return list(islice(self.waiting(), count))

    @property
    def idle(self) -> bool:
        """Whether there is no prompt to run, or all that run are in flight to their ends."""
        return not (self.queue or self.partial or self.replays)

    @property
    def head(self) -> Sequence | None:
        """The first that waits."""
        if self.replays:
            return self.replays[0]
        return next(iter(self.queue.values()), None)

    def can_start(self, sequence: Sequence, spare: int = 0) -> bool:
        """Whether pages for its whole prompt are free, and `spare` more."""
        return not self._swapped and self._ledger.can_take(sequence.tokens + spare * self._ledger.page_size)

    # --- running ------------------------------------------------------------------------------------------------------

    def start(self, sequence: Sequence) -> None:
        """Take the pages for its whole prompt; `can_start` must hold."""
        self._remove(sequence)
        sequence.phase = Phase.PREFILLING
        sequence.lease = self._ledger.take(sequence.tokens)
        self.partial[sequence.id] = sequence
        self.running += 1

    def chunk(self, sequence: Sequence, most: int) -> list[tuple[Sequence, Prefill]]:
        """Its next chunk, of at most `most` tokens and to be launched at once, with forks beside the last one."""
        assert sequence.lease is not None
        start, tokens = sequence.prefilled, sequence.tokens
        length = min(tokens - start, most)
        samples = start + length == tokens
        sequence.prefilled += length
        pages = () if start else tuple(sequence.lease.pages)
        chunks = [(sequence, Prefill(sequence.id, start, length, samples, pages))]
        if samples:
            sequence.sampling = 1
            del self.partial[sequence.id]
            if sequence.forks:
                chunks += [(fork, Prefill(fork.id, tokens, 0, True)) for fork in self._fork(sequence)]
        return chunks

    def _fork(self, leader: Sequence) -> list[Sequence]:
        """The sequences that follow the leader sample beside it, and hold the same pages."""
        forks, leader.forks = leader.forks, []
        assert leader.lease is not None
        for fork in forks:
            fork.home = leader.home
            fork.phase = Phase.PREFILLING
            fork.sampling = 1
            fork.lease = self._ledger.take(leader.tokens, leader.lease.pages)
        self.running += len(forks)
        return forks

    def land(self, sequence: Sequence) -> None:
        """Its last chunk is done."""
        self.running -= 1
        self._discharge(sequence)
        sequence.phase = Phase.READY

    def abandon(self, sequence: Sequence) -> None:
        """Let go of a sequence whose prefill is planned and not done; steps in flight still pin its pages."""
        self.running -= 1
        self._discharge(sequence)
        self.partial.pop(sequence.id, None)

    def _remove(self, sequence: Sequence) -> None:
        if self.queue.pop(sequence.id, None) is None:
            self.replays.remove(sequence)

    def _discharge(self, sequence: Sequence) -> None:
        self.load -= sequence.charged
        sequence.charged = 0
