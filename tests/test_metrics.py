"""Five stages, charged to the nanosecond."""

from __future__ import annotations

import pytest

from ds_jax.metrics import RequestTimes, StageClock
from ds_jax.protocol import (
    STAGES,
    Arrived,
    Copy,
    CopyDone,
    Decode,
    InstanceLost,
    Place,
    Prefill,
    Reject,
    Request,
    Run,
    Step,
    StepDone,
    Stopped,
)


class Hand:
    """A clock that is told by hand what happens when."""

    def __init__(self):
        self.stretches = []
        self.steps = []
        self.clock = StageClock(lambda *stretch: self.stretches.append(stretch), lambda *step: self.steps.append(step))
        self.commands = []

    def at(self, now_ns, event=None, *commands):
        self.clock.hear(event or Stopped(10**9, ""), commands, now_ns)

    def arrive(self, now_ns, id=0, max_tokens=3, **rest):
        self.at(now_ns, Arrived(Request(id, 10, max_tokens, **rest)))

    def times(self, id=0) -> RequestTimes:
        times = self.clock.pop(id)
        assert sum(times.stages_ns) == times.end_ns - times.arrived_ns
        assert sum(end - begin for one, _, begin, end in self.stretches if one == id) == sum(times.stages_ns)
        return times


def prefill(id, *chunks, instance=0, lane=0):
    return Run(Step(id, instance, 0, lane, tuple(Prefill(*chunk) for chunk in chunks)))


def decode(id, *sequences, instance=1, lane=0):
    return Run(Step(id, instance, 0, lane, (), tuple(Decode(one, slot) for slot, one in enumerate(sequences))))


def pull(id, sequence=0, source=0, destination=1, last=True):
    return Copy(id, sequence, Place(source, 0), Place(destination, 0), (), last)


@pytest.fixture
def hand() -> Hand:
    return Hand()


def test_each_stage_of_an_ordinary_life(hand):
    hand.arrive(100)
    hand.at(103, None, prefill(0, (0, 0, 10, True)))
    hand.at(110, StepDone(0, {0: 1}))
    hand.at(112, None, pull(0))
    hand.at(115, CopyDone(0, True))
    hand.at(120, None, decode(1, 0))
    hand.at(130, StepDone(1, {0: 1}), decode(2, 0))
    hand.at(141, StepDone(2, {0: 1}))
    times = hand.times()
    assert times.stages_ns == (3, 7, 3, 2 + 5, 21)
    assert (times.ttft_ns, times.tpot_ns, times.end, times.output_tokens) == (10, (141 - 110) / 2, "length", 3)
    assert times.stages_s() == dict(zip(STAGES, (3e-9, 7e-9, 3e-9, 7e-9, 21e-9), strict=True))


def test_a_step_begins_when_the_one_before_it_is_done(hand):
    hand.arrive(0, 0)
    hand.arrive(0, 1)
    hand.at(1, None, prefill(0, (0, 0, 10, True)), prefill(1, (1, 0, 10, True)))
    hand.at(9, StepDone(0, {0: 1}))
    hand.at(12, StepDone(1, {1: 1}))
    hand.at(12, Stopped(0, "stop"))
    hand.at(12, Stopped(1, "stop"))
    assert hand.times(0).stages_ns == (1, 8, 0, 3, 0)
    assert hand.times(1).stages_ns == (9, 3, 0, 0, 0)
    assert [(step.id, begin, end, done) for step, begin, end, done in hand.steps] == [(0, 1, 9, True), (1, 9, 12, True)]


def test_lanes_run_side_by_side(hand):
    hand.arrive(0, 0)
    hand.arrive(0, 1)
    hand.at(1, None, prefill(0, (0, 0, 10, True)), prefill(1, (1, 0, 10, True), lane=1))
    hand.at(5, StepDone(1, {1: 1}))
    hand.at(9, StepDone(0, {0: 1}))
    hand.at(9, Stopped(0, ""))
    hand.at(9, Stopped(1, ""))
    assert hand.times(0).stages_ns == (1, 8, 0, 0, 0)
    assert hand.times(1).stages_ns == (1, 4, 0, 4, 0)


def test_waiting_between_chunks_is_prefill_execution(hand):
    hand.arrive(0, max_tokens=1)
    hand.at(2, None, prefill(0, (0, 0, 5, False)))
    hand.at(4, StepDone(0))
    hand.at(10, None, prefill(1, (0, 5, 5, True)))
    hand.at(13, StepDone(1, {0: 1}))
    assert hand.times().stages_ns == (2, 11, 0, 0, 0)


def test_a_wait_that_ends_in_a_replay_is_prefill_queueing(hand):
    hand.arrive(0, max_tokens=9)
    hand.at(0, None, prefill(0, (0, 0, 10, True)))
    hand.at(5, StepDone(0, {0: 1}), pull(0))
    hand.at(7, CopyDone(0, True), decode(1, 0))
    hand.at(17, StepDone(1, {0: 1}))
    hand.at(30, None, prefill(2, (0, 0, 12, True)))  # it was preempted at some time after 17
    hand.at(34, StepDone(2, {0: 1}), pull(1))
    hand.at(35, CopyDone(1, True))
    hand.at(36, None, decode(3, 0))
    hand.at(40, StepDone(3, {0: 1}))
    hand.at(40, Stopped(0, "stop"))
    times = hand.times()
    assert times.stages_ns == (13, 5 + 4, 2 + 1, 1, 10 + 4)
    assert (times.replays, times.first_token_ns, times.output_tokens) == (1, 5, 4)


def test_what_a_lost_instance_was_doing_counts_until_it_was_lost(hand):
    hand.arrive(0, max_tokens=1)
    hand.at(2, None, prefill(0, (0, 0, 10, True)))
    hand.at(6, InstanceLost(0, 0))
    hand.at(7, StepDone(0, {0: 1}))  # from the dead
    hand.at(9, None, prefill(1, (0, 0, 10, True), instance=2))
    hand.at(14, StepDone(1, {0: 1}))
    times = hand.times()
    assert times.stages_ns == (2 + 3, 4 + 5, 0, 0, 0) and times.replays == 1
    assert [(step.id, begin, end, done) for step, begin, end, done in hand.steps] == [
        (0, 2, 6, False),
        (1, 9, 14, True),
    ]


def test_a_copy_that_failed_and_its_second_try_are_both_transmission(hand):
    hand.arrive(0, max_tokens=2)
    hand.at(0, None, prefill(0, (0, 0, 10, True)))
    hand.at(5, StepDone(0, {0: 1}), pull(0))
    hand.at(8, CopyDone(0, False))
    hand.at(10, None, pull(1))
    hand.at(14, CopyDone(1, True), decode(1, 0))
    hand.at(15, StepDone(1, {0: 1}))
    assert hand.times().stages_ns == (0, 5, 3 + 4, 2, 1)


def test_a_copy_both_of_whose_ends_died_ends_with_the_second(hand):
    hand.arrive(0, max_tokens=2)
    hand.at(0, None, prefill(0, (0, 0, 10, True)))
    hand.at(5, StepDone(0, {0: 1}), pull(0))
    hand.at(8, InstanceLost(1, 0))
    hand.at(9, InstanceLost(0, 0))
    hand.at(20, None, prefill(1, (0, 0, 11, True), instance=2))
    hand.at(22, StepDone(1, {0: 1}))
    hand.at(99, CopyDone(0, True))
    assert hand.times().stages_ns == (11, 5 + 2, 4, 0, 0)


def test_chunks_sent_early_count_as_transmission_only_after_the_prefill(hand):
    hand.arrive(0, max_tokens=9)
    hand.at(0, None, prefill(0, (0, 0, 5, False)))
    hand.at(5, StepDone(0), prefill(1, (0, 5, 5, True)), pull(0, last=False))
    hand.at(9, StepDone(1, {0: 1}), pull(1))
    hand.at(11, CopyDone(0, True))
    hand.at(13, CopyDone(1, True))
    hand.at(14, Stopped(0, "abort"))
    assert hand.times().stages_ns == (0, 9, 4, 1, 0)


def test_forks_begin_with_the_step_that_they_sample_in(hand):
    hand.arrive(0, max_tokens=1, n=2)
    hand.at(1, None, prefill(0, (0, 0, 5, False)))
    hand.at(4, StepDone(0), prefill(1, (0, 5, 5, True), (1, 10, 0, True)))
    hand.at(6, StepDone(1, {0: 1, 1: 1}))
    assert hand.times(0).stages_ns == (1, 5, 0, 0, 0)
    assert hand.times(1).stages_ns == (4, 2, 0, 0, 0)


def test_a_stop_in_the_middle_of_a_step_ends_the_life_there(hand):
    hand.arrive(0)
    hand.at(2, None, prefill(0, (0, 0, 10, True)))
    hand.at(7, Stopped(0, "abort"))
    hand.at(8, StepDone(0))
    hand.at(9, Stopped(0, "abort"))
    times = hand.times()
    assert times.stages_ns == (2, 5, 0, 0, 0) and times.end == "abort"
    assert times.ttft_ns is None and times.tpot_ns is None


def test_a_rejected_request_has_waited(hand):
    hand.arrive(0)
    hand.at(5, None, Reject(0, "the deadline has passed"))
    times = hand.times()
    assert times.rejected and times.end == "the deadline has passed" and times.stages_ns == (5, 0, 0, 0, 0)


def test_a_sequence_is_forgotten_when_it_is_read_and_not_read_before_its_end(hand):
    hand.arrive(0)
    assert not hand.clock.ended(0)
    with pytest.raises(KeyError, match="has not ended"):
        hand.clock.pop(0)
    hand.at(1, Stopped(0, "abort"))
    assert hand.clock.ended(0)
    hand.clock.pop(0)
    assert not hand.clock.ended(0)
    with pytest.raises(KeyError):
        hand.clock.pop(0)
