"""Why there is no placement: which limit rules everything out, and the nearest value of it that does not.

A value that is told was tried: the unit that asks for least meets it in a trial at LOWEST_RATE, of some requests.
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
from ds_jax.placement.trial import Requests, Trials, Until
from ds_jax.plan import PlanConfig
from ds_jax.protocol import Role, Slo

if TYPE_CHECKING:
    from ds_jax.placement.race import Candidate, Judged
    from ds_jax.placement.search import PlacementSearch

MOST_GPUS = 64
"""Of one node; no larger one is suggested."""
ATTEMPTS = 6
"""Trials of values that might do."""
SAMPLE = 200
"""Requests of such a trial."""


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
        if _does(
            search, replace(plan, cluster=replace(plan.cluster, network_gbits=_rounded_up(needed))), best.candidate
        ):
            break
        needed *= 1.1
    given = plan.cluster.network_gbits
    return (
        f"cluster.network_gbits = {given:g} rules everything out that fits: it must be at least "
        f"{_rounded_up(needed):g} Gbit/s ({100 * (needed / given - 1):.0f} % more)"
    )


# --- targets ----------------------------------------------------------------------------------------------------------


def _targets(search: PlacementSearch, judged: Sequence[Judged]) -> str:
    """The targets that the fastest candidate misses even when requests are alone, and what they would have to be."""
    plan, share = search.plan, 100 * search.plan.search.attainment

    def needs(one: Judged) -> tuple[float, float]:
        ttft_s, tpot_s = _alone(search, plan, one.candidate)
        at_least = [float(np.percentile(values, share, method="higher")) for values in (ttft_s, tpot_s)]
        return max(at_least[0], plan.slo.ttft_s), max(at_least[1], plan.slo.tpot_s)

    candidates = [one for one in judged if one.bound.obstacle is not Obstacle.UNMEASURED]
    best = min(candidates, key=lambda one: max(needs(one)[0] / plan.slo.ttft_s, needs(one)[1] / plan.slo.tpot_s))
    ttft_s, tpot_s = needs(best)
    raises = ttft_s > plan.slo.ttft_s, tpot_s > plan.slo.tpot_s
    if not any(raises):
        raises = True, True  # each would do alone, and both together do not
    for _ in range(ATTEMPTS):
        slo = replace(plan.slo, ttft_s=_rounded_up(ttft_s), tpot_s=_rounded_up(tpot_s))
        if _does(search, replace(plan, slo=slo), best.candidate):
            break
        ttft_s, tpot_s = (
            1.02 * value if grows else value for value, grows in zip((ttft_s, tpot_s), raises, strict=True)
        )
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
        f"no candidate meets both targets for {share:g} % of requests, although {best.candidate.unit} does when each "
        f"is alone, at {LOWEST_RATE:g} requests/s per GPU"
    )


def _alone(search: PlacementSearch, plan: PlanConfig, candidate: Candidate) -> tuple[np.ndarray, np.ndarray]:
    """TTFT and TPOT in seconds of each request when it is alone, on the fastest instances; 0 of a phase left out."""
    hardware, requests = search.hardware.under(plan), search.requests
    ttft_s, tpot_s = (np.full(len(requests.prompts), np.inf) for _ in range(2))
    for group in candidate.unit.groups:
        pace = hardware.pace(group, candidate.policy)
        if group.role is not Role.DECODE:
            prompts_s = pace.prefill[0] + pace.prompts_s(requests.prompts) + hardware.delay_s(candidate.policy)
            ttft_s = np.minimum(ttft_s, prompts_s)
        if group.role is not Role.PREFILL:
            base_s, context_s, sequence_s = pace.decode
            steps_s = base_s + sequence_s + context_s * (requests.prompts + requests.outputs / 2)
            tpot_s = np.minimum(tpot_s, np.where(requests.outputs > 1, steps_s, 0.0))
    if len(candidate.unit.groups) > 1:
        gaps = np.maximum(requests.outputs - 1, 1)
        tpot_s = tpot_s + hardware.copy_s(candidate.unit, requests.prompts) / gaps * (requests.outputs > 1)
    if Role.PREFILL not in candidate.phases:
        ttft_s = np.zeros(len(ttft_s))
    return ttft_s, tpot_s if Role.DECODE in candidate.phases else np.zeros(len(tpot_s))


def _does(search: PlacementSearch, plan: PlanConfig, candidate: Candidate) -> bool:
    """Whether the candidate passes under other limits at the lowest rate, in a trial of SAMPLE requests.

    Each is alone, so that any will do: of all, ranked by how near they come to the targets, every so many-th, which is
    the worst of those that it stands for.
    """
    requests, slo = search.requests, Slo(round(plan.slo.ttft_s * 1e9), round(plan.slo.tpot_s * 1e9))
    ttft_s, tpot_s = _alone(search, plan, candidate)
    order = np.argsort(np.maximum(ttft_s / plan.slo.ttft_s, tpot_s / plan.slo.tpot_s), kind="stable")
    every = max(1, len(order) // SAMPLE)
    chosen = sorted(int(index) for index in order[every - 1 :: every])
    submissions = [requests.submissions[index] for index in chosen]
    some = [one._replace(request=replace(one.request, slo=slo)) for one in submissions]
    trials = Trials(plan, search.hardware.under(plan), Requests(plan, some))
    rate = LOWEST_RATE * candidate.unit.gpus
    return trials.run(candidate.unit, candidate.policy, rate, candidate.phases, Until.DECIDED).passed


def _rounded_up(value: float) -> float:
    """To three digits, never down."""
    digits = 2 - math.floor(math.log10(value))
    return math.ceil(value * 10**digits * (1 - 1e-12)) / 10**digits
