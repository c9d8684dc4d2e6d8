"""What a search found, in words, numbers and a configuration to serve with."""

from __future__ import annotations

from typing import Any

from ds_jax.placement.hardware import Hardware
from ds_jax.placement.layouts import Unit
from ds_jax.placement.search import Found, Placement
from ds_jax.plan import PlanConfig
from ds_jax.protocol import Role

NEAR = 1.03
"""Ratios up to this one are called equal: precision and luck of the draw."""


def summary(plan: PlanConfig, found: Found) -> dict[str, Any]:
    """The keys of summary.json. A role that the policy does not have is None; a mixed worker counts as decode."""
    best = found.placement
    shapes = {role: _shape(best.unit, role) for role in (Role.PREFILL, Role.DECODE)}
    colocated = found.beside.get("colocated") or (best if best.policy == "colocated" else None)
    multiplexed = [
        one.goodput_per_gpu for policy, one in found.beside.items() if policy in ("multiplexed", "deflected")
    ]
    return {
        "policy": best.policy,
        "goodput_per_gpu": best.goodput_per_gpu,
        "gpus": best.gpus,
        "prefill_tp": shapes[Role.PREFILL][0],
        "prefill_pp": shapes[Role.PREFILL][1],
        "prefill_instances": best.instances(Role.PREFILL),
        "decode_tp": shapes[Role.DECODE][0],
        "decode_pp": shapes[Role.DECODE][1],
        "decode_instances": best.instances(Role.DECODE) or best.instances(Role.MIXED),
        "configurations": found.configurations,
        "simulated": found.simulated,
        "search_s": found.search_s,
        "best_colocated_goodput_per_gpu": colocated.goodput_per_gpu if colocated else None,
        "best_multiplexed_goodput_per_gpu": max(multiplexed, default=None),
        "rule": plan.search.rule,
        "extrapolated": found.extrapolated,
        "verdict": verdict(plan, found),
        "notes": list(found.notes),
        "placements": {one.policy: describe(one) for one in (best, *found.beside.values())},
    }


def describe(placement: Placement) -> dict[str, Any]:
    """One placement as plain values."""
    outcome = placement.outcome
    return {
        "unit": str(placement.unit),
        "replicas": placement.replicas,
        "gpus": placement.gpus,
        "goodput_per_gpu": placement.goodput_per_gpu,
        "attainment": outcome.share if outcome else None,
        "ttft_attainment": outcome.ttft_share if outcome else None,
        "tpot_attainment": outcome.tpot_share if outcome else None,
        "ttft_s": outcome.ttft_s if outcome else None,
        "tpot_s": outcome.tpot_s if outcome else None,
    }


def verdict(plan: PlanConfig, found: Found) -> str:
    """Whether disaggregation pays here, and why."""
    every = {found.placement.policy: found.placement, **found.beside}
    disaggregated, colocated = every.get("disaggregated"), every.get("colocated")
    if disaggregated is None or colocated is None:
        if "disaggregated" in every:
            return "Disaggregation is the only way: no colocated placement meets both targets."
        return ""
    ratio = disaggregated.goodput_per_gpu / colocated.goodput_per_gpu
    why = _binding(plan, colocated)
    if ratio > NEAR:
        text = f"Disaggregation pays: {ratio:.2f} x the goodput of the best colocated placement, where {why}."
    elif ratio < 1 / NEAR:
        text = (
            f"Disaggregation does not pay: the best colocated placement has {1 / ratio:.2f} x its goodput. "
            f"Disaggregated, {_binding(plan, disaggregated)}, and no ratio of prefill to decode GPUs keeps both busy."
        )
    else:
        text = "Disaggregation and the best colocated placement are about equal here."
    others = {policy: one for policy, one in every.items() if policy in ("multiplexed", "deflected")}
    for policy, one in others.items():
        best = max(disaggregated.goodput_per_gpu, colocated.goodput_per_gpu)
        if one.goodput_per_gpu > NEAR * best:
            text += f" {policy} is better still: {one.goodput_per_gpu / best:.2f} x."
    return text


def _binding(plan: PlanConfig, placement: Placement) -> str:
    """Which target holds a placement back at its goodput."""
    outcome = placement.outcome
    if outcome is None:
        return "the reason is not known"
    ttft, tpot = 1 - outcome.ttft_share, 1 - outcome.tpot_share
    if ttft > 2 * tpot:
        return f"TTFT holds it back (late: {100 * ttft:.0f} % of requests by TTFT, {100 * tpot:.0f} % by TPOT)"
    if tpot > 2 * ttft:
        return f"TPOT holds it back (late: {100 * tpot:.0f} % of requests by TPOT, {100 * ttft:.0f} % by TTFT)"
    return f"both targets hold it back (late: {100 * ttft:.0f} % of requests by TTFT, {100 * tpot:.0f} % by TPOT)"


def _shape(unit: Unit, role: Role) -> tuple[int | None, int | None]:
    group = unit.group(role) or (unit.group(Role.MIXED) if role is Role.DECODE else None)
    return (group.shape.tp, group.shape.pp) if group else (None, None)


def serving_config(plan: PlanConfig, placement: Placement, hardware: Hardware, *, dummy: bool) -> str:
    """The text of a configuration file that `experiments.serve` takes as it is.

    Args:
        dummy: serve random weights, for a folder that has none.
    """
    classes = {Role.PREFILL: "PrefillConfig", Role.DECODE: "DecodeConfig", Role.MIXED: "MixedConfig"}
    l_m = {group.role: hardware.l_m(group) for group in placement.unit.groups}
    groups = []
    for role in Role:
        group = placement.unit.group(role)
        count = group.instances * placement.replicas if group else 0
        settings = f"instances={count}"
        if group:
            settings += f", tp={group.shape.tp}, pp={group.shape.pp}"
            settings += f", slots={plan.slots}" if role is not Role.PREFILL else ""
            settings += f", saturation_tokens={l_m[role]}" if role is not Role.DECODE else ""
        groups.append(f"    {role}=c.{classes[role]}({settings}),\n")
    load = ', load_format="dummy"' if dummy else ""
    profile = f"    scheduler=c.SchedulerConfig(latency_profile={plan.profile!r}),\n" if plan.profile else ""
    return (
        f'"""Found by experiments.placement_search: {placement.goodput_per_gpu:.3g} requests/s per GPU with TTFT under '
        f"{plan.slo.ttft_s:g} s and TPOT under {plan.slo.tpot_s:g} s\nfor {100 * plan.search.attainment:g} % of "
        f'requests, workload {plan.workload.name}."""\n\n'
        "from ds_jax import config as c\n\n"
        "config = c.Config(\n"
        f"    model=c.ModelConfig(path={plan.model!r}{load}),\n"
        f"    policy={placement.policy!r},\n"
        f"{''.join(groups)}"
        f"{profile}"
        f"    slo=c.SloConfig(ttft_s={plan.slo.ttft_s!r}, tpot_s={plan.slo.tpot_s!r}),\n"
        ")\n"
    )
