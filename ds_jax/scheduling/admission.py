"""The line of prompts that wait for no worker in particular: who is next, who is given up, and nobody for ever.

Deadlines first (EDF) meets all targets whenever they can be met. When they cannot, EDF makes everybody late, so those
are given up first that free the most time for the others: in order of deadline, whenever a prompt would be late, the
longest so far goes to the back (Moore and Hodgson, 1968: the fewest late jobs on one machine). The prompts given up
are served when nobody else waits; and whoever has waited longest goes next after so many others went ahead.
"""

from __future__ import annotations

import bisect
import heapq
from collections import deque
from collections.abc import Callable, Iterator

from ds_jax.scheduling.sequence import Phase, Sequence

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
        self.work_ns = work_ns
        """What its prefill takes, alone on a worker."""
        self.late = False
        """Given up."""

    def __lt__(self, other: Entry) -> bool:
        return (self.rank, self.sequence.order) < (other.rank, other.sequence.order)


class Line:
    """Entries by deadline, those given up, and all in order of coming. Who has left drops out when looked at."""

    def __init__(self, most_overtaking: int) -> None:
        self._most_overtaking = most_overtaking
        self._entries: dict[int, Entry] = {}
        self._ranked: list[Entry] = []
        self._late: deque[Entry] = deque()
        self._oldest: deque[Entry] = deque()
        self._overtaken = 0

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, sequence: Sequence, rank: float, deadline_ns: float, work_ns: float) -> None:
        """The sequence waits from now on."""
        entry = self._entries[sequence.id] = Entry(sequence, rank, deadline_ns, work_ns)
        bisect.insort(self._ranked, entry)
        self._oldest.append(entry)

    def remove(self, sequence: Sequence) -> None:
        """The sequence was started: the oldest has been overtaken once more, unless it was itself."""
        if (oldest := self._head(self._oldest)) is not None and oldest.sequence is not sequence:
            self._overtaken += 1
        del self._entries[sequence.id]

    def given_up(self) -> Sequence | None:
        """The oldest of those given up."""
        late = self._head(self._late)
        return late.sequence if late is not None else None

    def forced(self) -> Sequence | None:
        """Who was overtaken so often that every worker that can must keep itself free for it."""
        oldest = self._head(self._oldest)
        return oldest.sequence if oldest is not None and self._overtaken >= self._most_overtaking else None

    def on_time(self) -> Iterator[Entry]:
        """The first of those who are not given up, by deadline."""
        ranked = self._ranked
        while ranked and not self._waits(ranked[0]):
            del ranked[0]
        found = 0
        for entry in ranked:
            if self._waits(entry) and not entry.late:
                yield entry
                found += 1
                if found == WINDOW:
                    return

    def triage(self, now_ns: float, workers: float) -> list[Sequence]:
        """Give up as few as possible, so that with `workers` side by side the others can be in time. Returns them."""
        ahead_ns = 0.0
        longest: list[tuple[float, int, Entry]] = []
        given_up = []
        for index, entry in enumerate(list(self.on_time())):
            heapq.heappush(longest, (-entry.work_ns, -index, entry))
            ahead_ns += entry.work_ns
            if now_ns + max(entry.work_ns, ahead_ns / workers) > entry.deadline_ns:
                victim = entry if now_ns + entry.work_ns > entry.deadline_ns else longest[0][2]
                longest = [one for one in longest if one[2] is not victim]
                heapq.heapify(longest)
                ahead_ns -= victim.work_ns
                victim.late = True
                self._late.append(victim)
                given_up.append(victim.sequence)
        if given_up:
            self._ranked = [entry for entry in self._ranked if not entry.late]
        return given_up

    def ends_ns(self, now_ns: float, workers: float, entry_ns: Callable[[Entry], bool]) -> float:
        """When the work of those for which `entry_ns` holds would be done."""
        return now_ns + sum(entry.work_ns for entry in self.on_time() if entry_ns(entry)) / workers

    def _waits(self, entry: Entry) -> bool:
        sequence = entry.sequence
        if self._entries.get(sequence.id) is entry and sequence.phase is Phase.WAITING:
            return True
        if self._entries.get(sequence.id) is entry:
            del self._entries[sequence.id]
        return False

    def _head(self, line: deque[Entry]) -> Entry | None:
        while line and not self._waits(line[0]):
            if line is self._oldest:
                self._overtaken = 0
            line.popleft()
        return line[0] if line else None
