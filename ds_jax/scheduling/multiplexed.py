"""Tropical (DAC'25): prefill workers, and multiplexing workers that decode, and prefill when their decodes can wait.

Where a prompt runs is decided with two slacks (`slack.py`): it may run on a multiplexing worker, before the decodes
there go on, if every one of them has banked enough time; else on a prefill worker that can still make all its first
tokens in time; else it waits. Afterwards it is decoded where it is, without a transfer, or handed over to the
multiplexing worker with the fewest decode tokens. Roles never flip.

The paper's README and its code route differently; `scheduler.routing` chooses, and the code is the default, since its
results are the published ones. Where both leave a prompt waiting for good we differ: an idle prefill worker takes it
however late it is, a prompt is overtaken 16 times at most, and nothing is rejected for a timeout of the router's own.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from itertools import islice

from ds_jax.protocol import Prefill
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
"""Waiting prompts that are tried after each event: the first in order,"""
FAR = 256
"""of so many that wait longest."""


class Multiplexed(SlackPolicy):
    """The scheduler of Tropical."""

    def __init__(self, *arguments: object, **options: object):
        super().__init__(*arguments, **options)
        self._oldest: Sequence | None = None
        self._overtaken = 0
        """Prompts that were placed while `_oldest` waited longest."""

    # --- routing ------------------------------------------------------------------------------------------------------

    def place_prompt(self, sequence: Sequence) -> Worker | None:
        worker = self._route(sequence)
        self._overtaken += worker is not None
        return worker

    def dispatch(self) -> None:
        """Try again for those that wait: something has changed."""
        oldest = next(self._in_line(), None)
        if oldest is None:
            return
        if oldest is not self._oldest:
            self._oldest, self._overtaken = oldest, 0
        if self._overtaken >= self.most_overtaking:
            self._assign(oldest, self._shortest_queue(oldest))
        waiting = list(islice(self._in_line(), WINDOW if self.options.queue_order == "fcfs" else FAR))
        some = next(iter(self.workers.values()), None)
        for sequence in heapq.nsmallest(WINDOW, waiting, key=self.order(some)) if some else ():
            self._assign(sequence, self._route(sequence))

    def _in_line(self) -> Iterator[Sequence]:
        """Prompts that wait for a worker, in order of their coming (or coming back)."""
        return (sequence for sequence in self.waiting.values() if sequence.phase is Phase.WAITING)

    def _assign(self, sequence: Sequence, worker: Worker | None) -> None:
        if worker is not None:
            self._overtaken += sequence is not self._oldest
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
                or self._multiplexed(sequence, multiplexing, reserve=False)
                or (self._unused(multiplexing) if not prefill else None)
            )
        short = sequence.tokens < LONGEST_MULTIPLEXED or not prefill
        return (
            (self._multiplexed(sequence, multiplexing, reserve=True) if short else None)
            or self._in_time_for_all(sequence, prefill)
            or idle
            or (self._unused(multiplexing) if not prefill else None)
        )

    def _multiplexed(self, sequence: Sequence, workers: list[Worker], reserve: bool) -> Worker | None:
        """A multiplexing worker all of whose decodes can wait for this prefill; the one with the fewest tokens.

        With `reserve` every decode keeps SLO_tpot of slack afterwards (the code), else any (the README).
        """
        able = []
        for worker in workers:
            foresight = self.foresight(worker)
            if worker.prompts.load or not self.below_watermark(worker, sequence.tokens):
                continue
            if reserve:
                slowest = max(
                    foresight.forecast.step_s([], one.batch, one.context_tokens) for one in foresight.accounts
                )
                if slowest > SLOWEST_DECODE_S or decode_tokens(worker) > MOST_DECODE_TOKENS:
                    continue
            ends_ns = foresight.forecast.free_ns(self.now_ns) + self.prefill_ns(sequence, worker)
            if ends_ns <= foresight.due_ns(ahead=0 if reserve else 1):  # the next token's due time has SLO_tpot in it
                able.append(worker)
        return min(able, key=decode_tokens, default=None)

    def _in_time_for_all(self, sequence: Sequence, workers: list[Worker]) -> Worker | None:
        """A prefill worker where, with this prompt in its place in the queue, all first tokens are expected in time."""
        able = []
        for worker in workers if self.deadline_ns(sequence) > self.now_ns else ():
            forecast = self.foresight(worker).forecast
            at_ns = float(forecast.free_ns(self.now_ns))
            rank = self.order(worker)
            queue = sorted([*worker.prompts.waiting(), sequence], key=rank)
            for one in [*worker.prompts.partial.values(), *queue]:
                at_ns += CAUTION * self.prefill_ns(one, worker)
                if at_ns >= self.deadline_ns(one):
                    break
            else:
                able.append(worker)
        return min(able, key=lambda worker: worker.prompts.load, default=None)

    def _busy_but_in_time(self, sequence: Sequence, workers: list[Worker]) -> Worker | None:
        """A prefill worker with nothing waiting that will be done early enough for this prompt."""
        for worker in workers:
            rest_ns = sum(self.prefill_ns(one, worker) for one in worker.prompts.partial.values())
            ends_ns = self.foresight(worker).forecast.free_ns(self.now_ns) + rest_ns
            if worker.prompts.head is None and ends_ns + self.prefill_ns(sequence, worker) < self.deadline_ns(sequence):
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
        rank = self.order(worker)
        started = min(worker.prompts.partial.values(), key=rank, default=None)
        following = self.next_prompt(worker)
        if started is None or following is None:
            return started or following
        if rank(following) < rank(started) and self.may_interrupt(worker) and worker.prompts.can_start(following):
            return following
        return started


def place_with_fewest_tokens(sequence: Sequence, workers: list[Worker]) -> Worker | None:
    """The worker that decodes a finished prefill: where it is, or the multiplexing one with the fewest tokens."""
    home: Worker = sequence.home
    return home if home.decodes else min(workers, key=decode_tokens, default=None)
