"""The plan's policy beside others: the best placement of each, or why it has none.

This is where one sees when disaggregation does not pay (DistServe, section 7, leaves it at "large SLOs").
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

from ds_jax.placement.search import Infeasible, Judged, Placement, PlacementSearch


@dataclass(frozen=True)
class Comparison:
    """The end of a search for several policies."""

    policy: str
    """The plan's."""
    placements: dict[str, Placement]
    """By policy, the plan's first, of those that have one."""
    infeasible: dict[str, str]
    """By policy, what rules everything out for those that have none."""
    judged: tuple[Judged, ...]
    search_s: float
    """What the search for the plan's own policy took."""
    beside_s: dict[str, float]
    """The same for each of the others."""
    extrapolated: bool
    """Whether step times were worked out and not measured."""
    notes: tuple[str, ...] = ()
    cached: bool = False
    """Some goodputs were known from an earlier search: the seconds are not those that a search takes."""

    @property
    def placement(self) -> Placement | None:
        """Of the plan's policy."""
        return self.placements.get(self.policy)

    @property
    def best(self) -> Placement | None:
        """Of any policy."""
        return max(self.placements.values(), key=lambda one: one.goodput_per_gpu, default=None)

    def configurations(self, policy: str) -> int:
        """Candidates that there are for a policy."""
        return sum(one.candidate.policy == policy for one in self.judged)

    def simulated(self, policy: str) -> int:
        """Of those, the ones that were simulated at least once."""
        return sum(
            one.candidate.policy == policy and one.goodput is not None and one.goodput.trials > 0 for one in self.judged
        )

    def refusal(self) -> str:
        """Why the plan's policy has no placement, and the best that there is instead; one sentence."""
        sentence = self.infeasible[self.policy]
        if self.best is None:
            others = ", ".join(policy for policy in self.infeasible if policy != self.policy)
            return sentence + (f"; nor has any of {others} a placement" if others else "")
        return (
            f"{sentence}; the best that there is instead is {self.best.policy}, {self.best.unit}, with "
            f"{self.best.goodput_per_gpu:.3g} requests/s per GPU"
        )


def compare(search: PlacementSearch, beside: Iterable[str]) -> Comparison:
    """Search for the plan's policy first, then for each of the others."""
    plan = search.plan
    placements: dict[str, Placement] = {}
    infeasible: dict[str, str] = {}
    seconds: dict[str, float] = {}
    for policy in dict.fromkeys((plan.policy, *beside)):
        begin = time.perf_counter()
        try:
            placements[policy] = search.place(policy)
        except Infeasible as error:
            infeasible[policy] = str(error)
        seconds[policy] = time.perf_counter() - begin
    assumed = search.requests.assumed
    notes = dict.fromkeys([f"workload {plan.workload.name}: assumed {assumed}"] if assumed else [])
    notes |= dict.fromkeys(search.hardware.notes())
    own_s = seconds.pop(plan.policy)
    return Comparison(
        plan.policy,
        placements,
        infeasible,
        tuple(search.judged),
        own_s,
        seconds,
        search.hardware.extrapolated,
        tuple(notes),
        search.cached,
    )
