"""The placement search: what there is to choose from, that bounds only save time, and what cannot be."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import replace

import pytest

from ds_jax.config import SloConfig
from ds_jax.placement.bounds import bound
from ds_jax.placement.goodput import fine_rates, goodput, published_rates
from ds_jax.placement.layouts import Group, Shape, multiplexed_units, paired_units, shapes
from ds_jax.placement.search import Candidate, Infeasible, PlacementSearch, find_goodput
from ds_jax.plan import ClusterConfig, PlanConfig, SearchConfig, WorkloadConfig
from ds_jax.protocol import Role
from models.folder import read_configs

OPT_13B = PlanConfig(
    model="models/published/opt-13b",
    profile="configs/latency/a100_80g_opt_13b.json",
    affinity="low",
    cluster=ClusterConfig(nodes=1, gpus_per_node=4),
    slo=SloConfig(ttft_s=0.25, tpot_s=0.1),
    search=SearchConfig(requests=60, precision=0.1, workers=1),
)
SMALL = replace(OPT_13B, cluster=ClusterConfig(nodes=1, gpus_per_node=3), search=replace(OPT_13B.search, requests=40))
OPT_66B = replace(
    OPT_13B,
    model="models/published/opt-66b",
    profile="configs/latency/a100_80g_opt_66b.json",
    cluster=ClusterConfig(nodes=1, gpus_per_node=8),
    slo=SloConfig(ttft_s=2.5, tpot_s=0.15),
)


def _search(plan: PlanConfig) -> PlacementSearch:
    return PlacementSearch(plan, read_configs(plan.model).arch)


# --- what there is ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("plan", "count"), [(OPT_13B, 9), (OPT_66B, 61)])
def test_there_are_as_many_pairs_as_distserves_search_counts(plan, count):
    assert len(paired_units(read_configs(plan.model).arch, plan)) == count


def test_instances_that_span_nodes_have_a_segment_of_the_same_size_on_each():
    plan = replace(OPT_66B, cluster=ClusterConfig(nodes=4, gpus_per_node=2))
    units = paired_units(read_configs(plan.model).arch, plan)
    assert {unit.segments for unit in units} == {1, 2, 4}  # 3 does not divide the 64 layers
    assert all(unit.gpus == 2 * unit.segments for unit in units)
    assert all(group.shape == Shape(1, unit.segments) for unit in units for group in unit.groups)


def test_shapes_divide_heads_and_layers_and_keep_layers_inside_a_node():
    arch = read_configs(OPT_66B.model).arch  # 72 heads, 64 layers, an MLP of 36,864
    found = shapes(arch, replace(OPT_66B, cluster=ClusterConfig(nodes=2, gpus_per_node=8)), 16)
    assert {shape.tp for shape in found} == {1, 2, 3, 4, 6, 8}
    assert {shape.pp for shape in found if shape.tp == 1} == {1, 2, 4, 8, 16}
    assert Shape(8, 2) in found and Shape(9, 1) not in found


def test_workers_of_a_node_are_split_every_way():
    units = multiplexed_units(read_configs(OPT_13B.model).arch, OPT_13B)
    splits = [(unit.group(Role.PREFILL), unit.group(Role.MIXED)) for unit in units]
    assert [(a.instances, b.instances) for a, b in splits if a.shape == b.shape == Shape(1, 1)] == [
        (1, 3),
        (2, 2),
        (3, 1),
    ]
    assert all(unit.gpus <= 4 for unit in units)


# --- the rate ---------------------------------------------------------------------------------------------------------

Score = namedtuple("Score", "passed share")


@pytest.mark.parametrize("limit", [0.0004, 0.02, 1.3, 4.9, 30.0])
@pytest.mark.parametrize("beat", [0.0, 0.01, 1.0, 1.29])
def test_the_goodput_does_not_depend_on_the_rate_to_beat(limit, beat):
    """Attainment falls on a line from 1 to 0.9 at the limit, so the interpolation is exact."""

    def trial(rate: float) -> Score:
        return Score(rate <= limit, 1 - 0.1 * rate / limit)

    alone = goodput(trial, fine_rates(50, 0.02), share=0.9)
    against = goodput(trial, fine_rates(50, 0.02), beat=beat, share=0.9)
    if against.below:
        assert limit < beat * 1.0001
    else:
        assert against.per_gpu == alone.per_gpu
    if limit > 0.001:
        assert alone.per_gpu == pytest.approx(limit)


def test_distserves_grid_ends_where_its_bisection_does():
    """[0, 5], halved until at most 0.25 wide: a system that passes up to 1.6 is given 1.5625."""
    low, high = 0.0, 5.0
    while high - low > 0.25:
        middle = (low + high) / 2
        low, high = (middle, high) if middle <= 1.6 else (low, middle)
    found = goodput(lambda rate: Score(rate <= 1.6, 0.0), published_rates())
    assert found.per_gpu == low == 1.5625


# --- the search -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("affinity", "rule"), [("low", "joint"), ("high", "published")])
def test_pruning_changes_nothing_but_the_time(rule, affinity):
    plan = replace(SMALL, affinity=affinity, search=replace(SMALL.search, rule=rule))
    with _search(plan) as search:
        pruned = search.find(beside=())
    with _search(replace(plan, search=replace(plan.search, prune=False))) as search:
        whole = search.find(beside=())
    assert pruned.placement.unit == whole.placement.unit
    assert pruned.placement.goodput_per_gpu == pytest.approx(whole.placement.goodput_per_gpu, rel=1e-9)
    trials = [sum(one.goodput.trials for one in found.judged if one.goodput) for found in (pruned, whole)]
    assert trials[0] < trials[1]


def test_several_processes_find_the_same():
    with _search(SMALL) as search:
        alone = search.find(beside=()).placement
    with _search(replace(SMALL, search=replace(SMALL.search, workers=2))) as search:
        together = search.find(beside=()).placement
    assert (alone.unit, alone.goodput_per_gpu) == (together.unit, together.goodput_per_gpu)


def test_no_bound_is_below_what_simulation_finds():
    search = _search(SMALL)
    for unit in paired_units(search.hardware.arch, SMALL):
        limit = bound(unit, SMALL, search.hardware, search.requests)
        found = find_goodput(search.trials, Candidate(unit, "disaggregated"), 0.0, None)
        assert found.per_gpu <= limit.per_gpu, unit


def test_phases_are_balanced_for_the_rate_that_is_asked_for():
    plan = replace(SMALL, affinity="high", cluster=ClusterConfig(nodes=4, gpus_per_node=2, network_gbits=400))
    plan = replace(plan, workload=WorkloadConfig(rate=8.0))
    with _search(plan) as search:
        placement = search.place("disaggregated")
    alone = {one.candidate.phases[0]: one for one in search.judged if len(one.candidate.phases) == 1}
    assert set(alone) == {Role.PREFILL, Role.DECODE}
    served = placement.goodput_per_gpu * placement.gpus
    assert placement.gpus <= 8 and served > 0.75 * 8.0


def test_what_was_found_is_kept(tmp_path):
    plan = replace(OPT_13B, search=replace(OPT_13B.search, cache=str(tmp_path)))
    with _search(plan) as search:
        first = search.find(beside=())
    with _search(plan) as search:
        again = search.find(beside=())
    assert again.placement.goodput_per_gpu == first.placement.goodput_per_gpu
    trials = [sum(one.goodput.trials for one in found.judged if one.goodput) for found in (first, again)]
    assert trials[1] < trials[0] / 2
    other = replace(plan, slo=SloConfig(ttft_s=0.3, tpot_s=0.1))
    with _search(other) as search:
        assert search.cache.get(Candidate(first.placement.unit, "disaggregated")) is None


def test_decode_gpus_of_another_kind_have_step_times_and_memory_of_their_own():
    plan = replace(OPT_13B, profile="", cluster=ClusterConfig(gpus_per_node=4, decode_gpu="l40s-48g"))
    hardware = _search(plan).hardware
    prefill, decode = (Group(role, Shape(1, 1)) for role in (Role.PREFILL, Role.DECODE))
    assert hardware.kv_tokens(prefill) > 2 * hardware.kv_tokens(decode) > 0
    assert hardware.step_time(decode).step_s((), 1, 500) > 1.5 * hardware.step_time(prefill).step_s((), 1, 500)
    assert hardware.extrapolated


# --- what cannot be ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"slo": SloConfig(ttft_s=0.01, tpot_s=0.1)}, r"slo.ttft_s = 0.01 rules everything out .* at least 0\.\d+ s"),
        (
            {"slo": SloConfig(ttft_s=0.25, tpot_s=0.002)},
            r"slo.tpot_s = 0.002 rules everything out .* at least 0\.0\d+ s",
        ),
        (
            {"model": OPT_66B.model, "profile": OPT_66B.profile, "cluster": ClusterConfig(1, 2)},
            "memory rules everything out: weights and the KV of the longest request need .* at least 2 GPUs",
        ),
        (
            {"affinity": "high", "cluster": ClusterConfig(nodes=8, gpus_per_node=1, network_gbits=2)},
            r"cluster.network_gbits = 2 rules everything out .* at least \d+",
        ),
        ({"workload": WorkloadConfig(rate=500.0)}, r"workload.rate = 500 requests/s needs \d+ GPUs .* is 4"),
    ],
)
def test_what_rules_everything_out_is_said_with_the_nearest_value_that_would_do(changes, sentence):
    with _search(replace(OPT_13B, **changes)) as search, pytest.raises(Infeasible, match=sentence):
        search.place("disaggregated")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"policy": "colocatd"}, "policy = 'colocatd' must be one of disaggregated"),
        ({"cluster": ClusterConfig(nodes=0)}, "cluster.nodes = 0 must be at least 1"),
        ({"cluster": ClusterConfig(gpu="a100")}, "gpu = 'a100' must be one of"),
        ({"slo": SloConfig(ttft_s=0.0, tpot_s=0.1)}, "slo.ttft_s = 0.0 must be greater than 0"),
        ({"search": SearchConfig(attainment=1.0)}, "search.attainment = 1.0 must be between 0 and 1"),
        ({"workload": WorkloadConfig(name="sharegtp")}, "workload 'sharegtp' is none of"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        _search(replace(OPT_13B, **changes))
