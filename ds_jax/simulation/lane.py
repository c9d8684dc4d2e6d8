"""The steps in flight on one lane, and its running batch, of which a step costs only what changes.

All members of a batch gain a token with every step. So the lane counts its steps, and keeps for each member what must
be added to that count, or taken from it: its context is `steps launched + offset`, and its true length is reached at a
step that is known when it joins.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ds_jax.protocol import Decode, Step


class Pipeline:
    """The stages of an instance, and when each of them is free."""

    __slots__ = ("_free_ns", "_stages")

    def __init__(self, stages: int):
        self._stages = stages
        self._free_ns = [0] * stages

    @property
    def free_ns(self) -> int:
        """When all that has entered has left the last stage. Not kept for an instance of one stage."""
        return self._free_ns[-1]

    def enter(self, now_ns: int, duration_ns: int, host_ns: int = 0) -> int:
        """A step that takes `duration_ns` through all stages enters the first one now, or when it is free.

        Each stage's host works `host_ns` on a step before the stage begins it, on one at a time. Later stages' hosts do
        so while they wait for the stages before them: there it shows only when the pipeline is full.

        Returns:
            When it leaves the last stage.
        """
        if self._stages == 1:
            return now_ns + host_ns + duration_ns
        given_ns = now_ns
        for stage, free_ns in enumerate(self._free_ns):
            share_ns = duration_ns * (stage + 1) // self._stages - duration_ns * stage // self._stages
            now_ns = max(now_ns, max(given_ns, free_ns) + host_ns) + share_ns
            self._free_ns[stage] = now_ns
        return now_ns


class Lane:
    """The step that runs and the one queued behind it, with its times on devices and host, and the running batch."""

    __slots__ = (
        "_batch_of",
        "_context",
        "_decodes",
        "_done",
        "_ends",
        "_ends_at",
        "_finished",
        "_lane_of",
        "_launched",
        "_left",
        "_living",
        "_offset",
        "alive",
        "context_tokens",
        "held",
        "pipeline",
        "place",
        "queued",
        "running",
    )

    def __init__(
        self,
        place: tuple[int, int],
        pipeline: Pipeline,
        left: dict[int, int],
        context: dict[int, int],
        batch_of: dict[int, Lane],
        lane_of: dict[int, Lane],
    ):
        self.place = place
        """Instance and epoch."""
        self.pipeline = pipeline
        self.alive = True
        self.held = False
        """The running step is through, but must not be told before one of another lane."""
        self.running: Step | None = None
        self.queued: tuple[Step, int, int] | None = None
        self.context_tokens = 0
        """Tokens that the decodes of the last step launched attend to."""
        self._left, self._context, self._batch_of, self._lane_of = left, context, batch_of, lane_of
        # As of the last step launched.
        self._launched = 0
        self._offset: dict[int, int] = {}
        """Of each member, its context less the steps launched."""
        self._decodes: Sequence[Decode] = ()
        # As of the last step done.
        self._done = 0
        self._finished: Sequence[Decode] = ()
        self._living: dict[int, int] = {}
        """Members that are not over, each with the one token that a step gives it."""
        self._ends_at: dict[int, int] = {}
        """The step, counted on this lane, that gives a living member its last token."""
        self._ends: dict[int, list[int]] = {}
        """By step, those who may end with it."""

    # --- launched -----------------------------------------------------------------------------------------------------

    def launch(self, decodes: Sequence[Decode]) -> None:
        """Take the decodes of a step in, of which there are some."""
        if decodes is not self._decodes:
            parted, joined = _changes(self._decodes, decodes)
            for sequence in parted:
                self.leave_batch(sequence)
                self.context_tokens -= self._launched + self._offset.pop(sequence)
            for sequence in joined:
                if (lane := self._batch_of.get(sequence)) is not None:
                    lane.leave_batch(sequence)
                self._batch_of[sequence] = self
                tokens = self._context[sequence]
                self._offset[sequence] = tokens - self._launched
                self.context_tokens += tokens
            self._decodes = decodes
        self._launched += 1
        self.context_tokens += len(decodes)

    def leave_batch(self, sequence: int) -> None:
        """The sequence's context is what the last step launched made it, and is not counted here any more."""
        if self._batch_of.get(sequence) is self:
            del self._batch_of[sequence]
            self._context[sequence] = self._launched + self._offset[sequence]

    # --- done ---------------------------------------------------------------------------------------------------------

    def emit(self, step: Step) -> tuple[dict[int, int], Sequence[int]]:
        """The step is done: the tokens that it gives, and the sequences whose last one it gives.

        The mapping is the lane's own, and changes with the next step that does.
        """
        decodes = step.decodes
        if not decodes:
            return {}, ()
        if decodes is not self._finished:
            parted, joined = _changes(self._finished, decodes)
            for sequence in parted:
                if self._lane_of.get(sequence) is self:
                    self.part(sequence)
            for sequence in joined:
                if sequence in self._left:
                    self._join(sequence)
            self._finished = decodes
        self._done += 1
        ends = self._ends.pop(self._done, None)
        if ends is None:
            return self._living, ()
        return self._living, [sequence for sequence in ends if self._ends_at.get(sequence) == self._done]

    def part(self, sequence: int) -> None:
        """The sequence gets no more tokens here: its own count of what is left is right again."""
        del self._lane_of[sequence], self._living[sequence]
        self._left[sequence] = self._ends_at.pop(sequence) - self._done

    def die(self) -> None:
        """The instance is lost."""
        self.alive = False
        for sequence in list(self._living):
            self.part(sequence)
        for sequence in self._offset:
            self.leave_batch(sequence)

    def _join(self, sequence: int) -> None:
        if (lane := self._lane_of.get(sequence)) is not None:
            lane.part(sequence)
        self._lane_of[sequence] = self
        self._living[sequence] = 1
        self._ends_at[sequence] = last = self._done + self._left[sequence]
        self._ends.setdefault(last, []).append(sequence)


def _changes(before: Sequence[Decode], after: Sequence[Decode]) -> tuple[Iterable[int], Iterable[int]]:
    """Who has parted and who has joined between two steps of a lane."""
    if getattr(after, "after", None) is not None:
        return after.parted, after.joined  # type: ignore[attr-defined]
    old, new = {decode[0] for decode in before}, {decode[0] for decode in after}
    return [decode[0] for decode in before if decode[0] not in new], [d[0] for d in after if d[0] not in old]
