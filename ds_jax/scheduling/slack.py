"""Slack: the time that a request can still lose without missing its targets (Tropical, section 4.2).

    TTFT slack   = arrival + SLO_ttft - now - T_prefill
    decode slack = t_first + SLO_tpot * max(1, n_output) - now

Decode slack is banked: tokens that came early are paid for with later ones. `Account` keeps the smallest decode slack
of a running batch, and its context, at the cost of what changes: with every step of its lane a member's due time moves
by its own SLO_tpot, so that among members of equal SLO_tpot the order never changes. `SlackPolicy` is what Tropical's
scheduler and ours share: forecasts, accounts, and order among waiting prompts with a bound on overtaking.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Many
from typing import ClassVar

from ds_jax.protocol import Command, Decodes, Event, InstanceUp, Prefill, Role, Step, StepDone, pages_for
from ds_jax.scheduling.core import Policy
from ds_jax.scheduling.prediction import Forecast
from ds_jax.scheduling.sequence import Sequence
from ds_jax.scheduling.worker import Worker


class Account:
    """Context and due times of the batch of one lane."""

    def __init__(self, forgiving: bool = False) -> None:
        self.forgiving = forgiving
        """Whether a request that has missed its TTFT, and with it both targets together, may wait for others."""
        self.batch = 0
        self._decodes: Decodes = Decodes()
        self._step: int | None = None
        """The last step that the account was told of."""
        self._tick = 0
        self._context = 0
        """Of all members, less the batch for every tick."""
        self._members: dict[int, int] = {}
        """What each adds to `_context`."""
        self._keys: dict[int, float] = {}
        """Due time of each at tick 0."""
        self._heaps: dict[int, list[tuple[float, int]]] = {}
        """(key, sequence) by SLO_tpot; entries of those who have left are dropped when they come up."""

    def enter(self, decodes: Decodes, sequences: dict[int, Sequence]) -> None:
        """The next step is to have these decodes; `launched` follows."""
        self._tick += 1
        if decodes is self._decodes:
            return
        if decodes.after == self._step and self._step is not None:
            for id in decodes.parted:
                self._part(id)
            joined: Iterable[int] = decodes.joined
        else:
            self._members, self._keys, self._heaps, self._context = {}, {}, {}, 0
            joined = [decode[0] for decode in decodes]
        for id in joined:
            self._join(sequences[id])
        self.batch = len(decodes)
        self._decodes = decodes

    def launched(self, step: int) -> None:
        """The step that `enter` was told of has this id."""
        self._step = step

    def forget(self) -> None:
        """The batch is empty."""
        if self.batch:
            self.batch = 0
            self._decodes, self._step = Decodes(), None
            self._members, self._keys, self._heaps, self._context = {}, {}, {}, 0

    @property
    def context_tokens(self) -> int:
        """What the decodes of the step attend to, their own tokens included."""
        return self._context + self.batch * self._tick

    def due_ns(self, ahead: int = 0) -> float:
        """When the step must be done at the latest so that nobody's slack falls below zero; inf: nobody minds.

        Args:
            ahead: of so many steps after this one.
        """
        due = math.inf
        for tpot_ns, heap in self._heaps.items():
            self._clear(heap)
            if heap:
                due = min(due, heap[0][0] + tpot_ns * (self._tick + ahead))
        return due

    def lenient_due_ns(self, begin_ns: float, floor: float, share: float, most: float) -> float:
        """As `due_ns`, but a few may fall behind for a while.

        Args:
            begin_ns: when the step begins.
            floor: who is behind already gets this share of its SLO_tpot, so that it catches up.
            share: of the members, so many with the least slack may be made to wait beyond it,
            most: for a step of at most so many times SLO_tpot. They are those who have just begun, and have the most
                tokens to catch up with.
        """
        due = math.inf
        for tpot_ns, heap in self._heaps.items():
            self._clear(heap)
            if heap:
                key = heap[0][0]
                if (few := int(share * len(heap))) and key + tpot_ns * self._tick < begin_ns + most * tpot_ns:
                    alive = [entry for entry in heap if self._keys.get(entry[1]) == entry[0]]
                    key = heapq.nsmallest(few + 1, alive)[-1][0] if few < len(alive) else key
                    key = min(key, max(heap[0][0], begin_ns + (most - self._tick) * tpot_ns))
                due = min(due, max(key + tpot_ns * self._tick, begin_ns + floor * tpot_ns))
        return due

    def _clear(self, heap: list[tuple[float, int]]) -> None:
        """Drop those from the top who have left."""
        while heap and self._keys.get(heap[0][1]) != heap[0][0]:
            heapq.heappop(heap)

    def tightest_tpot_ns(self) -> float:
        """The smallest SLO_tpot in the batch; inf: there is none."""
        return min((tpot_ns for tpot_ns, heap in self._heaps.items() if heap), default=math.inf)

    def _join(self, sequence: Sequence) -> None:
        tokens = sequence.emitted + sequence.planned
        self._members[sequence.id] = share = sequence.request.prompt_tokens + tokens - self._tick
        self._context += share
        slo = sequence.request.slo
        if slo is not None and sequence.first_ns is not None and not (self.forgiving and missed(sequence)):
            key = sequence.first_ns + slo.tpot_ns * (max(1, tokens) - self._tick)
            self._keys[sequence.id] = key
            heapq.heappush(self._heaps.setdefault(slo.tpot_ns, []), (key, sequence.id))

    def _part(self, id: int) -> None:
        self._context -= self._members.pop(id, 0)
        self._keys.pop(id, None)


class Foresight:
    """What a policy knows of one worker beside its state."""

    def __init__(self, forecast: Forecast, lanes: int, forgiving: bool):
        self.forecast = forecast
        self.accounts = [Account(forgiving) for _ in range(lanes)]
        self.decode_turn = False
        """A prompt was just finished here: those who decode go before the next one."""
        self.admits = True
        """The last prompt asked for was not refused for want of slack."""
        self.head: Sequence | None = None
        self.overtaken = 0
        """Prompts that were started while `head` was the oldest that waits."""
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

    # --- slack and order ----------------------------------------------------------------------------------------------

    def deadline_ns(self, sequence: Sequence) -> float:
        """When its first token is due; inf: whenever, or it has had its first token and replays."""
        slo = sequence.request.slo
        return math.inf if slo is None or sequence.first_ns is not None else sequence.arrived_ns + slo.ttft_ns

    def prefill_ns(self, sequence: Sequence, worker: Worker) -> float:
        """What the rest of its prompt is expected to take, alone on this worker."""
        forecast = self.foresight(worker).forecast
        return 1e9 * forecast.prefill_s(sequence.tokens, sequence.prefilled, worker.instance.max_step_tokens)

    def order(self, worker: Worker) -> Callable[[Sequence], tuple[float, int]]:
        """The configured order of the prompts that wait for this worker: the smallest first."""
        match self.options.queue_order:
            case "sjf":
                return lambda one: (one.tokens - one.prefilled, one.order)
            case "ljf":
                return lambda one: (one.prefilled - one.tokens, one.order)
            case "edf":
                return lambda one: (self.deadline_ns(one), one.order)
            case "llf":
                return lambda one: (self.deadline_ns(one) - self.prefill_ns(one, worker), one.order)
            case _:
                return lambda one: (0.0, one.order)

    def next_prompt(self, worker: Worker) -> Sequence | None:
        """The prompt to start next, of those that wait here: replays, then by order, then who was overtaken enough."""
        prompts = worker.prompts
        head = prompts.head
        if head is None or prompts.replays or self.options.queue_order == "fcfs":
            return head
        foresight = self.foresight(worker)
        if foresight.head is not head:
            foresight.head, foresight.overtaken = head, 0
        if foresight.overtaken >= self.most_overtaking:
            return head
        return min(prompts.waiting(), key=self.order(worker))

    def start(self, worker: Worker, sequence: Sequence) -> None:
        """Begin a prompt that waits here; its pages must be free."""
        foresight = self.foresight(worker)
        foresight.overtaken += foresight.head is not sequence
        foresight.interruptions = foresight.interruptions + 1 if worker.prompts.partial else 0
        worker.prompts.start(sequence)

    def may_interrupt(self, worker: Worker) -> bool:
        """Whether a prompt may go ahead of those that are half done."""
        return self.foresight(worker).interruptions < self.most_overtaking

    def below_watermark(self, worker: Worker, tokens: int) -> bool:
        """Whether the worker's pages in use or promised, and those of so many tokens more, stay below the watermark."""
        page_size, promised = worker.instance.page_size, worker.decoding.inbox_pages
        used = worker.ledger.used + promised + pages_for(tokens + sum_waiting(worker), page_size)
        return used <= self.options.memory_watermark * worker.ledger.pages


def missed(sequence: Sequence) -> bool:
    """Whether its first token came too late."""
    slo, first_ns = sequence.request.slo, sequence.first_ns
    return slo is not None and first_ns is not None and first_ns - sequence.arrived_ns > slo.ttft_ns


def sum_waiting(worker: Worker) -> int:
    """Tokens of the prompts that wait here for their pages."""
    return sum([sequence.tokens for sequence in worker.prompts.waiting()])


def decode_tokens(worker: Worker) -> int:
    """Tokens in pages that the worker decodes or was promised: what hand-overs are balanced by."""
    return (worker.ledger.used + worker.decoding.inbox_pages) * worker.instance.page_size
