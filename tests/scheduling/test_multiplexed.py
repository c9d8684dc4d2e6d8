"""Tropical's rules, each as a scenario to be checked by eye, and the conformance machine."""

from __future__ import annotations

import pytest

from ds_jax.config import SchedulerConfig
from ds_jax.protocol import Request, Role
from ds_jax.scheduling.flight import Flight
from ds_jax.scheduling.multiplexed import Multiplexed
from ds_jax.scheduling.sequence import Sequence
from ds_jax.scheduling.worker import Worker
from tests.scheduling.foretold import Clocked, WithTargets, fewer, foretell, slo, worker
from tests.scheduling.machine import conformance
from tests.scheduling.world import copies, decoded, prefilled, runs

PREFILL, MIXED, OTHER = worker(0, Role.PREFILL), worker(1, Role.MIXED), worker(2, Role.MIXED)


def world(*instances, **options):
    return Clocked(Multiplexed(SchedulerConfig(**options), foretell), *(instances or (PREFILL, MIXED)))


def test_the_code_tries_a_multiplexing_worker_first_and_the_readme_an_idle_prefill_worker():
    assert runs(world().arrive(0, 20))[0].instance == MIXED.id
    assert runs(world(routing="readme").arrive(0, 20))[0].instance == PREFILL.id


def test_long_prompts_go_to_prefill_workers():
    big = world(worker(0, Role.PREFILL, pages=9000), worker(1, Role.MIXED, pages=9000))
    assert runs(big.arrive(0, 8191))[0].instance == MIXED.id
    assert runs(big.arrive(1, 8192))[0].instance == PREFILL.id


@pytest.mark.parametrize(("prompt", "taken"), [(20, True), (90, False)])
def test_a_prompt_is_multiplexed_only_if_every_decode_keeps_its_slack(prompt, taken):
    """Tokens every 10 ms with SLO_tpot 50 ms: after 3 tokens 100 ms and more are banked, two steps are in flight."""
    one = world()
    one.served(0, 5, tokens=3)
    one.arrive(1, prompt, slo=slo(10**6, 50))
    assert one.scheduler.sequences[1].home.instance.id == (MIXED.id if taken else PREFILL.id)


def test_slack_is_banked_token_by_token():
    """A prompt of 200 ms has to wait until 10 ms tokens have banked it, though it could be routed at any time."""
    one = world(MIXED, OTHER, routing="readme")
    one.served(0, 5, tokens=2)
    few = one.scheduler.foresight(one.scheduler.workers[1]).due_ns() - one.now_ns
    while one.contract.sequences[0].confirmed < 8:
        one.after(10).finish(one.steps()[0])
    many = one.scheduler.foresight(one.scheduler.workers[1]).due_ns() - one.now_ns
    assert many - few == pytest.approx(6 * (50 - 10) * 1e6)


def test_a_prefill_here_is_decoded_here_and_one_from_elsewhere_where_the_fewest_tokens_are():
    one = world(PREFILL, MIXED, OTHER)
    one.arrive(0, 40)
    here = one.steps()[0]
    assert copies(one.finish(here)) == [] and one.steps(here.instance)
    two = world(PREFILL, MIXED, OTHER, routing="readme")
    two.arrive(0, 40)
    two.finish(two.steps(PREFILL.id)[0])
    assert two.copies()[0].destination.instance == MIXED.id
    two.land(two.copies()[0])
    two.arrive(1, 4)
    two.finish(two.steps(PREFILL.id)[0])
    assert two.copies()[0].destination.instance == OTHER.id


def test_a_multiplexed_prompt_runs_alone_and_the_decodes_have_a_turn_before_the_next():
    one = world(MIXED)
    one.served(0, 4, tokens=1, tpot_ms=10**6)
    one.arrive(1, 6)
    one.arrive(2, 6)
    seen = []
    while len(seen) < 6:
        step = one.steps()[0]
        seen.append("p" if step.prefills else "d")
        assert not (step.prefills and step.decodes)
        one.after(10).finish(step)
    assert "pp" not in "".join(seen) and seen.count("p") == 2


@pytest.mark.parametrize(("order", "first"), [("fcfs", 1), ("sjf", 2), ("ljf", 3), ("edf", 4), ("llf", 3)])
def test_waiting_prompts_are_run_in_the_configured_order(order, first):
    """Prompt tokens are milliseconds: 3 has 320 - 300 = 20 ms of slack, 4 has 100 - 60 = 40, the others far more."""
    scheduler = world(queue_order=order).scheduler
    figures = {1: (50, 900), 2: (30, 900), 3: (300, 320), 4: (60, 100)}
    waiting = [
        Sequence(Request(id, prompt, 9, slo=slo(ttft_ms, 50)), order=id) for id, (prompt, ttft_ms) in figures.items()
    ]
    assert min(waiting, key=lambda one: (scheduler.rank(one, scheduler.workers[PREFILL.id]), one.order)).id == first


def test_a_prompt_that_is_half_done_gives_way_to_a_shorter_one_at_the_border_of_a_chunk():
    """Worker 1 has decodes without slack, so that both prompts are run by worker 0."""
    one = world(worker(0, Role.PREFILL, max_step_tokens=10), MIXED, queue_order="sjf")
    one.served(9, 5, tokens=1, tpot_ms=1)
    one.arrive(0, 100, slo=slo(10**6, 50))
    assert [prefilled(step) for step in one.steps(0)] == [[(0, 0, 10)], [(0, 10, 10)]]
    one.arrive(1, 8, slo=slo(10**6, 50))
    one.finish(one.steps(0)[0])
    assert prefilled(one.steps(0)[-1]) == [(1, 0, 8)]


@pytest.mark.parametrize(
    ("routing", "watermark", "where"), [("readme", 0.1, None), ("readme", 0.9, MIXED.id), ("code", 0.1, MIXED.id)]
)
def test_the_watermark_is_the_readmes_and_not_the_codes(routing, watermark, where):
    """A prompt of 30 pages, where 20 of 200 are a tenth. The README tries an idle prefill worker first: it is busy."""
    one = world(PREFILL, worker(1, Role.MIXED, pages=200), memory_watermark=watermark, routing=routing)
    if routing == "readme":
        one.arrive(0, 250)
    one.arrive(1, 60, slo=slo(300, 50))
    home = one.scheduler.sequences[1].home
    assert (home and home.instance.id) == where


def test_the_codes_prefill_workers_run_the_shortest_prompt_first():
    one = world(PREFILL, worker(1, Role.MIXED, max_step_tokens=1000))
    one.served(9, 5, tokens=1, tpot_ms=1)
    for id, prompt in enumerate((300, 200, 100, 50)):
        one.arrive(id, prompt, slo=slo(10**6, 50))
    begun = [prefilled(step)[0][0] for step in one.steps(0)]
    while len(begun) < 4:
        one.after(1).finish(one.steps(0)[0])
        begun += [prefilled(step)[0][0] for step in one.steps(0) if prefilled(step)[0][0] not in begun]
    assert begun == [0, 1, 3, 2], "two steps are in flight when the short ones come"


def test_a_prompt_that_would_make_another_late_waits_though_it_would_be_in_time_itself():
    """Shortest first behind 300 ms that run: 2 is due at 560 ms and done at 500 or so. 60 ms more are too many."""
    one = world(PREFILL, MIXED)
    one.served(9, 5, tokens=1, tpot_ms=1)
    for id, (prompt, ttft_ms) in enumerate(((150, 10**6), (150, 10**6), (200, 560), (60, 10**6))):
        one.arrive(id, prompt, slo=slo(ttft_ms, 50))
    homes = {id: one.scheduler.sequences[id].home for id in (2, 3)}
    assert homes[2].instance.id == PREFILL.id and homes[3] is None


def test_requests_without_targets_have_all_the_slack_there_is():
    one = world(MIXED)
    one.arrive(0, 10)
    one.finish(one.steps()[0])
    assert decoded(one.steps()[0]) == [0]
    one.arrive(1, 500)
    assert one.scheduler.sequences[1].home.instance.id == MIXED.id


# --- nobody waits for ever: hand-overs and prompts on one multiplexing worker -----------------------------------------


def waiting_to_be_pulled(here, order, prompt):
    """A finished prefill of another worker, offered to this one."""
    there = Worker(worker(9, Role.PREFILL))
    sequence = Sequence(Request(order, prompt, 8), order)
    there.prompts.enqueue(sequence, replay=False)
    sequence.home = there
    there.prompts.start(sequence)
    there.prompts.chunk(sequence, prompt)
    sequence.sampling, sequence.counted = 0, 1
    there.prompts.land(sequence)
    here.decoding.offer(sequence)


@pytest.mark.parametrize(("pages", "order", "pulled"), [(4, 1, False), (4, -1, True), (8, 1, True)])
def test_a_hand_over_leaves_pages_for_an_older_prompt_that_waits_for_them(pages, order, pulled):
    here = Worker(worker(1, Role.MIXED, pages=pages, page_size=4))
    here.prompts.enqueue(Sequence(Request(0, 13, 4), 0), replay=False)
    waiting_to_be_pulled(here, order, 3)
    assert (here.decoding.pull(Flight()) is not None) is pulled


def test_no_prompt_begins_where_a_hand_over_waits_for_those_who_landed_before_it():
    here = Worker(worker(1, Role.MIXED, pages=20, page_size=4), pull_watermark=0.05)
    prompt = Sequence(Request(5, 4, 4), 5)
    waiting_to_be_pulled(here, 1, 3)
    assert here.can_start_beside(prompt)
    landed = Sequence(Request(0, 4, 4), 0)
    landed.lease = here.ledger.take(4)
    here.decoding.land(landed)
    assert not here.can_start_beside(prompt) and here.decoding.pull(Flight()) is None
    here.decoding.admit()
    assert here.can_start_beside(prompt)


class Impatient(Multiplexed):
    """So that the machine sees within its bound that nobody starves."""

    most_overtaking = 3


def machine(examples, **options):
    def make():
        return WithTargets(Impatient(SchedulerConfig(**options)))

    return fewer(conformance(make, roles=(Role.PREFILL, Role.MIXED), first_come_first_served=False), examples)


TestAsTheCode = machine(30)
TestFirstComeFirstServed = machine(15, queue_order="fcfs", routing="readme")
TestLeastSlackFirst = machine(15, queue_order="llf")
