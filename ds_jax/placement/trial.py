"""One trial: a unit of instances serves the workload at one rate in the simulator."""

from __future__ import annotations

import contextlib
import enum
import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ds_jax.metrics import RequestTimes
from ds_jax.placement.hardware import PAGE_SIZE, Hardware
from ds_jax.placement.layouts import Unit
from ds_jax.plan import PlanConfig
from ds_jax.protocol import InstanceUp, Role, Scheduler, Slo, pages_for
from ds_jax.simulation import VirtualTime
from ds_jax.workload import Submission, TraceWorkload, Workload, workload

BOTH = (Role.PREFILL, Role.DECODE)

LOOK_EVERY = 32
"""Arrivals after which those that live are looked through for who is late already."""


class Until(enum.Enum):
    """How far a trial goes."""

    DECIDED = enum.auto()
    """Until it is certain whether it passes."""
    HOPELESS = enum.auto()
    """To the end, so that its share is known, unless half as many more have missed their targets as may."""
    END = enum.auto()


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
        self._only_first: list[Submission] = []
        self.arrivals_s = np.array([one.arrival_ns for one in self.submissions]) / 1e9
        """Of the requests as they were drawn, at `own_rate`."""
        self.prompts = np.array([one.request.prompt_tokens for one in self.submissions])
        self.outputs = np.array([one.output_tokens for one in self.submissions])
        self.pages = sum(pages_for(int(prompt) + 1, PAGE_SIZE) for prompt in self.prompts)
        """Pages of all prompts together, with room for the first token."""

    def at(self, rate: float, phases: Sequence[Role] = BOTH) -> list[Submission]:
        """Arriving at `rate` requests/s; for the prefill phase alone every request is over with its first token."""
        scale = self.scale(rate)
        if Role.DECODE not in phases and not self._only_first:
            self._only_first = [
                one._replace(request=replace(one.request, max_tokens=1), output_tokens=1) for one in self.submissions
            ]
        source = self.submissions if Role.DECODE in phases else self._only_first
        return [one._replace(arrival_ns=int(one.arrival_ns * scale)) for one in source]

    def scale(self, rate: float) -> float:
        """What gaps are multiplied by so that `rate` requests/s arrive."""
        return 1.0 if self._own_rate == rate else self._own_rate / rate

    def digest(self) -> str:
        """Of arrivals and lengths."""
        hashed = hashlib.sha256()
        for one in self.submissions:
            hashed.update(repr((one.arrival_ns, one.request, one.output_tokens)).encode())
        return hashed.hexdigest()


def _draw(plan: PlanConfig) -> Workload | TraceWorkload:
    count = plan.search.requests or (300 if plan.search.rule == "published" else 1000)
    slo = Slo(round(plan.slo.ttft_s * 1e9), round(plan.slo.tpot_s * 1e9))
    if plan.workload.name.endswith((".csv", ".jsonl")):
        return workload(plan.workload.name, count=count, slo=slo)
    return workload(plan.workload.name, rate=1.0, cv=plan.workload.cv, count=count, seed=plan.search.seed, slo=slo)


class _Enough(Exception):
    """The trial is decided."""


class Trials:
    """Tries units of one plan at one rate after another; everything that trials share is worked out once."""

    def __init__(self, plan: PlanConfig, hardware: Hardware, requests: Requests | None = None):
        self.plan = plan
        self.hardware = hardware
        self.requests = requests or Requests(plan)

    def run(
        self,
        unit: Unit,
        policy: str,
        rate: float,
        phases: Sequence[Role] = BOTH,
        until: Until = Until.HOPELESS,
    ) -> Outcome:
        """The unit serves the requests at `rate` requests/s to the end, or until it is clear that it fails.

        Args:
            phases: judge, and run, only these: a lone prefill phase has no decoding; a lone decode phase has a prefill
                that takes no time.
        """
        hardware = self.hardware
        instances = hardware.instances(unit, phases, policy, self.requests.pages)
        latency = hardware.latency(unit, instances, phases, policy)
        scheduler = hardware.scheduler(unit, policy)
        submissions = self.requests.at(rate, phases)
        judge = _Judge(self.plan, phases, submissions, until, hardware.delay_s(policy))
        world = VirtualTime(scheduler, latency, judge.hear)
        with contextlib.suppress(_Enough):
            world.run([(0, InstanceUp(one)) for one in instances], judge.watch(submissions, scheduler))
        return judge.outcome()


class _Judge:
    """Hears of every request that ends, and looks at those that live."""

    def __init__(
        self, plan: PlanConfig, phases: Sequence[Role], submissions: Sequence[Submission], until: Until, delay_s: float
    ):
        self.slo_ttft_ns = plan.slo.ttft_s * 1e9 if Role.PREFILL in phases else float("inf")
        self.slo_tpot_ns = plan.slo.tpot_s * 1e9 if Role.DECODE in phases else float("inf")
        self.count = len(submissions)
        self.delay_ns = delay_s * 1e9
        self.apart = plan.search.rule == "published"
        self.attainment = plan.search.attainment
        self.until = until
        allowed = (1 - self.attainment) * self.count
        # Trials near the limit run to their end, so that the attainment curve can be interpolated there.
        factor = {Until.DECIDED: 1.0, Until.HOPELESS: 1.0 if self.apart else 1.5, Until.END: float("inf")}[until]
        self.most_misses = allowed * factor + 1
        # A percentile is read between two values, of which the higher one may be the late one.
        self.enough = math.ceil(self.count - allowed) + (1 if self.apart else 0) if until is Until.DECIDED else math.inf
        self.outputs = {one.request.id: one.output_tokens for one in submissions if isinstance(one.output_tokens, int)}
        self.ttft: list[float] = []
        self.tpot: list[float] = []
        self.late_first = self.late_rest = self.missed = 0
        self.sure = False

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
        on_time = len(self.ttft) - (max(self.late_first, self.late_rest) if self.apart else self.missed)
        if on_time >= self.enough:
            self.sure = True
            raise _Enough

    def watch(self, submissions: Iterable[Submission], scheduler: Scheduler) -> Iterator[Submission]:
        """The same submissions; every now and then those that live are counted that will be late whatever happens."""
        living = getattr(scheduler, "sequences", {})  # a scheduler from outside may have none: then nobody looks
        for arrived, one in enumerate(submissions, 1):
            yield one
            if arrived % LOOK_EVERY == 0 and self.until is not Until.END:
                self._look(living.values(), one.arrival_ns)

    def _look(self, living: Iterable[object], now_ns: int) -> None:
        late_first = late_rest = late = 0
        for one in living:
            output, first_ns = self.outputs.get(one.id, math.inf), one.first_ns  # type: ignore[attr-defined]
            waited = (now_ns if first_ns is None else first_ns) - one.arrived_ns + self.delay_ns  # type: ignore[attr-defined]
            first = waited > self.slo_ttft_ns
            rest = first_ns is not None and now_ns - first_ns > self.slo_tpot_ns * (output - 1)
            late_first += first
            late_rest += rest
            late += first or rest
        apart = max(self.late_first + late_first, self.late_rest + late_rest)
        if (apart if self.apart else self.missed + late) > self.most_misses:
            self.missed += late
            self.late_first += late_first
            self.late_rest += late_rest
            raise _Enough

    def outcome(self) -> Outcome:
        whole = len(self.ttft) >= self.count
        at = 100 * self.attainment
        ttft, tpot = (float(np.percentile(values, at)) if whole else float("nan") for values in (self.ttft, self.tpot))
        share = 1 - self.missed / self.count
        apart = ttft <= self.slo_ttft_ns and tpot <= self.slo_tpot_ns
        return Outcome(
            passed=self.sure or (whole and (apart if self.apart else share >= self.attainment)),
            share=share,
            ttft_s=ttft / 1e9,
            tpot_s=tpot / 1e9,
            ttft_share=1 - self.late_first / self.count,
            tpot_share=1 - self.late_rest / self.count,
        )
