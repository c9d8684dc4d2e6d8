"""The virtual-time executor keeps its side of the contract, and holds the scheduler to its own."""

from __future__ import annotations

import pytest

from ds_jax.protocol import (
    Arrived,
    Copy,
    Decode,
    Instance,
    InstanceLost,
    InstanceUp,
    Place,
    Prefill,
    Request,
    Role,
    Run,
    SetTimer,
    Step,
    Stopped,
)
from ds_jax.scheduling.disaggregated import Disaggregated
from ds_jax.simulation import LinearLatency, Violation, simulate
from ds_jax.workload import Submission, fixed, poisson, submissions, uniform

PREFILL = Instance(0, Role.PREFILL, 0, 200, 4, max_step_tokens=64, max_step_sequences=4, saturation_tokens=32)
DECODE = Instance(1, Role.DECODE, 0, 40, 4, slots=4)
MS = 1_000_000
LATENCY = LinearLatency(
    prefill_base_ns=MS,
    prefill_token_ns=0,
    decode_base_ns=2 * MS,
    decode_context_ns=0,
    decode_sequence_ns=0,
    copy_base_ns=5 * MS,
    copy_page_ns=0,
)


def requests(count: int, rate: float = 200.0, **kw) -> list[Submission]:
    return submissions(poisson(rate, count), uniform((1, 100), (1, 30), count), **kw)


def test_one_request_takes_the_sum_of_its_steps():
    result = simulate(Disaggregated(), [PREFILL, DECODE], submissions([7], fixed(10, 4, 1)), LATENCY, strict=True)
    times = result.times[0]
    assert times.stages_ns == (0, MS, 5 * MS, 0, 3 * 2 * MS)
    assert (times.ttft_ns, times.tpot_ns, times.end) == (MS, (5 + 6) * MS / 3, "length")
    assert result.end_ns == 7 + 12 * MS


def test_a_sequence_ends_at_its_true_length_and_its_surplus_steps_keep_nothing():
    work = submissions([0], fixed(10, 3, 1), max_tokens=50)
    result = simulate(Disaggregated(), [PREFILL, DECODE], work, LATENCY, strict=True, steps=True, log=True)
    assert (result.times[0].output_tokens, result.times[0].end) == (3, "stop")
    assert len(result.steps[1]) == 4, (
        "two decodes were needed; two more were in flight or planned when the last token came"
    )
    stop = next(i for i, entry in enumerate(result.log.entries) if isinstance(entry.event, Stopped))
    assert result.log.entries[stop].now_ns == result.log.entries[stop - 1].now_ns
    assert [dict(entry.event.emitted) for entry in result.log.entries[stop + 1 :]] == [{}, {}]


@pytest.mark.parametrize("seed", range(4))
def test_a_loaded_system_keeps_every_rule_page_by_page(seed):
    count = 150
    work = submissions(poisson(150.0, count, seed), uniform((1, 150), (1, 30), count, seed), max_tokens=30)
    result = simulate(Disaggregated(), [PREFILL, DECODE], work, LATENCY, strict=True)
    assert sorted(result.times) == list(range(count))
    assert sum(one.replays for one in result.times.values()) > 0, "the decode pool is small enough to preempt"
    for (_, request, output, _), one in zip(work, (result.times[id] for id in range(count)), strict=True):
        assert one.rejected or one.output_tokens == output, request
        assert sum(one.stages_ns) == one.end_ns - one.arrived_ns


def test_what_arrives_at_one_time_is_planned_together():
    work = submissions([0, 0, 1], fixed(10, 2, 3))
    result = simulate(Disaggregated(), [PREFILL, DECODE], work, LATENCY, strict=True, steps=True)
    assert [[one.sequence for one in step.prefills] for step in result.steps[0]] == [[0, 1], [2]]


def test_chunks_in_two_lanes_come_out_in_order():
    class Shrinking(LinearLatency):
        def step_ns(self, step, context_tokens):
            return (40 - step.id) * MS if step.prefills else 2 * MS

    lanes = Instance(0, Role.PREFILL, 0, 200, 4, lanes=2, max_step_tokens=8, max_step_sequences=4, saturation_tokens=8)
    work = submissions([0, 1, 2], [(40, 3), (5, 3), (30, 3)])
    result = simulate(Disaggregated(), [lanes, DECODE], work, Shrinking(), strict=True, steps=True)
    assert {step.lane for step in result.steps[0]} == {0, 1} and len(result.times) == 3


def test_losses_returns_and_aborts_leave_nobody_behind():
    work = requests(120)
    events = [
        (40 * MS, InstanceLost(0, 0)),
        (60 * MS, InstanceUp(Instance(0, Role.PREFILL, 1, 200, 4, 1, 0, 64, 4, 32))),
        (150 * MS, InstanceLost(1, 0)),
        (152 * MS, Stopped(3, "abort")),
        (155 * MS, InstanceUp(Instance(1, Role.DECODE, 1, 40, 4, slots=4))),
        (156 * MS, Stopped(10**6, "abort")),
        (300 * MS, InstanceLost(1, 0)),
    ]
    result = simulate(Disaggregated(), [PREFILL, DECODE], work, LATENCY, events=events, strict=True)
    ends = [result.times[id] for id in range(120)]
    assert all(one.output_tokens == work[id].output_tokens for id, one in enumerate(ends) if one.end == "length")
    assert sum(one.replays for one in ends) > 0


def test_copies_of_a_lost_instance_fail_while_one_end_lives():
    work = submissions([0], fixed(10, 4, 1))
    lost = [(3 * MS, InstanceLost(1, 0)), (9 * MS, InstanceUp(Instance(1, Role.DECODE, 1, 40, 4, slots=4)))]
    result = simulate(Disaggregated(), [PREFILL, DECODE], work, LATENCY, events=lost, strict=True)
    assert result.times[0].stages_ns == (0, MS, 2 * MS + 5 * MS, 6 * MS, 3 * 2 * MS), "copied again, without a replay"
    assert result.times[0].replays == 0


def test_a_deadline_rings_in_virtual_time():
    late = Submission(0, Request(0, 10, 30, deadline_ns=10 * MS), 30)
    result = simulate(Disaggregated(), [PREFILL, DECODE], [late], LATENCY, strict=True)
    assert result.times[0].rejected and result.times[0].end_ns == 10 * MS


def test_several_outputs_of_a_prompt_end_each_at_its_own_length():
    work = [Submission(0, Request(0, 10, 30, n=3), (4, 30, 1))]
    result = simulate(Disaggregated(), [PREFILL, DECODE], work, LATENCY, strict=True)
    assert [result.times[id].output_tokens for id in range(3)] == [4, 30, 1]
    assert {one.ttft_ns for one in result.times.values()} == {MS}


def test_sequences_that_wait_for_ever_are_named():
    with pytest.raises(RuntimeError, match="2 sequences never end, the oldest is 0"):
        simulate(Disaggregated(), [PREFILL], submissions([0, 0], fixed(4, 4, 2)), LATENCY)


def test_a_true_length_outside_max_tokens_is_refused():
    with pytest.raises(ValueError, match="output_tokens = 9 of request 0 must be 1 to 8"):
        simulate(Disaggregated(), [PREFILL, DECODE], [Submission(0, Request(0, 4, 8), 9)], LATENCY)


class Scripted:
    """Answers the arrival with what it was given."""

    ledgers: dict = {}

    def __init__(self, *commands):
        self.commands = list(commands)

    def handle(self, event, now_ns):
        return self.commands if isinstance(event, Arrived) else []


def run(id: int, *prefills: Prefill, instance: int = 0, epoch: int = 0, lane: int = 0, decodes=()) -> Run:
    return Run(Step(id, instance, epoch, lane, prefills, decodes))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    "commands",
    [
        [run(0, Prefill(0, 0, 2, False, (0,))), run(1, Prefill(0, 2, 1, False)), run(2, Prefill(0, 3, 1, True))],
        [run(0, Prefill(0, 0, 4, True, (0,)), epoch=1)],
        [run(0, Prefill(0, 0, 4, True, (0,)), instance=7)],
        [run(0, Prefill(0, 0, 4, True, (0,)), lane=1)],
        [Copy(0, 0, Place(0, 0), Place(1, 3), ((0, 0),))],
    ],
    ids=["third step", "dead epoch", "unknown instance", "unknown lane", "dead copy"],
)
def test_commands_that_no_executor_could_carry_out_are_refused(commands, strict):
    with pytest.raises(Violation):
        simulate(Scripted(*commands), [PREFILL, DECODE], submissions([0], fixed(4, 4, 1)), LATENCY, strict=strict)


@pytest.mark.parametrize("page", [-1, 200])
def test_strict_simulation_refuses_pages_outside_the_pool(page):
    with pytest.raises(Violation, match=f"page {page} of a pool"):
        simulate(
            Scripted(run(0, Prefill(0, 0, 4, True, (page,)))),
            [PREFILL, DECODE],
            submissions([0], fixed(4, 4, 1)),
            LATENCY,
            strict=True,
        )


def test_a_timer_in_the_past_rings_now():
    class Impatient(Disaggregated):
        def handle(self, event, now_ns):
            more = [SetTimer("x:0", 0)] if isinstance(event, Arrived) else []
            return more + super().handle(event, now_ns)

    result = simulate(Impatient(), [PREFILL, DECODE], submissions([5], fixed(4, 2, 1)), LATENCY, log=True)
    assert [entry.now_ns for entry in result.log.entries if type(entry.event).__name__ == "Timer"] == [5]


def test_decodes_are_told_how_much_they_attend_to():
    seen = []

    class Watching(LinearLatency):
        def step_ns(self, step, context_tokens):
            if step.decodes:
                assert all(isinstance(decode, Decode) for decode in step.decodes)
                seen.append(context_tokens)
            return super().step_ns(step, context_tokens)

    simulate(Disaggregated(), [PREFILL, DECODE], submissions([0], fixed(10, 4, 1)), Watching())
    assert seen == [11, 12, 13]
