"""Chunked prefill: every step has all decodes, and prompts fill what is left of a budget of tokens.

Three systems do so, and `scheduler.chunk_order` names whose rules hold:

* `sarathi` (Sarathi-Serve, OSDI'24, Algorithm 3): the decodes, one token each; then prompts that have begun; then
  waiting ones, first come, first served. The budget bounds the time of a step, and with it the time between tokens.
* `splitfuse` (DeepSpeed-FastGen, section 3.2): the decodes; then prompts in order of arrival, begun or not, split as
  needed to fill the step. A prompt begins only if pages for the whole of it are free.
* `vllm_v1`: requests that run first, each its remaining tokens or what is left of the budget; waiting ones only if
  nothing was preempted in this step. Out of pages, the last that came is preempted, also in the midst of its prompt.

In all of them a prompt takes the pages of the whole of it when it begins (vLLM v1 takes them chunk by chunk; then many
prompts that have begun can hold all pages, and none can go on). A step always has every decode of its lane, also when
they are more than the budget; then it has no prompts. Several instances take requests by their load.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable

from ds_jax.protocol import Prefill, Role
from ds_jax.scheduling.core import Policy
from ds_jax.scheduling.sequence import Phase, Sequence
from ds_jax.scheduling.worker import Worker


class Chunked(Policy):
    """The schedulers of Sarathi-Serve, DeepSpeed-FastGen and vLLM v1 over n instances."""

    roles = frozenset({Role.MIXED})

    def place_prompt(self, sequence: Sequence) -> Worker | None:
        return min(self.candidates(sequence, prefill=True), key=lambda worker: worker.load, default=None)

    def plan(self, worker: Worker) -> None:
        for lane in range(worker.instance.lanes):
            while worker.open(lane):
                decodes = worker.next_decodes(lane)
                chunks = self._chunks(worker, self.options.token_budget - len(decodes))
                if not decodes and not chunks:
                    break
                self.run(worker, lane, chunks, decodes)

    def _chunks(self, worker: Worker, budget: int) -> list[tuple[Sequence, Prefill]]:
        """Prompts, whole or in part, of at most `budget` tokens together. None begins before those ahead of it."""
        instance, prompts = worker.instance, worker.prompts
        budget = min(budget, instance.max_step_tokens)
        chunks: list[tuple[Sequence, Prefill]] = []
        blocked = False
        for sequence in self._in_order(worker):
            rows = 1 + len(sequence.forks)
            if budget <= 0 or len(chunks) + rows > instance.max_step_sequences:
                break
            if sequence.phase is Phase.WAITING:
                blocked = blocked or not worker.has_seats(rows) or not prompts.can_start(sequence)
                if blocked:
                    continue  # those behind it that have begun go on: it waits for what they hold
                prompts.start(sequence)
            added = prompts.chunk(sequence, budget)
            budget -= added[0][1].length
            chunks += added
        return chunks

    def _in_order(self, worker: Worker) -> Iterable[Sequence]:
        """The order of the prompts. At most so many are needed as a step has rows."""
        rows = worker.instance.max_step_sequences
        begun = list(worker.prompts.partial.values())[:rows]
        if worker.preempted or (self.options.chunk_order == "vllm_v1" and worker.ledger.promised):
            return begun  # those just preempted come before whoever waits, as soon as their last steps are done
        waiting = worker.prompts.first(rows)
        if self.options.chunk_order == "splitfuse":
            return heapq.merge(begun, waiting, key=lambda sequence: sequence.order)
        return [*begun, *waiting]
