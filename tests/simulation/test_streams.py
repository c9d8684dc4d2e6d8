"""Long runs: requests taken as time comes, lives told as they end, memory that does not grow; pipelines and lanes."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace

import pytest

from ds_jax.protocol import Instance, Request, Role, Run, Step
from ds_jax.scheduling.disaggregated import Disaggregated
from ds_jax.simulation import LinearLatency, simulate
from ds_jax.simulation.lane import Pipeline
from ds_jax.workload import Submission, poisson, submissions, uniform, workload

PREFILL = Instance(0, Role.PREFILL, 0, 4000, 16, max_step_tokens=2048, max_step_sequences=16, saturation_tokens=512)
DECODE = Instance(1, Role.DECODE, 0, 4000, 16, slots=64)
LATENCY = LinearLatency()


def test_lives_are_told_as_they_end_and_equal_those_of_a_run_that_keeps_them():
    kept = simulate(Disaggregated(), [PREFILL, DECODE], workload("sharegpt", rate=4, count=200), LATENCY).times
    told = {}
    streamed = simulate(
        Disaggregated(),
        [PREFILL, DECODE],
        workload("sharegpt", rate=4, count=200),
        LATENCY,
        on_end=lambda one: told.setdefault(one.sequence, one),
    )
    assert told == kept and streamed.times == {}


def test_an_iterator_that_is_not_in_order_is_refused():
    requests = iter(submissions([5, 3], [(4, 2), (4, 2)]))
    with pytest.raises(ValueError, match="request 1 arrives at 3 ns, before the one ahead of it"):
        simulate(Disaggregated(), [PREFILL, DECODE], requests, LATENCY)


def test_memory_does_not_grow_with_the_length_of_a_trace():
    def peak(count: int) -> int:
        tracemalloc.start()
        requests = workload("64/8", rate=20, count=count)
        simulate(Disaggregated(), [PREFILL, DECODE], requests, LATENCY, on_end=lambda one: None)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    peak(100)
    short, long = peak(300), peak(1200)
    assert long < 1.3 * short


class Forgetful(Disaggregated):
    """Says nothing of how decodes differ from step to step: plain tuples, as a policy from outside may send them."""

    def handle(self, event, now_ns):
        commands = super().handle(event, now_ns)
        return [Run(_plain(command.step)) if isinstance(command, Run) else command for command in commands]


def _plain(step: Step) -> Step:
    return replace(step, decodes=tuple(step.decodes))


def test_what_decodes_say_about_changes_changes_nothing():
    """Two lanes, preemptions, and stops before max_tokens."""
    decode = Instance(1, Role.DECODE, 0, 12, 16, lanes=2, slots=6)
    lengths = uniform((3, 60), (1, 90), 120, seed=5)
    work = [
        Submission(at_ns, Request(id, prompt, output + id % 3), output)
        for id, (at_ns, (prompt, output)) in enumerate(zip(poisson(30, 120), lengths, strict=True))
    ]
    said = simulate(Disaggregated(), [PREFILL, decode], work, LATENCY, strict=True)
    silent = simulate(Forgetful(), [PREFILL, decode], work, LATENCY, strict=True)
    assert said.times == silent.times
    assert sum(one.replays for one in said.times.values()) > 0
    assert all(one.output_tokens == output for one, (_, _, output, *_) in zip(said.times.values(), work, strict=True))


def test_steps_in_a_pipeline_overlap_as_far_as_their_stages_allow():
    """Two stages of 5: the second step enters stage 0 at 5, and stage 1 at 10, when the first one leaves it; a step of
    2 x 1 behind it waits at stage 1 for 15; one that comes late finds all stages free.

        stage 0   aaaaabbbbbc
        stage 1        aaaaabbbbbc
    """
    pipeline = Pipeline(2)
    assert [pipeline.enter(0, 10), pipeline.enter(0, 10), pipeline.enter(0, 2), pipeline.enter(40, 10)] == [
        10,
        15,
        16,
        50,
    ]


def test_a_step_alone_takes_as_long_through_any_number_of_stages():
    assert [Pipeline(stages).enter(7, 100) for stages in (1, 2, 3, 7)] == [107] * 4
