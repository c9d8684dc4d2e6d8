"""Ours: banked slack and the largest safe chunk on every multiplexing worker, and no prompt bound before it must be.

From Tropical comes the banked decode slack, from Prefill Deflection (arXiv 2607.02043) the search for the largest chunk
that a decode worker can take without missing a token's due time. What is added:

* Prompts wait in one line (`admission.py`) for no worker in particular. Whoever can take another step pulls from it, so
  that no prompt waits behind a long one on one worker while another worker is free.
* A worker pulls the most urgent prompt that can be in time there, and no other: a multiplexing worker looks ahead over
  its next steps, each as long as the decode with the least slack allows.
* The forecast is put right by the steps themselves, and its scatter is the margin (`prediction.py`).
* Requests that are not expected in time wait behind those that are; with `early_rejection` those that can surely not
  be in time are turned away, and told when to come back.
* Decodes that missed their TTFT get their SLO_tpot a token, and bank no slack.
* A worker that stops taking prompts, because its chunks have become small, begins again only when they are twice that.
"""

from __future__ import annotations

import math

from ds_jax.protocol import Decodes, Prefill
from ds_jax.scheduling.admission import Line
from ds_jax.scheduling.multiplexed import place_with_fewest_tokens
from ds_jax.scheduling.room import FLOOR, SMALLEST_CHUNK, Room
from ds_jax.scheduling.sequence import Phase, Sequence
from ds_jax.scheduling.slack import SlackPolicy
from ds_jax.scheduling.worker import Worker

PATIENCE_NS = 10 * 10**9
"""A request without a TTFT target is ranked as if it had this one; it is never given up."""
LEAST_SHARE = 0.1
"""Of a multiplexing worker, for prompts, however much its decodes take."""
HORIZON = 4
"""Steps that are looked ahead when a prompt is cut into chunks; the rest is taken to go on like the last."""


class Deflected(SlackPolicy):
    """Multiplexing by banked slack with the largest safe chunk, over one line of prompts."""

    forgiving = True

    def __init__(self, *arguments: object, **options: object):
        super().__init__(*arguments, **options)
        self._line = Line(self.most_overtaking)
        self._reserved: tuple[Sequence, Worker] | None = None
        """Who was overtaken too often, and the worker that begins no other prompt before it:"""
        self._held: list[Sequence] = []
        """finished prefills that are not pulled meanwhile, so that the pages go to that prompt."""

    # --- the line -----------------------------------------------------------------------------------------------------

    def place_prompt(self, sequence: Sequence) -> Worker | None:
        """Into the line. A replay goes ahead of all: whoever reads its answer is waiting now."""
        self._line.add(
            sequence,
            self._urgency(sequence)[0],
            self.deadline_ns(sequence),
            self._work_ns(sequence, self._able(sequence)),
        )
        return None

    def dispatch(self) -> None:
        """The line is offered to all who have room, the soonest free first; those who cannot be in time give way."""
        self._reserve()
        if not self._line:
            return
        free = sorted([(self.free_ns(worker), worker.instance.id) for worker in self.workers.values()])
        for _, id in free:
            if (worker := self.workers[id]).free_lane() is not None:
                self.touch(worker)
        able = [worker for worker in self.workers.values() if not worker.draining]
        if able:
            begun = [
                (self._urgency(one)[0], self.prefill_ns(one, worker))
                for worker in able
                for one in worker.prompts.partial.values()
            ]
            self._line.triage(sorted([(self._next_ns(worker), self._share(worker)) for worker in able]), sorted(begun))
            if self.options.early_rejection:
                self._reject_hopeless(able)

    def _reject_hopeless(self, workers: list[Worker]) -> None:
        """Turn away who would be late even if the next worker that is free did nothing else."""
        free_ns = min(self._next_ns(worker) for worker in workers)
        spared = []
        while (entry := self._line.hopeless(free_ns)) is not None:
            sequence = entry.sequence
            able = self._able(sequence)
            ends = [self._next_ns(worker) + self.prefill_ns(sequence, worker) for worker in able]
            if min(ends, default=float(self.now_ns)) <= entry.deadline_ns:
                spared.append((entry, self._work_ns(sequence, able)))
                continue
            assert sequence.request.slo is not None
            target_s = sequence.request.slo.ttft_ns / 1e9
            why = f"its TTFT target of {target_s:g} s can no longer be met: no instance can run its prompt by then"
            rest_ns = self._line.work_ns() / sum(self._share(worker) for worker in workers)
            again_s = (free_ns - self.now_ns + rest_ns) / 1e9
            for doomed in [*sequence.forks, sequence]:
                self.reject(doomed, why, retry_after_s=max(1.0, again_s))
        for entry, work_ns in spared:
            self._line.reprieve(entry, work_ns)

    def _next_ns(self, worker: Worker) -> float:
        """When the worker has done what is in flight there, and could turn to any prompt."""
        return self.foresight(worker).forecast.free_ns(self.now_ns)

    def _share(self, worker: Worker) -> float:
        """Of the worker for prompts: what its decodes leave, all of a prefill worker."""
        share = 1.0
        foresight = self.foresight(worker)
        for account in foresight.accounts:
            tpot_ns = account.tightest_tpot_ns()
            if tpot_ns < math.inf:
                step_s = foresight.forecast.step_s([], account.batch, account.context_tokens)
                share = min(share, 1 - step_s * 1e9 / tpot_ns if tpot_ns else 0.0)
        return max(LEAST_SHARE, share)

    def _work_ns(self, sequence: Sequence, workers: list[Worker]) -> float:
        """What its prefill takes where it is fastest."""
        return min([self.prefill_ns(sequence, worker) for worker in workers], default=0.0)

    # --- nobody waits for ever ----------------------------------------------------------------------------------------

    def _reserve(self) -> None:
        """Keep a worker for who was overtaken too often: one that can begin it now, or the one with most free pages."""
        forced = self._line.forced() if self._line else None
        if self._reserved is not None:
            sequence, worker = self._reserved
            if forced is sequence and worker.alive and not worker.draining:
                return
            self._reserved = None
        if self._held:
            self._release()
        if forced is not None and (able := self._able(forced)):
            worker = min(able, key=lambda one: (not one.prompts.can_start(forced), one.decodes, -one.ledger.free))
            self._reserved = forced, worker

    def place_decode(self, sequence: Sequence) -> Worker | None:
        """Where it is, or on the multiplexing worker with the fewest decode tokens that is not reserved."""
        workers = self.candidates(sequence, prefill=False)
        if not sequence.home.decodes and self._reserved is not None:
            workers = [worker for worker in workers if worker is not self._reserved[1]]
            if not workers:
                self._held.append(sequence)
        return place_with_fewest_tokens(sequence, workers)

    def _release(self) -> None:
        """Hand over what was held back for a prompt that had to start first."""
        held, self._held = self._held, []
        for sequence in held:
            if sequence.phase is Phase.READY and self.waiting.pop(sequence.id, None) is not None:
                self._hand_over(sequence)

    # --- steps --------------------------------------------------------------------------------------------------------

    def plan(self, worker: Worker) -> None:
        """Every step has all decodes, and as much of the line as they can afford."""
        for lane in range(worker.instance.lanes):
            while worker.open(lane):
                decodes = self.enter(worker, lane) if worker.decodes else Decodes()
                chunks = self._chunks(worker, lane)
                if not chunks and not decodes:
                    break
                self.run(worker, lane, chunks, decodes)

    def _chunks(self, worker: Worker, lane: int) -> list[tuple[Sequence, Prefill]]:
        """The largest safe chunk of the most urgent prompt, and short prompts beside it up to L_m tokens together."""
        if not worker.prompts.partial and not self._line:
            return []
        instance = worker.instance
        room = Room(self.foresight(worker), lane, self.now_ns)
        limit = min(instance.saturation_tokens, instance.max_step_tokens)
        chunks: list[tuple[Sequence, Prefill]] = []
        sizes: list[tuple[int, int]] = []
        tokens = rows = 0
        while (found := self._first(worker, room)) is not None:
            sequence, seconds = found
            most = min(sequence.tokens - sequence.prefilled, instance.max_step_tokens)
            rows += 1 + len(sequence.forks)
            if rows > instance.max_step_sequences or (tokens and tokens + most > limit):
                break
            safe = room.chunk_within(seconds, sequence.prefilled, most, sizes)
            most = safe if chunks else max(safe, min(most, SMALLEST_CHUNK))  # who was let in gets on, however slowly
            if most <= 0 or not self._started(sequence, worker):
                break
            new = worker.prompts.chunk(sequence, most)
            chunks += new
            sizes += [(chunk.start, chunk.length) for _, chunk in new]
            tokens += most
            if sequence.id in worker.prompts.partial:
                break
        room.remember()
        return chunks

    def _first(self, worker: Worker, room: Room) -> tuple[Sequence, float] | None:
        """The most urgent of the prompts begun here and of those in line that can be in time here, and the seconds that
        its step may take: decodes fall behind only for a prompt that would be late otherwise."""
        started = min(worker.prompts.partial.values(), key=self._urgency, default=None)
        if self._reserved is not None and self._reserved[1] is worker:
            forced = self._reserved[0]
            other = started or (forced if worker.prompts.can_start(forced) else None)
            return None if other is None else (other, room.strict)
        if started is None or self.may_interrupt(worker):
            urgency = self._urgency(started) if started is not None else None
            admitted = bool(self._line) and (room.admits(room.strict) or room.admits(room.lenient))
            for entry in self._line.on_time() if admitted else ():
                sequence = entry.sequence
                if urgency is not None and urgency <= self._urgency(sequence):
                    break
                if self._fits(worker, sequence):
                    seconds = self._in_time(worker, room, sequence)
                    if seconds is not None:
                        return sequence, seconds
        if started is None:
            given_up = self._too_late(worker, room.lane)
            return None if given_up is None else (given_up, room.strict)
        deadline_ns = self.deadline_ns(started)
        if self.now_ns < deadline_ns < math.inf and room.lenient > room.strict:
            late = self._ends_ns(worker, room, started, room.strict) > deadline_ns
            return started, room.lenient if late else room.strict
        return started, room.strict

    def _too_late(self, worker: Worker, lane: int) -> Sequence | None:
        """Who was given up, for a worker that has nothing better to do: a prefill worker that would be idle."""
        sequence = self._line.given_up()
        if sequence is None or not self._fits(worker, sequence):
            return None
        if not worker.decodes:
            return None if worker.in_flight[lane] else sequence
        elsewhere = any(not other.decodes for other in self._able(sequence))
        return None if elsewhere and worker.decoding.count else sequence

    def _urgency(self, sequence: Sequence) -> tuple[float, int]:
        """Replays first, since their readers are waiting now; then by deadline, those that are late already last."""
        if sequence.first_ns is not None:
            return -math.inf, sequence.order
        deadline_ns = self.deadline_ns(sequence)
        if deadline_ns == math.inf:
            deadline_ns = float(sequence.arrived_ns + PATIENCE_NS)
        elif deadline_ns < self.now_ns:
            deadline_ns = math.inf
        return deadline_ns, sequence.order

    def _fits(self, worker: Worker, sequence: Sequence) -> bool:
        """Whether the worker may start it now: it is able to, and has pages beside those promised to hand-overs."""
        if not worker.can_start_beside(sequence):
            return False
        if worker not in self._able(sequence):
            return False
        return not worker.decodes or not worker.decoding.count or self.below_watermark(worker, sequence.tokens)

    def _in_time(self, worker: Worker, room: Room, sequence: Sequence) -> float | None:
        """The seconds of a step with which its first token is expected in time if it starts here now; None: none."""
        deadline_ns = self.deadline_ns(sequence)
        if room.free_ns + self.prefill_ns(sequence, worker) > deadline_ns:
            return None
        if not room.account.batch:
            return math.inf
        if room.admits(room.strict) and self._ends_ns(worker, room, sequence, room.strict) <= deadline_ns:
            return room.strict
        if not room.lenient > room.strict or not room.admits(room.lenient):
            return None
        if self._ends_ns(worker, room, sequence, room.lenient) <= deadline_ns:
            return room.lenient
        return None

    def _able(self, sequence: Sequence) -> list[Worker]:
        return self.candidates(sequence, prefill=True)

    def _ends_ns(self, worker: Worker, room: Room, sequence: Sequence, seconds: float) -> float:
        """When the prompt would be done here: each step as long as the slack that is left, which grows by SLO_tpot."""
        forecast, account = room.forecast, room.account
        ends_s = (self.free_ns(worker) if sequence.phase is Phase.WAITING else room.free_ns) / 1e9
        each_s = account.tightest_tpot_ns() / 1e9
        size, done = 0, sequence.prefilled
        step_s = 0.0
        for _ in range(HORIZON):
            most = min(sequence.tokens - done, worker.instance.max_step_tokens)
            size = room.chunk_within(seconds, done, most)
            step_s = forecast.step_s([(done, size)] if size else [], account.batch, account.context_tokens)
            ends_s += step_s
            done += size
            if done >= sequence.tokens:
                return 1e9 * ends_s
            seconds = max(seconds - step_s + each_s, FLOOR * each_s)
        return 1e9 * (ends_s + step_s * (sequence.tokens - done) / size) if size else math.inf

    def _started(self, sequence: Sequence, worker: Worker) -> bool:
        """Bind the prompt to the worker, unless it is already; False if its pages are gone meanwhile."""
        if sequence.phase is Phase.WAITING:
            if not worker.prompts.can_start(sequence):
                return False
            self._line.remove(sequence)
            if self._reserved is not None and self._reserved[0] is sequence:
                self._reserved = None
            self.assign(sequence, worker)
            self.start(worker, sequence)
        return True
