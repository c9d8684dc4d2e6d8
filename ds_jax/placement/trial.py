"""One trial: a unit of instances serves the workload at one rate in the simulator."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ds_jax.metrics import RequestTimes
from ds_jax.placement.hardware import Hardware
from ds_jax.placement.layouts import Unit
from ds_jax.plan import PlanConfig
from ds_jax.protocol import InstanceUp, Role, Slo
from ds_jax.simulation import VirtualTime
from ds_jax.workload import Submission, TraceWorkload, Workload, workload

BOTH = (Role.PREFILL, Role.DECODE)


@dataclass(frozen=True)
class Outcome:
    """What came of a trial."""

    passed: bool
    share: float
    """Share of requests inside the targets; a bound from above if the trial was cut short."""
    ttft_s: float
    """Of the percentile that the search looks at; nan if the trial was cut short."""
    tpot_s: float
    ttft_share: float
    """Share of requests inside the target of TTFT alone."""
    tpot_share: float


class Requests:
    """The requests of a plan's workload, drawn once; at another rate the gaps are scaled."""

    def __init__(self, plan: PlanConfig, submissions: Sequence[Submission] | None = None):
        """
        Args:
            submissions: the requests themselves, in place of those that the plan names.
        """
        self.assumed = ""
        if submissions is None:
            drawn = _draw(plan)
            self.assumed = drawn.assumed
            submissions = list(drawn)
        self.submissions = submissions
        if not self.submissions:
            raise ValueError(f"workload.name = {plan.workload.name} has no request")
        span_s = self.submissions[-1].arrival_ns / 1e9
        self._own_rate = len(self.submissions) / span_s if span_s > 0 else 1.0
        self.prompts = np.array([one.request.prompt_tokens for one in self.submissions])
        self.outputs = np.array([one.output_tokens for one in self.submissions])

    def at(self, rate: float, phases: Sequence[Role] = BOTH) -> list[Submission]:
        """Arriving at `rate` requests/s; for the prefill phase alone every request is over with its first token."""
        scale = 1.0 if self._own_rate == rate else self._own_rate / rate
        scaled = [replace_arrival(one, int(one.arrival_ns * scale)) for one in self.submissions]
        if Role.DECODE in phases:
            return scaled
        return [one._replace(request=replace(one.request, max_tokens=1), output_tokens=1) for one in scaled]


def _draw(plan: PlanConfig) -> Workload | TraceWorkload:
    count = plan.search.requests or (300 if plan.search.rule == "published" else 1000)
    slo = Slo(round(plan.slo.ttft_s * 1e9), round(plan.slo.tpot_s * 1e9))
    if plan.workload.name.endswith((".csv", ".jsonl")):
        return workload(plan.workload.name, count=count, slo=slo)
    return workload(plan.workload.name, rate=1.0, cv=plan.workload.cv, count=count, seed=plan.search.seed, slo=slo)


def replace_arrival(one: Submission, arrival_ns: int) -> Submission:
    return one._replace(arrival_ns=arrival_ns)


class _Enough(Exception):
    """So many requests have missed their targets that the trial cannot pass any more."""


class Trials:
    """Tries units of one plan at one rate after another; everything that trials share is worked out once."""

    def __init__(self, plan: PlanConfig, hardware: Hardware, requests: Requests | None = None):
        self.plan = plan
        self.hardware = hardware
        self.requests = requests or Requests(plan)

    def run(self, unit: Unit, policy: str, rate: float, phases: Sequence[Role] = BOTH, cut: bool = True) -> Outcome:
        """The unit serves the requests at `rate` requests/s to the end, or until it is clear that it fails.

        Args:
            phases: judge, and run, only these: a lone prefill phase has no decoding; a lone decode phase has a prefill
                that takes no time.
        """
        hardware = self.hardware
        instances = hardware.instances(unit, phases, policy)
        judge = _Judge(self.plan, phases, len(self.requests.submissions), cut, hardware.delay_s(policy))
        latency = hardware.latency(unit, instances, phases, policy)
        world = VirtualTime(hardware.scheduler(unit, policy), latency, judge.hear)
        with contextlib.suppress(_Enough):
            world.run([(0, InstanceUp(one)) for one in instances], self.requests.at(rate, phases))
        return judge.outcome()


class _Judge:
    """Hears of every request that ends."""

    def __init__(self, plan: PlanConfig, phases: Sequence[Role], count: int, cut: bool, delay_s: float):
        self.slo_ttft_ns = plan.slo.ttft_s * 1e9 if Role.PREFILL in phases else float("inf")
        self.slo_tpot_ns = plan.slo.tpot_s * 1e9 if Role.DECODE in phases else float("inf")
        self.count = count
        self.delay_ns = delay_s * 1e9
        self.apart = plan.search.rule == "published"
        self.attainment = plan.search.attainment
        allowed = (1 - self.attainment) * count
        # Trials near the limit run to their end, so that the attainment curve can be interpolated there.
        self.most_misses = (allowed * (1 if self.apart else 1.5) + 1) if cut else float("inf")
        self.ttft: list[float] = []
        self.tpot: list[float] = []
        self.late_first = self.late_rest = self.missed = 0

    def hear(self, times: RequestTimes) -> None:
        ttft = None if times.ttft_ns is None else times.ttft_ns + self.delay_ns
        tpot = times.tpot_ns
        late_first = ttft is None or times.rejected or ttft > self.slo_ttft_ns
        late_rest = tpot is None or times.rejected or tpot > self.slo_tpot_ns
        self.ttft.append(float("inf") if ttft is None else ttft)
        self.tpot.append(float("inf") if tpot is None else tpot)
        self.late_first += late_first
        self.late_rest += late_rest
        self.missed += late_first or late_rest
        if (max(self.late_first, self.late_rest) if self.apart else self.missed) > self.most_misses:
            raise _Enough

    def outcome(self) -> Outcome:
        whole = len(self.ttft) >= self.count
        at = 100 * self.attainment
        ttft, tpot = (float(np.percentile(values, at)) if whole else float("nan") for values in (self.ttft, self.tpot))
        share = 1 - self.missed / self.count
        apart = ttft <= self.slo_ttft_ns and tpot <= self.slo_tpot_ns
        return Outcome(
            passed=whole and (apart if self.apart else share >= self.attainment),
            share=share,
            ttft_s=ttft / 1e9,
            tpot_s=tpot / 1e9,
            ttft_share=1 - self.late_first / self.count,
            tpot_share=1 - self.late_rest / self.count,
        )
