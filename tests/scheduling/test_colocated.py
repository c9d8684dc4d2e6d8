"""vLLM's first scheduler, rule by rule, in steps that one can check by eye."""

from __future__ import annotations

from typing import Any

from ds_jax.protocol import Arrived, Instance, Request, Role
from ds_jax.scheduling.colocated import Colocated
from tests.scheduling.world import World, copies, decoded, prefilled, runs


def instance(id: int = 0, **changes: Any) -> Instance:
    """Two tokens a page; limits wide unless changed."""
    limits = {"max_step_tokens": 100, "max_step_sequences": 100, "slots": 8} | changes
    return Instance(**({"id": id, "role": Role.MIXED, "epoch": 0, "pages": 100, "page_size": 2} | limits))


def advance(w: World, steps: int) -> list[tuple[list[int], list[int]]]:
    """Finish the oldest steps one by one; (prompts, decodes) of each."""
    seen = []
    for _ in range(steps):
        step = w.steps()[0]
        seen.append(([id for id, _, _ in prefilled(step)], decoded(step)))
        w.finish(step)
    return seen


def test_waiting_prompts_run_before_any_decode_and_never_beside_one():
    w = World(Colocated(), instance())
    w.arrive(0, 4)
    assert advance(w, 1) == [([0], [])]
    w.arrive(1, 4)  # two decode steps of 0 are in flight
    w.arrive(2, 4)
    w.arrive(3, 4)
    assert advance(w, 6) == [([], [0]), ([], [0]), ([1, 2, 3], []), ([], [0]), ([], [0, 1, 2, 3]), ([], [0, 1, 2, 3])]


def test_a_finished_prefill_is_decoded_where_it_is():
    w = World(Colocated(), instance(0), instance(1))
    w.arrive(0, 5, max_tokens=3)
    while w.steps():
        w.finish(w.steps()[0])
    assert not copies(w.news) and {step.instance for step in runs(w.news)} == {0}
    assert w.contract.sequences[0].confirmed == 3 and w.scheduler.ledgers[0].used == 0


def test_prompts_share_a_step_up_to_its_tokens_and_the_rest_waits_in_order():
    w = World(Colocated(), instance(max_step_tokens=10))
    w.arrive(8, 1)
    w.arrive(9, 1)  # two steps are in flight
    for id, prompt in enumerate((4, 5, 4, 1)):
        w.arrive(id, prompt)
    assert advance(w, 4) == [([8], []), ([9], []), ([0, 1], []), ([2, 3], [])]


def test_prompts_that_arrive_together_share_the_first_step():
    w = World(Colocated(), instance(max_step_tokens=10))
    for id, prompt in enumerate((4, 5, 4, 1)):
        assert not w.news
        w.tell(Arrived(Request(id, prompt, 1), more=id < 3))
    assert advance(w, 2) == [([0, 1], []), ([2, 3], [])]


def test_no_more_prompts_begin_than_will_find_slots():
    w = World(Colocated(), instance(slots=2))
    for id in range(3):
        w.arrive(id, 4, max_tokens=2)
    assert advance(w, 5) == [([0], []), ([1], []), ([], [0]), ([], [1]), ([2], [])], "2 begins when 0 has ended"


def test_out_of_pages_the_newest_is_preempted_and_replays_from_the_head_of_the_queue():
    w = World(Colocated(), instance(pages=6))
    w.arrive(0, 4, max_tokens=8)
    w.arrive(1, 4, max_tokens=8)
    w.arrive(2, 4, max_tokens=2)  # waits: 0 and 1 have four pages of six, and grow
    order = []
    while w.steps():
        order += [sequence for step, _, _ in [(w.steps()[0], 0, 0)] for sequence, start, _ in prefilled(step)]
        w.finish(w.steps()[0])
    assert order[:2] == [0, 1] and order.count(0) == 1, "the oldest is never preempted"
    assert order.count(1) == 2 and order.index(2) > order.index(1)


def test_requests_go_to_the_instance_with_the_least_work():
    w = World(Colocated(), instance(0), instance(1))
    for id, prompt in enumerate((30, 4, 4, 4)):
        w.arrive(id, prompt)
    assert {id: step.instance for step in w.steps() for id, _, _ in prefilled(step)} == {0: 0, 1: 1, 2: 1}


def test_outputs_of_one_prompt_stay_together_and_copy_only_their_last_page():
    w = World(Colocated(), instance())
    w.arrive(0, 5, max_tokens=4, n=3)
    w.finish(w.steps()[0])
    assert [(copy.sequence, len(copy.shared), len(copy.pages)) for copy in w.copies()] == [(0, 2, 1), (1, 2, 1)]
    for copy in w.copies():
        w.land(copy)
    while w.steps():
        w.finish(w.steps()[0])
    assert all(w.contract.sequences[id].confirmed == 4 for id in range(3)) and w.scheduler.ledgers[0].used == 0
