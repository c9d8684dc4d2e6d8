"""Why there is no placement: which limit rules everything out, and the nearest value of it that does not.

A value that is told was tried: the unit that asks for least meets it in a trial at LOWEST_RATE.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from ds_jax.placement.bounds import Obstacle
from ds_jax.placement.goodput import LOWEST_RATE
from ds_jax.placement.layouts import Group, Unit, colocated_units, located, multiplexed_units, paired_units, shapes
from ds_jax.placement.trial import Outcome, Requests, Trials, Until
from ds_jax.plan import PlanConfig
from ds_jax.protocol import Role

if TYPE_CHECKING:
    from ds_jax.placement.race import Candidate, Judged
    from ds_jax.placement.search import PlacementSearch

MOST_GPUS = 64
"""Of one node; no larger one is suggested."""
ATTEMPTS = 4
"""Trials of values that might do."""


def why_infeasible(search: PlacementSearch, judged: Sequence[Judged], policy: str) -> str:
    """One sentence."""
    plan = search.plan
    if not judged:
        return f"{policy}: the cluster has too few GPUs for any placement of this kind"
    fitting = [one for one in judged if one.bound.obstacle is not Obstacle.MEMORY]
    if not fitting:
        return f"{policy}: memory rules everything out: {_room(search, policy)}"
    known = [one for one in fitting if one.bound.obstacle is not Obstacle.UNMEASURED]
    if not known:
        have = ", ".join(map(str, search.hardware.measured_tps()))
        wanted = sorted({group.shape.tp for one in fitting for group in one.candidate.unit.groups})
        return (
            f"{policy}: profile = {plan.profile} rules everything out that fits: it has step times for tp = {have}, "
            f"and what fits has tp = {', '.join(map(str, wanted))}"
        )
    late = [one for one in known if one.bound.obstacle is not Obstacle.BANDWIDTH]
    if not late:
        return f"{policy}: {_bandwidth(search, known)}"
    return f"{policy}: {_targets(search, late)}"


# --- memory -----------------------------------------------------------------------------------------------------------


def _room(search: PlacementSearch, policy: str) -> str:
    """The smallest node that holds a placement of this kind."""
    longest = int((search.requests.prompts + search.requests.outputs).max()) - 1
    for gpus in range(1, MOST_GPUS + 1):
        plan = replace(search.plan, cluster=replace(search.plan.cluster, nodes=1, gpus_per_node=gpus))
        for unit in _smallest_units(search, plan, policy):
            hardware = search.hardware
            if all(hardware.measured(group) and hardware.kv_tokens(group) >= longest for group in unit.groups):
                least = sum(group.gpus for group in unit.groups)
                return (
                    f"weights and the KV of the longest request, {longest} tokens, need at least {least} GPUs "
                    f"({unit}); cluster.nodes x cluster.gpus_per_node = {search.plan.cluster.nodes} x "
                    f"{search.plan.cluster.gpus_per_node}, and the smallest cluster that works is 1 x {gpus}"
                )
    return (
        f"weights and the KV of the longest request, {longest} tokens, fit no instance whose step times and memory are "
        f"known, on any node of up to {MOST_GPUS} GPUs"
    )


def _smallest_units(search: PlacementSearch, plan: PlanConfig, policy: str) -> list[Unit]:
    arch, gpus = search.hardware.arch, plan.cluster.gpus_per_node
    if policy in ("colocated", "chunked"):
        return colocated_units(arch, plan)
    if policy != "disaggregated":
        return multiplexed_units(arch, plan, policy)
    if plan.affinity == "low":
        return paired_units(arch, plan)
    every = shapes(arch, plan, gpus)
    units = [Unit((Group(Role.PREFILL, one), Group(Role.DECODE, other))) for one in every for other in every]
    return [unit for unit in units if located(plan, unit) is not None]


# --- bandwidth --------------------------------------------------------------------------------------------------------


def _bandwidth(search: PlacementSearch, judged: Sequence[Judged]) -> str:
    plan = search.plan
    best = min(judged, key=lambda one: one.bound.nearest)
    needed = best.bound.nearest
    for _ in range(ATTEMPTS):
        cluster = replace(plan.cluster, network_gbits=_rounded_up(needed))
        if _try(search, replace(plan, cluster=cluster), best.candidate).passed:
            break
        needed *= 1.25
    given = plan.cluster.network_gbits
    return (
        f"cluster.network_gbits = {given:g} rules everything out that fits: it must be at least "
        f"{_rounded_up(needed):g} Gbit/s ({100 * (needed / given - 1):.0f} % more)"
    )


# --- targets ----------------------------------------------------------------------------------------------------------


def _targets(search: PlacementSearch, judged: Sequence[Judged]) -> str:
    """The targets that the fastest candidate misses even when requests are alone, and what they would have to be."""
    plan = search.plan
    needs = [_unloaded(search, one.candidate) for one in judged]
    index = min(range(len(judged)), key=lambda at: max(needs[at][0] / plan.slo.ttft_s, needs[at][1] / plan.slo.tpot_s))
    candidate, (ttft_s, tpot_s) = judged[index].candidate, needs[index]
    ttft_s, tpot_s = max(ttft_s, plan.slo.ttft_s), max(tpot_s, plan.slo.tpot_s)
    for _ in range(ATTEMPTS):
        slo = replace(plan.slo, ttft_s=_rounded_up(ttft_s), tpot_s=_rounded_up(tpot_s))
        outcome = _try(search, replace(plan, slo=slo), candidate)
        if outcome.passed:
            break
        # What the trial itself took; and both targets together are met by fewer requests than either.
        grow = 1.02 if ttft_s >= outcome.ttft_s and tpot_s >= outcome.tpot_s else 1.0
        raise_ttft = outcome.ttft_share <= outcome.tpot_share or ttft_s > plan.slo.ttft_s
        raise_tpot = outcome.tpot_share <= outcome.ttft_share or tpot_s > plan.slo.tpot_s
        ttft_s = grow * max(ttft_s, outcome.ttft_s) if raise_ttft else ttft_s
        tpot_s = grow * max(tpot_s, outcome.tpot_s) if raise_tpot else tpot_s
    said = []
    for name, given, needed, what in (
        ("slo.ttft_s", plan.slo.ttft_s, ttft_s, "the unloaded prefill of the fastest instance"),
        ("slo.tpot_s", plan.slo.tpot_s, tpot_s, "an unloaded decode step of the fastest instance"),
    ):
        if needed > given:
            said.append(
                f"{name} = {given:g} rules everything out that fits: it must be at least {_rounded_up(needed):g} s, "
                f"{what} ({100 * (needed / given - 1):.0f} % more)"
            )
    if said:
        return "; and ".join(said)
    return (
        f"no candidate meets both targets for {100 * plan.search.attainment:g} % of requests at {LOWEST_RATE:g} "
        f"requests/s per GPU or more, and none of them alone is the reason"
    )


def _unloaded(search: PlacementSearch, candidate: Candidate) -> tuple[float, float]:
    """TTFT and TPOT in seconds that enough requests meet when each is alone."""
    hardware, requests, share = search.hardware, search.requests, 100 * search.plan.search.attainment
    ttft_s = tpot_s = math.inf
    for group in candidate.unit.groups:
        if not hardware.measured(group):
            return math.inf, math.inf
        pace = hardware.pace(group, candidate.policy)
        if group.role is not Role.DECODE:
            prompts_s = pace.prefill[0] + pace.prompts_s(requests.prompts)
            ttft_s = min(ttft_s, float(np.percentile(prompts_s, share, method="higher")))
        if group.role is not Role.PREFILL:
            contexts = requests.prompts + (requests.outputs + 1) / 2
            steps_s = np.where(requests.outputs > 1, [pace.decode_s(1, context) for context in contexts], 0.0)
            tpot_s = min(tpot_s, float(np.percentile(steps_s, share, method="higher")))
    delay_s = hardware.delay_s(candidate.policy)
    return (
        ttft_s + delay_s if Role.PREFILL in candidate.phases else 0.0,
        tpot_s if Role.DECODE in candidate.phases else 0.0,
    )


def _try(search: PlacementSearch, plan: PlanConfig, candidate: Candidate) -> Outcome:
    """A trial of other limits at the lowest rate."""
    requests = search.requests
    if candidate.policy not in ("disaggregated", "colocated", "chunked"):
        requests = Requests(plan)  # these policies look at each request's own targets
    trials = Trials(plan, search.hardware.under(plan), requests)
    return trials.run(candidate.unit, candidate.policy, LOWEST_RATE * candidate.unit.gpus, candidate.phases, Until.END)


def _rounded_up(value: float) -> float:
    """To three digits, never down."""
    digits = 2 - math.floor(math.log10(value))
    return math.ceil(value * 10**digits * (1 - 1e-12)) / 10**digits
