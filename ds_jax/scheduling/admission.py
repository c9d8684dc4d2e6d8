"""Lines of waiting prompts: in any order, with nobody waiting for ever, and with those given up who cannot be in time.

Deadlines first (EDF) meets all targets whenever they can be met. When they cannot, EDF makes everybody late, so those
are given up first that free the most time for the others: in order of deadline, whenever a prompt would be late, the
longest so far goes to the back (Moore and Hodgson, 1968: the fewest late jobs on one machine). The prompts given up
are served when nobody else waits; and whoever has waited longest goes next after so many others went ahead.
"""

from __future__ import annotations

import bisect
import heapq
import math
from collections import deque
from collections.abc import Sequence as Many

from ds_jax.scheduling.sequence import Phase, Sequence
from ds_jax.scheduling.worker import Worker

WINDOW = 32
"""Prompts at the head of the line that are looked at: enough to see who must be given up."""


class Entry:
    """One prompt in line."""

    __slots__ = ("deadline_ns", "late", "rank", "sequence", "work_ns")

    def __init__(self, sequence: Sequence, rank: float, deadline_ns: float, work_ns: float):
        self.sequence = sequence
        self.rank = rank
        """Place in line: its deadline, or what is put in the place of one."""
        self.deadline_ns = deadline_ns
        """When its first token is due; inf: whenever."""
        self.work_ns = work_ns
        """What its prefill takes, alone on a worker."""
        self.late = False
        """Given up."""

    def __lt__(self, other: Entry) -> bool:
        return (self.rank, self.sequence.order) < (other.rank, other.sequence.order)


class Ranked:
    """Prompts that wait at one place, the smallest rank first. Who has left drops out when looked at."""

    def __init__(self, home: Worker | None = None) -> None:
        self._home = home
        """Where they wait; None: for no worker in particular."""
        self._entries: dict[int, Entry] = {}
        self._order: list[Entry] = []

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, entry: Entry) -> None:
        """Its sequence waits here from now on."""
        self._entries[entry.sequence.id] = entry
        bisect.insort(self._order, entry)

    def remove(self, sequence: Sequence) -> None:
        """The sequence waits here no longer."""
        entry = self._entries.pop(sequence.id, None)
        if entry is not None:
            at = bisect.bisect_left(self._order, entry)
            if at < len(self._order) and self._order[at] is entry:
                del self._order[at]

    def first(self, count: int) -> list[Entry]:
        """The first so many of those that wait here."""
        found: list[Entry] = []
        looked = 0
        for entry in self._order:
            looked += 1
            if self.waits(entry):
                found.append(entry)
                if len(found) == count:
                    break
        if looked > len(found):
            self._order[:looked] = found
        return found

    def waits(self, entry: Entry) -> bool:
        """Whether its sequence still waits here, and with this entry."""
        sequence = entry.sequence
        if self._entries.get(sequence.id) is not entry:
            return False
        if sequence.phase is Phase.WAITING and sequence.home is self._home:
            return True
        del self._entries[sequence.id]
        return False


class Line:
    """Those who wait for no worker in particular, by deadline; those given up; and all in order of coming."""

    def __init__(self, most_overtaking: int) -> None:
        self._most_overtaking = most_overtaking
        self._known: dict[int, Entry] = {}
        self._ranked = Ranked()
        self._late: deque[Entry] = deque()
        self._oldest: deque[Entry] = deque()
        self._hopeless: list[tuple[float, int, Entry]] = []
        """By the latest time at which each can begin and be in time; those without a deadline are not among them."""
        self._overtaken = 0

    def __len__(self) -> int:
        return len(self._known)

    def add(self, sequence: Sequence, rank: float, deadline_ns: float, work_ns: float) -> None:
        """The sequence waits from now on."""
        entry = self._known[sequence.id] = Entry(sequence, rank, deadline_ns, work_ns)
        self._ranked.add(entry)
        self._oldest.append(entry)
        if deadline_ns < math.inf:
            heapq.heappush(self._hopeless, (deadline_ns - work_ns, sequence.order, entry))

    def remove(self, sequence: Sequence) -> None:
        """The sequence was started: the oldest has been overtaken once more, unless it was itself."""
        if (oldest := self._head(self._oldest)) is not None and oldest.sequence is not sequence:
            self._overtaken += 1
        del self._known[sequence.id]
        self._ranked.remove(sequence)

    def given_up(self) -> Sequence | None:
        """The oldest of those given up."""
        late = self._head(self._late)
        return late.sequence if late is not None else None

    def forced(self) -> Sequence | None:
        """Who was overtaken so often that a worker must keep itself free for it."""
        oldest = self._head(self._oldest)
        return oldest.sequence if oldest is not None and self._overtaken >= self._most_overtaking else None

    def on_time(self) -> list[Entry]:
        """The first of those who are not given up, by deadline."""
        return self._ranked.first(WINDOW)

    def triage(self, free: Many[tuple[float, float]], begun: Many[tuple[float, float]] = ()) -> None:
        """Give up as few as possible, so that the others can be in time.

        Prompts without a deadline are served in their turn, and none of them is given up.

        Args:
            free: of each worker when its steps in flight are done, soonest first, and which share of it is for prompts.
            begun: of prompts that are half done rank and work, the smallest rank first: they have their turn too.
        """
        ahead_ns = 0.0
        longest: list[tuple[float, int, Entry]] = []
        begin_ns = free[0][0] if free else math.inf
        others = 0
        for index, entry in enumerate(self.on_time()):
            if begin_ns + entry.work_ns > entry.deadline_ns:
                self._give_up(entry)
                continue
            while others < len(begun) and begun[others][0] <= entry.rank:
                ahead_ns += begun[others][1]
                others += 1
            ahead_ns += entry.work_ns
            if entry.deadline_ns == math.inf:
                continue
            heapq.heappush(longest, (-entry.work_ns, -index, entry))
            if _done_ns(free, ahead_ns) > entry.deadline_ns:
                victim = heapq.heappop(longest)[2]
                ahead_ns -= victim.work_ns
                self._give_up(victim)

    def hopeless(self, free_ns: float) -> Entry | None:
        """One who is late even if the worker that is free soonest, then, does nothing else. It stays in line, and is
        named once."""
        line = self._hopeless
        while line and (line[0][0] < free_ns or not self._waits(line[0][2])):
            entry = heapq.heappop(line)[2]
            if self._waits(entry):
                return entry
        return None

    def reprieve(self, entry: Entry, work_ns: float) -> None:
        """Its prefill takes no more than this: it is not hopeless yet."""
        heapq.heappush(self._hopeless, (entry.deadline_ns - work_ns, entry.sequence.order, entry))

    def work_ns(self) -> float:
        """Of those in line who are not given up, as far as they are looked at."""
        return sum([entry.work_ns for entry in self.on_time()])

    def _give_up(self, entry: Entry) -> None:
        entry.late = True
        self._ranked.remove(entry.sequence)
        self._late.append(entry)

    def _waits(self, entry: Entry) -> bool:
        sequence = entry.sequence
        if self._known.get(sequence.id) is not entry:
            return False
        if sequence.phase is Phase.WAITING and sequence.home is None:
            return True
        del self._known[sequence.id]
        return False

    def _head(self, line: deque[Entry]) -> Entry | None:
        while line and not self._waits(line[0]):
            if line is self._oldest:
                self._overtaken = 0
            line.popleft()
        return line[0] if line else None


def _done_ns(free: Many[tuple[float, float]], work_ns: float) -> float:
    """When so much work is done if every worker helps with its share as soon as it is free."""
    at_ns, rate = free[0]
    for next_ns, share in free[1:]:
        if (done_ns := at_ns + work_ns / rate) <= next_ns:
            return done_ns
        work_ns -= (next_ns - at_ns) * rate
        at_ns, rate = next_ns, rate + share
    return at_ns + work_ns / rate
