"""A quick look at a unit: the same requests at the same rate, with neither scheduler nor pages.

Prompts are served first come, first served in the steps that the policy makes, and decodes leap from one arrival or
departure to the next: between two of them a batch stays the same and its steps grow by the same time each, so that any
number of steps is one formula. Memory and slots make requests wait, nothing is preempted, copies are free: so a sketch
is at least as good as a trial (which the search checks with MARGIN to spare), at a fraction of its cost.

It knows `disaggregated` and `colocated`, the policies whose steps are either prompts or decodes.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

from ds_jax.placement.hardware import Hardware, Pace
from ds_jax.placement.layouts import Group, Unit
from ds_jax.placement.trial import BOTH, Requests
from ds_jax.plan import PlanConfig
from ds_jax.protocol import Role

MARGIN = 1.06
"""A unit that fails in a sketch is taken to fail in a trial at so many times the rate."""
PIPED = 0.6
"""What a sketch of a pipeline where prompts and decodes share stages is worth as a guess: it leaves out the bubbles."""
SKETCHED = ("disaggregated", "colocated")


@dataclass(frozen=True)
class Verdict:
    """What came of a sketch; a `Score`."""

    passed: bool
    share: float


def worth(unit: Unit) -> float:
    """What a sketched rate is to be multiplied with for a guess, which is not a bound."""
    return PIPED if any(group.role is Role.MIXED and group.shape.pp > 1 for group in unit.groups) else 0.98


class Sketches:
    """Sketches units of one plan."""

    def __init__(self, plan: PlanConfig, hardware: Hardware, requests: Requests):
        self.plan, self.hardware, self.requests = plan, hardware, requests
        self._arrivals = requests.arrivals_s.tolist()
        self._prompts: list[int] = requests.prompts.tolist()
        self._outputs: list[int] = requests.outputs.tolist()
        self._most_misses = (1 - plan.search.attainment) * len(self._prompts) + 1

    def run(self, unit: Unit, policy: str, rate: float, phases: Sequence[Role] = BOTH) -> Verdict:
        """The unit at `rate` requests/s."""
        scale = self.requests.scale(rate)
        arrivals = [scale * at for at in self._arrivals]
        slo = self.plan.slo
        luck = [0.0] * len(arrivals)
        late_first, late_rest = [False] * len(arrivals), [False] * len(arrivals)
        if (mixed := unit.group(Role.MIXED)) is not None:
            firsts, ends, luck = self._shared(mixed, policy, arrivals)
        else:
            firsts = arrivals
            if Role.PREFILL in phases:
                group = unit.group(Role.PREFILL)
                assert group is not None
                firsts = self._prefill(group, policy, arrivals)
            ends = firsts
            if Role.DECODE in phases:
                group = unit.group(Role.DECODE)
                assert group is not None
                landed = firsts
                if len(phases) > 1:
                    copies_s = self.hardware.copy_s(unit, self.requests.prompts).tolist()
                    landed = [first + copy_s for first, copy_s in zip(firsts, copies_s, strict=True)]
                ends = self._decode(group, policy, landed)
        delay_s = self.hardware.delay_s(policy)
        if Role.PREFILL in phases:
            late_first = [
                first - at - lucky + delay_s > slo.ttft_s
                for first, at, lucky in zip(firsts, arrivals, luck, strict=True)
            ]
        if Role.DECODE in phases:
            late_rest = [
                end - first > slo.tpot_s * (output - 1)
                for first, end, output in zip(firsts, ends, self._outputs, strict=True)
            ]
        if self.plan.search.rule == "published":
            misses = max(sum(late_first), sum(late_rest))
        else:
            misses = sum([first or rest for first, rest in zip(late_first, late_rest, strict=True)])
        return Verdict(misses <= self._most_misses, 1 - misses / len(arrivals))

    def _prefill(self, group: Group, policy: str, arrivals: list[float]) -> list[float]:
        """When each first token is there."""
        pace = self.hardware.pace(group, policy)
        base, work, limit = pace.prefill[0], pace.prompts_s(self.requests.prompts).tolist(), pace.step_tokens
        stages, most = group.shape.pp, pace.step_prompts
        prompts, count = self._prompts, len(arrivals)
        planned = [[0.0] * (pace.ahead * stages) for _ in range(group.instances)]  # ends of the steps before
        free = [[0.0] * stages for _ in range(group.instances)]
        firsts: list[float] = []
        index = 0
        while index < count:
            one = 0 if group.instances == 1 else min(range(group.instances), key=lambda one: planned[one][0])
            now = max(planned[one][0], arrivals[index])
            tokens, seconds, end = prompts[index], base + work[index], index + 1
            last = min(count, index + most)
            while end < last and arrivals[end] <= now and tokens + prompts[end] <= limit:
                tokens += prompts[end]
                seconds += work[end]
                end += 1
            now = max(now, planned[one][-stages])  # each lane has one step in the pipeline, and others behind it
            for stage, free_s in enumerate(free[one]):
                now = free[one][stage] = max(now, free_s) + seconds / stages
            planned[one] = [*planned[one][1:], now]
            firsts += [now] * (end - index)
            index = end
        return firsts

    def _decode(self, group: Group, policy: str, firsts: list[float]) -> list[float]:
        """When each last token is there, of requests whose pages are."""
        order = sorted(range(len(firsts)), key=firsts.__getitem__)
        batch = _Batch(self.hardware.pace(group, policy), group, self._prompts, self._outputs)
        ends = list(firsts)
        for index in order:
            if self._outputs[index] > 1:
                batch.run_until(firsts[index], ends)
                batch.add(index)
        batch.run_until(math.inf, ends)
        return ends

    def _shared(self, group: Group, policy: str, arrivals: list[float]) -> tuple[list[float], list[float], list[float]]:
        """When each first and each last token is there, of workers where prompts go first.

        And what of its wait for the end of a decode step a request might have been spared if it had come at another
        moment of that step: to which moment it comes hangs on every step before.
        """
        pace = self.hardware.pace(group, policy)
        base, work, limit = pace.prefill[0], pace.prompts_s(self.requests.prompts).tolist(), pace.step_tokens
        share = group.shape.pp * group.instances
        prompts, count, most = self._prompts, len(arrivals), pace.step_prompts
        batch = _Batch(pace, group, prompts, self._outputs)
        firsts, ends, luck = [0.0] * count, [0.0] * count, [0.0] * count
        index = 0
        while index < count:
            prefilling_s = batch.at_s
            batch.run_until(arrivals[index], ends)
            if batch.waiting:
                batch.run_to_room(ends)
            at = decided_s = max(batch.at_s, arrivals[index])
            tokens, seconds, end = prompts[index], base + work[index], index + 1
            last = min(count, index + most)
            while end < last and arrivals[end] <= at and tokens + prompts[end] <= limit:
                tokens += prompts[end]
                seconds += work[end]
                end += 1
            if pace.ahead > 1:
                batch.step(ends)
            at = max(batch.at_s, at)
            batch.at_s = at + seconds / share
            for one in range(index, end):
                firsts[one] = ends[one] = at + seconds
                luck[one] = max(0.0, decided_s - max(arrivals[one], prefilling_s))
                if self._outputs[one] > 1:
                    batch.add(one)
            index = end
        batch.run_until(math.inf, ends)
        return firsts, ends, luck


class _Batch:
    """Everything that decodes on the instances of a group, spread evenly over their lanes."""

    def __init__(self, pace: Pace, group: Group, prompts: list[int], outputs: list[int]):
        self._pace, self._prompts, self._outputs = pace, prompts, outputs
        self._lanes = group.instances * group.shape.pp
        self._slots = pace.slots * self._lanes
        self._room = pace.kv_tokens * group.instances
        self.at_s = 0.0
        self.waiting: list[int] = []
        """Wait for memory or a slot, first come, first served."""
        self._head = 0
        self._steps = 0
        self._ends: list[tuple[int, int, int]] = []
        """(number of its last step, request, steps that it sat out) of each in the batch."""
        self._context = 0

    def add(self, index: int) -> None:
        self.waiting.append(index)
        self._enter()

    def _enter(self) -> None:
        while self._head < len(self.waiting):
            index = self.waiting[self._head]
            tokens = self._prompts[index]
            if self._ends and (len(self._ends) >= self._slots or self._context + tokens >= self._room):
                return
            # Where its lane is busy the next step has been planned without it.
            planned = self._pace.ahead - 1 if len(self._ends) >= self._lanes else 0
            heapq.heappush(self._ends, (self._steps + planned + self._outputs[index] - 1, index, planned))
            self._context += tokens
            self._head += 1
        self.waiting.clear()
        self._head = 0

    def run_to_room(self, ends: list[float]) -> None:
        """Run until nobody waits."""
        while self.waiting:
            self._leap(math.inf, ends)

    def step(self, ends: list[float]) -> None:
        """One step, if there is anything to run."""
        if self._ends:
            self._leap(self.at_s, ends)

    def run_until(self, until_s: float, ends: list[float]) -> None:
        """Run to the first step that ends at or after this time; idle to it if there is nothing to run."""
        while self._ends and self.at_s < until_s:
            self._leap(until_s, ends)
        if not self._ends and self.at_s < until_s < math.inf:
            self.at_s = until_s

    def _leap(self, until_s: float, ends: list[float]) -> None:
        """Steps until the next one leaves, or until the time has come."""
        count, lanes = len(self._ends), self._lanes
        base, per_context, per_sequence = self._pace.decode_of(count / lanes)
        first_s = base + per_context * (self._context + count) / lanes + per_sequence * max(1.0, count / lanes)
        more_s = per_context * count / lanes
        steps = self._ends[0][0] - self._steps
        half = first_s - more_s / 2
        left_s = until_s - self.at_s
        if steps * half + more_s * steps * steps / 2 > left_s:
            reached = (math.sqrt(half * half + 2 * more_s * left_s) - half) / more_s if more_s else left_s / first_s
            steps = min(steps, max(1, math.ceil(reached)))
        self.at_s += steps * half + more_s * steps * steps / 2
        self._steps += steps
        self._context += count * steps
        left = False
        while self._ends and self._ends[0][0] <= self._steps:
            _, index, planned = heapq.heappop(self._ends)
            ends[index] = self.at_s
            self._context -= self._prompts[index] + planned + self._outputs[index] - 1
            left = True
        if left and self.waiting:
            self._enter()
