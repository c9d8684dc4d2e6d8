"""Which counts of which prefill and decode instances go together (DistServe, Algorithm 1)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from ds_jax.placement.layouts import Group, Shape, Unit, located, split_by_kind
from ds_jax.plan import PlanConfig
from ds_jax.protocol import Role

MOST_INSTANCES = 8
"""Most instances of one phase in a unit when no rate says how many there must be."""

Option = tuple[Shape, float]
"""A shape and the requests/s that one instance of it serves, its phase alone."""


def combinations(
    plan: PlanConfig, prefills: Sequence[Option], decodes: Sequence[Option], wanted: float
) -> Iterable[Unit]:
    """Units that the cluster has room for, the most promising first.

    Without a rate those with the most requests/s per GPU by their phases alone, each ratio of instances once. With one,
    those with the fewest GPUs: by their phases alone they serve it, with nothing or one instance to spare.

    Args:
        wanted: requests/s; 0: no rate.
    """
    found: list[tuple[float, float, int, Unit]] = []
    for prefill, prefill_rate in prefills:
        for decode, decode_rate in decodes:
            for n, m in _counts(prefill_rate, decode_rate, wanted):
                unit = _unit(plan, prefill, n, decode, m)
                per_gpu = min(n * prefill_rate, m * decode_rate) / unit.gpus
                found.append((unit.gpus if wanted else 0, -round(per_gpu, 6), unit.gpus, unit))
    found.sort(key=lambda one: one[:3])
    return (unit for *_, unit in found if located(plan, unit) is not None)


def _counts(prefill_rate: float, decode_rate: float, wanted: float) -> list[tuple[int, int]]:
    if wanted:
        n, m = math.ceil(wanted / prefill_rate), math.ceil(wanted / decode_rate)
        return [(n, m), (n + 1, m), (n, m + 1), (n + 1, m + 1)]
    many = range(1, MOST_INSTANCES + 1)
    return [(n, m) for n in many for m in many if math.gcd(n, m) == 1]


def _unit(plan: PlanConfig, prefill: Shape, n: int, decode: Shape, m: int) -> Unit:
    gpus = prefill.gpus * n + decode.gpus * m
    crosses = split_by_kind(plan) or gpus > plan.cluster.gpus_per_node
    return Unit((Group(Role.PREFILL, prefill, n), Group(Role.DECODE, decode, m)), kv_crosses_nodes=crosses)
