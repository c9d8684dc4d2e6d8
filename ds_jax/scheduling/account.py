"""What the decodes of one lane can still lose: the smallest banked slack of a running batch, and its context.

Decode slack is banked: tokens that came early are paid for with later ones. With every step of its lane a member's due
time moves by its own SLO_tpot, so that among members of equal SLO_tpot the order never changes: an account costs what
changes in the batch, and not the batch.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable

from ds_jax.protocol import NO_TARGET_NS, Decodes
from ds_jax.scheduling.sequence import Sequence

SPARE = 16
"""Entries of a heap that may be stale before it is swept, beside as many as are not."""


class Equals:
    """Members of equal SLO_tpot."""

    __slots__ = ("count", "forgiven", "heap")

    def __init__(self) -> None:
        self.heap: list[tuple[float, int]] = []
        """(key, sequence); entries of those who have left are dropped when they come up, or are too many."""
        self.count = 0
        """Members with a key."""
        self.forgiven = 0
        """Members without."""


class Member:
    """What one sequence adds to an account."""

    __slots__ = ("equals", "key", "share", "tpot_ns")

    def __init__(self, share: int) -> None:
        self.share = share
        """Of the context, as it was at tick 0."""
        self.tpot_ns = 0
        self.equals: Equals | None = None
        """None: it has no target."""
        self.key: float | None = None
        """Due time at tick 0; None: it has missed its TTFT, and is forgiven."""


class Account:
    """Context and due times of the batch of one lane."""

    def __init__(self, forgiving: bool = False) -> None:
        self.forgiving = forgiving
        """Whether a request that has missed its TTFT, and with it both targets together, banks no slack: it gets its
        SLO_tpot for every token, and others wait neither for what it has lost nor for what it has saved."""
        self.batch = 0
        self._decodes: Decodes = Decodes()
        self._step: int | None = None
        """The last step that the account was told of."""
        self._tick = 0
        self._context = 0
        """Of all members, less the batch for every tick."""
        self._members: dict[int, Member] = {}
        self._classes: dict[int, Equals] = {}
        """By SLO_tpot; none is empty."""

    def enter(self, decodes: Decodes, sequences: dict[int, Sequence]) -> None:
        """The next step is to have these decodes; `launched` follows."""
        self._tick += 1
        if decodes is self._decodes:
            return
        if decodes.after == self._step and self._step is not None:
            for id in decodes.parted:
                self._part(id)
            joined: Iterable[int] = decodes.joined
        else:
            self._members, self._classes, self._context = {}, {}, 0
            joined = [decode[0] for decode in decodes]
        for id in joined:
            self._join(sequences[id])
        self.batch = len(decodes)
        self._decodes = decodes

    def launched(self, step: int) -> None:
        """The step that `enter` was told of has this id."""
        self._step = step

    def forget(self) -> None:
        """The batch is empty."""
        if self.batch:
            self.batch = 0
            self._decodes, self._step = Decodes(), None
            self._members, self._classes, self._context = {}, {}, 0

    @property
    def context_tokens(self) -> int:
        """What the decodes of the step attend to, their own tokens included."""
        return self._context + self.batch * self._tick

    def due_ns(self, ahead: int = 0) -> float:
        """When the step must be done at the latest so that nobody's slack falls below zero; inf: nobody minds.

        Args:
            ahead: of so many steps after this one.
        """
        due = math.inf
        for tpot_ns, equals in self._classes.items():
            if equals.count:
                due = min(due, self._first(equals)[0] + tpot_ns * (self._tick + ahead))
        return due

    def lenient_due_ns(self, begin_ns: float, floor: float, share: float, most: float) -> float:
        """As `due_ns`, but a few may fall behind for a while, and who was forgiven gets one SLO_tpot.

        Args:
            begin_ns: when the step begins.
            floor: who is behind already gets this share of its SLO_tpot, so that it catches up.
            share: of the members, so many with the least slack may be made to wait beyond it,
            most: for a step of at most so many times SLO_tpot. They are those who have just begun, and have the most
                tokens to catch up with.
        """
        due = math.inf
        for tpot_ns, equals in self._classes.items():
            if equals.forgiven:
                due = min(due, begin_ns + max(1.0, most) * tpot_ns)
            if equals.count:
                least = key = self._first(equals)[0]
                if (few := int(share * equals.count)) and key + tpot_ns * self._tick < begin_ns + most * tpot_ns:
                    key = heapq.nsmallest(few + 1, self._alive(equals))[-1][0] if few < equals.count else key
                    key = min(key, max(least, begin_ns + (most - self._tick) * tpot_ns))
                due = min(due, max(key + tpot_ns * self._tick, begin_ns + floor * tpot_ns))
        return due

    def tightest_tpot_ns(self) -> float:
        """The smallest SLO_tpot in the batch; inf: there is none."""
        return min(self._classes, default=math.inf)

    def _first(self, equals: Equals) -> tuple[float, int]:
        """The member with the least slack; `count` says that there is one."""
        heap, members = equals.heap, self._members
        while (member := members.get(heap[0][1])) is None or member.key != heap[0][0]:
            heapq.heappop(heap)
        return heap[0]

    def _alive(self, equals: Equals) -> list[tuple[float, int]]:
        """Entries of those who have not left."""
        members = self._members
        return [entry for entry in equals.heap if (member := members.get(entry[1])) and member.key == entry[0]]

    def _join(self, sequence: Sequence) -> None:
        tokens = sequence.emitted + sequence.planned
        member = self._members[sequence.id] = Member(sequence.request.prompt_tokens + tokens - self._tick)
        self._context += member.share
        slo = sequence.request.slo
        if slo is None or sequence.first_ns is None or slo.tpot_ns >= NO_TARGET_NS:
            return
        member.tpot_ns = slo.tpot_ns
        member.equals = equals = self._classes.setdefault(slo.tpot_ns, Equals())
        if self.forgiving and missed(sequence):
            equals.forgiven += 1
            return
        member.key = sequence.first_ns + slo.tpot_ns * (max(1, tokens) - self._tick)
        equals.count += 1
        heapq.heappush(equals.heap, (member.key, sequence.id))

    def _part(self, id: int) -> None:
        member = self._members.pop(id, None)
        if member is None:
            return
        self._context -= member.share
        if (equals := member.equals) is None:
            return
        if member.key is None:
            equals.forgiven -= 1
        else:
            equals.count -= 1
        if not equals.count and not equals.forgiven:
            del self._classes[member.tpot_ns]
        elif len(equals.heap) > 2 * equals.count + SPARE:
            equals.heap = self._alive(equals)
            heapq.heapify(equals.heap)


def missed(sequence: Sequence) -> bool:
    """Whether its first token came too late."""
    slo, first_ns = sequence.request.slo, sequence.first_ns
    return slo is not None and first_ns is not None and first_ns - sequence.arrived_ns > slo.ttft_ns
