"""Our scheduler's rules, each as a scenario to be checked by eye, and the conformance machine."""

from __future__ import annotations

import math

import pytest

from ds_jax.config import Config, DecodeConfig, MixedConfig, PrefillConfig, SchedulerConfig
from ds_jax.protocol import NO_TARGET_NS, Request, Role, Slo
from ds_jax.scheduling.admission import Line
from ds_jax.scheduling.deflected import Deflected
from ds_jax.scheduling.room import SMALLEST_CHUNK, Room
from ds_jax.scheduling.sequence import Sequence
from tests.scheduling.foretold import MS, Clocked, WithTargets, fewer, foretell, slo, worker
from tests.scheduling.machine import conformance
from tests.scheduling.world import prefilled, rejects, runs

PREFILL, MIXED = worker(0, Role.PREFILL), worker(1, Role.MIXED)


def world(*instances, **options):
    return Clocked(Deflected(SchedulerConfig(**options), foretell), *(instances or (PREFILL, MIXED)))


def waiting(one):
    """Prompts that no worker has begun."""
    return [id for id, sequence in one.scheduler.sequences.items() if sequence.home is None]


# --- steps ------------------------------------------------------------------------------------------------------------


def test_a_step_is_as_long_as_the_decode_with_the_least_slack_allows():
    """Decode steps take 10 ms, prompts a millisecond a token. The chunk is what the banked slack leaves beside them."""
    one = world(MIXED)
    one.served(0, 10, tokens=20, tpot_ms=20)
    one.arrive(1, 900, slo=slo(10**6, 20))
    one.after(10).finish(one.steps()[0])
    step = one.steps()[-1]
    begin_ns = one.now_ns + 10 * MS  # behind the step that runs
    due_ns = one.scheduler.sequences[0].first_ns + 20 * MS * (one.contract.sequences[0].confirmed + 1)
    [(sequence, start, length)] = prefilled(step)
    assert (sequence, start) == (1, 0) and step.decodes
    assert 0.8 * (due_ns - begin_ns) < (10 + length) * MS * 1.05 <= 1.1 * (due_ns - begin_ns)


def test_decodes_go_on_in_every_step_whatever_prompts_come():
    one = world(MIXED)
    one.served(0, 10, tokens=3, tpot_ms=40)
    one.arrive(1, 300, slo=slo(10**6, 40))
    while one.scheduler.sequences[1].first_ns is None:
        step = one.steps()[0]
        assert [work.sequence for work in step.decodes][:1] == [0]
        one.after(10 * bool(step.decodes) + sum(work.length for work in step.prefills)).finish(step)
    late_ns = one.now_ns - one.scheduler.sequences[0].first_ns - 40 * MS * (one.contract.sequences[0].confirmed - 1)
    assert late_ns <= 0, "its mean time per token is inside the target"


# --- who takes a prompt -----------------------------------------------------------------------------------------------


def test_a_prompt_is_bound_to_no_worker_before_one_can_run_it():
    one = world(PREFILL, worker(2, Role.PREFILL), MIXED)
    one.served(9, 10, tokens=3, tpot_ms=1)
    for id in range(5):
        one.arrive(id, 100, slo=slo(10**6, 50))
    assert waiting(one) == [4], "two steps are in flight at most on each prefill worker"
    one.finish(one.steps(2)[0])
    assert waiting(one) == [] and one.scheduler.sequences[4].home.instance.id == 2


def test_a_multiplexing_worker_takes_only_what_can_be_in_time_there():
    """Behind decodes of 10 ms with 20 ms a token there are 10 ms of prompt in each step: 30 tokens take 60 ms or so."""
    for ttft_ms, taken in ((40, False), (400, True)):
        one = world(worker(0, Role.PREFILL, pages=4), MIXED)
        one.served(9, 10, tokens=2, tpot_ms=20)
        one.arrive(0, 30, slo=slo(ttft_ms, 20))
        one.after(10).finish(one.steps(1)[0])
        assert (one.scheduler.sequences[0].home is not None) is taken


def test_the_most_urgent_prompt_goes_first_also_into_one_that_is_half_done():
    one = world(worker(0, Role.PREFILL, max_step_tokens=50), MIXED)
    one.served(9, 10, tokens=3, tpot_ms=1)
    one.arrive(0, 500, slo=slo(5000, 50))
    one.arrive(1, 40, slo=slo(300, 50))
    one.after(50).finish(one.steps(0)[0])
    assert [prefilled(step) for step in one.steps(0)] == [[(0, 50, 50)], [(1, 0, 40)]]


def test_a_worker_that_stopped_taking_prompts_begins_again_only_with_twice_the_slack():
    one = world(MIXED)
    one.served(0, 10, tokens=2, tpot_ms=20)
    scheduler = one.scheduler
    foresight = scheduler.foresight(scheduler.workers[MIXED.id])
    account = foresight.accounts[0]
    base_s = foresight.forecast.safe_s([(0, 1)], account.batch, account.context_tokens)
    enough_s = base_s + 1.3e-3 * SMALLEST_CHUNK

    def planned(*seconds):
        """What one plan makes of steps of so many seconds."""
        room = Room(foresight, 0, one.now_ns)
        admitted = [room.admits(one) for one in seconds]
        room.remember()
        return admitted

    assert planned(enough_s) == [True] and planned(base_s) == [False]
    assert planned(enough_s) == [False] and planned(2 * enough_s) == [True] and planned(enough_s) == [True]
    assert planned(base_s, enough_s, base_s, enough_s) == [False, True, False, True], "asking does not change its mind"
    assert planned(enough_s) == [True]


# --- who is given up --------------------------------------------------------------------------------------------------


def test_as_few_as_possible_are_given_up():
    """Work and deadlines on one worker. By deadline 5 would be late after 4 and 6: the longest of the three, 6, goes.
    Then all are in time, 4 and 5 and 3 ending at 4, 9 and 12."""
    line = Line(16)
    jobs = {"a": (4, 6), "b": (6, 10), "c": (5, 11), "d": (3, 13)}
    sequences = {}
    for order, (name, (work, deadline)) in enumerate(jobs.items()):
        sequences[name] = Sequence(Request(order, 1, 1), order)
        line.add(sequences[name], deadline, deadline, work)
    for _ in range(2):
        line.triage([(0.0, 1.0)])
        assert [entry.sequence for entry in line.on_time()] == [sequences[name] for name in "acd"]
        assert line.given_up() is sequences["b"]


@pytest.mark.parametrize(
    ("free", "kept"),
    [
        ([(0, 1.0), (0, 1.0)], "abcd"),  # two workers: all work is done at 9
        ([(0, 1.0), (7, 1.0)], "abc"),  # one of them comes at 7: 10 are done at 8.5 and not at 8, where c is due
        ([(0, 1.0), (6, 0.5)], "abc"),  # or gives half of itself
        ([(3, 1.0)], "ab"),  # one worker, busy until 3: it has done 4 at 7, and c with 4 would end at 11
    ],
)
def test_who_is_given_up_depends_on_when_workers_are_free(free, kept):
    line = Line(16)
    for order, (name, work, deadline) in enumerate((("a", 2, 8), ("b", 2, 8), ("c", 4, 8), ("d", 10, 10))):
        line.add(Sequence(Request(ord(name), 1, 1), order), deadline, deadline, work)
    line.triage(free)
    assert "".join(chr(entry.sequence.id) for entry in line.on_time()) == kept


def test_nobody_is_given_up_who_has_no_target_and_replays_stay_ahead():
    """A long prompt without a target, a replay, and short ones behind them that it makes late: those are given up."""
    line = Line(16)
    figures = ((5, math.inf, 100), (-math.inf, math.inf, 50), (20, 20, 3), (30, 30, 2), (400, 400, 200))
    sequences = [Sequence(Request(id, 1, 1), id) for id in range(len(figures))]
    for sequence, (rank, deadline, work) in zip(sequences, figures, strict=True):
        line.add(sequence, rank, deadline, work)
    line.triage([(0.0, 1.0)])
    assert [entry.sequence.id for entry in line.on_time()] == [1, 0, 4]
    line.triage([(10.0**9, 1.0)])
    assert [entry.sequence.id for entry in line.on_time()] == [1, 0]


def test_those_who_cannot_be_in_time_any_more_wait_behind_those_who_can():
    one = world(worker(0, Role.PREFILL), MIXED)
    one.served(9, 10, tokens=3, tpot_ms=1)
    for id in (0, 1):
        one.arrive(id, 100, slo=slo(10**6, 50))
    one.arrive(2, 100, slo=slo(50, 50))
    one.arrive(3, 100, slo=slo(1000, 50))
    one.after(100).finish(one.steps(0)[0])
    assert waiting(one) == [2] and prefilled(one.steps(0)[-1]) == [(3, 0, 100)]
    one.after(100).finish(one.steps(0)[0])
    one.after(100).finish(one.steps(0)[0])
    assert waiting(one) == [], "with nobody else waiting it is served"


@pytest.mark.parametrize("early", [False, True])
def test_early_rejection_is_of_those_who_can_surely_not_be_in_time_and_says_when_to_come_back(early):
    """1 s and 0.4 s are in flight. Due after 1.5 s, a prompt of 0.4 s is late whatever is done, one of 60 ms is not."""
    one = world(worker(1, Role.MIXED, max_step_tokens=10**4), early_rejection=early)
    for id, prompt in enumerate((1000, 400, 400, 60)):
        one.arrive(id, prompt, slo=slo(1500, 50))
    one.arrive(4, 1000)
    refused = rejects(one.news)
    assert [reject.sequence for reject in refused] == ([2] if early else [])
    for reject in refused:
        assert reject.why == "its TTFT target of 1.5 s can no longer be met: no instance can run its prompt by then"
        assert reject.retry_after_s == pytest.approx(1.4, abs=0.1), "when the steps in flight are done"


def test_a_request_with_a_target_per_token_alone_waits_no_longer_than_one_without_any():
    one = world(worker(0, Role.PREFILL), MIXED)
    one.served(9, 10, tokens=3, tpot_ms=1)
    for id in (0, 1):
        one.arrive(id, 100, slo=slo(10**6, 50))
    one.arrive(2, 100, slo=Slo(NO_TARGET_NS, 50 * MS))
    one.arrive(3, 100, slo=slo(10**6, 50))
    assert one.scheduler.deadline_ns(one.scheduler.sequences[2]) == math.inf
    one.after(100).finish(one.steps(0)[0])
    assert waiting(one) == [3]


def test_for_who_was_overtaken_one_worker_is_kept_free_and_the_others_go_on():
    """The long prompt needs more pages than either worker has beside what decodes there, until one of those ends."""
    one = world(*(worker(id, Role.MIXED, pages=120) for id in (0, 1)))
    for id in (0, 1):
        one.served(id, 80, tokens=2, tpot_ms=10**6)
    assert {one.scheduler.sequences[id].home.instance.id for id in (0, 1)} == {0, 1}
    one.arrive(2, 180, max_tokens=2, slo=slo(10**6, 10**6))
    began = {}
    for id in range(3, 3 + 2 * Deflected.most_overtaking):
        one.arrive(id, 2, max_tokens=1, slo=slo(10**5, 10**6))
        began[id] = one.scheduler._reserved is not None, one.scheduler.sequences[id].home
        for step in one.steps()[:2]:
            one.after(10).finish(step)
    kept = one.scheduler._reserved[1]
    assert one.scheduler._reserved[0].id == 2
    assert {home for reserved, home in began.values() if reserved} <= {None, *one.scheduler.workers.values()} - {kept}
    assert all(id not in one.scheduler.sequences for id in range(3, 2 * Deflected.most_overtaking)), "others are served"
    one.stop(kept.instance.id)
    while 2 in waiting(one):
        one.after(10).finish(one.steps()[0])
    assert one.scheduler.sequences[2].home is kept and one.scheduler._reserved is None


def test_whoever_was_overtaken_often_enough_goes_next():
    one = world(worker(0, Role.PREFILL, max_step_sequences=1), MIXED)
    one.served(99, 10, tokens=3, tpot_ms=1)
    for id in (0, 1):
        one.arrive(id, 10, slo=slo(10**6, 50))
    one.arrive(2, 10, slo=slo(1, 50))
    for id in range(3, 3 + Deflected.most_overtaking + 2):
        one.arrive(id, 10, slo=slo(10**6, 50))
    begun = []
    while 2 in waiting(one):
        one.after(10).finish(one.steps(0)[0])
        begun += [prefilled(step)[0][0] for step in runs(one.take_news()) if step.instance == 0]
    assert begun.index(2) - begun.index(3) == Deflected.most_overtaking


def test_it_works_with_multiplexing_workers_alone():
    none, two = PrefillConfig(instances=0), MixedConfig(instances=2)
    Config(policy="deflected", prefill=none, decode=DecodeConfig(instances=0), mixed=two).check()
    with pytest.raises(ValueError, match="policy = multiplexed needs prefill.instances >= 1, got 0"):
        Config(policy="multiplexed", prefill=none, decode=DecodeConfig(instances=0), mixed=two).check()


@pytest.mark.parametrize(
    ("policy", "knob", "value", "whose"),
    [
        ("multiplexed", "early_rejection", True, "deflected"),
        ("deflected", "routing", "readme", "multiplexed"),
        ("deflected", "queue_order", "edf", "multiplexed"),
        ("multiplexed", "token_budget", 64, "chunked"),
    ],
)
def test_a_knob_that_the_policy_does_not_look_at_is_refused(policy, knob, value, whose):
    roles = {"decode": DecodeConfig(instances=0), "mixed": MixedConfig(instances=1)}
    scheduler = SchedulerConfig(**{knob: value})
    with pytest.raises(ValueError, match=f"{knob} = {value} has no effect with policy = {policy}: .* {whose}$"):
        Config(policy=policy, scheduler=scheduler, **roles).check()
    Config(policy="my.module:Scheduler", scheduler=scheduler, **roles).check()


class Impatient(Deflected):
    """So that the machine sees within its bound that nobody starves."""

    most_overtaking = 3


def machine(examples, *roles):
    case = conformance(lambda: WithTargets(Impatient()), roles=roles, first_come_first_served=False)
    return fewer(case, examples)


TestDeflected = machine(30, Role.PREFILL, Role.MIXED)
TestWithoutPrefillWorkers = machine(15, Role.MIXED)
