"""vLLM (SOSP'23), as its first scheduler was: prefill and decode on the same instances, prompts first.

If any waiting prompts fit whole, the next step runs them and nothing else: first come, first served, up to the limits
of a step, while their pages are free. Else it is one decode step of all that run. When decoding runs out of pages the
newest is preempted, and goes back to the head of the queue.

A prompt longer than a step, which vLLM refuses in this mode, runs alone in chunks. With several pipeline stages each
has a running batch of its own, as vLLM's virtual engines do. Several instances take requests by their load.
"""

from __future__ import annotations

from ds_jax.protocol import Prefill, Role
from ds_jax.scheduling.core import Policy
from ds_jax.scheduling.sequence import Sequence
from ds_jax.scheduling.worker import Worker

WATERMARK = 0.01
"""Share of the pages that a prompt leaves free beside running sequences, so that they need not preempt it at once."""


class Colocated(Policy):
    """The scheduler of vLLM v0 over n instances."""

    roles = frozenset({Role.MIXED})

    def place_prompt(self, sequence: Sequence) -> Worker | None:
        return min(self.candidates(sequence, prefill=True), key=lambda worker: worker.load, default=None)

    def plan(self, worker: Worker) -> None:
        while (lane := worker.free_lane()) is not None and (chunks := self._prompts(worker)):
            self.run(worker, lane, chunks)
        for lane in range(worker.instance.lanes):
            while worker.open(lane) and (decodes := worker.next_decodes(lane)):
                self.run(worker, lane, decodes=decodes)

    def _prompts(self, worker: Worker) -> list[tuple[Sequence, Prefill]]:
        """The prompts of the next step: a long one that has begun, else as many as fit from the head of the queue."""
        instance, prompts = worker.instance, worker.prompts
        chunks: list[tuple[Sequence, Prefill]] = []
        tokens = 0
        for sequence in list(prompts.partial.values()):
            return prompts.chunk(sequence, instance.max_step_tokens)
        while (head := prompts.head) is not None:
            room = len(chunks) + 1 + len(head.forks) <= instance.max_step_sequences
            if not room or (chunks and tokens + head.tokens > instance.max_step_tokens):
                break
            if not worker.has_seats(1 + len(head.forks)) or not prompts.can_start(head, _spare(worker)):
                break
            prompts.start(head)
            tokens += head.tokens
            chunks += prompts.chunk(head, instance.max_step_tokens)
        return chunks


def _spare(worker: Worker) -> int:
    """Pages to leave free; none where there is nobody to leave them to."""
    return int(WATERMARK * worker.instance.pages) if worker.decoding.count else 0
