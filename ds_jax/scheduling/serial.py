"""DistServe's public code (LLMServe/DistServe), where it differs from the paper's system: its decode loop is serial.

One loop takes care of all lanes. When a lane's step is done it first pulls, one hand-over after the other, and only
then plans that lane's next step; no step of any lane begins while it pulls. A sequence gets a slot only while the pool
has as many pages free as it holds already, because the loop counts it twice: once as waiting, once as joining. What was
swapped out comes back ahead of it and is counted once.
Where the public code is wrong (it frees pages before their copies have landed) it is not followed.

Not for serving: it is there so that runs of that system can be simulated as they were.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ds_jax.config import SchedulerConfig
from ds_jax.protocol import pages_for
from ds_jax.scheduling.disaggregated import Disaggregated
from ds_jax.scheduling.worker import Worker

if TYPE_CHECKING:
    from ds_jax.latency import Predictor


class Serial(Disaggregated):
    """`Disaggregated` with the public code's decode loop. `options.steps_per_lane` is to be 1."""

    pulls_at_once = False

    def __init__(self, options: SchedulerConfig | None = None, predictor: Predictor | None = None):
        super().__init__(options, predictor)
        self._pulling: dict[Worker, int] = {}
        """The copy that each loop waits for."""

    def admit(self, worker: Worker) -> None:
        decoding, ledger = worker.decoding, worker.ledger
        while decoding.landed:
            head = next(iter(decoding.landed.values()))
            pulled = head.emitted == 1  # and not swapped in
            if pulled and pages_for(head.tokens, ledger.page_size) > ledger.free and any(decoding.running):
                return
            batch = min(decoding.batches, key=lambda batch: len(batch.sequences))
            if not batch.slots:
                return
            decoding.seat(head, batch)

    def _plan_decodes(self, worker: Worker) -> None:
        if (copy := self._pulling.get(worker)) is not None and self._flight.moves(copy):
            return
        idle = [lane for lane, steps in enumerate(worker.in_flight) if not steps]
        idle.sort(key=worker.last_step.__getitem__)
        if idle and (pull := worker.decoding.pull(self._flight)) is not None:
            self._pulling[worker] = pull.id
            self._commands.append(pull)
            return
        self._pulling.pop(worker, None)
        for lane in idle:
            if decodes := worker.next_decodes(lane):
                self.run(worker, lane, decodes=decodes)
