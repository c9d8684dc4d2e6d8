"""Curves of attainment: against the rate, with the goodput, and against the scale of the targets."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

from ds_jax.attainment import goodput
from ds_jax.placement.layouts import Unit
from ds_jax.placement.search import Infeasible, PlacementSearch
from ds_jax.plan import PlanConfig
from experiments.systems import System, hardware, rate_at, serve

SHARES = (0.9, 0.99)
FRACTIONS = (0.4, 0.7, 1.15, 1.5, 2.0)
"""Rates of the curve beside those that the goodputs needed, in shares of the goodput."""
FEW_REQUESTS = 150
SCALES = (0.3, 0.45, 0.6, 0.75, 0.9, 1.0, 1.25, 1.6, 2.0)


def find(plan: PlanConfig, policy: str) -> tuple[Unit | None, str]:
    """The unit that the search finds, or None and why there is none.

    Coarsely: what it is worth is found out later, in longer runs.
    """
    count = min(plan.search.requests or FEW_REQUESTS, FEW_REQUESTS)
    search = replace(plan.search, workers=1, requests=count, precision=max(plan.search.precision, 0.05))
    plan = replace(plan, policy=policy, search=search)
    with PlacementSearch(plan, hardware(plan).arch) as searching:
        try:
            return searching.place(policy).unit, ""
        except Infeasible as error:
            return None, str(error)


def study(plan: PlanConfig, system: System, first: float) -> dict[str, Any]:
    """The curve of attainment against the rate, and where it crosses the shares."""
    apart = plan.search.rule == "published"

    @functools.cache
    def shares(rate: float) -> tuple[float, float, float]:
        return serve(plan, system, rate).shares(plan.slo)

    def share_at(rate: float) -> float:
        both, ttft, tpot = shares(rate)
        return min(ttft, tpot) if apart else both

    rates: set[float] = set()

    def asked(rate: float) -> float:
        rates.add(rate)
        return share_at(rate)

    goodputs: list[float] = []
    for share in SHARES[: 1 if apart else 2]:
        if goodputs and not goodputs[0]:
            break
        first, lowest = (0.85 * goodputs[0], goodputs[0] / 8) if goodputs else (first, 0.02)
        goodputs.append(rate_at(asked, share, first=first, precision=0.04, lowest=lowest))
    if goodputs[0] and not apart:
        for fraction in FRACTIONS:
            asked(fraction * goodputs[0])
    curve = [{"rate": rate, **dict(zip(("both", "ttft", "tpot"), shares(rate), strict=True))} for rate in sorted(rates)]
    return {"goodput_90": goodputs[0], "goodput_99": goodputs[1] if len(goodputs) > 1 else None, "curve": curve}


def tighten(plan: PlanConfig, system: System, rate: float) -> dict[str, Any]:
    """Attainment against the scale of both targets at one rate, and the tightest scale that 90 % keep."""

    def shares(scale: float) -> float:
        slo = replace(plan.slo, ttft_s=scale * plan.slo.ttft_s, tpot_s=scale * plan.slo.tpot_s)
        return serve(replace(plan, slo=slo), system, rate).share(slo)

    if system.foretells:
        values = [shares(scale) for scale in SCALES]
    else:
        served = serve(plan, system, rate)
        values = [served.share(plan.slo, scale) for scale in SCALES]
        finer = [0.05 * 1.03**step for step in range(160)]
        inside = [scale for scale in finer if served.share(plan.slo, scale) >= SHARES[0]]
        return {"values": values, "tightest": inside[0] if inside else None}
    # 1 / scale grows as targets tighten: goodput() interpolates there.
    tightness, falling = [1 / scale for scale in reversed(SCALES)], list(reversed(values))
    best = goodput(tightness, falling, SHARES[0])
    return {"values": values, "tightest": 1 / best if best else None}
