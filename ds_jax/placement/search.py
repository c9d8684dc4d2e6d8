"""The placement search: which instances, of which parallelism, serve the most requests per GPU inside their targets.

* high node affinity (DistServe, Algorithm 1): each phase is placed alone, then replicated to match the other;
* low node affinity (Algorithm 2): pairs that share nodes are tried together;
* vLLM++: colocated instances of every parallelism;
* multiplexed, deflected: nodes of workers, some of which only prefill.

Candidates are looked at in the order of a bound on what they could reach, several at a time. One that cannot pass at
the rate of the best so far is dropped after at most one simulation.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from typing import NoReturn

from ds_jax.architecture import Architecture
from ds_jax.placement.bounds import Bound, Obstacle, bound
from ds_jax.placement.cache import GoodputCache
from ds_jax.placement.goodput import Goodput, fine_rates, goodput, published_rates
from ds_jax.placement.hardware import Hardware
from ds_jax.placement.layouts import Group, Unit, colocated_units, multiplexed_units, paired_units, shapes
from ds_jax.placement.trial import BOTH, Outcome, Requests, Trials
from ds_jax.plan import PlanConfig
from ds_jax.protocol import Role

MOST_REPLICAS = 8
"""Most instances of one phase in a unit when no rate says how many there must be."""

HIGHEST_RATE = 1000.0
"""Requests/s/GPU beyond which nobody looks."""

Progress = Callable[[int, int, str], None]
"""Called with (candidates done, candidates in all, what is being looked at)."""


@dataclass(frozen=True)
class Candidate:
    """A unit under a policy, or one phase of it alone."""

    unit: Unit
    policy: str
    phases: tuple[Role, ...] = BOTH


@dataclass(frozen=True)
class Judged:
    """What the search knows of a candidate."""

    candidate: Candidate
    bound: Bound
    goodput: Goodput | None
    """None: ruled out by its bound, without a simulation."""


@dataclass(frozen=True)
class Placement:
    """What to run: a unit, so many times, and what it serves."""

    policy: str
    unit: Unit
    replicas: int
    goodput_per_gpu: float
    """Requests/s/GPU inside the targets."""
    outcome: Outcome | None = None
    """The trial at that rate."""

    @property
    def gpus(self) -> int:
        return self.unit.gpus * self.replicas

    def instances(self, role: Role) -> int:
        group = self.unit.group(role)
        return group.instances * self.replicas if group else 0


@dataclass(frozen=True)
class Found:
    """The end of a search."""

    placement: Placement
    beside: dict[str, Placement]
    """The best placements of other policies, where they were asked for and there are any."""
    judged: tuple[Judged, ...]
    search_s: float
    extrapolated: bool
    notes: tuple[str, ...] = field(default=())

    @property
    def configurations(self) -> int:
        """Candidates that there are."""
        return len(self.judged)

    @property
    def simulated(self) -> int:
        """Candidates that were simulated at least once."""
        return sum(judged.goodput is not None and judged.goodput.trials > 0 for judged in self.judged)


class Infeasible(ValueError):
    """No placement meets the targets; the sentence says what rules them out and what would do."""


class PlacementSearch:
    """Searches one plan. Use as a context manager: it keeps worker processes."""

    def __init__(
        self,
        plan: PlanConfig,
        arch: Architecture,
        progress: Progress | None = None,
        requests: Requests | None = None,
    ):
        plan.check()
        self.plan = plan
        self.hardware = Hardware(plan, arch)
        self.requests = requests or Requests(plan)
        self.trials = Trials(plan, self.hardware, self.requests)
        self.cache = GoodputCache(plan, self.hardware)
        self._progress = progress
        self._done = self._total = 0
        self._pool: ProcessPoolExecutor | None = None
        self._workers = plan.search.workers or os.cpu_count() or 1
        self.judged: list[Judged] = []

    def __enter__(self) -> PlacementSearch:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None

    def find(self, beside: Iterable[str] = ("colocated",)) -> Found:
        """The best placement of the plan's policy and, beside it, of other policies.

        Raises:
            Infeasible: there is none; the sentence names the limit that rules everything out.
        """
        begin = time.perf_counter()
        placement = self.place(self.plan.policy)
        others: dict[str, Placement] = {}
        for policy in beside:
            if policy != self.plan.policy:
                try:
                    others[policy] = self.place(policy)
                except Infeasible:
                    continue
        notes = (
            (f"workload {self.plan.workload.name}: assumed {self.requests.assumed}",) if self.requests.assumed else ()
        )
        return Found(
            placement,
            others,
            tuple(self.judged),
            time.perf_counter() - begin,
            self.hardware.extrapolated,
            notes + tuple(self.hardware.notes()),
        )

    def place(self, policy: str) -> Placement:
        """The best placement under one policy. Raises Infeasible."""
        arch, plan = self.hardware.arch, self.plan
        if policy == "disaggregated" and plan.affinity == "high":
            return self._place_phases()
        if policy == "disaggregated":
            units = paired_units(arch, plan)
        elif policy in ("colocated", "chunked"):
            units = colocated_units(arch, plan)
        else:
            units = multiplexed_units(arch, plan)
        best = self._best([Candidate(unit, policy) for unit in units], policy)
        return self._replicated(policy, best.candidate.unit, best.goodput.per_gpu if best.goodput else 0.0)

    # --- Algorithm 1 --------------------------------------------------------------------------------------------------

    def _place_phases(self) -> Placement:
        """Each phase alone, then as many instances of each as balance; last, the whole unit is simulated."""
        plan = self.plan
        gpus = plan.cluster.nodes * plan.cluster.gpus_per_node
        best = {}
        for role in BOTH:
            units = [Unit((Group(role, shape),)) for shape in shapes(self.hardware.arch, plan, gpus - 1)]
            found = self._best([Candidate(unit, "disaggregated", (role,)) for unit in units], f"{role} alone")
            assert found.goodput is not None
            best[role] = (found.candidate.unit.groups[0], found.goodput.per_gpu * found.candidate.unit.gpus)
        (prefill, prefill_rate), (decode, decode_rate) = best[Role.PREFILL], best[Role.DECODE]
        counts = self._balance(prefill.gpus, prefill_rate, decode.gpus, decode_rate, gpus)
        unit = Unit(
            (replace(prefill, instances=counts[0]), replace(decode, instances=counts[1])),
            kv_crosses_nodes=prefill.gpus * counts[0] + decode.gpus * counts[1] > plan.cluster.gpus_per_node,
        )
        (judged,) = self.judge([Candidate(unit, "disaggregated")], "both phases together")
        if judged.goodput is None or not judged.goodput.per_gpu:
            self._refuse([judged], "disaggregated")
        assert judged.goodput is not None
        return self._replicated("disaggregated", unit, judged.goodput.per_gpu)

    def _balance(self, gpus_p: int, rate_p: float, gpus_d: int, rate_d: float, gpus: int) -> tuple[int, int]:
        """How many prefill and decode instances: for the plan's rate, or the best ratio that the cluster has room for.

        Raises:
            Infeasible: the cluster is too small.
        """
        wanted = self.plan.workload.rate
        if wanted:
            counts = math.ceil(wanted / rate_p), math.ceil(wanted / rate_d)
        else:
            options = [
                (n, m)
                for n in range(1, MOST_REPLICAS + 1)
                for m in range(1, MOST_REPLICAS + 1)
                if n * gpus_p + m * gpus_d <= gpus
            ]
            if not options:
                raise Infeasible(
                    f"cluster.nodes x cluster.gpus_per_node = {gpus} GPUs are too few: the best prefill instance takes "
                    f"{gpus_p} and the best decode instance {gpus_d}"
                )
            counts = max(
                options,
                key=lambda c: (
                    round(min(c[0] * rate_p, c[1] * rate_d) / (c[0] * gpus_p + c[1] * gpus_d), 6), -c[0] - c[1],
                ),
            )  # fmt: skip
        return counts

    # --- judging ------------------------------------------------------------------------------------------------------

    def _best(self, candidates: Sequence[Candidate], what: str) -> Judged:
        judged = self.judge(candidates, what)
        winners = [one for one in judged if one.goodput is not None and one.goodput.per_gpu > 0]
        if not winners:
            self._refuse(judged, what)
        return min(winners, key=_rank)

    def judge(self, candidates: Sequence[Candidate], what: str, *, within: float = 1.0) -> list[Judged]:
        """Every candidate's goodput, or that it is below the best one's; in the order given.

        Args:
            within: find the goodput of those too that reach this share of the best one's.
        """
        bounds = [self._bound(candidate) for candidate in candidates]
        self._total += len(candidates)
        judged: dict[int, Judged] = {}
        order = sorted(range(len(candidates)), key=lambda index: -bounds[index].per_gpu)
        queue = [index for index in order if bounds[index].per_gpu > 0]
        for index in order:
            if bounds[index].per_gpu <= 0:
                judged[index] = Judged(candidates[index], bounds[index], None)
        prune = self.plan.search.prune
        best: tuple[float, int, int] | None = None
        flying: dict[Future[Goodput], int] = {}
        self._tell(len(judged), what)
        while queue or flying:
            while queue and len(flying) < self._workers:
                index = queue.pop(0)
                beat = -best[0] * within if best is not None and prune else 0.0
                if prune and bounds[index].per_gpu < beat:
                    judged[index] = Judged(candidates[index], bounds[index], None)
                    self._tell(1, what)
                    continue
                known = self.cache.get(candidates[index])
                highest = bounds[index].per_gpu if prune else None
                if known is not None:
                    future: Future[Goodput] = Future()
                    future.set_result(known)
                elif len(candidates) == 1 or self._workers == 1:
                    future = Future()
                    future.set_result(find_goodput(self.trials, candidates[index], beat, highest))
                else:
                    future = self._submit(candidates[index], beat, highest)
                flying[future] = index
            done, _ = wait(flying, return_when=FIRST_COMPLETED)
            for future in done:
                index = flying.pop(future)
                result = future.result()
                self.cache.put(candidates[index], result)
                judged[index] = Judged(candidates[index], bounds[index], result)
                if result.per_gpu > 0:
                    rank = (-result.per_gpu, candidates[index].unit.gpus, index)
                    best = rank if best is None else min(best, rank)
                self._tell(1, what)
        everything = [judged[index] for index in range(len(candidates))]
        self.judged += everything
        return everything

    def _bound(self, candidate: Candidate) -> Bound:
        return bound(candidate.unit, self.plan, self.hardware, self.requests, candidate.phases)

    def _submit(self, candidate: Candidate, beat: float, highest: float | None) -> Future[Goodput]:
        if self._pool is None:
            # Workers that are forked have all that this process has read; with jax loaded that would not be safe.
            method = "fork" if sys.platform == "linux" and "jax" not in sys.modules else "spawn"
            self._pool = ProcessPoolExecutor(
                self._workers, get_context(method), initializer=_remember, initargs=(self.trials,)
            )
        return self._pool.submit(_find_goodput, candidate, beat, highest)

    def _tell(self, more: int, what: str) -> None:
        self._done += more
        if self._progress is not None:
            self._progress(self._done, self._total, what)

    # --- the answer ---------------------------------------------------------------------------------------------------

    def _replicated(self, policy: str, unit: Unit, per_gpu: float) -> Placement:
        """As many units as the plan's rate asks for, or as the cluster holds."""
        gpus = self.plan.cluster.nodes * self.plan.cluster.gpus_per_node
        wanted = self.plan.workload.rate
        replicas = max(1, math.ceil(wanted / (per_gpu * unit.gpus) - 1e-9)) if wanted else max(1, gpus // unit.gpus)
        if replicas * unit.gpus > gpus:
            raise Infeasible(
                f"workload.rate = {wanted:g} requests/s needs {replicas * unit.gpus} GPUs under policy {policy}; "
                f"cluster.nodes x cluster.gpus_per_node is {gpus}, which serve at most {per_gpu * gpus:.3g} requests/s"
            )
        outcome = self.trials.run(unit, policy, per_gpu * unit.gpus, cut=False)
        return Placement(policy, unit, replicas, per_gpu, outcome)

    def _refuse(self, judged: Sequence[Judged], what: str) -> NoReturn:
        raise Infeasible(why_infeasible(self.plan, judged, what))


def why_infeasible(plan: PlanConfig, judged: Sequence[Judged], what: str) -> str:
    """Which limit rules all candidates out, and the nearest value of it that would not."""
    if not judged:
        return f"{what}: the cluster has too few GPUs for any placement of this kind"
    obstacles = [one.bound for one in judged if one.bound.obstacle is not None]
    by_kind = {kind: [one.nearest for one in obstacles if one.obstacle is kind] for kind in Obstacle}
    if len(by_kind[Obstacle.MEMORY]) == len(judged):
        return (
            f"{what}: memory rules everything out: weights and the KV of the longest request need an instance of at "
            f"least {min(by_kind[Obstacle.MEMORY]):.0f} GPUs"
        )
    for kind, field_name, unit in (
        (Obstacle.TTFT, "slo.ttft_s", "s, the unloaded prefill of the fastest instance"),
        (Obstacle.TPOT, "slo.tpot_s", "s, an unloaded decode step of the fastest instance"),
        (Obstacle.BANDWIDTH, "cluster.network_gbits", "Gbit/s"),
    ):
        if by_kind[kind] and len(obstacles) == len(judged):
            given = {
                Obstacle.TTFT: plan.slo.ttft_s,
                Obstacle.TPOT: plan.slo.tpot_s,
                Obstacle.BANDWIDTH: plan.cluster.network_gbits,
            }[kind]
            nearest = min(by_kind[kind])
            return (
                f"{what}: {field_name} = {given:g} rules everything out that fits: it must be at least "
                f"{math.ceil(nearest * 1e4) / 1e4:g} {unit} ({100 * (nearest / given - 1):.0f} % more)"
            )
    return f"{what}: no candidate meets both targets for {100 * plan.search.attainment:g} % of requests at any rate"


def find_goodput(trials: Trials, candidate: Candidate, beat: float, highest: float | None) -> Goodput:
    """The candidate's goodput by the plan's rule."""
    search = trials.plan.search
    gpus = candidate.unit.gpus

    def trial(per_gpu: float) -> Outcome:
        return trials.run(candidate.unit, candidate.policy, per_gpu * gpus, candidate.phases)

    if search.rule == "published":
        return goodput(trial, published_rates(), beat=beat, highest=highest)
    rates = fine_rates(min(highest or HIGHEST_RATE, HIGHEST_RATE), search.precision)
    return goodput(trial, rates, beat=beat, highest=highest, share=search.attainment)


_trials: Trials | None = None
"""What a worker process was given."""


def _remember(trials: Trials) -> None:
    global _trials
    _trials = trials


def _find_goodput(candidate: Candidate, beat: float, highest: float | None) -> Goodput:
    assert _trials is not None
    return find_goodput(_trials, candidate, beat, highest)


def _rank(judged: Judged) -> tuple[float, int]:
    """Higher goodput first, then fewer GPUs; what was listed first wins a tie."""
    assert judged.goodput is not None
    return -judged.goodput.per_gpu, judged.candidate.unit.gpus
