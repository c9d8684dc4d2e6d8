"""Curves of attainment: against the rate, with the goodput, and against the scale of the targets."""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass, replace
from typing import Any

from ds_jax.attainment import goodput
from ds_jax.placement.layouts import Unit
from ds_jax.placement.search import Infeasible, PlacementSearch
from ds_jax.plan import PlanConfig
from experiments.systems import System, hardware, rate_at, serve

REQUESTS = {"joint": 1000, "published": 300}
"""Of one run: to steady state where both targets are asked for together; as the public code's search where not."""
SHARES = (0.9, 0.99)
LOWEST, LOWEST_STRICT = 20.0, 3.0
"""How far down the first rate is looked for, from where it begins; and the second, from the first."""
FRACTIONS = (0.6, 1.4)
"""Rates of the curve beside those that the goodputs needed, in shares of the goodput."""
SCALES = (0.3, 0.45, 0.6, 0.75, 0.9, 1.0, 1.25, 1.6, 2.0)


@dataclass(frozen=True)
class Place:
    """What the search found for one policy."""

    unit: Unit | None
    """None: nothing meets the targets."""
    goodput: float = 0.0
    """Requests/s per GPU, as the search found it."""
    why_none: str = ""


def find(plan: PlanConfig, policy: str) -> Place:
    """The unit that the search finds by the plan's rule and its number of requests, to 5 %: what it is worth is found
    out when it is served."""
    search = replace(plan.search, workers=1, precision=max(plan.search.precision, 0.05))
    plan = replace(plan, policy=policy, search=search)
    with PlacementSearch(plan, hardware(plan).arch) as searching, warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # whoever serves the unit tells of its ranges
        try:
            found = searching.place(policy)
        except Infeasible as error:
            return Place(None, why_none=str(error))
    return Place(found.unit, found.goodput_per_gpu)


def study(plan: PlanConfig, system: System, first: float) -> dict[str, Any]:
    """The curve of attainment against the rate, and where it crosses the shares: at 99 % None if that is at less than a
    third of the rate at 90 %, or not asked for (by the published rule).

    Args:
        first: requests/s per GPU to begin at, such as what the search found.
    """
    apart = plan.search.rule == "published"
    notes: dict[str, None] = {}
    counts: set[int] = set()

    @functools.cache
    def shares(rate: float) -> tuple[float, float, float]:
        served = serve(plan, system, rate)
        notes.update(dict.fromkeys(served.notes))
        counts.add(len(served.ttft_s))
        return served.shares(plan.slo)

    def share_at(rate: float) -> float:
        both, ttft, tpot = shares(rate)
        return min(ttft, tpot) if apart else both

    rates: set[float] = set()

    def asked(rate: float) -> float:
        rates.add(rate)
        return share_at(rate)

    # Runs at low rates are long, as nothing is batched: nobody looks far below what is expected.
    most = rate_at(asked, SHARES[0], first=first, precision=0.04, lowest=max(0.02, first / LOWEST))
    strict = None
    if most and not apart:
        lowest = most / LOWEST_STRICT
        strict = rate_at(asked, SHARES[1], first=max(0.85 * most, lowest), precision=0.1, lowest=lowest) or None
    for fraction in FRACTIONS:
        rate = fraction * most
        if rate and not any(abs(rate / other - 1) < 0.08 for other in rates):
            asked(rate)
    curve = [{"rate": rate, **dict(zip(("both", "ttft", "tpot"), shares(rate), strict=True))} for rate in sorted(rates)]
    return {
        "goodput_90": most,
        "goodput_99": strict,
        "requests": max(counts),
        "curve": curve,
        "notes": list(notes),
    }


def tighten(plan: PlanConfig, system: System, rate: float) -> dict[str, Any]:
    """Attainment against the scale of both targets at one rate, and the tightest scale that 90 % keep."""

    def shares(scale: float) -> float:
        slo = replace(plan.slo, ttft_s=scale * plan.slo.ttft_s, tpot_s=scale * plan.slo.tpot_s)
        return serve(replace(plan, slo=slo), system, rate).share(slo)

    if not system.foretells:
        served = serve(plan, system, rate)
        values = [served.share(plan.slo, scale) for scale in SCALES]
        finer = [0.05 * 1.03**step for step in range(160)]
        inside = [scale for scale in finer if served.share(plan.slo, scale) >= SHARES[0]]
        return {"scales": list(SCALES), "values": values, "tightest": inside[0] if inside else None}
    scales = SCALES[::2]  # each is a run of its own
    values = [shares(scale) for scale in scales]
    # 1 / scale grows as targets tighten: goodput() interpolates there.
    best = goodput([1 / scale for scale in reversed(scales)], list(reversed(values)), SHARES[0])
    return {"scales": list(scales), "values": values, "tightest": 1 / best if best else None}
