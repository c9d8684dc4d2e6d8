"""Where a request's time went: the five stages, TTFT, TPOT, and the share of requests inside their targets.

`StageClock` hears what a scheduler hears and answers, so that one piece of code stamps the engine's requests in real
time and the simulator's in virtual time.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ds_jax.protocol import (
    STAGES,
    Arrived,
    Command,
    Copy,
    CopyDone,
    Event,
    InstanceLost,
    Reject,
    Request,
    Run,
    Slo,
    Step,
    StepDone,
    Stopped,
)

PREFILL_QUEUEING, PREFILL_EXECUTION, KV_TRANSMISSION, DECODE_QUEUEING, DECODE_EXECUTION = range(5)


@dataclass(frozen=True, slots=True)
class RequestTimes:
    """A sequence's whole life. The five stages sum to `end_ns - arrived_ns` exactly."""

    sequence: int
    prompt_tokens: int
    output_tokens: int
    arrived_ns: int
    first_token_ns: int | None
    """When the first token was on the host; None if there never was one."""
    end_ns: int
    stages_ns: tuple[int, int, int, int, int]
    """Nanoseconds in each of STAGES."""
    end: str
    """`length`, the reason of `Stopped`, or the text of `Reject`."""
    rejected: bool = False
    replays: int = 0
    """Times that its prefill began anew, after a preemption or a lost instance."""

    @property
    def ttft_ns(self) -> int | None:
        """Time to first token."""
        return None if self.first_token_ns is None else self.first_token_ns - self.arrived_ns

    @property
    def tpot_ns(self) -> float | None:
        """Time per output token after the first; 0 for one token, None without any."""
        if self.first_token_ns is None:
            return None
        return (self.end_ns - self.first_token_ns) / (self.output_tokens - 1) if self.output_tokens > 1 else 0.0

    def stages_s(self) -> dict[str, float]:
        return {stage: ns / 1e9 for stage, ns in zip(STAGES, self.stages_ns, strict=True)}


class _Life:
    """A request whose life is being stamped: all before `since_ns` is charged, and what comes now goes to `stage`.

    Its decode steps only move `seen_ns`, the end of the last one, so that a step costs little.
    """

    __slots__ = (
        "arrived_ns",
        "copies",
        "end",
        "end_ns",
        "first_ns",
        "output",
        "prefilled",
        "rejected",
        "replays",
        "request",
        "seen_ns",
        "sequence",
        "since_ns",
        "stage",
        "stages",
        "started",
    )

    def __init__(self, sequence: int, request: Request, now_ns: int):
        self.sequence = sequence
        self.request = request
        self.arrived_ns = self.since_ns = self.seen_ns = now_ns
        self.first_ns: int | None = None
        self.end_ns: int | None = None
        self.end = ""
        self.rejected = False
        self.output = 0
        self.copies = 0
        """Copies in flight, of those that began since the present replay did."""
        self.replays = 0
        self.started = False
        self.prefilled = False
        self.stage = PREFILL_QUEUEING
        self.stages = [0, 0, 0, 0, 0]


@dataclass(slots=True)
class _Move:
    """A copy in flight: whose, in which of its replays, and the (instance, epoch) ends of it that still live."""

    sequence: int
    replay: int
    ends: set[tuple[int, int]]


OnStage = Callable[[int, int, int, int], None]
"""Called with (sequence, stage, begin_ns, end_ns) for every stretch of time that is charged."""

OnStep = Callable[[Step, int, int, bool], None]
"""Called with (step, begin_ns, end_ns, done) for every step that began to run; not done: its instance was lost."""


class StageClock:
    """Charges every nanosecond of every sequence to one of the five stages.

    A step starts when it is at the head of its lane: at its Run, or when the step before it is done.

    * prefill queueing: waiting for the step with its first chunk, at first and after each preemption or loss. A wait
      that turns out to end in a replay is charged here from the last step on that did something for the request.
    * prefill execution: from the start of that step to the end of its last chunk, with the waits between chunks.
    * KV transmission: from a Copy to its CopyDone (what overlaps the prefill is charged to the prefill).
    * decode queueing: from the end of the prefill until the first decode step starts, except during copies.
    * decode execution: from there to the end.
    """

    def __init__(self, on_stage: OnStage | None = None, on_step: OnStep | None = None):
        self._on_stage = on_stage
        self._on_step = on_step
        self._lives: dict[int, _Life] = {}
        self._lanes: dict[tuple[int, int, int], deque[Step]] = {}
        self._lane_of: dict[int, tuple[int, int, int]] = {}
        self._began: dict[tuple[int, int, int], int] = {}
        """Start of the step at the head of each lane."""
        self._copies: dict[int, _Move] = {}

    def hear(self, event: Event, commands: Iterable[Command], now_ns: int) -> None:
        """One call of `Scheduler.handle` and its answer."""
        if isinstance(event, StepDone):
            self._step_done(event, now_ns)
        elif isinstance(event, Arrived):
            for sequence in event.request.sequences:
                self._lives[sequence] = _Life(sequence, event.request, now_ns)
        elif isinstance(event, Stopped):
            self._end(event.sequence, event.reason, now_ns)
        elif isinstance(event, CopyDone):
            self._copy_done(event.copy, now_ns)
        elif isinstance(event, InstanceLost):
            self._lost(event.instance, event.epoch, now_ns)
        for command in commands:
            if isinstance(command, Run):
                self._run(command.step, now_ns)
            elif isinstance(command, Copy):
                self._copy(command, now_ns)
            elif isinstance(command, Reject):
                self._end(command.sequence, command.why, now_ns, rejected=True)

    def ended(self, sequence: int) -> bool:
        """Whether the request is over and `pop` will give its times."""
        life = self._lives.get(sequence)
        return life is not None and life.end_ns is not None

    def pop(self, sequence: int) -> RequestTimes:
        """The times of a request that has ended; the clock forgets it.

        Raises:
            KeyError: unknown, popped before, or still living.
        """
        life = self._lives[sequence]
        if life.end_ns is None:
            raise KeyError(f"sequence {sequence} has not ended")
        del self._lives[sequence]
        a, b, c, d, e = life.stages
        return RequestTimes(
            sequence=sequence,
            prompt_tokens=life.request.prompt_tokens,
            output_tokens=life.output,
            arrived_ns=life.arrived_ns,
            first_token_ns=life.first_ns,
            end_ns=life.end_ns,
            stages_ns=(a, b, c, d, e),
            end=life.end,
            rejected=life.rejected,
            replays=life.replays,
        )

    def pop_ended(self) -> list[RequestTimes]:
        """The times of all requests that have ended, in order of arrival."""
        return [self.pop(sequence) for sequence in [id for id, life in self._lives.items() if life.end_ns is not None]]

    # --- one life -----------------------------------------------------------------------------------------------------

    def _living(self, sequence: int) -> _Life | None:
        life = self._lives.get(sequence)
        return life if life is not None and life.end_ns is None else None

    def _charge(self, life: _Life, now_ns: int) -> None:
        begin = life.since_ns
        if now_ns > begin:
            life.stages[life.stage] += now_ns - begin
            life.since_ns = now_ns
            if self._on_stage is not None:
                self._on_stage(life.sequence, life.stage, begin, now_ns)

    def _end(self, sequence: int, why: str, now_ns: int, rejected: bool = False) -> None:
        life = self._living(sequence)
        if life is not None:
            self._charge(life, now_ns)
            life.end_ns, life.end, life.rejected = now_ns, why, rejected

    # --- steps --------------------------------------------------------------------------------------------------------

    def _run(self, step: Step, now_ns: int) -> None:
        key = (step.instance, step.epoch, step.lane)
        lane = self._lanes.get(key)
        if lane is None:
            lane = self._lanes[key] = deque()
        lane.append(step)
        self._lane_of[step.id] = key
        if len(lane) == 1:
            self._start(key, step, now_ns)

    def _start(self, key: tuple[int, int, int], step: Step, now_ns: int) -> None:
        self._began[key] = now_ns
        lives = self._lives
        for prefill in step.prefills:
            life = self._living(prefill.sequence)
            if life is None:
                continue
            if prefill.start == 0 or not prefill.length:  # a fork begins with the last chunk of the one it follows
                if life.stage == DECODE_EXECUTION:
                    self._charge(life, life.seen_ns)
                life.replays += life.started
                life.started, life.prefilled, life.copies = True, False, 0
                life.stage = PREFILL_QUEUEING  # whatever it seemed to wait for, this is what it waited for
            self._charge(life, now_ns)
            life.stage = PREFILL_EXECUTION
        for decode in step.decodes:
            life = lives.get(decode.sequence)
            if life is not None and life.stage != DECODE_EXECUTION and life.end_ns is None:
                self._charge(life, now_ns)
                life.stage = DECODE_EXECUTION

    def _step_done(self, event: StepDone, now_ns: int) -> None:
        key = self._lane_of.pop(event.step, None)
        if key is None:
            return  # of a dead epoch
        lane = self._lanes[key]
        step = lane.popleft()
        if step.id != event.step:
            raise ValueError(f"step {event.step} is done before step {step.id}, which runs ahead of it on lane {key}")
        if self._on_step is not None:
            self._on_step(step, self._began[key], now_ns, True)
        for prefill in step.prefills:
            life = self._living(prefill.sequence)
            if life is None:
                continue
            self._charge(life, now_ns)
            if prefill.samples:
                life.prefilled = True
                life.stage = KV_TRANSMISSION if life.copies else DECODE_QUEUEING
        lives = self._lives
        for decode in step.decodes:
            life = lives.get(decode.sequence)
            if life is not None:
                life.seen_ns = now_ns
        for sequence, tokens in event.emitted.items():
            life = lives.get(sequence)
            if life is None or life.end_ns is not None or not tokens:
                continue
            life.output += tokens
            if life.first_ns is None:
                life.first_ns = now_ns
            if life.output >= life.request.max_tokens:
                self._end(sequence, "length", now_ns)
        if lane:
            self._start(key, lane[0], now_ns)
        else:
            del self._lanes[key]

    # --- copies and losses --------------------------------------------------------------------------------------------

    def _copy(self, copy: Copy, now_ns: int) -> None:
        life = self._living(copy.sequence)
        if life is None:
            return
        self._copies[copy.id] = _Move(copy.sequence, life.replays, {copy.source[:2], copy.destination[:2]})
        life.copies += 1
        if life.prefilled:
            self._charge(life, now_ns)
            life.stage = KV_TRANSMISSION

    def _copy_done(self, id: int, now_ns: int, then: int = DECODE_QUEUEING) -> None:
        move = self._copies.pop(id, None)
        life = None if move is None else self._living(move.sequence)
        if move is None or life is None or life.replays != move.replay:
            return
        life.copies -= 1
        if life.stage == KV_TRANSMISSION and not life.copies:
            self._charge(life, now_ns)
            life.stage = then

    def _lost(self, instance: int, epoch: int, now_ns: int) -> None:
        """Charge what was under way up to now; whoever was in it waits for a replay."""
        dead = (instance, epoch)
        for key in [key for key in self._lanes if key[:2] == dead]:
            steps = self._lanes.pop(key)
            for step in steps:
                del self._lane_of[step.id]
            if self._on_step is not None:
                self._on_step(steps[0], self._began[key], now_ns, False)
            for sequence in [w.sequence for w in steps[0].prefills] + [w.sequence for w in steps[0].decodes]:
                life = self._living(sequence)
                if life is not None:
                    self._charge(life, now_ns)
                    life.stage = PREFILL_QUEUEING
        for id, move in list(self._copies.items()):
            move.ends.discard(dead)
            if not move.ends:  # nobody is left to answer for it
                self._copy_done(id, now_ns, then=PREFILL_QUEUEING)


@dataclass(frozen=True)
class Attainment:
    """Shares of requests, 0 to 1, inside their targets."""

    requests: int
    ttft: float
    tpot: float
    both: float


def attainment(times: Iterable[RequestTimes], slo: Slo) -> Attainment:
    """Share of requests inside the TTFT target, the TPOT target, and both (DistServe's goodput needs >= 0.9 of both).

    A request that was rejected, or ended without a token, is inside none.

    Raises:
        ValueError: there are no requests.
    """
    count = ttft = tpot = both = 0
    for one in times:
        count += 1
        if one.rejected or one.ttft_ns is None or one.tpot_ns is None:
            continue
        fast_start, fast_tokens = one.ttft_ns <= slo.ttft_ns, one.tpot_ns <= slo.tpot_ns
        ttft += fast_start
        tpot += fast_tokens
        both += fast_start and fast_tokens
    if not count:
        raise ValueError("attainment needs at least one request, got none")
    return Attainment(count, ttft / count, tpot / count, both / count)


def percentile(values: Iterable[float], share: float) -> float:
    """The smallest value that at least `share` (0 to 1) of the values do not exceed.

    Raises:
        ValueError: there are no values, or share is outside 0 to 1.
    """
    ordered = sorted(values)
    if not ordered or not 0 <= share <= 1:
        raise ValueError(f"percentile needs values and a share from 0 to 1, got {len(ordered)} values and {share}")
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]
