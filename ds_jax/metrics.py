"""Where a request's time went: the five stages, TTFT and TPOT.

`StageClock` hears what a scheduler hears and answers, so that one piece of code stamps the engine's requests in real
time and the simulator's in virtual time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
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
    Step,
    StepDone,
    Stopped,
    message,
    parted_and_joined,
)

PREFILL_QUEUEING, PREFILL_EXECUTION, KV_TRANSMISSION, DECODE_QUEUEING, DECODE_EXECUTION = range(5)


@message
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

    While it is decoded it is a member of a lane, and a step counts once for all members: `output` and `seen_ns` (the
    end of its last step) are as they were when it joined, until it parts.
    """

    __slots__ = (
        "arrived_ns",
        "copies",
        "end",
        "end_ns",
        "ends_at",
        "first_ns",
        "joined",
        "lane",
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
        self.lane: _Lane | None = None
        """Where it is decoded."""
        self.joined = 0
        """Decode steps that the lane had done when it joined; `output` counts as if it had been in all since."""
        self.ends_at = 0
        """Decode steps that the lane will have done when it has its last token."""


class _Lane:
    """Steps in flight on one lane of a living epoch, and who is in the decode step that runs or ran last."""

    __slots__ = ("before", "began_ns", "done", "done_ns", "ends", "left", "members", "silent", "steps")

    def __init__(self) -> None:
        self.steps: deque[Step] = deque()
        self.began_ns = 0
        """Start of the step at the head."""
        self.before: Step | None = None
        """The last step that began and has decodes."""
        self.done = 0
        """Decode steps done."""
        self.done_ns = 0
        """When the last of them was."""
        self.members: dict[int, _Life] = {}
        """Those of its decodes that live."""
        self.silent: set[int] = set()
        """Those that have ended: no token comes of them."""
        self.left: set[int] = set()
        """Those that have begun elsewhere since; if they come back, no step in between may say so."""
        self.ends: dict[int, list[_Life]] = {}
        """By the decode steps that will be done when they have their last tokens."""


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
        self._lanes: dict[tuple[int, int, int], _Lane] = {}
        self._lane_of: dict[int, _Lane] = {}
        """Of each step in flight."""
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

    def produced(self, sequence: int) -> int:
        """Tokens that a living sequence has given so far; 0 for one that is not known."""
        life = self._lives.get(sequence)
        if life is None:
            return 0
        return life.output + (life.lane.done - life.joined if life.lane is not None else 0)

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
            if life.lane is not None:
                life.lane.silent.add(sequence)
                self._part(life)
            self._charge(life, now_ns)
            life.end_ns, life.end, life.rejected = now_ns, why, rejected

    # --- steps --------------------------------------------------------------------------------------------------------

    def _run(self, step: Step, now_ns: int) -> None:
        key = (step.instance, step.epoch, step.lane)
        lane = self._lanes.get(key)
        if lane is None:
            lane = self._lanes[key] = _Lane()
        lane.steps.append(step)
        self._lane_of[step.id] = lane
        if len(lane.steps) == 1:
            self._start(lane, step, now_ns)

    def _start(self, lane: _Lane, step: Step, now_ns: int) -> None:
        lane.began_ns = now_ns
        for prefill in step.prefills:
            life = self._living(prefill.sequence)
            if life is None:
                continue
            if prefill.start == 0 or not prefill.length:  # a fork begins with the last chunk of the one it follows
                if life.lane is not None:
                    life.lane.left.add(life.sequence)
                    self._part(life)
                if life.stage == DECODE_EXECUTION:
                    self._charge(life, life.seen_ns)
                life.replays += life.started
                life.started, life.prefilled, life.copies = True, False, 0
                life.stage = PREFILL_QUEUEING  # whatever it seemed to wait for, this is what it waited for
            self._charge(life, now_ns)
            life.stage = PREFILL_EXECUTION
        if step.decodes:
            parted, joined = parted_and_joined(lane.before, step)
            lane.before = step
            for sequence in parted:
                lane.silent.discard(sequence)
                if sequence in lane.members:
                    self._part(lane.members[sequence])
            if lane.left:
                joined = dict.fromkeys([*joined, *(decode[0] for decode in step.decodes if decode[0] in lane.left)])
                lane.left.clear()
            for sequence in joined:
                life = self._living(sequence)
                if life is None:
                    lane.silent.add(sequence)
                else:
                    self._join(lane, life, now_ns)

    def _join(self, lane: _Lane, life: _Life, now_ns: int) -> None:
        self._part(life)
        if life.stage != DECODE_EXECUTION:
            self._charge(life, now_ns)
            life.stage = DECODE_EXECUTION
        life.lane, life.joined = lane, lane.done
        lane.members[life.sequence] = life
        self._expect_end(lane, life)

    def _expect_end(self, lane: _Lane, life: _Life) -> None:
        life.ends_at = life.joined + life.request.max_tokens - life.output
        lane.ends.setdefault(life.ends_at, []).append(life)

    def _part(self, life: _Life) -> None:
        """Settle what its lane has counted for it."""
        lane = life.lane
        if lane is not None:
            del lane.members[life.sequence]
            life.lane = None
            if lane.done > life.joined:
                life.output += lane.done - life.joined
                life.seen_ns = lane.done_ns

    def _step_done(self, event: StepDone, now_ns: int) -> None:
        lane = self._lane_of.pop(event.step, None)
        if lane is None:
            return  # of a dead epoch
        step = lane.steps.popleft()
        if step.id != event.step:
            raise ValueError(f"step {event.step} is done before step {step.id}, which runs ahead of it on its lane")
        if self._on_step is not None:
            self._on_step(step, lane.began_ns, now_ns, True)
        emitted = event.emitted
        others = self._prefills_done(step, emitted, now_ns) if step.prefills else 0
        if step.decodes:
            self._decodes_done(lane, step, emitted, others, now_ns)
        if lane.steps:
            self._start(lane, lane.steps[0], now_ns)

    def _prefills_done(self, step: Step, emitted: Mapping[int, int], now_ns: int) -> int:
        """Returns how many entries of `emitted` are of its prefills."""
        others = 0
        for prefill in step.prefills:
            others += prefill.samples and prefill.sequence in emitted
            life = self._living(prefill.sequence)
            if life is None:
                continue
            self._charge(life, now_ns)
            if prefill.samples:
                life.prefilled = True
                life.stage = KV_TRANSMISSION if life.copies else DECODE_QUEUEING
                if emitted.get(prefill.sequence):
                    life.output += 1
                    if life.first_ns is None:
                        life.first_ns = now_ns
                    if life.output >= life.request.max_tokens:
                        self._end(prefill.sequence, "length", now_ns)
        return others

    def _decodes_done(self, lane: _Lane, step: Step, emitted: Mapping[int, int], others: int, now_ns: int) -> None:
        lane.done += 1
        lane.done_ns = now_ns
        if len(emitted) - others != len(step.decodes) - len(lane.silent):
            self._tokens_missing(lane, step, emitted)
        for life in lane.ends.pop(lane.done, ()):
            if life.lane is lane and life.ends_at == lane.done:
                if life.first_ns is None:
                    life.first_ns = now_ns
                self._end(life.sequence, "length", now_ns)

    def _tokens_missing(self, lane: _Lane, step: Step, emitted: Mapping[int, int]) -> None:
        """Not every living member has a token of the step: go through them."""
        for sequence, life in lane.members.items():
            if not emitted.get(sequence):
                life.output -= 1
                self._expect_end(lane, life)

    # --- copies and losses --------------------------------------------------------------------------------------------

    def _copy(self, copy: Copy, now_ns: int) -> None:
        life = self._living(copy.sequence)
        if life is None:
            return
        (source, source_epoch, _), (destination, destination_epoch, _) = copy.source, copy.destination
        ends = {(source, source_epoch), (destination, destination_epoch)}
        self._copies[copy.id] = _Move(copy.sequence, life.replays, ends)
        life.copies += 1
        if life.lane is not None:  # it is swapped out
            life.lane.left.add(life.sequence)
            self._part(life)
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
            lane = self._lanes.pop(key)
            for life in list(lane.members.values()):
                self._part(life)
            for step in lane.steps:
                del self._lane_of[step.id]
            if not lane.steps:
                continue
            head = lane.steps[0]
            if self._on_step is not None:
                self._on_step(head, lane.began_ns, now_ns, False)
            for sequence in [work.sequence for work in head.prefills] + [work.sequence for work in head.decodes]:
                if (one := self._living(sequence)) is not None:
                    self._charge(one, now_ns)
                    one.stage = PREFILL_QUEUEING
        for id, move in list(self._copies.items()):
            move.ends.discard(dead)
            if not move.ends:  # nobody is left to answer for it
                self._copy_done(id, now_ns, then=PREFILL_QUEUEING)
