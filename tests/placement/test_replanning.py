"""Fleets that follow the workload: what a change consists of, and when there is one."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest

from ds_jax.config import SloConfig
from ds_jax.placement import replanning
from ds_jax.placement.changeover import ChangeCost, Changeover
from ds_jax.placement.following import follow
from ds_jax.placement.hardware import Hardware
from ds_jax.placement.layouts import Group, Shape
from ds_jax.placement.replanning import Replanner
from ds_jax.plan import ClusterConfig, PlanConfig, SearchConfig
from ds_jax.protocol import Drain, InstanceLost, InstanceUp, Role
from ds_jax.workload import Lengths, submission, workload
from ds_jax.workload.monitor import Pattern, Shift
from models.folder import read_configs

PLAN = PlanConfig(
    model="models/published/opt-13b",
    profile="configs/latency/a100_80g_opt_13b.json",
    cluster=ClusterConfig(nodes=1, gpus_per_node=4),
    slo=SloConfig(ttft_s=1.0, tpot_s=0.1),
    search=SearchConfig(requests=150, precision=0.2, workers=1, max_tp=1, max_pp=1),
)
ARCH = read_configs(PLAN.model).arch
SHIFT = Shift(0, 0, ("rate",), Pattern(2, 1.0, 1.0, 1.0), Pattern(2, 1.0, 1.0, 1.0))


ONE = Shape(1, 1)


def fleet(prefills: int, decodes: int, prefill: Shape = ONE, decode: Shape = ONE):
    return (Group(Role.PREFILL, prefill, prefills), Group(Role.DECODE, decode, decodes))


FLEETS = [fleet(1, 3), fleet(3, 1), fleet(1, 1, Shape(2, 1), Shape(2, 1)), fleet(2, 1, decode=Shape(2, 1)), fleet(2, 2)]


class Fixed(Replanner):
    """Plans what it is told to, and keeps what it was asked."""

    def __init__(self, *plans):
        super().__init__(PLAN, ARCH)
        self.plans, self.asked = list(plans), []

    def fleet(self, lengths, rate=0.0, now=None):
        self.asked.append((lengths, rate))
        return self.plans.pop(0)


def shifting(*parts, gap_s: float = 0.0):
    """Workloads (name, rate, count) one after another, ids counted through."""
    trace, begin_ns = [], 0
    for seed, (name, rate, count) in enumerate(parts):
        for one in workload(name, rate=rate, count=count, seed=seed):
            length = Lengths(one.request.prompt_tokens, one.output_tokens)
            trace.append(submission(len(trace), begin_ns + one.arrival_ns, length))
        begin_ns = trace[-1].arrival_ns + round(gap_s * 1e9)
    return trace


# --- a change ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(10))
def test_no_gpu_is_in_two_instances_and_what_was_drained_never_comes_up(seed):
    rng = random.Random(seed)
    changeover = Changeover(FLEETS[0], Hardware(PLAN, ARCH))
    events = [(0, InstanceUp(one)) for one in changeover.instances]
    now_ns = 0
    for _ in range(8):
        now_ns = changeover.up_ns + rng.randrange(10**9)
        if (after := rng.choice(FLEETS)) != changeover.fleet:
            events += changeover.change(after, SHIFT, now_ns)[1]
    alive, drained, seen = {}, set(), set()
    for _, event in sorted(events, key=lambda one: one[0]):
        if isinstance(event, InstanceUp):
            assert event.instance.id not in seen
            seen.add(event.instance.id)
            alive[event.instance.id] = changeover.kinds[event.instance.id][1].gpus
            assert sum(alive.values()) <= 4
        elif isinstance(event, Drain):
            assert event.instance in alive and event.instance not in drained
            drained.add(event.instance)
        else:
            assert isinstance(event, InstanceLost) and event.instance in drained
            del alive[event.instance]
    assert sorted(alive) == [one.id for one in changeover.instances]
    assert not drained & set(alive)
    kinds = sorted(changeover.kinds[id] for id in alive)
    assert kinds == sorted((g.role, g.shape) for g in changeover.fleet for _ in range(g.instances))


def test_a_change_waits_for_the_one_before_it():
    changeover = Changeover(FLEETS[0], Hardware(PLAN, ARCH))
    change, _ = changeover.change(FLEETS[1], SHIFT, 10**9)
    assert change.planned_ns < change.at_ns < change.up_ns == changeover.up_ns
    with pytest.raises(ValueError, match="must wait until the last one is over"):
        changeover.change(FLEETS[0], SHIFT, change.up_ns - 1)


def test_gpus_that_change_roles_keep_their_weights_and_others_load_theirs_in_the_models_type():
    weights = {"float16": 2 * ARCH.parameters(), "float32": 4 * ARCH.parameters()}
    for dtype, size in weights.items():
        plan = replace(PLAN, dtype=dtype)
        cost = ChangeCost(search_s=0, drain_s=0, start_s=0, load_bytes_per_s=1e9)
        flip, _ = Changeover(fleet(1, 3), Hardware(plan, ARCH), cost).change(fleet(3, 1), SHIFT, 0)
        assert (flip.moved, flip.loaded_bytes, flip.up_ns) == (2, 0.0, 0)
        whole, _ = Changeover(fleet(1, 3), Hardware(plan, ARCH), cost).change(
            fleet(1, 1, Shape(2, 1), Shape(2, 1)), SHIFT, 0
        )
        assert whole.moved == 4
        assert whole.loaded_bytes == pytest.approx(2 * size, rel=0.02)  # two instances
        assert whole.up_ns == pytest.approx(size / 2, rel=0.02)  # half of the weights on each GPU, at 1 byte/ns


# --- a trace ----------------------------------------------------------------------------------------------------------


def test_a_shift_is_followed_by_one_change_and_every_request_ends():
    trace = shifting(("100/60", 10.0, 800), ("1500/60", 4.0, 700))
    planner = Fixed(fleet(3, 1))
    followed = follow(planner, trace, fleet(1, 3), strict=True)
    assert len(followed.times) == len(trace) and not any(one.rejected for one in followed.times.values())
    (change,) = followed.changes
    assert "prompt_tokens" in change.shift.what
    assert trace[800].arrival_ns < change.shift.at_ns <= change.planned_ns
    ((lengths, rate),) = planner.asked
    assert len(lengths) >= 200 and rate == pytest.approx(4.0, rel=0.25)
    known = [one for one in followed.times.values() if one.end_ns <= change.planned_ns and one.sequence >= 800]
    assert len(known) >= 100, "outputs are heard of when requests end"


def test_a_run_without_replanning_is_the_simulation_of_its_fleet():
    trace = shifting(("100/60", 10.0, 300))
    followed = follow(Fixed(), trace, fleet(1, 3), replan=False)
    assert len(followed.times) == 300 and not followed.changes and not followed.shifts


def test_what_is_told_during_a_change_is_planned_for_when_it_is_over():
    trace = shifting(("100/60", 10.0, 800), ("1500/60", 4.0, 700), ("100/60", 10.0, 1200))
    cost = ChangeCost(search_s=150.0)  # longer than the second stretch
    followed = follow(Fixed(fleet(3, 1), fleet(1, 3)), trace, fleet(1, 3), cost=cost)
    first, second = followed.changes
    assert second.shift.at_ns < first.up_ns <= second.planned_ns
    assert len(followed.times) == len(trace)


def test_a_stationary_trace_changes_nothing_whatever_the_planner_would_do():
    for seed in range(1):
        trace = list(workload("sharegpt", rate=5.0, count=1500, seed=seed))
        planner = Fixed()  # has no plan to give
        assert follow(planner, trace, fleet(2, 2)).changes == [] and not planner.asked


# --- a plan -----------------------------------------------------------------------------------------------------------


def test_plans_fit_the_lengths_and_a_fleet_that_serves_enough_or_nearly_the_most_stays(monkeypatch):
    monkeypatch.setattr(replanning, "LONGEST", 400)
    replanner = Replanner(PLAN, ARCH)
    lengths = [Lengths(1500, 40)] * 10
    best, other = replanner.fleet(lengths), fleet(1, 3)
    assert best == fleet(3, 1)
    most = replanner.served(best, lengths)
    assert replanner.served(other, lengths) < most / replanning.GAIN
    assert replanner.fleet(lengths, 0.2, other) == other  # far below what it serves
    assert replanner.fleet(lengths, most, other) == best
    assert replanner.fleet(lengths, 2 * most, best) == best


def test_what_a_phase_can_do_is_what_queueing_theory_and_its_memory_say():
    replanner = Replanner(PLAN, ARCH)
    lengths = [Lengths(1000, 101)] * 10
    step_s = replanner.hardware.step_time(Group(Role.PREFILL, ONE)).step_s
    prefill_s = step_s([(0, 1000)], 0, 0)
    rate = replanner.phase_rate(Role.PREFILL, ONE, lengths)
    load = rate * prefill_s
    assert prefill_s + math.log(10) * load * prefill_s / (2 * (1 - load)) == pytest.approx(PLAN.slo.ttft_s)
    rate = replanner.phase_rate(Role.DECODE, ONE, lengths)
    context = 1000 + 101 / 2
    batch = int(replanner.hardware.kv_tokens(Group(Role.DECODE, ONE)) / context)
    assert rate == pytest.approx(batch / step_s((), batch, round(batch * context)) / 100, rel=0.01)
    assert replanner.phase_rate(Role.PREFILL, ONE, [Lengths(60_000, 2)]) == 0.0, "it does not fit"


def test_the_best_split_follows_the_lengths():
    replanner = Replanner(PLAN, ARCH)
    assert replanner._weighed([Lengths(1500, 40)] * 10)[0][2] == fleet(3, 1)
    assert replanner._weighed([Lengths(100, 300)] * 10)[0][2] == fleet(1, 3)
    assert [tuple(group.instances for group in one) for one in replanner.splits(fleet(1, 3))] == [
        (1, 3),
        (2, 2),
        (3, 1),
    ]
