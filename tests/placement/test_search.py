"""The placement search: what there is to choose from, that bounds only save time, and what cannot be."""

from __future__ import annotations

import re
from collections import Counter, namedtuple
from dataclasses import replace

import pytest

from ds_jax.config import SloConfig
from ds_jax.placement.bounds import bound
from ds_jax.placement.goodput import fine_rates, goodput, published_rates
from ds_jax.placement.layouts import (
    Group,
    Shape,
    Unit,
    located,
    most_copies,
    multiplexed_units,
    paired_units,
    shapes,
    units_of,
)
from ds_jax.placement.search import Candidate, Infeasible, PlacementSearch, find_goodput
from ds_jax.placement.sketch import MARGIN, SKETCHED
from ds_jax.placement.trial import BOTH, Requests
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
    units = multiplexed_units(read_configs(OPT_13B.model).arch, OPT_13B, "multiplexed")
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

    def trial(rate: float, whole: bool) -> Score:
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
    found = goodput(lambda rate, whole: Score(rate <= 1.6, 0.0), published_rates())
    assert found.per_gpu == low == 1.5625


# --- the search -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("affinity", "rule"), [("low", "joint"), ("high", "joint"), ("low", "published"), ("high", "published")]
)
def test_pruning_changes_nothing_but_the_time(rule, affinity):
    plan = replace(SMALL, affinity=affinity, search=replace(SMALL.search, rule=rule, requests=25))
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


@pytest.mark.parametrize(
    ("policy", "rule"),
    [
        ("disaggregated", "joint"),
        ("colocated", "joint"),
        ("chunked", "joint"),
        ("multiplexed", "joint"),
        ("deflected", "joint"),
        ("disaggregated", "published"),
        ("colocated", "published"),
    ],
)
def test_no_bound_and_no_sketch_is_below_what_simulation_finds(policy, rule):
    plan = replace(SMALL, policy=policy, search=replace(SMALL.search, rule=rule))
    search = _search(plan)
    arch = search.hardware.arch
    units = units_of(policy, arch, plan)
    assert policy != "deflected" or Unit((Group(Role.MIXED, Shape(1, 1), 3),)) in units
    for unit in units if policy not in ("multiplexed", "deflected") else units[::3]:
        limit = bound(unit, plan, search.hardware, search.requests, policy=policy)
        highest = 5.0 if rule == "published" else 50.0
        found = find_goodput(search.trials, Candidate(unit, policy), 0.0, highest)
        assert found.per_gpu <= limit.per_gpu, unit
        if policy in SKETCHED and found.per_gpu:
            assert search.sketches.run(unit, policy, found.per_gpu * unit.gpus / MARGIN).passed, unit


def test_a_prefill_worker_takes_what_slower_mixed_workers_cannot():
    """One that prefills and three mixed: the mixed ones prefill as well, so that prompts do not bound at the rate of
    the one alone; and a mixed worker too slow for the target of TTFT rules nothing out beside a fast one."""
    plan = replace(OPT_13B, search=SearchConfig(requests=1000))
    search = _search(plan)
    one, four = (Unit((Group(Role.PREFILL, Shape(1, 1)), Group(Role.MIXED, Shape(1, 1), mixed))) for mixed in (1, 3))
    rates = [
        bound(unit, plan, search.hardware, search.requests, policy="multiplexed").per_gpu * unit.gpus
        for unit in (one, four)
    ]
    assert rates[1] > 1.7 * rates[0]
    tight = replace(OPT_13B, slo=SloConfig(ttft_s=0.12, tpot_s=0.1))
    search = _search(tight)
    slow, fast = Group(Role.MIXED, Shape(1, 1)), Group(Role.PREFILL, Shape(2, 1))
    assert bound(Unit((slow,)), tight, search.hardware, search.requests, policy="multiplexed").per_gpu == 0
    assert bound(Unit((fast, slow)), tight, search.hardware, search.requests, policy="multiplexed").per_gpu > 0


def test_both_phases_have_as_many_instances_as_the_rate_that_is_asked_for_needs():
    plan = replace(SMALL, affinity="high", cluster=ClusterConfig(nodes=4, gpus_per_node=2, network_gbits=400))
    plan = replace(plan, workload=WorkloadConfig(rate=8.0))
    with _search(plan) as search:
        placement = search.place("disaggregated")
    assert placement.gpus <= 8 and placement.goodput_per_gpu * placement.gpus >= 8.0


def test_a_pair_that_fits_is_found_where_the_best_of_each_phase_do_not_fit_together():
    plan = replace(OPT_66B, affinity="high", search=replace(OPT_66B.search, requests=40))
    with _search(plan) as search:
        placement = search.place("disaggregated")
    alone = {role: [one for one in search.judged if one.candidate.phases == (role,)] for role in BOTH}
    assert all(alone.values()) and placement.gpus <= 8 and not placement.unit.kv_crosses_nodes
    with _search(replace(plan, affinity="low")) as search:
        assert placement.goodput_per_gpu >= 0.97 * search.place("disaggregated").goodput_per_gpu


# --- where ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cluster", "groups", "copies"),
    [
        (ClusterConfig(4, 4), (Group(Role.PREFILL, Shape(2, 1)), Group(Role.DECODE, Shape(1, 1))), 4),
        (ClusterConfig(4, 8), (Group(Role.MIXED, Shape(6, 1)),), 4),
        (ClusterConfig(4, 8), (Group(Role.MIXED, Shape(4, 4)),), 2),
        (ClusterConfig(1, 8), (Group(Role.PREFILL, Shape(1, 1)), Group(Role.DECODE, Shape(1, 1))), 4),
    ],
)
def test_no_copy_of_a_unit_straddles_nodes_where_it_must_not(cluster, groups, copies):
    assert most_copies(replace(OPT_13B, cluster=cluster), Unit(groups)) == copies


def test_every_instance_is_on_a_node_that_has_room_for_it():
    plan = replace(OPT_13B, affinity="high", cluster=ClusterConfig(nodes=3, gpus_per_node=8))
    groups = (Group(Role.PREFILL, Shape(3, 1), 4), Group(Role.DECODE, Shape(4, 2), 1))
    places = located(plan, Unit(groups, kv_crosses_nodes=True))
    assert places is not None
    used = Counter(
        node for stages, tp in zip(places, [3, 3, 3, 3, 4], strict=True) for node in stages for _ in range(tp)
    )
    assert set(used) <= {0, 1, 2} and max(used.values()) <= 8 and used.total() == 20
    assert located(plan, Unit((Group(Role.PREFILL, Shape(6, 1), 4),))) is None  # 24 GPUs, but three times six of eight


def test_instances_on_gpus_of_another_kind_have_nodes_of_their_own_and_all_kv_crosses():
    cluster = ClusterConfig(nodes=1, gpus_per_node=4, decode_gpu="h20-96g", decode_nodes=2, network_gbits=800)
    plan = replace(SMALL, profile="", affinity="high", cluster=cluster)
    with _search(plan) as search:
        placement = search.place("disaggregated")
    assert placement.unit.kv_crosses_nodes
    places = located(plan, placement.unit, placement.replicas)
    assert places is not None
    roles = [group.role for group in placement.unit.groups for _ in range(group.instances)] * placement.replicas
    for role, stages in zip(roles, places, strict=True):
        assert set(stages) <= ({0} if role is Role.PREFILL else {1, 2})
    assert located(plan, placement.unit, placement.replicas + 1) is None
    with pytest.raises(ValueError, match="affinity = low must be high"):
        _search(replace(plan, affinity="low"))


def test_what_was_found_is_kept(tmp_path):
    plan = replace(OPT_13B, search=replace(OPT_13B.search, cache=str(tmp_path)))
    with _search(plan) as search:
        first = search.find(beside=())
    with _search(plan) as search:
        again = search.find(beside=())
    assert again.placement.goodput_per_gpu == first.placement.goodput_per_gpu
    trials = [sum(one.goodput.trials for one in found.judged if one.goodput) for found in (first, again)]
    assert trials[1] < trials[0] / 2
    assert again.cached and not first.cached
    winner = Candidate(first.placement.unit, "disaggregated")
    for other in (replace(plan, slo=SloConfig(ttft_s=0.3, tpot_s=0.1)), replace(plan, slots=8)):
        with _search(other) as search:
            assert search.cache.get(winner)[1] is None
    requests = Requests(plan, [one._replace(output_tokens=1) for one in Requests(plan).submissions])
    with PlacementSearch(plan, read_configs(plan.model).arch, requests=requests) as search:
        assert search.cache.get(winner)[1] is None
    with _search(plan) as search:
        assert search.cache.get(winner)[1] is not None


def test_decode_gpus_of_another_kind_have_step_times_and_memory_of_their_own():
    plan = replace(OPT_13B, profile="", affinity="high", cluster=ClusterConfig(gpus_per_node=4, decode_gpu="l40s-48g"))
    hardware = _search(plan).hardware
    prefill, decode = (Group(role, Shape(1, 1)) for role in (Role.PREFILL, Role.DECODE))
    assert hardware.kv_tokens(prefill) > 2 * hardware.kv_tokens(decode) > 0
    assert hardware.step_time(decode).step_s((), 1, 500) > 1.5 * hardware.step_time(prefill).step_s((), 1, 500)
    assert hardware.extrapolated


def test_a_profile_of_other_gpus_is_not_taken_for_measured():
    assert not _search(OPT_13B).hardware.extrapolated
    for change in ({"cluster": ClusterConfig(1, 4, gpu="h100-80g")}, {"model": OPT_66B.model}, {"dtype": "bfloat16"}):
        hardware = _search(replace(OPT_13B, **change)).hardware
        assert hardware.extrapolated and "step times are a roofline instead" in hardware.notes()[0]


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
            "memory rules everything out: weights and the KV of the longest request.* need at least 4 GPUs",
        ),
        (
            {"affinity": "high", "cluster": ClusterConfig(nodes=8, gpus_per_node=1, network_gbits=2)},
            r"cluster.network_gbits = 2 rules everything out .* at least \d+",
        ),
        ({"workload": WorkloadConfig(rate=500.0)}, r"workload.rate = 500 requests/s needs \d+ GPUs .* is 1 x 4"),
    ],
)
def test_what_rules_everything_out_is_said_with_the_nearest_value_that_would_do(changes, sentence):
    with _search(replace(OPT_13B, **changes)) as search, pytest.raises(Infeasible, match=sentence):
        search.place("disaggregated")


@pytest.mark.parametrize("target", ["ttft_s", "tpot_s"])
def test_the_target_that_is_told_does(target):
    plan = replace(SMALL, slo=replace(SMALL.slo, **{target: 0.002}))
    with _search(plan) as search, pytest.raises(Infeasible) as error:
        search.place("disaggregated")
    told = re.search(rf"slo.{target} = 0.002 .* at least ([\d.]+) s", str(error.value))
    assert told
    with _search(replace(plan, slo=replace(plan.slo, **{target: float(told[1])}))) as search:
        assert search.place("disaggregated").goodput_per_gpu > 0


def test_the_cluster_that_is_told_does():
    plan = replace(OPT_66B, cluster=ClusterConfig(1, 3))
    with _search(plan) as search, pytest.raises(Infeasible, match="the smallest cluster that works is 1 x 4"):
        search.place("disaggregated")
    with _search(replace(plan, cluster=ClusterConfig(1, 4), slo=SloConfig(ttft_s=10.0, tpot_s=0.5))) as search:
        assert search.place("disaggregated").gpus == 4


def test_parallelism_that_was_not_measured_is_said_with_what_was():
    plan = replace(OPT_66B, policy="colocated", search=replace(OPT_66B.search, max_tp=1), cluster=ClusterConfig(1, 4))
    with _search(plan) as search, pytest.raises(Infeasible, match="it has step times for tp = 2, 3, 4, 8"):
        search.place("colocated")


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
