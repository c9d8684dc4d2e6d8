"""DistServe's rules, one scenario each."""

from __future__ import annotations

import pytest

from ds_jax.config import SchedulerConfig
from ds_jax.protocol import Drain, InstanceLost, InstanceUp, SetTimer, StepDone, Timer
from ds_jax.scheduling.disaggregated import Disaggregated
from tests.scheduling.world import World, copies, decode_instance, decoded, prefill_instance, prefilled, rejects, runs


def world(prefill=None, decode=None, *more, **options) -> World:
    options = SchedulerConfig(**options)
    return World(Disaggregated(options), prefill or prefill_instance(), decode or decode_instance(), *more)


def fill_lane(w: World, prompt: int = 1) -> None:
    """Two prompts that keep the prefill lane full, so that what comes after them queues."""
    w.arrive(1000, prompt, max_tokens=2)
    w.arrive(1001, prompt, max_tokens=2)
    assert len(w.steps(0)) == 2


# --- prefill: strict first come, first served under three limits ------------------------------------------------------


def test_a_batch_takes_no_more_prompts_than_a_step_may_hold():
    w = world(prefill_instance(max_step_sequences=2))
    fill_lane(w)
    for id in range(3):
        w.arrive(id, 1)
    (step,) = runs(w.finish(w.steps(0)[0]))
    assert prefilled(step) == [(0, 0, 1), (1, 0, 1)]


def test_short_prompts_are_batched_up_to_saturation_and_a_longer_one_runs_alone():
    w = world(prefill_instance(saturation_tokens=10))
    fill_lane(w)
    for id, prompt in enumerate((4, 6, 1, 30, 2, 3)):
        w.arrive(id, prompt)
    seen = []
    for _ in range(4):
        seen.append([work[0] for step in runs(w.finish(w.steps(0)[0])) for work in prefilled(step)])
    assert seen == [[0, 1], [2], [3], [4, 5]]


def test_a_prompt_longer_than_a_step_runs_alone_in_chunks_and_only_the_last_one_samples():
    w = world(prefill_instance(max_step_tokens=8, saturation_tokens=8))
    w.arrive(0, 19)
    w.arrive(1, 2)
    w.prefill_all()
    steps = [step for step in runs(w.take_news()) if step.prefills]
    assert [prefilled(step) for step in steps] == [[(0, 0, 8)], [(0, 8, 8)], [(0, 16, 3)], [(1, 0, 2)]]
    assert [step.prefills[0].samples for step in steps] == [False, False, True, True]
    assert [len(step.prefills[0].new_pages) for step in steps] == [10, 0, 0, 1], "pages of the whole prompt come first"


def test_a_head_that_does_not_fit_into_the_pool_blocks_those_behind_it():
    w = world(prefill_instance(pages=6), decode_instance(pages=6))
    w.arrive(0, 8, 2)  # 4 of 6 pages
    w.arrive(1, 6, 2)  # 3 pages: must wait
    w.arrive(2, 1, 2)  # 1 page would be free, but it is behind
    assert [prefilled(step) for step in w.steps()] == [[(0, 0, 8)]]
    w.prefill_all()
    assert not w.steps(0), "the pages of 0 are not free before it has been pulled"
    (step,) = [step for step in runs(w.land(w.copies()[0])) if step.prefills]
    assert prefilled(step) == [(1, 0, 6), (2, 0, 1)]


def test_finished_prefills_that_were_not_pulled_hold_the_prefill_pool_back():
    w = world(prefill_instance(pages=4), decode_instance(pages=4, slots=1))
    for id in range(4):
        w.arrive(id, 4, 3)  # two pages each; the decode pool has room for one and its third page
    w.prefill_all()
    assert len(w.copies()) == 1
    w.land(w.copies()[0])
    w.prefill_all()
    assert {work for step in runs(w.take_news()) for work, _, _ in prefilled(step)} == {0, 1, 2}
    assert not w.copies() and not w.steps(0), "1 and 2 wait to be pulled, and 3 for their pages"


# --- dispatch ---------------------------------------------------------------------------------------------------------


def test_arrivals_go_to_the_prefill_instance_with_the_least_work():
    w = world(prefill_instance(0), decode_instance(1), prefill_instance(2))
    for id, prompt in enumerate((10, 3, 3, 3, 3, 1)):
        w.arrive(id, prompt)
    w.prefill_all()
    on = {work: step.instance for step in runs(w.take_news()) for work, _, _ in prefilled(step)}
    assert [on[id] for id in range(6)] == [0, 2, 2, 2, 2, 0]


def test_finished_prefills_go_to_the_least_loaded_decode_instance():
    w = world(prefill_instance(0), decode_instance(1), decode_instance(2))
    for id, prompt in enumerate((10, 2, 2, 2)):
        w.arrive(id, prompt)
        w.prefill_all()
    assert [copy.destination.instance for copy in copies(w.take_news())] == [1, 2, 2, 2]


def test_a_request_goes_only_where_it_fits_whole():
    w = world(prefill_instance(0, pages=4), decode_instance(1, pages=4), prefill_instance(2), decode_instance(3))
    w.arrive(0, 20, 4)
    w.prefill_all()
    (step,), (copy,) = [step for step in runs(w.news) if step.prefills], w.copies()
    assert (step.instance, copy.source.instance, copy.destination.instance) == (2, 2, 3)


def test_several_outputs_go_only_where_one_step_holds_all_of_them():
    w = world(prefill_instance(0, max_step_sequences=1), decode_instance(1), prefill_instance(2, pages=6))
    w.arrive(0, 4, 2, n=2)
    assert [(step.instance, prefilled(step)) for step in w.steps()] == [(2, [(0, 0, 4), (1, 4, 0)])]
    (reject, _) = rejects(w.arrive(2, 20, 2, n=2))
    assert reject.why == "n = 2 must be at most 1, the prompts that one prefill step holds"


# --- the pull ---------------------------------------------------------------------------------------------------------


def test_pulls_stop_while_sequences_without_a_slot_hold_the_watermark():
    w = world(decode=decode_instance(slots=1), pull_watermark=0.05)  # 5 of 100 pages
    for id in range(6):
        w.arrive(id, 5)  # three pages each
    w.prefill_all()
    assert [copy.sequence for copy in w.copies()] == [0, 1], "0 and 1 are on their way, without a slot, with six pages"
    assert [copy.sequence for copy in copies(w.land(w.copies()[0]))] == [2], "0 has taken the slot; 1 and 2 hold six"
    w.land(w.copies()[0])
    assert [copy.sequence for copy in w.copies()] == [2]
    w.stop(0)
    assert [copy.sequence for copy in w.copies()] == [2, 3], "1 has taken the slot"


def test_pulls_are_first_in_first_out_even_when_a_later_one_would_fit():
    w = world(decode=decode_instance(pages=6, slots=2))
    w.arrive(0, 4, 8)
    w.arrive(1, 8, 4)
    w.arrive(2, 1, 4)
    w.prefill_all()
    assert [copy.sequence for copy in w.copies()] == [0]
    w.land(w.copies()[0])
    assert not w.copies(), "1 does not fit beside 0, and 2 must not overtake it"
    w.stop(0)
    for step in w.steps(1):
        w.finish(step)
    assert [copy.sequence for copy in w.copies()] == [1]


def test_pages_are_freed_only_when_the_pull_has_landed():
    w = world()
    w.arrive(0, 9)
    w.prefill_all()
    (copy,) = w.copies()
    source, destination = w.scheduler.ledgers[0], w.scheduler.ledgers[1]
    assert (source.used, destination.used) == (5, 5)
    assert [source.references(page) for page, _ in copy.pages] == [1] * 5
    w.land(copy)
    assert source.used == 0


def test_pages_of_a_stopped_sequence_stay_until_its_pull_has_landed():
    w = world()
    w.arrive(0, 9)
    w.prefill_all()
    (copy,) = w.copies()
    w.stop(0)
    assert (w.scheduler.ledgers[0].used, w.scheduler.ledgers[1].used) == (5, 5)
    w.land(copy)
    assert (w.scheduler.ledgers[0].used, w.scheduler.ledgers[1].used) == (0, 0)


def test_a_failed_copy_is_tried_again_from_the_same_pages():
    w = world()
    w.arrive(0, 9)
    w.prefill_all()
    (first,) = w.copies()
    (second,) = copies(w.land(first, ok=False))
    assert [page for page, _ in second.pages] == [page for page, _ in first.pages]
    w.land(second)
    assert [decoded(step) for step in w.steps(1)] == [[0], [0]]


# --- decoding ---------------------------------------------------------------------------------------------------------


def test_two_decode_steps_are_in_flight_and_a_third_waits_for_the_first():
    w = world()
    w.decoding(4)
    assert [decoded(step) for step in w.steps(1)] == [[0], [0]]
    first, second = w.steps(1)
    (third,) = runs(w.finish(first))
    assert [step.id for step in w.steps(1)] == [second.id, third.id]


def test_a_newcomer_joins_the_next_step_beside_the_running_batch():
    w = world()
    w.decoding(4, 4)
    (step,) = runs(w.finish(w.steps(1)[0]))
    assert decoded(step) == [0, 1]
    assert len({work.slot for work in step.decodes}) == 2


def test_sequences_are_spread_over_the_lanes():
    w = world(decode=decode_instance(lanes=2, slots=4))
    w.decoding(4, 4, 4)
    for _ in range(4):
        w.finish(w.steps(1)[0])
    lanes = {work: step.lane for step in w.steps(1) for work in decoded(step)}
    assert sorted(lanes.values()) == [0, 0, 1] and len(w.steps(1)) == 4


def test_the_newest_is_preempted_and_replays_prompt_and_output_ahead_of_new_arrivals():
    w = world(prefill_instance(max_step_sequences=1), decode_instance(pages=8, slots=2))
    w.arrive(0, 4, 9)
    w.arrive(1, 4, 9)
    w.prefill_all()
    while w.copies():
        w.land(w.copies()[0])
    fill_lane(w)
    w.arrive(2, 1, 2)  # waits in the queue when 1 is preempted
    w.finish(w.steps(1)[0])
    while 1 in {work for step in w.steps(1) for work in decoded(step)}:
        w.finish(w.steps(1)[0])
    assert {work for step in w.steps(1) for work in decoded(step)} == {0}, "never the oldest"
    confirmed = w.contract.sequences[1].confirmed
    assert confirmed >= 3
    (step,) = runs(w.finish(w.steps(0)[0]))
    assert prefilled(step) == [(1, 0, 4 + confirmed)], "ahead of 2"
    assert step.prefills[0].samples, "and samples the next token"


def test_when_the_newest_preempts_itself_an_older_one_that_waits_takes_its_slot():
    w = world(prefill_instance(0), decode_instance(1, pages=6, slots=1), prefill_instance(2))
    w.arrive(0, 4, 9)
    w.arrive(1, 4, 9)
    for instance in (2, 0):  # the younger is prefilled, pulled and decoded first
        w.finish(w.steps(instance)[0])
        w.land(w.copies()[0])
    assert {work for step in w.steps(1) for work in decoded(step)} == {1}
    while 1 in {work for step in w.steps(1) for work in decoded(step)}:
        w.finish(w.steps(1)[0])
    assert {work for step in w.steps(1) for work in decoded(step)} == {0}


def test_max_tokens_is_never_planned_beyond():
    w = world()
    w.decoding(4, max_tokens=3)
    assert len(w.steps(1)) == 2, "with the token of the prefill, that makes three"
    w.finish(w.steps(1)[0])
    assert len(w.steps(1)) == 1
    w.finish(w.steps(1)[0])
    assert not w.steps() and w.scheduler.ledgers[1].used == 0


def test_one_token_needs_no_hand_over():
    w = world()
    w.arrive(0, 7, max_tokens=1)
    w.prefill_all()
    assert not w.copies() and w.contract.sequences[0].over
    assert (w.scheduler.ledgers[0].used, w.scheduler.ledgers[1].used) == (0, 0)


def test_a_late_stop_drops_the_surplus_and_frees_the_pages_when_the_last_step_is_done():
    w = world()
    w.decoding(4)
    first, second = w.steps(1)
    w.finish(first)
    w.stop(0)
    w.stop(0)
    assert not runs(w.finish(second)), "the third step is in flight, a fourth is not planned"
    assert w.scheduler.ledgers[1].used > 0
    w.finish(w.steps(1)[0])
    assert w.scheduler.ledgers[1].used == 0
    assert w.stop(0) == w.stop(77) == []


def test_lockstep_is_planned_only_when_its_last_token_is_known():
    w = world()
    w.arrive(0, 4, lockstep=True)
    w.prefill_all()
    w.land(w.copies()[0])
    assert len(w.steps(1)) == 1
    assert len(runs(w.finish(w.steps(1)[0]))) == 1


# --- ends -------------------------------------------------------------------------------------------------------------


def test_what_can_never_run_is_rejected_with_the_reason():
    w = world(prefill_instance(pages=10), decode_instance(pages=8))
    (reject,) = rejects(w.arrive(0, 14, 4))
    assert reject.why == "prompt and max_tokens ask for KV pages of 17 tokens; the largest decode pool holds 16"
    assert reject.retry_after_s is None
    assert not rejects(w.arrive(1, 14, 3)), "the last token is never fed back: 16 tokens need pages"


def test_a_deadline_ends_a_sequence_wherever_it_is():
    w = world()
    (timer,) = [command for command in w.arrive(0, 4, deadline_ns=50) if isinstance(command, SetTimer)]
    assert timer.at_ns == 50
    w.prefill_all()
    w.land(w.copies()[0])
    w.now_ns = 60
    (reject,) = rejects(w.tell(Timer(timer.key)))
    assert reject.sequence == 0
    for step in w.steps():
        w.finish(step)
    assert w.scheduler.ledgers[1].used == 0
    assert w.tell(Timer(timer.key)) == []


def test_an_aborted_prompt_leaves_the_queue():
    w = world()
    fill_lane(w)
    w.arrive(0, 4)
    w.arrive(1, 4)
    w.stop(0, "abort")
    (step,) = runs(w.finish(w.steps(0)[0]))
    assert prefilled(step) == [(1, 0, 4)]


def test_an_abort_between_chunks_plans_no_more_of_them_and_frees_the_pages():
    w = world(prefill_instance(max_step_tokens=4))
    w.arrive(0, 20)
    w.stop(0, "abort")
    for step in w.steps(0):
        w.finish(step)
    assert not w.steps(0) and w.scheduler.ledgers[0].used == 0


# --- instances come and go --------------------------------------------------------------------------------------------


def test_a_drained_instance_finishes_what_it_has_and_gets_nothing_new():
    w = world(prefill_instance(0), decode_instance(1), prefill_instance(2), decode_instance(3))
    w.arrive(0, 4)
    w.prefill_all()
    w.land(w.copies()[0])
    w.tell(Drain(0))
    w.tell(Drain(1))
    w.take_news()
    for id in (1, 2, 3):
        w.arrive(id, 4)
    w.prefill_all()
    steps = [step for step in runs(w.news) if step.prefills]
    assert {step.instance for step in steps} == {2}
    assert {copy.destination.instance for copy in w.copies()} == {3}
    assert {work for step in w.steps(1) for work in decoded(step)} == {0}
    assert len(runs(w.finish(w.steps(1)[0]))) == 1, "0 goes on where it is"


def test_what_waits_at_a_drained_instance_moves():
    w = world(prefill_instance(0), decode_instance(1))
    fill_lane(w)
    w.arrive(0, 4)
    w.tell(InstanceUp(prefill_instance(2)))
    (step,) = runs(w.tell(Drain(0)))
    assert (step.instance, prefilled(step)) == (2, [(0, 0, 4)])


@pytest.mark.parametrize("chunks_done", [0, 1, 2])
def test_prompts_of_a_lost_prefill_instance_begin_anew_elsewhere_oldest_first(chunks_done):
    w = world(prefill_instance(0, max_step_tokens=4, saturation_tokens=4), decode_instance(1))
    w.arrive(0, 12)
    w.arrive(1, 2)
    for _ in range(chunks_done):
        w.finish(w.steps(0)[0])
    dead = w.steps(0)
    w.tell(InstanceUp(prefill_instance(2)))
    commands = w.tell(InstanceLost(0, 0))
    (step,) = runs(commands)
    assert (step.instance, prefilled(step)) == (2, [(0, 0, 12), (1, 0, 2)])
    for step in dead:
        assert w.tell(StepDone(step.id, {0: 1})) == [], "what comes back from a dead epoch is ignored"


def test_sequences_of_a_lost_decode_instance_replay_what_was_confirmed():
    w = world(prefill_instance(0), decode_instance(1), decode_instance(2, slots=1))
    w.decoding(4, max_tokens=9)
    w.finish(w.steps(1)[0])
    w.finish(w.steps(1)[0])
    (step,) = runs(w.tell(InstanceLost(1, 0)))
    assert prefilled(step) == [(0, 0, 4 + 3)]
    w.prefill_all()
    (copy,) = w.copies()
    assert copy.destination.instance == 2
    w.land(copy)
    while w.steps():
        w.finish(w.steps()[0])
    assert w.contract.sequences[0].confirmed == 9


def test_a_copy_whose_destination_died_goes_to_another_one_without_a_replay():
    w = world(prefill_instance(0), decode_instance(1), decode_instance(2))
    w.arrive(0, 4)
    w.prefill_all()
    (copy,) = w.copies()
    assert copy.destination.instance == 1
    commands = w.tell(InstanceLost(1, 0))
    commands += w.tell(StepDone(999, {}))
    commands += w.land(copy, ok=False)
    assert [copy.destination.instance for copy in copies(commands)] == [2] and not runs(commands)


def test_a_copy_whose_source_died_is_replayed():
    w = world(prefill_instance(0), decode_instance(1), prefill_instance(2))
    w.arrive(0, 4)
    w.prefill_all()
    (copy,) = w.copies()
    (step,) = runs(w.tell(InstanceLost(0, 0)))
    assert (step.instance, prefilled(step)) == (2, [(0, 0, 5)])
    assert w.scheduler.ledgers[1].used == 2, "the copy may still be writing there"
    w.land(copy, ok=False)
    assert w.scheduler.ledgers[1].used == 0


def test_requests_wait_for_an_instance_to_exist_and_run_in_order_when_it_comes():
    w = World(Disaggregated(SchedulerConfig()), prefill_instance(0))
    w.tell(InstanceLost(0, 0))
    for id in range(3):
        assert not rejects(w.arrive(id, 4))
    (step,) = runs(w.tell(InstanceUp(prefill_instance(0, epoch=1))))
    assert [work for work, _, _ in prefilled(step)] == [0, 1, 2] and step.epoch == 1
    w.prefill_all()
    assert not w.copies()
    w.tell(InstanceUp(decode_instance(1)))
    assert [copy.sequence for copy in w.copies()] == [0, 1, 2]


def test_a_token_lost_with_a_late_stop_leads_to_a_replay_and_not_to_wrong_context():
    w = world()
    w.decoding(4)
    w.finish(w.steps(1)[0], without=(0,))
    assert not w.steps(0), "a step of it is still in flight"
    w.finish(w.steps(1)[0], without=(0,))
    assert prefilled(w.steps(0)[0]) == [(0, 0, 5)]


# --- several outputs of one prompt ------------------------------------------------------------------------------------


def test_outputs_of_one_prompt_share_its_prefill_and_its_full_pages():
    w = world()
    w.arrive(0, 5, n=3)
    (step,) = w.steps(0)
    assert prefilled(step) == [(0, 0, 5), (1, 5, 0), (2, 5, 0)], "the last two sample from the same tokens"
    assert w.scheduler.ledgers[0].used == 3
    w.prefill_all()
    while w.copies():
        w.land(w.copies()[0])
    first, second, third = copies(w.news)
    assert (len(first.pages), first.shared) == (3, ())
    shared = tuple(page for _, page in first.pages[:2])
    assert [(len(copy.pages), copy.shared) for copy in (second, third)] == [(1, shared), (1, shared)]
    for id in range(3):
        w.stop(id)
    while w.steps():
        w.finish(w.steps()[0])
    assert w.scheduler.ledgers[0].used == w.scheduler.ledgers[1].used == 0


def test_when_the_first_output_is_aborted_in_the_queue_the_second_leads():
    w = world()
    fill_lane(w)
    w.arrive(0, 5, n=2)
    w.stop(0, "abort")
    (step,) = runs(w.finish(w.steps(0)[0]))
    assert prefilled(step) == [(1, 0, 5)]
