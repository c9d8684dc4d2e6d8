"""Preemption by swap: pages go to host memory and come back, and nothing is computed twice."""

from __future__ import annotations

from ds_jax.config import SchedulerConfig
from ds_jax.protocol import Medium, Request
from ds_jax.scheduling.colocated import Colocated
from ds_jax.scheduling.disaggregated import Disaggregated
from ds_jax.simulation import LinearLatency, simulate
from ds_jax.workload import Submission
from tests.scheduling.test_colocated import instance
from tests.scheduling.world import World, decode_instance, prefill_instance, prefilled, runs

SWAP = SchedulerConfig(preemption="swap")


def crowded(host_pages: int) -> World:
    """Two sequences of eight tokens more than the prompt, in a pool where both fit only at first."""
    w = World(Colocated(SWAP), instance(pages=7, host_pages=host_pages))
    w.arrive(0, 4, max_tokens=8)
    w.arrive(1, 4, max_tokens=8)
    return w


def until_a_copy(w: World) -> None:
    while not w.copies():
        w.finish(w.steps()[0])


def test_the_newest_goes_to_host_memory_when_its_last_step_is_done_and_its_pages_come_free_with_the_copy():
    w = crowded(host_pages=10)
    until_a_copy(w)
    (out,) = w.copies()
    assert (out.sequence, out.source.medium, out.destination.medium) == (1, Medium.DEVICE, Medium.HOST)
    assert not any(1 in {decode.sequence for decode in step.decodes} for step in w.steps()), (
        "nothing of it is in flight"
    )
    device, host = w.scheduler.ledgers[0], w.scheduler.host_ledgers[0]
    assert all(device.references(page) for page, _ in out.pages) and host.used == len(out.pages)
    w.land(out)
    assert host.used == len(out.pages), "it waits there"


def test_it_comes_back_before_any_prompt_begins_and_runs_to_its_end_without_a_replay():
    w = crowded(host_pages=10)
    until_a_copy(w)
    w.land(w.copies()[0])
    w.arrive(2, 1, max_tokens=2)
    while not w.copies():
        assert not any(prefilled(step) for step in w.steps()), "2 would fit, and must not overtake 1"
        w.finish(w.steps()[0])
    (back,) = w.copies()
    assert (back.sequence, back.source.medium, back.destination.medium) == (1, Medium.HOST, Medium.DEVICE)
    w.land(back)
    while w.steps():
        w.finish(w.steps()[0])
    begun = [id for step in runs(w.news) for id, start, length in prefilled(step) if start == 0 and length]
    assert begun == [0, 1, 2] and w.scheduler.host_ledgers[0].used == 0
    assert [w.contract.sequences[id].confirmed for id in range(3)] == [8, 8, 2]


def test_without_room_in_host_memory_it_is_recomputed():
    w = crowded(host_pages=1)
    while w.steps():
        w.finish(w.steps()[0])
    assert not w.copies() and [id for step in runs(w.news) for id, _, _ in prefilled(step)].count(1) == 2


def test_a_copy_to_the_host_that_fails_is_a_replay():
    w = crowded(host_pages=10)
    until_a_copy(w)
    w.land(w.copies()[0], ok=False)
    assert w.scheduler.host_ledgers[0].used == 0
    while w.steps():
        w.finish(w.steps()[0])
    assert [w.contract.sequences[id].confirmed for id in range(2)] == [8, 8]


def test_a_decode_instance_swaps_beside_its_pulls_in_the_simulator_too():
    instances = [prefill_instance(0), decode_instance(1, pages=12, host_pages=40)]
    work = [Submission(id, Request(id, 4, 12), 12) for id in range(9)]
    swapped = simulate(Disaggregated(SWAP), instances, work, LinearLatency(), strict=True).times
    recomputed = simulate(Disaggregated(), instances, work, LinearLatency(), strict=True).times
    assert sum(one.replays for one in swapped.values()) == 0 < sum(one.replays for one in recomputed.values())
    assert all(one.output_tokens == 12 for one in swapped.values())
