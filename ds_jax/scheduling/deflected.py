"""Ours: banked slack and the largest safe chunk on every multiplexing worker, and no prompt bound before it must be.

From Tropical comes the banked decode slack, from Prefill Deflection (arXiv 2607.02043) the search for the largest chunk
that a decode worker can take without missing a token's due time. What is added:

* Prompts wait in one line (`admission.py`) for no worker in particular. Whoever can take another step pulls from it, so
  that no prompt waits behind a long one on one worker while another worker is free.
* A worker pulls the most urgent prompt that can be in time there, and no other: a multiplexing worker looks ahead over
  its next steps, each as long as the decode with the least slack allows.
* The forecast is put right by the steps themselves, and its scatter is the margin (`prediction.py`).
* Requests that cannot be in time any more wait behind those that can; with `early_rejection` they are turned away at
  once, and told when to come back. Decodes that missed their TTFT do not hold prompts back.
* A worker that stops taking prompts, because its chunks have become small, begins again only when they are twice that.
"""

from __future__ import annotations

import math

from ds_jax.protocol import Decodes, Prefill
from ds_jax.scheduling.admission import Line
from ds_jax.scheduling.multiplexed import place_with_fewest_tokens
from ds_jax.scheduling.sequence import Phase, Sequence
from ds_jax.scheduling.slack import Account, Foresight, SlackPolicy
from ds_jax.scheduling.worker import Worker

FLOOR = 0.7
"""A decode that is behind gets at least this share of its SLO_tpot for each token, so that it catches up."""
FEW = 0.1
"""Share of a batch, those with the least slack, that may fall behind for a while for the sake of a prompt,"""
BEHIND = 2.0
"""by a step of at most so many SLO_tpot."""
PATIENCE_NS = 10 * 10**9
"""A request without a TTFT target is ranked as if it had this one; it is never given up."""
SMALLEST_CHUNK = 16
"""Tokens; below, a worker takes no further prompts until a chunk of twice as many is safe."""
HORIZON = 4
"""Steps that are looked ahead when a prompt is cut into chunks; the rest is taken to go on like the last."""


class Deflected(SlackPolicy):
    """Multiplexing by banked slack with the largest safe chunk, over one line of prompts."""

    forgiving = True

    def __init__(self, *arguments: object, **options: object):
        super().__init__(*arguments, **options)
        self._line = Line(self.most_overtaking)
        self._held: list[Sequence] = []
        """Finished prefills that are not pulled yet, so that the pages go to a prompt overtaken too often:"""
        self._held_for: Sequence | None = None

    # --- the line -----------------------------------------------------------------------------------------------------

    def place_prompt(self, sequence: Sequence) -> Worker | None:
        """Into the line. A replay goes ahead of all: whoever reads its answer is waiting now."""
        workers = self.candidates(sequence, prefill=True)
        work_ns = min((self.prefill_ns(sequence, worker) for worker in workers), default=0.0)
        self._line.add(sequence, self._urgency(sequence)[0], self.deadline_ns(sequence), work_ns)
        return None

    def dispatch(self) -> None:
        """The line is offered to all who have room, the soonest free first; those who cannot be in time give way."""
        if self._held and self._line.forced() is not self._held_for:
            self._release()
        if not self._line:
            return
        able = [worker for worker in self.workers.values() if worker.free_lane() is not None]
        for worker in sorted(able, key=self._free_ns) if len(able) > 1 else able:
            self.touch(worker)
        for sequence in self._line.triage(self.now_ns, self._prefillers()):
            if self.options.early_rejection and sequence.first_ns is None:
                again_s = (self._line.ends_ns(self.now_ns, self._prefillers(), lambda _: True) - self.now_ns) / 1e9
                for doomed in [*sequence.forks, sequence]:
                    self.reject(doomed, "its TTFT target can no longer be met", retry_after_s=max(1.0, again_s))

    def _prefillers(self) -> float:
        """Workers' worth of prefill: all of a prefill worker, of a multiplexing one what its decodes leave."""
        total = 0.0
        for worker in self.workers.values():
            share = 1.0
            for account in self.foresight(worker).accounts:
                tpot_ns = account.tightest_tpot_ns()
                if tpot_ns < math.inf:
                    step_s = self.foresight(worker).forecast.step_s([], account.batch, account.context_tokens)
                    share = min(share, 1 - step_s * 1e9 / tpot_ns if tpot_ns else 0.0)
            total += max(0.1, share)
        return max(1.0, total)

    def _free_ns(self, worker: Worker) -> float:
        """When the worker could begin another prompt, those that it has begun being done."""
        rest_ns = sum(self.prefill_ns(one, worker) for one in worker.prompts.partial.values())
        return self.foresight(worker).forecast.free_ns(self.now_ns) + rest_ns

    def place_decode(self, sequence: Sequence) -> Worker | None:
        """Where it is, or on the multiplexing worker with the fewest decode tokens that nobody has to start on."""
        workers = self.candidates(sequence, prefill=False)
        if not sequence.home.decodes and (forced := self._line.forced()) is not None:
            workers = [worker for worker in workers if worker not in self._able(forced)]
            if not workers:
                self._held.append(sequence)
                self._held_for = forced
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
        instance, foresight = worker.instance, self.foresight(worker)
        account = foresight.accounts[lane]
        strict, lenient = self._seconds(foresight, account, lane)
        limit = min(instance.saturation_tokens, instance.max_step_tokens)
        chunks: list[tuple[Sequence, Prefill]] = []
        sizes: list[tuple[int, int]] = []
        tokens = rows = 0
        while (found := self._first(worker, lane, strict, lenient)) is not None:
            sequence, seconds = found
            most = min(sequence.tokens - sequence.prefilled, instance.max_step_tokens)
            rows += 1 + len(sequence.forks)
            if rows > instance.max_step_sequences or (tokens and tokens + most > limit):
                break
            safe = foresight.forecast.chunk_within(
                seconds, sequence.prefilled, most, account.batch, account.context_tokens, sizes
            )
            most = safe if chunks else max(safe, min(most, SMALLEST_CHUNK))  # who was let in gets on, however slowly
            if most <= 0 or not self._started(sequence, worker):
                break
            new = worker.prompts.chunk(sequence, most)
            chunks += new
            sizes += [(chunk.start, chunk.length) for _, chunk in new]
            tokens += most
            if sequence.id in worker.prompts.partial:
                break
        return chunks

    def _seconds(self, foresight: Foresight, account: Account, lane: int) -> tuple[float, float]:
        """How long the next step may take for its decodes, and if a few of them may fall behind; inf: nobody minds."""
        if not account.batch:
            return math.inf, math.inf
        begin_ns = foresight.forecast.free_ns(self.now_ns, lane)
        strict = account.lenient_due_ns(begin_ns, FLOOR, 0.0, 0.0) - begin_ns
        return strict / 1e9, max(strict, account.lenient_due_ns(begin_ns, FLOOR, FEW, BEHIND) - begin_ns) / 1e9

    def _first(self, worker: Worker, lane: int, strict: float, lenient: float) -> tuple[Sequence, float] | None:
        """The most urgent of the prompts begun here and of those in line that can be in time here, and the seconds that
        its step may take: decodes fall behind only for a prompt that would be late otherwise."""
        started = min(worker.prompts.partial.values(), key=self._urgency, default=None)
        forced = self._line.forced()
        if forced is not None and worker in self._able(forced):
            other = started or (forced if worker.prompts.can_start(forced) else None)
            return None if other is None else (other, strict)
        if started is None or self.may_interrupt(worker):
            for sequence in [entry.sequence for entry in self._line.on_time()]:
                if started is not None and self._urgency(started) <= self._urgency(sequence):
                    break
                if self._fits(worker, sequence):
                    for seconds in (strict, lenient):
                        if self._in_time(worker, lane, sequence, seconds):
                            return sequence, seconds
        if started is None:
            late = self._too_late(worker, lane)
            return None if late is None else (late, strict)
        ends_ns = self._ends_ns(worker, lane, started, strict) if lenient > strict else -math.inf
        return started, lenient if self.now_ns < self.deadline_ns(started) < ends_ns else strict

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
        if not worker.prompts.can_start(sequence, spare=worker.decoding.inbox_pages) or worker not in self._able(
            sequence
        ):
            return False
        return not worker.decodes or not worker.decoding.count or self.below_watermark(worker, sequence.tokens)

    def _in_time(self, worker: Worker, lane: int, sequence: Sequence, seconds: float) -> bool:
        """Whether its first token is expected in time if it starts here now."""
        foresight = self.foresight(worker)
        account = foresight.accounts[lane]
        ends_ns = foresight.forecast.free_ns(self.now_ns, lane) + self.prefill_ns(sequence, worker)
        if ends_ns > self.deadline_ns(sequence) or not account.batch:
            pass
        elif self._admits(foresight, account, seconds):
            ends_ns = self._ends_ns(worker, lane, sequence, seconds)
        else:
            return False
        return ends_ns <= self.deadline_ns(sequence)

    def _able(self, sequence: Sequence) -> list[Worker]:
        return self.candidates(sequence, prefill=True)

    def _admits(self, foresight: Foresight, account: Account, seconds: float) -> bool:
        """With hysteresis: whether chunks here are large enough to begin another prompt."""
        enough = SMALLEST_CHUNK if foresight.admits else 2 * SMALLEST_CHUNK
        most = foresight.forecast.chunk_within(seconds, 0, enough, account.batch, account.context_tokens)
        foresight.admits = most >= enough
        return foresight.admits

    def _ends_ns(self, worker: Worker, lane: int, sequence: Sequence, seconds: float) -> float:
        """When the prompt would be done here: each step as long as the slack that is left, which grows by SLO_tpot."""
        foresight = self.foresight(worker)
        forecast, account = foresight.forecast, foresight.accounts[lane]
        begin_ns = self._free_ns(worker) if sequence.phase is Phase.WAITING else forecast.free_ns(self.now_ns, lane)
        ends_s = begin_ns / 1e9
        each_s = account.tightest_tpot_ns() / 1e9
        size, done = 0, sequence.prefilled
        step_s = 0.0
        for _ in range(HORIZON):
            most = min(sequence.tokens - done, worker.instance.max_step_tokens)
            size = forecast.chunk_within(seconds, done, most, account.batch, account.context_tokens)
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
            self.assign(sequence, worker)
            self.start(worker, sequence)
        return True
