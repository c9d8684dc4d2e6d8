"""A recorded run, lived again."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from ds_jax.protocol import Drain, Instance, InstanceLost, InstanceUp, Request, Role, Stopped, Timer
from ds_jax.recorder import Log, load, replay
from ds_jax.scheduling.disaggregated import Disaggregated
from ds_jax.simulation import LinearLatency, RecordedDurations, recorded_workload, simulate, steps_of
from ds_jax.workload import Submission, poisson, submissions, uniform

PREFILL = Instance(0, Role.PREFILL, 0, 100, 4, max_step_tokens=64, max_step_sequences=4, saturation_tokens=32)
DECODES = [Instance(id, Role.DECODE, 0, 30, 4, slots=4) for id in (1, 2)]
MS = 1_000_000


class Jitter(LinearLatency):
    """Durations as a real machine has them: never twice the same."""

    random = random.Random(0)

    def step_ns(self, step, context_tokens):
        return round(super().step_ns(step, context_tokens) * self.random.uniform(0.7, 1.5))

    def copy_ns(self, copy, now_ns):
        return round(super().copy_ns(copy, now_ns) * self.random.uniform(0.7, 4))


@pytest.fixture(scope="module")
def run():
    events = [
        (300 * MS, InstanceLost(2, 0)),
        (500 * MS, InstanceUp(Instance(2, Role.DECODE, 1, 30, 4, slots=4))),
        (600 * MS, Drain(1)),
        (640 * MS, Stopped(20, "abort")),
        (1400 * MS, Timer("deadline:70")),
    ]
    work = submissions(poisson(60.0, 80), uniform((1, 90), (1, 20), 80), max_tokens=20)
    for id, deadline_ms in ((30, 600), (70, 1390), (75, 10**6)):
        request = replace(work[id].request, deadline_ns=deadline_ms * MS)
        work[id] = work[id]._replace(request=request)
    return simulate(
        Disaggregated(), [PREFILL, *DECODES], work, Jitter(), events=events, steps=True, log=True, strict=True
    )


def test_a_fresh_scheduler_gives_the_same_commands(run, tmp_path):
    assert replay(run.log, Disaggregated()) is None
    run.log.save(tmp_path / "log.jsonl")
    assert load(tmp_path / "log.jsonl") == run.log
    assert replay(load(tmp_path / "log.jsonl"), Disaggregated()) is None


def test_the_recorded_durations_lead_to_the_same_steps_and_times(run):
    work, events = recorded_workload(run.log)
    again = simulate(Disaggregated(), (), work, RecordedDurations(run.log), events=events, steps=True, strict=True)
    assert again.steps == run.steps == steps_of(run.log)
    assert again.times == run.times
    assert sum(one.replays for one in again.times.values()) > 0
    assert again.times[70].rejected and again.times[70].end_ns == 1400 * MS, "its deadline was at 1390, and rang late"


def test_true_lengths_are_told_apart_from_stops_from_outside(run):
    work, events = recorded_workload(run.log)
    assert [event for _, event in events if isinstance(event, Stopped)] == [Stopped(20, "abort")]
    for submission in work:
        times = run.times[submission.request.id]
        if times.end in ("stop", "length"):
            assert submission.output_tokens == (times.output_tokens,)


def test_a_simulation_that_goes_another_way_says_so(run):
    work, events = recorded_workload(run.log)
    with pytest.raises(ValueError, match="the log has no more"):
        more = [Submission(0, Request(10_000 + index, 9, 9), 9) for index in range(9)]
        simulate(Disaggregated(), (), [*work, *more], _relabelled(run.log), events=events)


def _relabelled(log: Log) -> RecordedDurations:
    """Durations of the first half of the log only."""
    return RecordedDurations(Log(log.entries[: len(log.entries) // 2]))


def test_a_log_without_its_beginning_is_refused(run):
    cut = Log(run.log.entries[10:], dropped=10)
    for use in (RecordedDurations, recorded_workload, lambda log: replay(log, Disaggregated())):
        with pytest.raises(ValueError, match="lost its first 10 entries and cannot be replayed"):
            use(cut)
