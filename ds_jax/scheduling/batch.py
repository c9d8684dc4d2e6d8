"""The running batch of one lane, kept so that a step costs what has changed since the last one.

Decode steps of a lane are numbered from 0, its *ticks*: `planned` steps were launched and `done` of them have landed,
in order. Most members are *steady*: they are in every step from tick `joined` on, until they end, are preempted, or
find no page. What such a member has emitted follows from the ticks alone; the tick at which it needs another page and
the one at which it has its last token are known when it joins, and wait in a calendar. So a tick looks only at those
whose day it is. All others are *loose*, and named one by one: those that have left but are in steps in flight, those
that sit steps out until pages come free, and `lockstep` sequences.

Steps in flight pin the pages of their sequences. While a sequence is steady it holds its pages itself; when it turns
loose with steps in flight, its lease is pinned once until the last of them has landed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from heapq import heappop, heappush

from ds_jax.protocol import Decode, Decodes
from ds_jax.scheduling.ledger import PageLedger
from ds_jax.scheduling.sequence import Phase, Sequence

_decode = partial(tuple.__new__, Decode)
"""A `Decode` of its three fields, in half the time: every page of every sequence needs one."""


class RunningBatch:
    """One lane's members, slots and calendar."""

    def __init__(self, slots: int, ledger: PageLedger):
        self.sequences: dict[int, Sequence] = {}
        """All that have a slot."""
        self.planned = 0
        self.done = 0
        self._ledger = ledger
        self._slots = list(range(slots))
        """Free ones, as a heap: the lowest goes first, so that a small batch is a small program (slot buckets)."""
        self._members: dict[int, Decode] = {}
        """The steady ones, as they stand in a step without new pages, in order of joining."""
        self._loose: dict[int, Sequence] = {}
        self._stalled: set[int] = set()
        """Members that sat the last step out for want of a page; one is promised to each."""
        self._ends: dict[int, list[Sequence]] = {}
        self._growth: dict[int, list[Sequence]] = {}
        self._last_step: int | None = None
        self._last: Decodes = Decodes()
        self._joined: dict[int, None] = {}
        self._parted: dict[int, None] = {}
        """Changes of membership since the last step."""

    @property
    def slots(self) -> int:
        """Slots that are free."""
        return len(self._slots)

    def join(self, sequence: Sequence) -> None:
        """Give the sequence a slot: it decodes from the next step on. Its steps in flight, if any, have landed."""
        sequence.slot = heappop(self._slots)
        sequence.batch = self
        sequence.phase = Phase.RUNNING
        self.sequences[sequence.id] = sequence
        if sequence.request.lockstep:
            self._loose[sequence.id] = sequence
        else:
            self._enter(sequence)
            self._settle(sequence, self.planned)

    def leave(self, sequence: Sequence) -> None:
        """Take the slot away. What is in flight of it is still heard of, and still pins its pages."""
        del self.sequences[sequence.id]
        self._resume(sequence)
        heappush(self._slots, sequence.slot)
        if sequence.steady:
            self._loosen(sequence)
        elif sequence.id in self._members:  # in the step that is being put together
            self._part(sequence.id)
        if not sequence.ticks:
            del self._loose[sequence.id]
            sequence.batch = None

    # --- planning -----------------------------------------------------------------------------------------------------

    def decodes(self, find_page: Callable[[Sequence], bool]) -> Decodes:
        """The decodes of the next step, which must be launched if it is not empty.

        Args:
            find_page: makes sure that a page is free for the sequence, by preempting others if it must; False if the
                sequence has to sit this step out, or was itself preempted.
        """
        tick = self.planned
        for sequence in self._ends.pop(tick, ()):
            if sequence.ends_at == tick and sequence.batch is self:
                self._loosen(sequence)  # all its tokens are in flight
        grown = self._grow(tick, find_page) if tick in self._growth else {}
        included = self._include(grown, find_page) if self._loose else ()
        if not self._members:
            return Decodes()
        if grown:
            members = self._members
            plain = [members[id] for id in grown if id in members]  # the others were preempted after they grew
            fresh = tuple([_decode((id, slot, grown[id])) for id, slot, _ in plain])
            members |= {entry[0]: entry for entry in fresh}
            decodes = Decodes(members.values())
            decodes.grown = fresh
            members |= {entry[0]: entry for entry in plain}
        elif self._joined or self._parted or self._last.grown:
            decodes = Decodes(self._members.values())
            decodes.grown = ()
        else:
            decodes = self._last
        if decodes is not self._last:
            decodes.after = self._last_step
            decodes.parted, decodes.joined = tuple(self._parted), tuple(self._joined)
            self._parted, self._joined = {}, {}
        self._last = decodes
        for sequence in included:
            if sequence.id in self.sequences:
                self._name(sequence, tick)
        return decodes

    def launched(self, step: int) -> None:
        """The step with the decodes of the last call has this id."""
        self.planned += 1
        self._last_step = step

    def _grow(self, tick: int, find_page: Callable[[Sequence], bool]) -> dict[int, tuple[int, ...]]:
        """Give a page to each steady member whose day has come; who finds none turns loose and sits the step out."""
        grown: dict[int, tuple[int, ...]] = {}
        ledger, later = self._ledger, tick + self._ledger.page_size
        due = [one for one in self._growth.pop(tick) if one.grows_at == tick and one.batch is self]
        if len(due) <= ledger.free:
            again = due
            grown = ledger.grow_each({one.id: one.lease for one in due})  # type: ignore[misc]
            for sequence in due:
                sequence.grows_at = later
        else:
            again = []
            for sequence in due:
                if sequence.grows_at != tick or sequence.batch is not self:
                    continue  # preempted for one before it
                if ledger.free or find_page(sequence):
                    grown[sequence.id] = ledger.grow(sequence.lease, 1)  # type: ignore[arg-type]
                    sequence.grows_at = later  # now: whoever is preempted for one after it grows no more
                    again.append(sequence)
                elif sequence.steady:
                    self._loosen(sequence)
                    self._stall(sequence)
        if later in self._growth:
            self._growth[later] += again
        elif again:
            self._growth[later] = again
        return grown

    def _include(self, grown: dict[int, tuple[int, ...]], find_page: Callable[[Sequence], bool]) -> list[Sequence]:
        """Put loose members that can take this step beside the steady ones."""
        included = []
        for sequence in list(self._loose.values()):
            if sequence.phase is not Phase.RUNNING or not sequence.has_more:
                continue
            if sequence.request.lockstep and sequence.ticks:
                continue
            lease = sequence.lease
            assert lease is not None
            if sequence.tokens + len(sequence.ticks) > len(lease.pages) * self._ledger.page_size:
                if not self._ledger.free and not find_page(sequence):
                    if sequence.phase is Phase.RUNNING:
                        self._stall(sequence)
                    continue
                self._resume(sequence)
                grown[sequence.id] = self._ledger.grow(lease, 1)
            self._enter(sequence)
            included.append(sequence)
        return included

    def _stall(self, sequence: Sequence) -> None:
        if sequence.id not in self._stalled:
            self._stalled.add(sequence.id)
            self._ledger.promised += 1

    def _resume(self, sequence: Sequence) -> None:
        if sequence.id in self._stalled:
            self._stalled.remove(sequence.id)
            self._ledger.promised -= 1

    def _name(self, sequence: Sequence, tick: int) -> None:
        """A loose member is in the step of this tick. It is steady again if it is in all those before it in flight."""
        first = sequence.ticks[0] if sequence.ticks else tick
        if not sequence.request.lockstep and len(sequence.ticks) == tick - first:
            self._unpin(sequence)
            sequence.ticks = []
            del self._loose[sequence.id]
            self._settle(sequence, first)
        else:
            sequence.ticks.append(tick)
            self._pin(sequence)
            self._part(sequence.id)

    # --- landing ------------------------------------------------------------------------------------------------------

    def land(self, decodes: tuple[Decode, ...], emitted: Mapping[int, int], others: int) -> list[tuple[Sequence, int]]:
        """The oldest step in flight is done. Returns who must be looked at, with its tokens of this step (0 or 1):
        the loose, those with their last token, and those whose token was lost.

        Args:
            others: entries of `emitted` that are not of these decodes.
        """
        tick = self.done
        self.done = done = tick + 1
        heard: list[tuple[Sequence, int]] = []
        named = 0
        for sequence in list(self._loose.values()) if self._loose else ():
            if sequence.ticks and sequence.ticks[0] == tick:
                del sequence.ticks[0]
                kept = emitted.get(sequence.id, 0)
                named += 1
                others += sequence.id in emitted
                sequence.counted += kept
                heard.append((sequence, kept))
                if not sequence.ticks:
                    self._unpin(sequence)
                    if sequence.phase is not Phase.RUNNING:
                        del self._loose[sequence.id]
                        sequence.batch = None
        if len(emitted) - others != len(decodes) - named:
            for sequence in [self.sequences[id] for id in self._members]:
                if sequence.joined <= tick and not emitted.get(sequence.id):
                    self._loosen(sequence)
                    sequence.counted -= 1
                    heard.append((sequence, 0))
        for sequence in self._ends.pop(done, ()):
            if sequence.ends_at == done and sequence.batch is self:
                self._loosen(sequence)
                heard.append((sequence, 1))
        return heard

    # --- steady and loose ---------------------------------------------------------------------------------------------

    def _settle(self, sequence: Sequence, joined: int) -> None:
        """The member is in every step from tick `joined` on, before which it had `counted` tokens of output."""
        assert sequence.lease is not None
        sequence.steady = True
        sequence.joined = joined
        counted, request = sequence.counted, sequence.request
        sequence.ends_at = joined + request.max_tokens - counted
        self._ends.setdefault(sequence.ends_at, []).append(sequence)
        room = len(sequence.lease.pages) * self._ledger.page_size - request.prompt_tokens - counted
        sequence.grows_at = joined + room + 1
        if sequence.grows_at < sequence.ends_at:
            self._growth.setdefault(sequence.grows_at, []).append(sequence)

    def _loosen(self, sequence: Sequence) -> None:
        sequence.counted = sequence.emitted
        sequence.ticks = list(range(max(sequence.joined, self.done), self.planned))
        sequence.steady = False
        sequence.grows_at = sequence.ends_at = -1
        self._part(sequence.id)
        self._loose[sequence.id] = sequence
        if sequence.ticks:
            self._pin(sequence)

    def _enter(self, sequence: Sequence) -> None:
        self._members[sequence.id] = Decode(sequence.id, sequence.slot)
        self._joined[sequence.id] = None

    def _part(self, id: int) -> None:
        del self._members[id]
        if id in self._joined:
            del self._joined[id]
        else:
            self._parted[id] = None

    def _pin(self, sequence: Sequence) -> None:
        if sequence.pinned is None:
            assert sequence.lease is not None
            sequence.pinned = sequence.lease
            self._ledger.pin(sequence.lease)

    def _unpin(self, sequence: Sequence) -> None:
        if sequence.pinned is not None:
            self._ledger.unpin(sequence.pinned)
            sequence.pinned = None
