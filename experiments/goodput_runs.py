"""What `experiments.goodput` runs: the systems of each workload, their placements, their curves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ds_jax.config import SloConfig
from ds_jax.placement.layouts import Shape
from ds_jax.plan import PlanConfig
from experiments.curves import REQUESTS, Place, find, study, tighten
from experiments.systems import (
    EVALUATIONS,
    MII,
    Case,
    Evaluation,
    System,
    mixed,
    multiplexing,
    pair,
    parallel,
    serve,
)

AT_TABLE_3 = "DistServe, Table 3"
SEARCHED = ("disaggregated", "colocated")
LENGTHS = (300, 600, 1200, 2400)


@dataclass
class Trial:
    """One workload under one rule: what is tried, and what came of it."""

    case: Case
    rule: str
    plan: PlanConfig
    places: dict[str, Place] = field(default_factory=dict)
    """By policy, what the search found."""
    systems: list[System] = field(default_factory=list)
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By system: its curve, its goodputs, its scales."""
    rate_of_scales: float = 0.0
    """Requests/s per GPU at which targets are tightened; 0: nowhere."""

    def guess(self, system: System) -> float:
        """Requests/s per GPU at which to begin to look for its goodput."""
        together = system.policy in ("colocated", "chunked")
        return self.places[SEARCHED[together]].goodput or 1.0

    def entry(self) -> dict[str, Any]:
        """For summary.json."""
        return {system.name: {"unit": str(system.unit), **self.results[system.name]} for system in self.systems}


def trials(cases: Sequence[Case], rules: Sequence[str], requests: int) -> list[Trial]:
    """Every workload under every rule, nothing run yet.

    Args:
        requests: of a run by the joint rule, where the plan has no number; the published rule has 300 at most.
    """
    made = []
    for case in cases:
        for rule in rules:
            count = case.plan.search.requests or requests
            count = count if rule == "joint" else min(count, REQUESTS["published"])
            plan = replace(case.plan, search=replace(case.plan.search, rule=rule, requests=count))  # type: ignore[arg-type]
            made.append(Trial(case, rule, plan))
    return made


def search(every: Sequence[Trial], published: bool, workers: int) -> None:
    """Find the placements, and with them the systems of each trial.

    Args:
        published: DistServe has the paper's placement.

    Raises:
        ValueError: the paper has none for this plan.
    """
    for trial in every:
        if published and trial.case.evaluation is None:
            raise ValueError(f"--placements=published: the paper has none for {trial.case.name}")
    policies = [(trial, policy) for trial in every for policy in SEARCHED if not (published and policy == SEARCHED[0])]
    found = parallel(find, [(trial.plan, policy) for trial, policy in policies], "placements", workers)
    for (trial, policy), place in zip(policies, found, strict=True):
        trial.places[policy] = place
    for trial in every:
        evaluation = trial.case.evaluation
        if published and evaluation is not None:
            trial.places[SEARCHED[0]] = Place(pair(evaluation.prefill, evaluation.decode))
        trial.systems = systems_of(trial.rule, evaluation, *(trial.places[policy].unit for policy in SEARCHED))


def systems_of(rule: str, evaluation: Evaluation | None, disaggregated: Any, colocated: Any) -> list[System]:
    """What is compared, of what has a placement."""
    found: list[System] = []
    vllm = mixed(Shape(evaluation.vllm_tp, 1)) if evaluation else colocated
    if disaggregated is not None:
        found.append(System("DistServe", "disaggregated", disaggregated))
    if evaluation and disaggregated not in (None, pair(evaluation.prefill, evaluation.decode)):
        found.append(System(AT_TABLE_3, "disaggregated", pair(evaluation.prefill, evaluation.decode)))
    if vllm is not None:
        found.append(System("vLLM", "colocated", vllm))
    if rule == "published":
        return found
    if colocated is not None and colocated != vllm:
        found.append(System("vLLM++", "colocated", colocated))
    if vllm is not None:
        found.append(System("DeepSpeed-MII", "chunked", vllm, MII))
    if disaggregated is not None:
        found += [
            System(policy, policy, multiplexing(disaggregated), foretells=True)
            for policy in ("multiplexed", "deflected")
        ]
    return found


def measure(every: Sequence[Trial], workers: int) -> None:
    """Attainment against the rate, then against the scale of the targets, of every system of every trial."""
    pairs = [(trial, system) for trial in every for system in trial.systems]
    jobs = [(trial.plan, system, trial.guess(system)) for trial, system in pairs]
    for (trial, system), result in zip(pairs, parallel(study, jobs, "rates", workers), strict=True):
        trial.results[system.name] = result
    for trial in every:  # at vLLM's goodput (where it has none, at half of DistServe's)
        own = [trial.results[name]["goodput_90"] for name in ("vLLM", "DistServe") if name in trial.results]
        trial.rate_of_scales = next((rate * part for rate, part in zip(own, (1.0, 0.5), strict=False) if rate), 0.0)
    pairs = [one for one in pairs if one[0].rate_of_scales]
    jobs = [(trial.plan, system, trial.rate_of_scales) for trial, system in pairs]
    for (trial, system), result in zip(pairs, parallel(tighten, jobs, "targets", workers), strict=True):
        trial.results[system.name]["scale"] = result


def run_length(workers: int, counts: Sequence[int] = LENGTHS) -> list[dict[str, float]]:
    """DistServe on OPT-13B, prefill tp 2 and decode tp 1, 6 requests/s in all: attainment of longer and longer runs."""
    one = EVALUATIONS[0]
    plan = replace(one.plan(), slo=SloConfig(0.2, 0.1))
    rules = ("joint", "published")
    jobs = [
        (replace(plan, search=replace(plan.search, rule=rule, requests=count)),)  # type: ignore[arg-type]
        for count in counts
        for rule in rules
    ]
    shares = iter(parallel(_at_six, jobs, "lengths", workers))
    return [{"requests": float(count), **{rule: next(shares) for rule in rules}} for count in counts]


def _at_six(plan: PlanConfig) -> float:
    one = EVALUATIONS[0]
    system = System("DistServe", "disaggregated", pair(one.prefill, one.decode))
    return serve(plan, system, 6 / system.unit.gpus).share(plan.slo)
