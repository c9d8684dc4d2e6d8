"""The placement search: which instances, of which parallelism, serve the most requests per GPU inside their targets.

* high node affinity (DistServe, Algorithm 1): each phase is placed alone, then both are combined and tried together;
* low node affinity (Algorithm 2): pairs that share nodes are tried together;
* vLLM++: colocated instances of every parallelism;
* multiplexed, deflected: nodes of workers, some of which only prefill.

Candidates race: bounds and sketches put them into an order, several are simulated at a time, and one that cannot pass
at the rate of the best so far is dropped after at most one trial. Goodputs are found coarsely first; only those that
end up in the best cell of rates are told apart.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from ds_jax.architecture import Architecture
from ds_jax.placement.bounds import Bound, bound
from ds_jax.placement.cache import GoodputCache
from ds_jax.placement.combining import combinations
from ds_jax.placement.hardware import Hardware
from ds_jax.placement.layouts import (
    Shape,
    Unit,
    lone_units,
    most_copies,
    nodes_for,
    split_by_kind,
    units_of,
)
from ds_jax.placement.race import Candidate, Judged, Pool, Race, find_goodput
from ds_jax.placement.refusal import why_infeasible
from ds_jax.placement.sketch import MARGIN, Sketches
from ds_jax.placement.trial import BOTH, Outcome, Requests, Trials, Until
from ds_jax.plan import PlanConfig
from ds_jax.protocol import Role

__all__ = ["Candidate", "Found", "Infeasible", "Judged", "Placement", "PlacementSearch", "find_goodput"]

TOGETHER = 16
"""So many combinations inside a node, and so many over several, the best by their phases alone, are tried whole."""

Progress = Callable[[int, int, str], None]
"""Called with (candidates done, candidates in all, what is being looked at)."""


@dataclass(frozen=True)
class Placement:
    """What to run: a unit, so many times, and what it serves."""

    policy: str
    unit: Unit
    replicas: int
    goodput_per_gpu: float
    """Requests/s/GPU inside the targets."""
    outcome: Outcome | None = None
    """The trial at that rate, or at the last of the grid before it."""

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
    cached: bool = False
    """Some goodputs were known from an earlier search: then `search_s` is not the time that a search takes."""
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
        self.sketches = Sketches(plan, self.hardware, self.requests)
        self.cache = GoodputCache(plan, self.hardware, self.requests)
        self.judged: list[Judged] = []
        self._progress = progress
        self._done = self._total = 0
        self._pool: Pool | None = None

    def __enter__(self) -> PlacementSearch:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    @property
    def cached(self) -> bool:
        """Whether some goodputs were known from an earlier search."""
        return any(one.goodput is not None and one.goodput.cached for one in self.judged)

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
            self.cached,
            notes + tuple(self.hardware.notes()),
        )

    def place(self, policy: str) -> Placement:
        """The best placement under one policy. Raises Infeasible."""
        arch, plan = self.hardware.arch, self.plan
        if policy == "disaggregated" and plan.affinity == "high":
            return self._place_phases()
        if policy == "disaggregated" and split_by_kind(plan):
            raise Infeasible(
                "disaggregated: affinity = low puts both phases on the same nodes, but cluster.decode_gpu = "
                f"{plan.cluster.decode_gpu} has nodes of its own; it must be high"
            )
        units = units_of(policy, arch, plan)
        return self._replicated(policy, self._best([Candidate(unit, policy) for unit in units], policy))

    # --- Algorithm 1 --------------------------------------------------------------------------------------------------

    def _place_phases(self) -> Placement:
        """Each phase alone, coarsely; then the combinations that promise most are tried whole.

        A phase that keeps its target for 90 % of the requests does not make both do so together, and what is best alone
        may not leave room for the other: so more than one shape of each is combined. Since only their order matters
        here, sketches are enough for the phases (without pruning they are simulated).
        """
        plan = self.plan
        options: dict[Role, list[tuple[Shape, float]]] = {}
        for role in BOTH:
            most = nodes_for(plan, role) * plan.cluster.gpus_per_node - (not split_by_kind(plan))
            units = lone_units(self.hardware.arch, plan, role, most)
            candidates = [Candidate(unit, "disaggregated", (role,)) for unit in units]
            judged = self._judge_alone(candidates, f"{role} alone")
            options[role] = [
                (one.candidate.unit.groups[0].shape, one.goodput.per_gpu * one.candidate.unit.gpus)
                for one in judged
                if one.goodput is not None and one.goodput.per_gpu > 0
            ]
            if not options[role]:
                raise Infeasible(why_infeasible(self, judged, "disaggregated"))
        wanted = plan.workload.rate
        if wanted:
            units = list(combinations(plan, options[Role.PREFILL], options[Role.DECODE], wanted))
            enough = self._first_to_serve(units, wanted)
            if enough is not None:
                return self._replicated("disaggregated", enough)
        units = list(combinations(plan, options[Role.PREFILL], options[Role.DECODE], 0.0))
        if not units:
            smallest = [min(shape.gpus for shape, _ in options[role]) for role in BOTH]
            raise Infeasible(
                f"cluster.nodes x cluster.gpus_per_node = {plan.cluster.nodes} x {plan.cluster.gpus_per_node} GPUs are "
                f"too few: the smallest prefill instance takes {smallest[0]} and the smallest decode instance "
                f"{smallest[1]}"
            )
        # As many inside a node as over several: the network may rule all of the latter out.
        inside = [unit for unit in units if not unit.kv_crosses_nodes][:TOGETHER]
        across = [unit for unit in units if unit.kv_crosses_nodes][:TOGETHER]
        candidates = [Candidate(unit, "disaggregated") for unit in (*inside, *across)]
        return self._replicated("disaggregated", self._best(candidates, "both phases together"))

    # --- judging ------------------------------------------------------------------------------------------------------

    def _best(self, candidates: Sequence[Candidate], what: str) -> Judged:
        judged = self.judge(candidates, what)
        winners = [one for one in judged if one.goodput is not None and one.goodput.per_gpu > 0]
        if not winners:
            raise Infeasible(why_infeasible(self, judged, candidates[0].policy if candidates else what))
        return min(winners, key=_rank)

    def judge(
        self, candidates: Sequence[Candidate], what: str, *, within: float = 1.0, exact: bool = True
    ) -> list[Judged]:
        """Every candidate's goodput, or that it is below the best one's; in the order given.

        Args:
            within: find the goodput of those too that reach this share of the best one's.
            exact: otherwise goodputs are found in larger steps of the rate, and not interpolated.
        """
        judged = self._race(candidates, what, within, exact).run()
        self.judged += judged
        return judged

    def _judge_alone(self, candidates: Sequence[Candidate], what: str) -> list[Judged]:
        if not self.plan.search.prune:
            return self.judge(candidates, what, exact=False)
        judged = self._race(candidates, what, 0.0, False).sketched()
        self.judged += judged
        return judged

    def _race(self, candidates: Sequence[Candidate], what: str, within: float, exact: bool) -> Race:
        if self._pool is None:
            self._pool = Pool(self.trials, self.sketches, self.plan.search.workers)
        return Race(self, self._pool, candidates, within, exact, lambda done, more: self._tell(done, more, what))

    def _first_to_serve(self, units: Sequence[Unit], wanted: float) -> Judged | None:
        """The first of these units that serves so many requests/s, with its goodput; None: none of those tried does."""
        sketched = tried = 0
        for unit in units:
            candidate = Candidate(unit, "disaggregated")
            if self.bound(candidate).per_gpu * unit.gpus < wanted:
                continue
            sketched += 1
            if self.sketches.run(unit, candidate.policy, wanted / MARGIN).passed:
                tried += 1
                if self.trials.run(unit, candidate.policy, wanted, until=Until.DECIDED).passed:
                    (judged,) = self.judge([candidate], "both phases together")
                    assert judged.goodput is not None
                    least = max(judged.goodput.per_gpu, wanted / unit.gpus)
                    return replace(judged, goodput=replace(judged.goodput, per_gpu=least))
            if tried == TOGETHER or sketched == 8 * TOGETHER:
                break
        return None

    def bound(self, candidate: Candidate) -> Bound:
        """A rate that the candidate cannot pass."""
        return bound(candidate.unit, self.plan, self.hardware, self.requests, candidate.phases, policy=candidate.policy)

    def _tell(self, done: int, more: int, what: str) -> None:
        self._done += done
        self._total += more
        if self._progress is not None:
            self._progress(self._done, self._total, what)

    # --- the answer ---------------------------------------------------------------------------------------------------

    def _replicated(self, policy: str, judged: Judged) -> Placement:
        """As many units as the plan's rate asks for, or as the cluster has room for."""
        cluster, unit, wanted = self.plan.cluster, judged.candidate.unit, self.plan.workload.rate
        assert judged.goodput is not None
        per_gpu = judged.goodput.per_gpu
        most = most_copies(self.plan, unit)
        replicas = max(1, math.ceil(wanted / (per_gpu * unit.gpus) - 1e-9)) if wanted else most
        if replicas > most:
            raise Infeasible(
                f"workload.rate = {wanted:g} requests/s needs {replicas * unit.gpus} GPUs under policy {policy}, "
                f"{replicas} units of {unit.gpus}; cluster.nodes x cluster.gpus_per_node is {cluster.nodes} x "
                f"{cluster.gpus_per_node}, which has room for {most} and serves at most "
                f"{per_gpu * unit.gpus * most:.3g} requests/s"
            )
        outcome = judged.goodput.outcome
        if outcome is None:
            outcome = self.trials.run(unit, policy, per_gpu * unit.gpus, until=Until.END)
        return Placement(policy, unit, replicas, per_gpu, outcome)


def _rank(judged: Judged) -> tuple[float, int]:
    """Higher goodput first, then fewer GPUs; what was listed first wins a tie."""
    assert judged.goodput is not None
    return -judged.goodput.per_gpu, judged.candidate.unit.gpus
