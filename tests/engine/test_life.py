"""Requests come, go, hang up, run out of time and ask for the impossible; instances fail; nothing leaks or hangs."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from ds_jax.async_engine import AsyncEngine, Output
from ds_jax.config import EngineConfig
from ds_jax.errors import Draining, Overloaded, RequestError
from ds_jax.llm import LLM
from ds_jax.protocol import Arrived, Event, StepDone
from ds_jax.sampling import SamplingParams
from tests import goldens
from tests.engine.serving import config_for, mixed_requests, serve

CASE = goldens.CASES[0]
GREEDY = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with serve(config_for(CASE)) as llm:
        yield llm


def until(condition: Callable[[], bool], timeout_s: float = 30) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)


def pages_used(llm: LLM) -> int:
    return sum(instance["pages_used"] for instance in llm.engine.statistics()["instances"])


def test_no_compilation_while_200_mixed_requests_are_served(llm: LLM) -> None:
    prompts, params = mixed_requests(200, llm.engine.executor.arch.vocab_size, seed=2)
    outputs = llm.generate(prompts, params)
    assert len(outputs) == 200
    assert llm.engine.statistics()["compilations_while_serving"] == 0


def test_the_five_stages_sum_to_the_life_of_a_request(llm: LLM) -> None:
    times = llm.generate([[1, 2, 3]], GREEDY)[0].times
    assert times is not None
    assert sum(times.stages_ns) == times.end_ns - times.arrived_ns
    assert times.stages_s()["prefill_execution"] > 0
    assert times.stages_s()["kv_transmission"] > 0
    assert times.stages_s()["decode_execution"] > 0


def test_one_token_needs_no_hand_over(llm: LLM) -> None:
    output = llm.generate([[1, 2, 3]], replace(GREEDY, max_tokens=1))[0]
    assert len(output.token_ids) == 1
    assert output.stages_s is not None
    assert output.stages_s["kv_transmission"] == 0


@pytest.mark.parametrize(
    ("prompt", "params", "param", "says"),
    [
        ([], GREEDY, "prompt", "empty"),
        ("", GREEDY, "prompt", "empty"),
        ([1, 10_000], GREEDY, "prompt", "token id 10000; the vocabulary is 0 to"),
        ([-1], GREEDY, "prompt", "token id -1"),
        ([1] * 96, GREEDY, "prompt", "prompt has 96 tokens; the model allows 96"),
        ([1] * 90, GREEDY, "max_tokens", "max_tokens = 8 with a prompt of 90 tokens exceeds the 96 tokens"),
    ],
)
def test_what_can_never_run_is_refused_by_name(
    llm: LLM, prompt: list[int] | str, params: SamplingParams, param: str, says: str
) -> None:
    with pytest.raises(RequestError, match=says) as caught:
        llm.generate([[1, 2], prompt], params)
    assert caught.value.param == param
    assert "prompts[1]" in str(caught.value)
    assert pages_used(llm) == 0


def test_max_tokens_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="max_tokens = 0 must be a whole number from 1"):
        SamplingParams(max_tokens=0)


def test_four_outputs_of_one_prompt_differ_and_come_again_from_the_same_seed(llm: LLM) -> None:
    params = SamplingParams(n=4, max_tokens=12, temperature=1.0, seed=5, ignore_eos=True)
    [first] = llm.generate([[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]], params)
    assert len({tuple(completion.token_ids) for completion in first.completions}) == 4
    [alone] = llm.generate([[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]], replace(params, n=1))
    assert alone.token_ids == first.token_ids, "the first of n is the one that n = 1 gives"
    again = llm.generate([[7] * 20, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]], [replace(params, n=2), params])[1]
    assert [one.token_ids for one in again.completions] == [one.token_ids for one in first.completions]
    until(lambda: pages_used(llm) == 0)


def test_prompts_given_together_are_planned_together(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[Event] = []
    ask = llm.engine._ask
    monkeypatch.setattr(llm.engine, "_ask", lambda event, now_ns: (heard.append(event), ask(event, now_ns))[1])
    busy, here = threading.Event(), threading.Event()
    llm.engine.call_soon(lambda: (here.set(), busy.wait(30)))
    assert here.wait(30)
    ids = [llm.engine.submit([1, 2, index], GREEDY).start for index in range(3)]
    busy.set()
    until(lambda: not llm.engine.statistics()["requests"] and len(heard) > 3)
    arrived = [event for event in heard if isinstance(event, Arrived)]
    assert [(event.request.id, event.more) for event in arrived] == list(zip(ids, (True, True, False), strict=True))
    first = next(event for event in heard if isinstance(event, StepDone))
    assert set(first.emitted) == set(ids), "one step ran all three"


def test_an_abort_frees_the_pages(llm: LLM) -> None:
    long = SamplingParams(max_tokens=90, temperature=0, ignore_eos=True)
    sequences = [llm.engine.submit([index + 1], long).start for index in range(3)]
    until(lambda: pages_used(llm) > 0)
    for sequence in sequences:
        llm.engine.stop(sequence)
    until(lambda: pages_used(llm) == 0)
    assert llm.engine.statistics()["requests"] == 0


def test_a_deadline_ends_a_request() -> None:
    with serve(config_for(CASE)) as llm:
        updates: list[Any] = []
        llm.engine.submit([1, 2], SamplingParams(max_tokens=90, temperature=0, ignore_eos=True), deadline_s=0.001)
        until(lambda: not updates.extend(llm._updates.get(timeout=30)) and updates[-1].finish_reason is not None)
        assert updates[-1].finish_reason == "deadline"
        assert "deadline" in updates[-1].error
        until(lambda: pages_used(llm) == 0)


def test_a_full_waiting_queue_refuses_and_recovers() -> None:
    config = replace(config_for(CASE), engine=EngineConfig(compilation_cache="", max_waiting=2))
    with serve(config) as llm:
        accepted = []
        with pytest.raises(Overloaded, match="waiting") as caught:
            for _ in range(200):
                accepted.append(llm.engine.submit([1] * 60, GREEDY))
        assert caught.value.retry_after_s > 0
        assert len(accepted) >= 2
        assert llm.engine.drain(60)
        assert llm.engine.statistics()["finished"] == len(accepted)
        with pytest.raises(Draining):
            llm.engine.submit([1], GREEDY)


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_lost_instance_comes_back_and_its_requests_are_replayed(role: str) -> None:
    with serve(config_for(CASE, slots=4)) as llm:
        prompts, params = mixed_requests(16, llm.engine.executor.arch.vocab_size, seed=3)
        wanted = [output.token_ids for output in llm.generate(prompts, params)]
        instance = next(one for one in llm.engine.executor.instances if one.role == role)
        finished = llm.engine.statistics()["finished"]
        llm.engine.call_soon(lose_when, llm, instance.id, finished + 4)
        outputs = llm.generate(prompts, params)
        assert [output.token_ids for output in outputs] == wanted
        epochs = {one["id"]: one["epoch"] for one in llm.engine.statistics()["instances"]}
        assert epochs[instance.id] == 1, "the instance was never lost"
        assert llm.engine.healthy
        until(lambda: pages_used(llm) == 0)


@pytest.mark.parametrize("instances", [1, 2])
def test_nobody_waits_for_an_instance_that_stays_lost(monkeypatch: pytest.MonkeyPatch, instances: int) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("caught fire")

    with serve(config_for(CASE, decode_instances=instances)) as llm:
        monkeypatch.setattr(llm.engine.executor._instances[1], "run", fail)
        outputs = llm.generate([[1, 2, 3], [4], [5, 6]], replace(GREEDY, max_tokens=20))
        if instances == 2:  # the other one goes on
            assert [len(output.token_ids) for output in outputs] == [20] * 3
            assert llm.engine.healthy
        else:
            assert {output.finish_reason for output in outputs} == {"error"}
            error = str(outputs[0].completions[0].error)
            assert "stays lost" in error and "caught fire" in error
            assert not llm.engine.healthy
            with pytest.raises(Draining, match="the engine has failed: instance 1 stays lost"):
                llm.generate([[1]], GREEDY)


def lose_when(llm: LLM, instance: int, finished: int) -> None:
    """On the dispatch thread: take the instance's KV pool away once some requests have finished."""
    if llm.engine.statistics()["finished"] < finished:
        llm.engine.call_soon(lose_when, llm, instance, finished)
    else:
        for layer in llm.engine.executor._instances[instance].pool["k"]:
            layer.delete()


# --- asyncio ----------------------------------------------------------------------------------------------------------


async def gathered(engine: AsyncEngine, prompt: list[int], params: SamplingParams) -> list[Output]:
    return [output async for output in engine.generate(prompt, params)]


def test_the_async_engine_streams_stops_and_aborts() -> None:
    async def scenario() -> None:
        engine = AsyncEngine(config_for(CASE), progress=False)
        await engine.start()
        try:
            many = await asyncio.gather(*(gathered(engine, [index + 1], GREEDY) for index in range(6)))
            for outputs in many:
                assert sum(len(output.token_ids) for output in outputs) == 8
                assert [output.finish_reason for output in outputs[:-1]] == [None] * (len(outputs) - 1)
                assert outputs[-1].finish_reason == "length"
                assert outputs[-1].stages_s is not None

            text = "".join(output.text for output in many[0])
            stop = text[len(text) // 2 :][:3]
            stopped = await gathered(engine, [1], replace(GREEDY, stop=(stop,)))
            assert stopped[-1].finish_reason == "stop"
            assert "".join(output.text for output in stopped) == text[: text.index(stop)]

            stream = engine.generate([1], replace(GREEDY, max_tokens=90))
            await anext(stream)
            await stream.aclose()  # type: ignore[attr-defined]
            deadline = time.monotonic() + 30
            while any(one["pages_used"] for one in engine.statistics()["instances"]):
                assert time.monotonic() < deadline
                await asyncio.sleep(0.005)

            with pytest.raises(RequestError):
                await gathered(engine, [], GREEDY)
            assert await engine.drain(30)
            with pytest.raises(Draining):
                await gathered(engine, [1], GREEDY)
        finally:
            await engine.close()

    asyncio.run(scenario())


def test_offline_a_prompt_that_can_never_run_does_not_disturb_the_others_if_asked(llm: LLM) -> None:
    wanted = llm.generate([[1, 2, 3]], GREEDY)[0]
    good, bad = llm.generate([[1, 2, 3], []], GREEDY, errors="return")
    assert good.token_ids == wanted.token_ids
    assert bad.finish_reason == "error"
    assert bad.error is not None
    assert "prompts[1]: prompt is empty" in bad.error
