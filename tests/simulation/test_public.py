"""The public systems' rules: serial pulls, hosts that work on every stage, pools with room for activations."""

from __future__ import annotations

from pathlib import Path

import pytest

from ds_jax.config import SchedulerConfig
from ds_jax.latency import load
from ds_jax.protocol import Copy, CopyDone, Decode, Instance, Medium, Prefill, Role, Run, Step, StepDone
from ds_jax.scheduling import create_scheduler
from ds_jax.simulation import LinearLatency, simulate
from ds_jax.simulation.lane import Pipeline
from ds_jax.simulation.public import PUBLIC_DISTSERVE, PUBLIC_VLLM, HostWork
from ds_jax.workload import fixed, poisson, submissions, uniform

CHECKOUT = Path(__file__).resolve().parents[2]
MS = 1_000_000
PREFILL = Instance(0, Role.PREFILL, 0, 400, 4, max_step_tokens=200, max_step_sequences=4, saturation_tokens=200)
LATENCY = LinearLatency(MS, 0, 2 * MS, 0, 0, 5 * MS, 0)


def decode(lanes: int, pages: int = 60) -> Instance:
    return Instance(1, Role.DECODE, 0, pages, 4, lanes=lanes, slots=8, host_pages=80)


def serial(preemption: str = "recompute"):
    options = SchedulerConfig(steps_per_lane=1, preemption=preemption)
    return create_scheduler("ds_jax.scheduling.serial:Serial", options)


def test_a_host_works_on_each_stage_and_shows_only_where_the_stage_would_not_wait_anyway():
    alone = Pipeline(2)
    assert alone.enter(0, 20, 3) == 3 + 10 + 10, "the second stage's host is ready before the first stage is done"
    assert alone.enter(13, 20, 3) == max(13 + 3 + 10, 23 + 3) + 10
    assert Pipeline(1).enter(5, 20, 3) == 28
    full = Pipeline(2)
    ends = [full.enter(0, 20, 3) for _ in range(4)]
    assert [after - before for before, after in zip(ends, ends[1:], strict=False)] == [13, 13, 13]


def test_the_serial_loop_begins_no_step_while_it_pulls_and_pulls_one_at_a_time():
    work = submissions(poisson(150.0, 60), uniform((1, 60), (2, 20), 60))
    for lanes in (1, 2):
        log = simulate(serial(), [PREFILL, decode(lanes)], work, LATENCY, strict=True, log=True).log
        pulling, stepping = False, set[int]()
        for entry in log.entries:
            if isinstance(entry.event, CopyDone):
                pulling = False
            elif isinstance(entry.event, StepDone):
                stepping.discard(entry.event.step)
            for command in entry.commands:
                if isinstance(command, Copy):
                    assert not pulling and len(stepping) < lanes
                    pulling = True
                elif isinstance(command, Run) and command.step.instance == 1:
                    stepping.add(command.step.id)
                    assert not pulling and len(stepping) <= lanes


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
@pytest.mark.parametrize("lanes", [1, 2])
def test_the_serial_loop_keeps_every_rule_page_by_page_and_leaves_nobody_behind(lanes, preemption):
    work = submissions(poisson(200.0, 120, lanes), uniform((1, 100), (1, 30), 120, lanes), max_tokens=30)
    result = simulate(serial(preemption), [PREFILL, decode(lanes)], work, LATENCY, strict=True, log=True)
    assert all(result.times[one.request.id].output_tokens == one.output_tokens for one in work)
    replays = sum(one.replays for one in result.times.values())
    swaps = [
        command
        for entry in result.log.entries
        for command in entry.commands
        if isinstance(command, Copy) and command.destination.medium is Medium.HOST
    ]
    assert (replays, len(swaps)) > (0, 0) if preemption == "recompute" else len(swaps) > replays == 0


def test_a_sequence_with_more_than_half_of_the_pool_is_admitted_when_nobody_runs():
    work = submissions([0, 1], fixed(150, 20, 2))
    assert len(simulate(serial(), [PREFILL, decode(1)], work, LATENCY, strict=True).times) == 2


def test_pulls_wait_for_the_steps_in_flight_and_overlap_with_none():
    class After(LinearLatency):
        copies_after_steps = True

    slow = After(MS, 0, 100 * MS, 0, 0, 5 * MS, 0)
    work = submissions([0, 10 * MS], fixed(10, 6, 2))
    # The first decodes on lane 0 from 1 + 5 ms on, 100 ms a step. The second is prefilled at 11 ms; lane 1 is idle and
    # pulls at once, but the copy begins when lane 0's step has left the pipeline: at 106 ms.
    times = simulate(serial(), [PREFILL, decode(2)], work, slow, strict=True).times
    assert times[1].stages_ns[2] == (106 + 5 - 11) * MS


def test_host_work_counts_steps_context_and_sequences_and_the_crowd_less():
    host = HostWork(step_s=1.0, context_token_s=0.01, sequence_s=0.5, crowd=4, crowded_sequence_s=0.1)
    assert host.seconds(3, 100) == pytest.approx(1 + 1 + 1.5)
    assert host.seconds(10, 100) == pytest.approx(1 + 1 + 2 + 0.6)


def test_only_decode_steps_have_host_work():
    profile = load(CHECKOUT / "configs/latency/a100_80g_opt_13b.json")
    latency = PUBLIC_DISTSERVE.latency(profile, [(0, 2, 1), (1, 1, 1)])
    prompts = Step(0, 0, 0, 0, (Prefill(0, 0, 100, True),))
    decodes = Step(1, 1, 0, 0, decodes=(Decode(0, 0), Decode(1, 1)))
    assert latency.host_ns(prompts, 0) == 0
    assert latency.host_ns(decodes, 1000) == round(1e9 * PUBLIC_DISTSERVE.host.seconds(2, 1000))
    assert latency.step_ns(prompts, 0) == round(1e9 * profile.step_time(2).step_s([(0, 100)], 0, 0))


def test_the_pools_are_as_published_less_the_room_that_vllm_leaves_for_activations():
    profile = load(CHECKOUT / "configs/latency/a100_80g_opt_13b.json")
    capacities = {(1, 1): 66144, (1, 2): 163008, (2, 1): 163008, (4, 1): 356736}
    for (tp, pp), tokens in capacities.items():
        assert PUBLIC_DISTSERVE.kv_tokens(profile, 5120, tp, pp) == tokens
    # 16,384 tokens x 66 vectors x 5,120 numbers x 2 bytes = 11.07 GB; a token of KV has 819,200 bytes
    assert PUBLIC_VLLM.kv_tokens(profile, 5120, 1, 1) == int(66144 - 16384 * 66 * 5120 * 2 / 819200)
    with pytest.raises(ValueError, match="tp,pp = 16,1 has no KV capacity in the profile of opt-13b"):
        PUBLIC_DISTSERVE.kv_tokens(profile, 5120, 16, 1)
