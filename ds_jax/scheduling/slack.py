"""Slack: the time that a request can still lose without missing its targets (Tropical, section 4.2).

    TTFT slack   = arrival + SLO_ttft - now - T_prefill
    decode slack = t_first + SLO_tpot * max(1, n_output) - now

`SlackPolicy` is what Tropical's scheduler and ours share: forecasts, the decode slack of every lane (`account.py`), and
the deadlines of prompts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Many
from typing import ClassVar

from ds_jax.protocol import NO_TARGET_NS, Command, Decodes, Event, InstanceUp, Prefill, Role, Step, StepDone, pages_for
from ds_jax.scheduling.account import Account
from ds_jax.scheduling.core import Policy
from ds_jax.scheduling.prediction import Forecast
from ds_jax.scheduling.sequence import Sequence
from ds_jax.scheduling.worker import Worker


class Foresight:
    """What a policy knows of one worker beside its state."""

    def __init__(self, forecast: Forecast, lanes: int, forgiving: bool):
        self.forecast = forecast
        self.accounts = [Account(forgiving) for _ in range(lanes)]
        self.decode_turn = False
        """A prompt was just finished here: those who decode go before the next one."""
        self.admits = True
        """When it was last planned there was slack for chunks worth beginning a prompt with."""
        self.interruptions = 0
        """Prompts that were started while others were half done."""

    def due_ns(self, ahead: int = 1) -> float:
        """When the worker's next decode steps must be done so that nobody's slack falls below zero."""
        return min(account.due_ns(ahead=ahead) for account in self.accounts)


class SlackPolicy(Policy):
    """Forecasts, accounts and order, for policies over prefill workers and multiplexing ones."""

    roles = frozenset({Role.PREFILL, Role.MIXED})
    forgiving: ClassVar[bool] = False
    """As `Account.forgiving`."""
    most_overtaking: ClassVar[int] = 16
    """A prompt is overtaken by so many others in its queue, then it goes next: whatever the order, nobody starves."""

    def __init__(self, *arguments: object, **options: object):
        super().__init__(*arguments, **options)  # type: ignore[arg-type]
        self._foresights: dict[Worker, Foresight] = {}
        self._forecast_of: dict[int, tuple[Worker, int]] = {}
        """Worker and lane of each step in flight."""

    def handle(self, event: Event, now_ns: int) -> list[Command]:
        """As `Policy.handle`; the forecasts hear first how long the step took."""
        if type(event) is StepDone:
            known = self._forecast_of.pop(event.step, None)
            if known is not None and known[0].alive:
                self.foresight(known[0]).forecast.landed(known[1], now_ns)
        elif type(event) is InstanceUp:
            self._foresights = {worker: one for worker, one in self._foresights.items() if worker.alive}
            self._forecast_of = {step: one for step, one in self._forecast_of.items() if one[0].alive}
        return super().handle(event, now_ns)

    def foresight(self, worker: Worker) -> Foresight:
        """What is known of the worker."""
        found = self._foresights.get(worker)
        if found is None:
            step_time = self.predictor(worker.instance) if self.predictor is not None else None
            lanes = worker.instance.lanes
            found = self._foresights[worker] = Foresight(Forecast(step_time, lanes), lanes, self.forgiving)
        return found

    def run(
        self, worker: Worker, lane: int, prefills: Many[tuple[Sequence, Prefill]] = (), decodes: Decodes | None = None
    ) -> Step:
        """As `Policy.run`. `enter` must have been called for the decodes."""
        step = super().run(worker, lane, prefills, decodes)
        foresight = self.foresight(worker)
        account = foresight.accounts[lane]
        chunks = [(chunk.start, chunk.length) for _, chunk in prefills]
        if decodes:
            account.launched(step.id)
            foresight.forecast.launched(lane, self.now_ns, chunks, account.batch, account.context_tokens)
        else:
            foresight.forecast.launched(lane, self.now_ns, chunks, 0, 0)
        self._forecast_of[step.id] = (worker, lane)
        return step

    def enter(self, worker: Worker, lane: int) -> Decodes:
        """`worker.next_decodes`, told to the lane's account."""
        decodes = worker.next_decodes(lane)
        account = self.foresight(worker).accounts[lane]
        if decodes:
            account.enter(decodes, self.sequences)
        else:
            account.forget()
        return decodes

    # --- slack --------------------------------------------------------------------------------------------------------

    def deadline_ns(self, sequence: Sequence) -> float:
        """When its first token is due; inf: whenever, or it has had its first token and replays."""
        slo = sequence.request.slo
        if slo is None or slo.ttft_ns >= NO_TARGET_NS or sequence.first_ns is not None:
            return math.inf
        return sequence.arrived_ns + slo.ttft_ns

    def prefill_ns(self, sequence: Sequence, worker: Worker) -> float:
        """What the rest of its prompt is expected to take, alone on this worker."""
        forecast = self.foresight(worker).forecast
        return 1e9 * forecast.prefill_s(sequence.tokens, sequence.prefilled, worker.instance.max_step_tokens)

    def free_ns(self, worker: Worker) -> float:
        """When the worker could begin another prompt, those that it has begun being done."""
        forecast, lanes = self.foresight(worker).forecast, worker.instance.lanes
        rest_ns = sum([self.prefill_ns(one, worker) for one in worker.prompts.partial.values()])
        return forecast.free_ns(self.now_ns) + rest_ns / lanes

    def start(self, worker: Worker, sequence: Sequence) -> None:
        """Begin a prompt that waits here; its pages must be free."""
        foresight = self.foresight(worker)
        foresight.interruptions = foresight.interruptions + 1 if worker.prompts.partial else 0
        worker.prompts.start(sequence)

    def may_interrupt(self, worker: Worker) -> bool:
        """Whether a prompt may go ahead of those that are half done."""
        return self.foresight(worker).interruptions < self.most_overtaking

    def below_watermark(self, worker: Worker, tokens: int) -> bool:
        """Whether the worker's pages in use or promised, and those of so many tokens more, stay below the watermark."""
        used = worker.ledger.used + worker.decoding.inbox_pages + pages_for(tokens, worker.instance.page_size)
        return used <= self.options.memory_watermark * worker.ledger.pages


def decode_tokens(worker: Worker) -> int:
    """Tokens in pages that the worker decodes or was promised: what hand-overs are balanced by."""
    return (worker.ledger.used + worker.decoding.inbox_pages) * worker.instance.page_size
