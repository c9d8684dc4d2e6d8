"""Steps and copies on real devices: the same tokens however they are cut, batched, moved and replayed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from ds_jax.config import CacheConfig, Config, DecodeConfig, MixedConfig, ModelConfig, PrefillConfig, SchedulerConfig
from ds_jax.protocol import Copy, Decode, Medium, Place, Prefill, Role, pages_for
from ds_jax.runtime.executor import InProcessExecutor
from ds_jax.runtime.instance import Result
from ds_jax.runtime.sequence import Sequence
from ds_jax.sampling import SamplingParams
from tests.goldens import CASES
from tests.runtime.harness import Bench, bench, write_config

GOLDEN = CASES[0]
PAGE = 8
SAMPLED = SamplingParams(temperature=1.3, top_k=40, top_p=0.95)
PROMPTS = [[5, 6, 7], list(range(20, 57)), [9] * 11, [3]]


def config_for(prefill_tp: int = 1, decode_tp: int = 1, mixed: int = 0) -> Config:
    sizes: dict[str, Any] = {"max_step_tokens": 64, "max_step_sequences": 4, "token_buckets": (64,)}
    return Config(
        model=ModelConfig(path=str(GOLDEN.folder)),
        policy="by:hand" if mixed else "disaggregated",
        prefill=PrefillConfig(tp=prefill_tp, **sizes),
        decode=DecodeConfig(tp=decode_tp, slots=4),
        mixed=MixedConfig(instances=mixed, slots=4, **sizes),
        cache=CacheConfig(page_size=PAGE, num_pages=2048, host_pages=12),
    )


@pytest.fixture(scope="module")
def shared() -> Iterator[Bench]:
    """One executor for all tests that leave it as it was."""
    with bench(config_for(decode_tp=2, mixed=1)) as b:
        yield b
        assert b.executor.compilations.count == 0, "something compiled while serving"


@pytest.fixture(scope="module")
def alone(shared: Bench) -> list[list[int]]:
    """What each prompt generates alone, sampled."""
    return [shared.generate(shared.add(prompt, SAMPLED, seed=i), 8) for i, prompt in enumerate(PROMPTS)]


def pull(b: Bench, sequence: Sequence) -> int:
    """Prefill and hand over; returns the pages it has at the decode instance."""
    here = b.prefill(sequence, b.of(Role.PREFILL).id)
    return len(b.finish_copy(b.start_copy(sequence, b.of(Role.PREFILL).id, here, b.of(Role.DECODE).id)))


@pytest.mark.parametrize("prefill_tp, decode_tp", [(1, 4), (4, 1)])
def test_tokens_are_the_oracles_and_do_not_depend_on_tp(prefill_tp: int, decode_tp: int, alone: list[list[int]]):
    with bench(config_for(prefill_tp, decode_tp)) as b:
        for answer in GOLDEN.answers():
            assert answer.agrees(b.generate(b.add(answer.prompt), len(answer.tokens), slot=2))
        for i, prompt in enumerate(PROMPTS):
            assert b.generate(b.add(prompt, SAMPLED, seed=i), 8) == alone[i]
        assert b.executor.compilations.count == 0


@pytest.mark.parametrize("chunk", [1, 4, 10])
def test_a_prompt_in_chunks_gives_the_same_tokens(shared: Bench, alone: list[list[int]], chunk: int):
    sequence = shared.add(PROMPTS[1][:], SAMPLED, seed=1)
    shared.prefill(sequence, shared.of(Role.PREFILL).id, chunk)
    assert sequence.output == alone[1][:1]


def test_prompts_in_one_step_give_the_same_tokens(shared: Bench, alone: list[list[int]]):
    instance = shared.of(Role.PREFILL)
    sequences = [shared.add(prompt, SAMPLED, seed=i) for i, prompt in enumerate(PROMPTS)]
    prefills = tuple(
        Prefill(s.id, 0, len(s), True, shared.pages(instance.id, pages_for(len(s), instance.page_size)))
        for s in sequences
    )
    shared.finish(shared.run(instance.id, prefills))
    assert [sequence.output for sequence in sequences] == [tokens[:1] for tokens in alone]


def test_sequences_that_join_and_leave_a_running_batch_do_not_disturb_each_other(shared: Bench, alone: list[list[int]]):
    decode = shared.of(Role.DECODE).id
    sequences = [shared.add(prompt, SAMPLED, seed=i) for i, prompt in enumerate(PROMPTS)]
    have = {sequence.id: pull(shared, sequence) for sequence in sequences}
    a, b, c, d = sequences
    # Two steps in flight throughout; b leaves for good, c takes its slot in the very next step, d leaves and returns.
    first = [{0: a, 1: b}, {0: a, 1: b, 3: d}, {0: a, 1: c}, {0: a, 1: c}, {0: a, 1: c}, {0: a, 2: d}, {2: d}]
    flying: list[tuple[int, dict[int, Sequence]]] = []
    done = dict.fromkeys(have, 0)

    def ahead(sequence: Sequence) -> int:
        return sum(sequence in slots.values() for _, slots in flying)

    for slots in first:
        # A sequence that comes (back) needs its newest token on the host.
        while len(flying) == 2 or any(ahead(s) and (slot, s) not in flying[-1][1].items() for slot, s in slots.items()):
            shared.finish(flying.pop(0)[0])
        decodes = []
        for slot, sequence in slots.items():
            missing = pages_for(len(sequence) + ahead(sequence), PAGE) - have[sequence.id]
            decodes.append(Decode(sequence.id, slot, shared.pages(decode, missing) if missing > 0 else ()))
            have[sequence.id] += max(missing, 0)
            done[sequence.id] += 1
        flying.append((shared.run(decode, decodes=tuple(decodes)), slots))
    for step, _ in flying:
        shared.finish(step)
    assert [s.output for s in sequences] == [t[: 1 + done[s.id]] for s, t in zip(sequences, alone, strict=True)]


def test_a_replay_continues_where_the_sequence_was(shared: Bench, alone: list[list[int]]):
    for known in (1, 3):
        sequence = shared.add(PROMPTS[1], SAMPLED, seed=1)
        sequence.output.extend(alone[1][:known])
        have = {sequence.id: pull(shared, sequence)}
        shared.finish(shared.decode({0: sequence}, shared.of(Role.DECODE).id, have))
        assert sequence.output == alone[1][: known + 2]


def test_a_sequence_replayed_into_the_slot_it_was_in_starts_from_its_new_pages(shared: Bench, alone: list[list[int]]):
    decode, sequence = shared.of(Role.DECODE).id, shared.add(PROMPTS[1], SAMPLED, seed=1)
    for _ in range(2):
        have = {sequence.id: pull(shared, sequence)}
        shared.finish(shared.decode({0: sequence}, decode, have))
        shared.finish(shared.decode({0: sequence}, decode, have))
    assert sequence.output == alone[1][:6]


@pytest.mark.parametrize("one_program", [True, False])
def test_chunks_and_decodes_in_one_step_give_the_same_tokens(
    shared: Bench, alone: list[list[int]], monkeypatch: pytest.MonkeyPatch, one_program: bool
):
    """A prompt in chunks beside two sequences that decode, the second of them in a slot that another has left."""
    mixed = shared.of(Role.MIXED).id
    instance = shared.executor._instances[mixed]
    monkeypatch.setattr(instance, "shapes", replace(instance.shapes, mixes=one_program))
    first, chunked, last = (shared.add(PROMPTS[i], SAMPLED, seed=i) for i in (0, 1, 2))
    have = {sequence.id: len(shared.prefill(sequence, mixed)) for sequence in (first, last)}
    pages = shared.pages(mixed, pages_for(len(chunked), PAGE))

    def step(prefills: tuple[Prefill, ...], slots: dict[int, Sequence]) -> None:
        decodes = []
        for slot, sequence in slots.items():
            missing = pages_for(len(sequence), PAGE) - have[sequence.id]
            decodes.append(Decode(sequence.id, slot, shared.pages(mixed, missing) if missing else ()))
            have[sequence.id] += missing
        assert shared.finish(shared.run(mixed, prefills, tuple(decodes))).keys() == {
            *(sequence.id for sequence in slots.values()),
            *(prefill.sequence for prefill in prefills if prefill.samples),
        }

    step((Prefill(chunked.id, 0, 10, False, pages),), {3: first})
    step((Prefill(chunked.id, 10, 20, False), Prefill(chunked.id, 30, 0, False)), {3: first, 0: last})
    step((Prefill(chunked.id, 30, 7, True),), {3: last})
    have[chunked.id] = len(pages)
    step((), {3: last, 1: chunked})
    assert [s.output for s in (first, chunked, last)] == [alone[0][:3], alone[1][:2], alone[2][:4]]


def test_log_probabilities_and_penalties_are_the_same_in_mixed_steps(shared: Bench):
    asks = SamplingParams(
        temperature=0.7,
        repetition_penalty=1.3,
        logit_bias={7: 2.0},
        logprobs=2,
        prompt_logprobs=1,
        presence_penalty=0.5,
    )
    mixed = shared.of(Role.MIXED).id
    found = []
    for together in (False, True):
        decoded, prompted = shared.add([5, 6, 7], asks, seed=3), shared.add([9] * 6, asks, seed=4)
        shared.prefill(decoded, mixed)
        prefills = (Prefill(prompted.id, 0, 6, True, shared.pages(mixed, 1)),)
        decodes = (Decode(decoded.id, 2),)
        steps = [(prefills, decodes)] if together else [(prefills, ()), ((), decodes)]
        scores = []
        for step in steps:
            shared.finish(id := shared.run(mixed, *step))
            scores.append(shared.scores[id])
        tokens = [one for score in scores for one in score.tokens.values()]
        prompts = [one for score in scores for one in score.prompts.values()]
        found.append((decoded.output, prompted.output, tokens, prompts))
    apart, together_ = found
    assert apart[:2] == together_[:2]
    assert [len(one) for one in apart[2:]] == [len(one) for one in together_[2:]] == [2, 1]
    for one, other in zip(apart[2], together_[2], strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
        assert [token for token, _ in one.top] == [token for token, _ in other.top]
    assert [one.logprob for one in apart[3][0][1]] == pytest.approx(
        [one.logprob for one in together_[3][0][1]], abs=1e-4
    )


def test_a_prefill_that_does_not_sample_emits_nothing(shared: Bench):
    sequence = shared.add([1, 2, 3])
    pages = shared.pages(0, 1)
    assert shared.finish(shared.run(0, (Prefill(sequence.id, 0, 2, False, pages),))) == {}
    assert shared.finish(shared.run(0)) == {}


def test_a_series_of_copies_brings_a_prompt_page_by_page(shared: Bench, alone: list[list[int]]):
    source, destination = shared.of(Role.PREFILL).id, shared.of(Role.DECODE).id
    sequence = shared.add(PROMPTS[1], SAMPLED, seed=1)
    here = shared.prefill(sequence, source)
    cuts = [here[:2], here[2:3], here[3:]]
    copies = [shared.start_copy(sequence, source, part, destination, last=part is cuts[-1]) for part in cuts]
    have = {sequence.id: sum(len(shared.finish_copy(copy)) for copy in copies)}
    shared.finish(shared.decode({1: sequence}, destination, have))
    assert sequence.output == alone[1][:2]


def test_pages_move_between_any_two_instances(shared: Bench, alone: list[list[int]]):
    """From a prefill instance to a mixed one, on to the decode instance, back, and to the prefill instance for good."""
    prefill, decode, mixed = (shared.of(role).id for role in (Role.PREFILL, Role.DECODE, Role.MIXED))
    sequence = shared.add(PROMPTS[1], SAMPLED, seed=1)
    pages, at = shared.prefill(sequence, prefill), prefill
    for to in (mixed, decode, mixed, prefill, decode):
        pages, at = shared.finish_copy(shared.start_copy(sequence, at, pages, to)), to
        if at != prefill:
            have = {sequence.id: len(pages)}
            shared.finish(shared.decode({1: sequence}, at, have))
            pages = shared.executor._instances[at].tables[sequence.id]
    assert sequence.output == alone[1][:5]


def test_outputs_of_one_prompt_part_on_the_instance_that_ran_it(shared: Bench, alone: list[list[int]]):
    """The fork decodes in pages that it shares, but for the last one, which it gets a copy of."""
    mixed = shared.of(Role.MIXED).id
    leader, fork = shared.add(PROMPTS[1], SAMPLED, seed=1), shared.add(PROMPTS[1], SAMPLED, seed=1, index=1)
    pages = shared.pages(mixed, 5)
    prefills = Prefill(leader.id, 0, 37, True, pages), Prefill(fork.id, 37, 0, True)
    shared.finish(shared.run(mixed, prefills))
    ends = (Place(mixed, 0),) * 2
    [own] = shared.pages(mixed, 1)
    copy = Copy(-77, fork.id, *ends, ((pages[4], own),), shared=pages[:4])
    shared.executor.copy(copy)
    have = dict.fromkeys((leader.id, fork.id), 5)
    shared.finish(shared.decode({0: leader, 1: fork}, mixed, have))
    assert shared.copies[-77]
    for _ in range(5):
        shared.finish(shared.decode({0: leader, 1: fork}, mixed, have))
    assert leader.output == alone[1][:7] and fork.output[:1] != leader.output[:1]
    again = shared.add(PROMPTS[1], SAMPLED, seed=1, index=1)
    assert shared.generate(again, 7) == fork.output


# --- host memory ------------------------------------------------------------------------------------------------------


def swap(b: Bench, sequence: Sequence, instance: int, pairs: tuple[tuple[int, int], ...], out: bool) -> Copy:
    """Start a copy between an instance and its own host memory."""
    b._ids += 1
    epoch = b.instances[instance].epoch
    ends = Place(instance, epoch), Place(instance, epoch, Medium.HOST)
    copy = Copy(b._ids, sequence.id, *(ends if out else ends[::-1]), pairs)
    b.executor.copy(copy)
    return copy


@pytest.mark.parametrize("role", [Role.DECODE, Role.MIXED])
def test_a_sequence_that_was_swapped_out_goes_on_where_it_was(shared: Bench, alone: list[list[int]], role: Role):
    instance, sequence = shared.of(role), shared.add(PROMPTS[1], SAMPLED, seed=1)
    prefill = shared.of(Role.PREFILL).id
    here = shared.prefill(sequence, prefill)
    pages = shared.finish_copy(shared.start_copy(sequence, prefill, here, instance.id))
    have = {sequence.id: len(pages)}
    for _ in range(3):
        shared.finish(shared.decode({1: sequence}, instance.id, have))
        pages = shared.executor._instances[instance.id].tables[sequence.id]
        places = [(7 * i + 3) % instance.host_pages for i in range(len(pages))]
        shared.finish_copy(swap(shared, sequence, instance.id, tuple(zip(pages, places, strict=True)), out=True))
        shared.finish(shared.run(instance.id))  # the slot is empty meanwhile
        fresh = shared.pages(instance.id, len(pages))
        shared.finish_copy(swap(shared, sequence, instance.id, tuple(zip(places, fresh, strict=True)), out=False))
        have = {sequence.id: len(fresh)}
    shared.finish(shared.decode({2: sequence}, instance.id, have))
    assert sequence.output == alone[1][:5]


def test_a_swap_never_holds_up_the_thread_that_starts_it(shared: Bench, monkeypatch: pytest.MonkeyPatch):
    instance, sequence = shared.of(Role.MIXED).id, shared.add(PROMPTS[1])
    pages = shared.prefill(sequence, instance)
    host, go = shared.executor._instances[instance].host, threading.Event()
    down = host.down
    monkeypatch.setattr(host, "down", lambda pages: go.wait(30) and down(pages))
    copy = swap(shared, sequence, instance, ((pages[0], 0),), out=True)
    assert shared.finish(shared.run(instance)) == {}, "a step started later is done earlier"
    assert copy.id not in shared.copies
    go.set()
    shared.finish_copy(copy)


def test_a_swap_that_cannot_be_is_answered_once(shared: Bench):
    instance, sequence = shared.of(Role.MIXED), shared.add([1])
    for pages, out in ((((0, instance.host_pages),), True), (((-1, 0),), False)):
        copy = swap(shared, sequence, instance.id, pages, out)
        shared.wait(lambda copy=copy: copy.id in shared.copies)
        assert not shared.copies[copy.id]
    assert shared.instances[instance.id].epoch == 0


def test_source_pages_may_be_overwritten_by_steps_that_follow_a_copy(shared: Bench, alone: list[list[int]]):
    """The gather has been dispatched; later programs on the source wait for it."""
    source, destination = shared.of(Role.PREFILL), shared.of(Role.DECODE).id
    sequence, other = shared.add(PROMPTS[1], SAMPLED, seed=1), shared.add([8] * 40)
    here = shared.prefill(sequence, source.id)
    copy = shared.start_copy(sequence, source.id, here, destination)
    shared.run(source.id, (Prefill(other.id, 0, 40, True, tuple(here)),))
    have = {sequence.id: len(shared.finish_copy(copy))}
    shared.finish(shared.decode({1: sequence}, destination, have))
    assert sequence.output == alone[1][:2]


def test_a_forgotten_sequence_leaves_nothing_behind(shared: Bench):
    source, destination = shared.of(Role.PREFILL).id, shared.of(Role.DECODE).id
    sequence = shared.add(PROMPTS[0])
    copy = shared.start_copy(sequence, source, shared.prefill(sequence, source), destination)
    shared.executor.forget(sequence.id)
    shared.finish_copy(copy)
    assert not any(sequence.id in instance.tables for instance in shared.executor._instances)


def test_copies_that_cannot_be_are_answered_once(shared: Bench):
    source, destination = shared.of(Role.PREFILL), shared.of(Role.DECODE)
    here, there = Place(source.id, source.epoch), Place(destination.id, destination.epoch)
    wrong = [
        (Place(source.id, source.epoch + 1), there),
        (here, Place(destination.id, destination.epoch + 1)),
        (here, here),
        (here, there._replace(medium=Medium.HOST)),
    ]
    for number, ends in enumerate(wrong):
        shared.executor.copy(Copy(-1 - number, 0, *ends, ((0, 0),)))
        shared.wait(lambda number=number: -1 - number in shared.copies)
    assert [shared.copies[-1 - number] for number in range(4)] == [False] * 4
    shared.executor.copy(Copy(-9, 0, *(Place(i, 99) for i in (0, 1)), ((0, 0),)))
    shared.turn()
    assert -9 not in shared.copies


# --- failures ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def fragile(tmp_path: Any) -> Iterator[Bench]:
    config = Config(
        model=ModelConfig(path=write_config(tmp_path), load_format="dummy"),
        prefill=PrefillConfig(max_step_tokens=32, max_step_sequences=2),
        decode=DecodeConfig(slots=2),
        cache=CacheConfig(page_size=8, num_pages=64),
    )
    with bench(config) as b:
        yield b


@pytest.fixture
def swapping(tmp_path: Any) -> Iterator[Bench]:
    config = Config(
        model=ModelConfig(path=write_config(tmp_path), load_format="dummy"),
        policy="colocated",
        prefill=PrefillConfig(instances=0),
        decode=DecodeConfig(instances=0),
        mixed=MixedConfig(instances=1, max_step_tokens=32, max_step_sequences=2, slots=2),
        cache=CacheConfig(page_size=8, num_pages=64, host_pages=4),
        scheduler=SchedulerConfig(preemption="swap"),
    )
    with bench(config) as b:
        yield b


def fail(*_: Any) -> Any:
    raise RuntimeError("the device caught fire\nin many places")


def break_dispatch(b: Bench, instance: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(b.executor._instances[instance], "run", fail)


class Unreadable:
    """Tokens that a device never computed."""

    copy_to_host_async = lambda self: None  # noqa: E731
    __array__ = fail


def break_results(b: Bench, instance: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(b.executor._instances[instance], "run", lambda *_: [Result(Unreadable(), [(0, 0)])])  # type: ignore[arg-type]


@pytest.mark.parametrize("break_", [break_dispatch, break_results])
def test_a_lost_instance_comes_back_empty_and_works(fragile: Bench, monkeypatch: pytest.MonkeyPatch, break_: Any):
    b = fragile
    expected = b.generate(b.add([1, 2, 3]), 5)
    with monkeypatch.context() as broken:
        break_(b, 0, broken)
        step = b.run(0, (Prefill(0, 0, 3, True, b.pages(0, 1)),))
        late = b.run(0)
        b.wait(lambda: ("up", 0, 1) in b.heard)
    b.run(1)  # the living answer still
    b.wait(lambda: b.heard[-1][0] == "step")
    assert ("lost", 0, 0) in b.heard and step not in b.steps and late not in b.steps
    assert b.generate(b.add([1, 2, 3]), 5) == expected


@pytest.mark.parametrize("lost", [0, 1])
def test_copies_of_a_lost_instance_fail_once_and_are_never_inserted(
    fragile: Bench, monkeypatch: pytest.MonkeyPatch, lost: int
):
    b = fragile
    sequence = b.add([1, 2, 3])
    copy = b.start_copy(sequence, 0, b.prefill(sequence, 0), 1)
    b.executor._lose(lost, 0, "for the test")
    assert b.heard[-3:] == [("lost", lost, 0), ("copy", copy.id, False), ("up", lost, 1)]
    b.finish(b.run(0))  # whatever the copy's reader had to say has been said
    b.executor._landings[0].close()
    while not b.calls.empty():
        b.turn()
    assert sequence.id not in b.executor._instances[1].tables


@pytest.mark.parametrize("out", [True, False])
def test_a_lost_instance_loses_its_host_pages_and_answers_no_swap_of_that_life(swapping: Bench, out: bool):
    """Both ends of a swap die together, so that nobody waits for an answer."""
    b, sequence = swapping, swapping.add([1, 2, 3])
    b.finish_copy(swap(b, sequence, 0, ((b.prefill(sequence, 0)[0], 0),), out=True))
    copy = swap(b, sequence, 0, ((0, 1),), out)
    b.executor._lose(0, 0, "for the test")
    assert b.heard[-2:] == [("lost", 0, 0), ("up", 0, 1)]
    b.finish(b.run(0))
    b.executor._swaps[0].close()
    while not b.calls.empty():
        b.turn()
    assert copy.id not in b.copies
    assert not b.executor._instances[0].tables
    late = swap(b, sequence, 0, ((0, 0),), out=False)  # of a page that this life never wrote
    b.wait(lambda: ("up", 0, 2) in b.heard)
    assert late.id not in b.copies


def test_an_instance_that_fails_again_and_again_stays_lost(fragile: Bench, monkeypatch: pytest.MonkeyPatch):
    b = fragile
    break_dispatch(b, 0, monkeypatch)
    for epoch in range(4):
        assert b.instances[0].epoch == epoch
        b.run(0)
        b.wait(lambda epoch=epoch: ("lost", 0, epoch) in b.heard)
    assert [event for event in b.heard if event[0] == "up"] == [("up", 0, 1), ("up", 0, 2), ("up", 0, 3)]
    assert b.heard[-1] == ("gone", 0)


def test_a_good_step_in_between_gives_an_instance_all_its_lives_again(fragile: Bench, monkeypatch: pytest.MonkeyPatch):
    b = fragile
    for epoch in range(6):
        b.finish(b.run(0))
        with monkeypatch.context() as broken:
            break_dispatch(b, 0, broken)
            b.run(0)
            b.wait(lambda epoch=epoch: ("up", 0, epoch + 1) in b.heard)


def test_closing_ends_all_threads_and_may_come_at_any_time(fragile: Bench):
    before = threading.active_count()
    sequence = fragile.add([1, 2, 3])
    here = fragile.prefill(sequence, 0)
    fragile.start_copy(sequence, 0, here, 1)
    fragile.run(0, (Prefill(sequence.id, 0, 3, True, tuple(here)),))
    fragile.executor.close()
    fragile.executor.close()
    assert threading.active_count() == before - 3
    while not fragile.calls.empty():
        fragile.turn()
    assert not fragile.executor._instances[0].pool


def test_an_executor_that_was_never_built_can_be_closed(tmp_path: Any):
    config = Config(
        model=ModelConfig(path=write_config(tmp_path), load_format="dummy"),
        prefill=PrefillConfig(max_step_tokens=32, max_step_sequences=2),
        decode=DecodeConfig(slots=2),
        cache=CacheConfig(page_size=8, num_pages=64),
    )
    InProcessExecutor(config).close()
