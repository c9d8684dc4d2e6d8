"""DistServe (OSDI'24): prefill and decoding on different instances, FCFS in both (section 4.3).

A request is dispatched to the least loaded prefill instance, prefilled in one step (or in chunks, if it is longer than
a step), then *pulled* by the least loaded decode instance as soon as that one has room, and decoded to its end. Bursts
queue in the memory of the prefill instances. Dispatch is as `Policy` has it, the pull is `Decoding.pull`.
"""

from __future__ import annotations

from ds_jax.protocol import Prefill, Role
from ds_jax.scheduling.core import Policy
from ds_jax.scheduling.sequence import Sequence
from ds_jax.scheduling.worker import Worker


class Disaggregated(Policy):
    """The scheduler of DistServe over n prefill and m decode instances."""

    roles = frozenset({Role.PREFILL, Role.DECODE})

    def plan(self, worker: Worker) -> None:
        if worker.decodes:
            self._plan_decodes(worker)
        else:
            self._plan_prompts(worker)

    def _plan_decodes(self, worker: Worker) -> None:
        """A lane for each pipeline stage, with disjoint running batches: so the pipeline stays full."""
        for lane in range(worker.instance.lanes):
            while worker.open(lane) and (decodes := worker.next_decodes(lane)):
                self.run(worker, lane, decodes=decodes)

    def _plan_prompts(self, worker: Worker) -> None:
        prompts = worker.prompts
        while not prompts.idle and (lane := worker.free_lane()) is not None:
            batch = list(prompts.partial.values()) or self._next_batch(worker)
            if not batch:
                return
            chunks: list[tuple[Sequence, Prefill]] = []
            for sequence in batch:
                chunks += prompts.chunk(sequence, worker.instance.max_step_tokens)
            self.run(worker, lane, chunks)

    def _next_batch(self, worker: Worker) -> list[Sequence]:
        """Strict head of line: stop at the first prompt that breaks one of the three limits.

        Prompts share a step up to L_m tokens together, where the devices are saturated (section 3.1); a longer one
        runs alone. Pages of finished prefills that were not pulled yet are still leased, so that the third limit is
        also the back-pressure: this pool is the queue for bursts.
        """
        instance, prompts = worker.instance, worker.prompts
        limit = min(instance.saturation_tokens, instance.max_step_tokens)
        batch: list[Sequence] = []
        tokens = rows = 0
        while (head := prompts.head) is not None:
            rows += 1 + len(head.forks)
            tokens += head.tokens
            room = rows <= instance.max_step_sequences
            if not room or (batch and tokens > limit) or not prompts.can_start(head):
                break
            prompts.start(head)
            batch.append(head)
        return batch
