"""What a search found, in words, numbers and a configuration to serve with."""

from __future__ import annotations

from typing import Any

from ds_jax.config import FORETELLING
from ds_jax.placement.comparison import Comparison
from ds_jax.placement.hardware import Hardware
from ds_jax.placement.layouts import Unit
from ds_jax.placement.search import Placement
from ds_jax.plan import PlanConfig
from ds_jax.protocol import Role

NEAR = 1.03
"""Ratios up to this one are called equal: precision and luck of the draw."""
MULTIPLEXING = ("multiplexed", "deflected")
"""Policies whose decode workers take prompts."""


def summary(plan: PlanConfig, found: Comparison) -> dict[str, Any]:
    """The keys of summary.json. A role that the policy does not have is None; a mixed worker counts as decode.

    Where the plan's policy has no placement, its keys are None and `infeasible` says why.
    """
    own, colocated = found.placement, found.placements.get("colocated")
    multiplexed = [one.goodput_per_gpu for policy, one in found.placements.items() if policy in MULTIPLEXING]
    shapes = {role: _shape(own.unit, role) if own else (None, None) for role in (Role.PREFILL, Role.DECODE)}
    return {
        "policy": plan.policy,
        "goodput_per_gpu": own.goodput_per_gpu if own else None,
        "gpus": own.gpus if own else None,
        "prefill_tp": shapes[Role.PREFILL][0],
        "prefill_pp": shapes[Role.PREFILL][1],
        "prefill_instances": own.instances(Role.PREFILL) if own else None,
        "decode_tp": shapes[Role.DECODE][0],
        "decode_pp": shapes[Role.DECODE][1],
        "decode_instances": (own.instances(Role.DECODE) or own.instances(Role.MIXED)) if own else None,
        "configurations": found.configurations(plan.policy),
        "simulated": found.simulated(plan.policy),
        "search_s": found.search_s,
        "cached": found.cached,
        "beside_s": found.beside_s,
        "best_colocated_goodput_per_gpu": colocated.goodput_per_gpu if colocated else None,
        "best_multiplexed_goodput_per_gpu": max(multiplexed, default=None),
        "rule": plan.search.rule,
        "extrapolated": found.extrapolated,
        "verdict": verdict(plan, found),
        "notes": list(found.notes),
        "placements": {policy: describe(one) for policy, one in found.placements.items()},
        "infeasible": found.infeasible,
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
        "pipelined": pipelined(placement),
    }


def pipelined(placement: Placement) -> bool:
    """Whether an instance has several pipeline stages: simulated only, the engine serves one."""
    return any(group.shape.pp > 1 for group in placement.unit.groups)


def verdict(plan: PlanConfig, found: Comparison) -> str:
    """Whether disaggregation pays here, and what was measured that says so; empty where it was not asked for."""
    disaggregated, colocated = found.placements.get("disaggregated"), found.placements.get("colocated")
    if disaggregated is None and "disaggregated" not in found.infeasible:
        return ""
    if disaggregated is None:
        if found.best is None:
            return "No placement meets both targets."
        return (
            f"Disaggregation is not possible here ({found.infeasible['disaggregated']}); the best of the others is "
            f"{found.best.policy} with {found.best.goodput_per_gpu:.3g} requests/s per GPU, where "
            f"{_binding(found.best)}."
        )
    if colocated is not None:
        text = _against_colocated(disaggregated, colocated)
    elif "colocated" in found.infeasible:
        text = f"No colocated placement meets both targets ({found.infeasible['colocated']}); disaggregated ones do."
    else:
        text = "What disaggregation is worth is not known: colocated placements were not asked for."
    best = max(one.goodput_per_gpu for one in (disaggregated, colocated) if one is not None)
    for policy in MULTIPLEXING:
        one = found.placements.get(policy)
        if one is not None and one.goodput_per_gpu > NEAR * best:
            text += f" {policy} is better still: {one.goodput_per_gpu / best:.2f} x."
    return text


def _against_colocated(disaggregated: Placement, colocated: Placement) -> str:
    ratio = disaggregated.goodput_per_gpu / colocated.goodput_per_gpu
    if ratio > NEAR:
        return (
            f"Disaggregation pays: {ratio:.2f} x the goodput of the best colocated placement, where "
            f"{_binding(colocated)}."
        )
    if ratio < 1 / NEAR:
        return (
            f"Disaggregation does not pay: the best colocated placement has {1 / ratio:.2f} x its goodput. "
            f"Disaggregated, {_binding(disaggregated)}."
        )
    return "Disaggregation and the best colocated placement are about equal here."


def _binding(placement: Placement) -> str:
    """Which target holds a placement back, by the requests that miss each at its goodput."""
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


def serving_config(
    plan: PlanConfig, placement: Placement, hardware: Hardware, *, dummy: bool, instead: str = ""
) -> str:
    """The text of a configuration file that `experiments.serve` takes as it is.

    Args:
        dummy: serve random weights, for a folder that has none.
        instead: of a placement with several pipeline stages, the file that the engine can serve.
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
            if role is not Role.DECODE:
                settings += f", max_step_tokens={plan.max_step_tokens}, saturation_tokens={l_m[role]}"
                settings += f", token_buckets={plan.token_buckets!r}" if plan.token_buckets else ""
        groups.append(f"    {role}=c.{classes[role]}({settings}),\n")
    load = ', load_format="dummy"' if dummy else ""
    foretells = plan.profile and placement.policy in FORETELLING
    profile = f"    scheduler=c.SchedulerConfig(latency_profile={plan.profile!r}),\n" if foretells else ""
    note = ""
    if pipelined(placement):
        note = "\n\nFor the simulator: the engine serves one pipeline stage (pp = 1) and refuses this one."
        note += f" The best that it serves is {instead}." if instead else ""
    return (
        f'"""Found by experiments.placement_search: {placement.goodput_per_gpu:.3g} requests/s per GPU with TTFT under '
        f"{plan.slo.ttft_s:g} s and TPOT under {plan.slo.tpot_s:g} s\nfor {100 * plan.search.attainment:g} % of "
        f"requests, workload {plan.workload.name}.{note}"
        f'{chr(10) if note else ""}"""\n\n'
        "from ds_jax import config as c\n\n"
        "config = c.Config(\n"
        f"    model=c.ModelConfig(path={plan.model!r}, dtype={plan.dtype!r}{load}),\n"
        f"    policy={placement.policy!r},\n"
        f"{''.join(groups)}"
        f"{profile}"
        f"    slo=c.SloConfig(ttft_s={plan.slo.ttft_s!r}, tpot_s={plan.slo.tpot_s!r}),\n"
        ")\n"
    )
