"""What DistServe's public simulator finds, found by its rule."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ds_jax.config import SloConfig
from ds_jax.flags import read_config
from ds_jax.placement.comparison import Comparison, compare
from ds_jax.placement.search import PlacementSearch
from ds_jax.plan import PlanConfig
from ds_jax.protocol import Role
from models.folder import read_configs


def _found(file: str, ttft_s: float, tpot_s: float) -> Comparison:
    plan = read_config(f"configs/{file}.py", PlanConfig)
    plan = replace(plan, slo=SloConfig(ttft_s, tpot_s), search=replace(plan.search, rule="published", workers=1))
    with PlacementSearch(plan, read_configs(plan.model).arch) as search:
        return compare(search, ("colocated",))


def test_opt_13b_on_four_gpus_is_placed_as_published():
    """1.56 requests/s per GPU, prefill tp2 and decode tp1, at 200/100 ms."""
    placement = _found("plan_opt_13b_a100", 0.2, 0.1).placements["disaggregated"]
    shapes = {role: placement.unit.group(role).shape for role in (Role.PREFILL, Role.DECODE)}
    assert (shapes[Role.PREFILL].tp, shapes[Role.DECODE].tp) == (2, 1)
    assert placement.goodput_per_gpu == pytest.approx(1.56, rel=0.15)


def test_opt_66b_on_eight_gpus_serves_more_than_twice_what_colocated_instances_do():
    found = _found("plan_opt_66b_a100", 2.5, 0.15)
    placements = found.placements
    assert placements["disaggregated"].goodput_per_gpu > 2 * placements["colocated"].goodput_per_gpu > 0
    assert found.configurations("disaggregated") == 61
