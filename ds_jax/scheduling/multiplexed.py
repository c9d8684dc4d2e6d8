"""Tropical (DAC'25): prefill workers, and multiplexing workers that decode, and prefill when their decodes can wait.

Where a prompt runs is decided with two slacks (`slack.py`): it may run on a multiplexing worker, before the decodes
there go on, if every one of them has banked enough time; else on a prefill worker that can still make all its first
tokens in time; else it waits. Afterwards it is decoded where it is, without a transfer, or handed over to the
multiplexing worker with the fewest decode tokens. Roles never flip.

The paper's README and its code route differently, and `scheduler.routing` chooses. The code is the default, since its
results are the published ones: it tries multiplexing workers first and looks at their tokens, not at their memory, and
its prefill workers run the shortest prompt first (`scheduler.queue_order = sjf`). Where both leave a prompt waiting for
good we differ: an idle prefill worker takes it however late it is, a prompt is overtaken 16 times at most, and nothing
is rejected for a timeout of the router's own.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator

from ds_jax.protocol import Prefill
from ds_jax.scheduling.admission import Entry, Ranked
from ds_jax.scheduling.sequence import Phase, Sequence
from ds_jax.scheduling.slack import SlackPolicy, decode_tokens
from ds_jax.scheduling.worker import Worker

LONGEST_MULTIPLEXED = 8192
"""The code sends longer prompts to prefill workers at once."""
SLOWEST_DECODE_S = 0.85
MOST_DECODE_TOKENS = 400_000
"""The code spares multiplexing workers beyond these."""
CAUTION = 1.02
"""The code's factor on the predicted service ahead of a prompt."""
WINDOW = 8
"""Waiting prompts that are tried after each event: the first in order."""
MOST_QUEUED = 64
"""Prompts that wait for one worker. Further ones wait for any: what is looked at does not grow with the load."""


class Queue:
    """What waits for one worker, in the configured order."""

    def __init__(self, worker: Worker) -> None:
        self.prompts = Ranked(worker)
        self.head: Sequence | None = None
        self.overtaken = 0
        """Prompts that were started while `head` was the oldest that waits."""


class Multiplexed(SlackPolicy):
    """The scheduler of Tropical."""

    def __init__(self, *arguments: object, **options: object):
        super().__init__(*arguments, **options)
        self._line = Ranked()
        self._queues: dict[Worker, Queue] = {}
        self._seen: dict[Worker, list[Entry]] = {}
        """What waits for each worker, as far as it was looked at during this event."""
        self._oldest: Sequence | None = None
        self._overtaken = 0
        """Prompts that were placed while `_oldest` waited longest."""

    # --- order --------------------------------------------------------------------------------------------------------

    def rank(self, sequence: Sequence, worker: Worker) -> float:
        """The configured order of waiting prompts: the smallest first, and first come, first served among equals."""
        match self.options.queue_order:
            case "sjf":
                return sequence.tokens - sequence.prefilled
            case "ljf":
                return sequence.prefilled - sequence.tokens
            case "edf":
                return self.deadline_ns(sequence)
            case "llf":
                return self.deadline_ns(sequence) - self.prefill_ns(sequence, worker)
            case _:
                return 0.0

    def assign(self, sequence: Sequence, worker: Worker, *, replay: bool = False) -> None:
        """As `Policy.assign`, into the worker's queue too."""
        super().assign(sequence, worker, replay=replay)
        self._seen.pop(worker, None)
        self._queue(worker).prompts.add(self._entry(sequence, worker, replay))

    def start(self, worker: Worker, sequence: Sequence) -> None:
        """As `SlackPolicy.start`: the oldest in the queue has been overtaken once more, unless it was itself."""
        queue = self._queue(worker)
        queue.overtaken += queue.head is not sequence
        queue.prompts.remove(sequence)
        self._seen.pop(worker, None)
        super().start(worker, sequence)

    def _queue(self, worker: Worker) -> Queue:
        if worker not in self._queues:
            self._queues = {one: queue for one, queue in self._queues.items() if one.alive}
            self._queues[worker] = Queue(worker)
        return self._queues[worker]

    def _entry(self, sequence: Sequence, worker: Worker, replay: bool) -> Entry:
        rank = -math.inf if replay else self.rank(sequence, worker)
        return Entry(sequence, rank, self.deadline_ns(sequence), self.prefill_ns(sequence, worker))

    # --- routing ------------------------------------------------------------------------------------------------------

    def place_prompt(self, sequence: Sequence) -> Worker | None:
        """A worker by the routing; else it waits, in order."""
        worker = self._route(sequence)
        if worker is not None:
            self._overtaken += 1
        elif some := next(iter(self.workers.values()), None):
            self._line.add(self._entry(sequence, some, replay=False))
        return worker

    def dispatch(self) -> None:
        """Try again for those that wait: something has changed."""
        self._seen.clear()
        oldest = next((one for one in self.waiting.values() if one.phase is Phase.WAITING), None)
        if oldest is None:
            return
        if oldest is not self._oldest:
            self._oldest, self._overtaken = oldest, 0
        if self._overtaken >= self.most_overtaking:
            self._assign(oldest, self._shortest_queue(oldest))
        for entry in self._line.first(WINDOW):
            self._assign(entry.sequence, self._route(entry.sequence))

    def _assign(self, sequence: Sequence, worker: Worker | None) -> None:
        if worker is not None:
            self._overtaken += sequence is not self._oldest
            self._line.remove(sequence)
            self.assign(sequence, worker, replay=bool(sequence.emitted))

    def _route(self, sequence: Sequence) -> Worker | None:
        workers = self.candidates(sequence, prefill=True)
        prefill = [worker for worker in workers if not worker.decodes]
        multiplexing = [worker for worker in workers if worker.decodes]
        idle = next((worker for worker in prefill if not worker.prompts.load), None)
        if self.options.routing == "readme":
            return (
                idle
                or self._busy_but_in_time(sequence, prefill)
                or self._with_slack(sequence, multiplexing)
                or (self._unused(multiplexing) if not prefill else None)
            )
        short = sequence.tokens < LONGEST_MULTIPLEXED or not prefill
        return (
            (self._with_reserve(sequence, multiplexing) if short else None)
            or self._in_time_for_all(sequence, prefill)
            or idle
            or (self._unused(multiplexing) if not prefill else None)
        )

    def _with_slack(self, sequence: Sequence, workers: list[Worker]) -> Worker | None:
        """The README: a multiplexing worker below its memory watermark whose smallest decode slack covers the prefill;
        the one with the fewest tokens."""
        able = [
            worker
            for worker in workers
            if not worker.prompts.load
            and self.below_watermark(worker, sequence.tokens)
            and worker.can_start_beside(sequence)
            and self._ends_ns(sequence, worker) <= self.foresight(worker).due_ns(ahead=1)
        ]
        return min(able, key=decode_tokens, default=None)

    def _with_reserve(self, sequence: Sequence, workers: list[Worker]) -> Worker | None:
        """The code: one without a prefill, whose decodes are neither slow nor many and all keep SLO_tpot of slack.

        That its pages are free is ours: it would wait for them there, behind all that is handed over meanwhile.
        """
        able = [
            worker
            for worker in workers
            if not worker.prompts.load
            and worker.can_start_beside(sequence)
            and decode_tokens(worker) <= MOST_DECODE_TOKENS
            and self._slowest_decode_s(worker) <= SLOWEST_DECODE_S
            # the next token's due time, ahead = 1, has that SLO_tpot in it
            and self._ends_ns(sequence, worker) <= self.foresight(worker).due_ns(ahead=0)
        ]
        return min(able, key=decode_tokens, default=None)

    def _ends_ns(self, sequence: Sequence, worker: Worker) -> float:
        """When its prefill would be done on a worker that has no other."""
        return self.foresight(worker).forecast.free_ns(self.now_ns) + self.prefill_ns(sequence, worker)

    def _slowest_decode_s(self, worker: Worker) -> float:
        foresight = self.foresight(worker)
        return max(foresight.forecast.step_s([], one.batch, one.context_tokens) for one in foresight.accounts)

    def _in_time_for_all(self, sequence: Sequence, workers: list[Worker]) -> Worker | None:
        """A prefill worker where, with this prompt in its place in the queue, all first tokens are expected in time."""
        deadline_ns = self.deadline_ns(sequence)
        able = []
        for worker in workers if deadline_ns > self.now_ns else ():
            if (queue := self._seen.get(worker)) is None:
                queue = self._seen[worker] = self._queue(worker).prompts.first(MOST_QUEUED)
            if len(queue) == MOST_QUEUED:
                continue
            entry = self._entry(sequence, worker, replay=False)
            forecast, lanes = self.foresight(worker).forecast, worker.instance.lanes
            at_ns = float(forecast.free_ns(self.now_ns))
            for one in worker.prompts.partial.values():
                at_ns += CAUTION * self.prefill_ns(one, worker) / lanes
                if at_ns >= self.deadline_ns(one):
                    break
            else:
                if self._all_in_time(entry, queue, at_ns, lanes):
                    able.append(worker)
        return min(able, key=lambda worker: worker.prompts.load, default=None)

    def _all_in_time(self, entry: Entry, queue: list[Entry], at_ns: float, lanes: int) -> bool:
        """Whether the entry, and those in the queue behind it, end in time if the queue begins at that time."""
        behind = bisect.bisect(queue, entry)
        at_ns += CAUTION * sum([one.work_ns for one in queue[:behind]]) / lanes
        for one in (entry, *queue[behind:]):
            if at_ns + CAUTION * one.work_ns >= one.deadline_ns:
                return False
            at_ns += CAUTION * one.work_ns / lanes
        return True

    def _busy_but_in_time(self, sequence: Sequence, workers: list[Worker]) -> Worker | None:
        """A prefill worker with nothing waiting that will be done early enough for this prompt."""
        for worker in workers:
            if worker.prompts.head is None:
                ends_ns = self.free_ns(worker) + self.prefill_ns(sequence, worker)
                if ends_ns < self.deadline_ns(sequence):
                    return worker
        return None

    def _unused(self, workers: list[Worker]) -> Worker | None:
        """With no prefill worker there: a multiplexing worker without any prompt."""
        return next((worker for worker in workers if not worker.prompts.load), None)

    def _shortest_queue(self, sequence: Sequence) -> Worker | None:
        workers = self.candidates(sequence, prefill=True)
        prefill = [worker for worker in workers if not worker.decodes]
        return min(prefill or workers, key=lambda worker: worker.prompts.load, default=None)

    def place_decode(self, sequence: Sequence) -> Worker | None:
        return place_with_fewest_tokens(sequence, self.candidates(sequence, prefill=False))

    # --- steps --------------------------------------------------------------------------------------------------------

    def plan(self, worker: Worker) -> None:
        """A prompt runs alone, chunk after chunk; between two prompts the decodes have a turn."""
        foresight = self.foresight(worker)
        for lane in range(worker.instance.lanes):
            while worker.open(lane):
                if not foresight.decode_turn and (chunks := list(self._chunks(worker))):
                    self.run(worker, lane, chunks)
                    foresight.decode_turn = worker.decodes and not worker.prompts.partial
                elif worker.decodes and (decodes := self.enter(worker, lane)):
                    self.run(worker, lane, decodes=decodes)
                    foresight.decode_turn = False
                elif foresight.decode_turn:
                    foresight.decode_turn = False
                else:
                    break

    def _chunks(self, worker: Worker) -> Iterator[tuple[Sequence, Prefill]]:
        """The next step's prompts: the first in order, and further short ones up to L_m tokens together."""
        instance = worker.instance
        limit = min(instance.saturation_tokens, instance.max_step_tokens)
        tokens = rows = 0
        while (sequence := self._first(worker)) is not None:
            rest = sequence.tokens - sequence.prefilled
            rows += 1 + len(sequence.forks)
            if rows > instance.max_step_sequences or (tokens and tokens + rest > limit):
                return
            if sequence.phase is Phase.WAITING:
                if not worker.prompts.can_start(sequence):
                    return
                self.start(worker, sequence)
            tokens += rest
            yield from worker.prompts.chunk(sequence, instance.max_step_tokens)

    def _first(self, worker: Worker) -> Sequence | None:
        """A prompt that is half done gives way, at the border of a chunk, to one ahead of it in order."""
        started = min(worker.prompts.partial.values(), key=lambda one: self._key(one, worker), default=None)
        following = self._next(worker)
        if started is None or following is None:
            return started or following
        ahead = self._key(following, worker) < self._key(started, worker)
        return following if ahead and self.may_interrupt(worker) and worker.prompts.can_start(following) else started

    def _key(self, sequence: Sequence, worker: Worker) -> tuple[float, int]:
        return self.rank(sequence, worker), sequence.order

    def _next(self, worker: Worker) -> Sequence | None:
        """The prompt to start next, of those that wait here: replays, then by order, then who was overtaken enough."""
        head = worker.prompts.head
        if head is None or worker.prompts.replays or self.options.queue_order == "fcfs":
            return head
        queue = self._queue(worker)
        if queue.head is not head:
            queue.head, queue.overtaken = head, 0
        if queue.overtaken >= self.most_overtaking:
            return head
        return queue.prompts.first(1)[0].sequence


def place_with_fewest_tokens(sequence: Sequence, workers: list[Worker]) -> Worker | None:
    """The worker that decodes a finished prefill: where it is, or the multiplexing one with the fewest tokens."""
    home: Worker = sequence.home
    return home if home.decodes else min(workers, key=decode_tokens, default=None)
