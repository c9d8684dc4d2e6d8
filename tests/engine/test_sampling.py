"""Penalties, biases and log-probabilities through whole engines: they depend on the tokens and on nothing else."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from ds_jax.errors import RequestError
from ds_jax.llm import LLM, RequestOutput
from ds_jax.sampling import SamplingParams, TokenLogprobs
from tests import goldens
from tests.engine.serving import config_for, mixed_requests, serve

CASE = next(case for case in goldens.CASES if case.name == "llama_gqa")
GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
PROMPT = list(range(5, 16))


def requests(count: int, vocabulary: int) -> tuple[list[list[int]], list[SamplingParams]]:
    """Mixed requests; three in four ask for something that depends on the tokens so far."""
    prompts, params = mixed_requests(count, vocabulary, seed=7)
    draw = random.Random(7)
    for index, one in enumerate(params):
        wanted: dict[str, Any] = {"logprobs": draw.choice((None, 0, 3))}
        if index % 4:
            wanted |= {
                "presence_penalty": draw.choice((0.0, 1.5, -0.5)),
                "frequency_penalty": draw.choice((0.0, 0.7)),
                "repetition_penalty": draw.choice((1.0, 1.3)),
                "logit_bias": draw.choice(({}, {draw.randrange(vocabulary): 3.0})),
                "min_p": draw.choice((0.0, 0.05)),
            }
        params[index] = replace(one, **wanted)
    return prompts, params


@pytest.fixture(scope="module")
def plain() -> Iterator[LLM]:
    with serve(config_for(CASE)) as llm:
        yield llm
        assert llm.engine.statistics()["compilations_while_serving"] == 0


@pytest.fixture(scope="module")
def cramped() -> Iterator[LLM]:
    """A pool so small that sequences are preempted."""
    with serve(config_for(CASE, pages=14)) as llm:
        yield llm


@pytest.fixture(scope="module")
def alone(plain: LLM) -> list[RequestOutput]:
    pairs = zip(*requests(24, vocabulary(plain)), strict=True)
    return [plain.generate([prompt], params)[0] for prompt, params in pairs]


def vocabulary(llm: LLM) -> int:
    return llm.engine.executor.arch.vocab_size


def check(llm: LLM, alone: list[RequestOutput]) -> list[RequestOutput]:
    outputs = llm.generate(*requests(24, vocabulary(llm)))
    for got, wanted in zip(outputs, alone, strict=True):
        assert got.token_ids == wanted.token_ids
        same(got.completions[0].logprobs, wanted.completions[0].logprobs)
    return outputs


def same(got: list[TokenLogprobs] | None, wanted: list[TokenLogprobs] | None) -> None:
    assert (got is None) == (wanted is None)
    for one, other in zip(got or (), wanted or (), strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
        assert [value for _, value in one.top] == pytest.approx([value for _, value in other.top], abs=1e-4)


def test_batched_together_the_tokens_are_those_of_each_alone(plain: LLM, alone: list[RequestOutput]) -> None:
    check(plain, alone)


def test_the_tokens_do_not_depend_on_tp(alone: list[RequestOutput]) -> None:
    with serve(config_for(CASE, prefill_tp=4, decode_tp=2)) as llm:
        check(llm, alone)
        assert llm.engine.statistics()["compilations_while_serving"] == 0


def test_a_preempted_sequence_goes_on_with_the_counts_of_its_confirmed_tokens(
    cramped: LLM, alone: list[RequestOutput]
) -> None:
    outputs = check(cramped, alone)
    assert sum(output.times.replays for output in outputs if output.times is not None), "nothing was preempted"


def test_what_each_parameter_is_for(plain: LLM) -> None:
    [free] = plain.generate([PROMPT], replace(GREEDY, max_tokens=40))
    repeated = {token for token in free.token_ids if free.token_ids.count(token) > 1}
    assert repeated, "the test needs a model that repeats itself"
    [output] = plain.generate([PROMPT], replace(GREEDY, max_tokens=40, repetition_penalty=100.0))
    assert len({*output.token_ids}) > len({*free.token_ids})
    [output] = plain.generate([PROMPT], replace(GREEDY, logit_bias={9: 100.0}))
    assert output.token_ids == [9] * 12
    [output] = plain.generate([PROMPT], replace(GREEDY, logit_bias={9: 100.0, 4: 99.0}, frequency_penalty=2.0))
    assert output.token_ids == [9, 4] * 6 or {*output.token_ids} == {9, 4}


def test_a_stop_token_ends_the_output_and_min_tokens_holds_it_back(plain: LLM) -> None:
    [free] = plain.generate([PROMPT], GREEDY)
    stop = free.token_ids[3]
    first = free.token_ids.index(stop)
    params = replace(GREEDY, stop_token_ids=(stop,))
    [output] = plain.generate([PROMPT], params)
    assert (output.token_ids, output.finish_reason) == (free.token_ids[: first + 1], "stop")
    [output] = plain.generate([PROMPT], replace(params, min_tokens=8))
    assert stop not in output.token_ids[:8] and len(output.token_ids) >= 8
    assert output.token_ids[:first] == free.token_ids[:first]
    eos = plain.engine.executor.checkpoint.eos_token_ids[0]
    bias = {eos: 100.0}
    [output] = plain.generate([PROMPT], replace(GREEDY, ignore_eos=False, logit_bias=bias, min_tokens=5))
    assert output.token_ids[5:] == [eos] and eos not in output.token_ids[:5] and output.finish_reason == "stop"


def log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


def check_prompt(output: RequestOutput, answer: goldens.Answer, top: int, tolerance: float) -> None:
    assert output.prompt_logprobs is not None
    assert len(output.prompt_logprobs) == len(answer.prompt) - 1
    expected = log_softmax(answer.prefill_logits)
    for place, (token, found) in enumerate(zip(answer.prompt[1:], output.prompt_logprobs, strict=True)):
        assert found.logprob == pytest.approx(expected[place, token], abs=tolerance)
        assert len(found.top) == top
        for rank, (id, value) in enumerate(found.top):
            assert value == pytest.approx(expected[place, id], abs=tolerance)
            assert value == pytest.approx(np.sort(expected[place])[-1 - rank], abs=tolerance)


def test_logprobs_of_prompts_are_the_oracles(plain: LLM) -> None:
    """In one chunk and in several (a step holds 64 tokens), with and without penalties."""
    answers = CASE.answers()
    params = replace(GREEDY, max_tokens=2, prompt_logprobs=5, repetition_penalty=1.5, n=2)
    for output, answer in zip(plain.generate([one.prompt for one in answers], params), answers, strict=True):
        check_prompt(output, answer, 5, 1e-3)
    long = [token for answer in answers for token in answer.prompt][:80]
    whole, chunked = plain.generate([long[:64], long], replace(params, max_tokens=1))
    assert whole.prompt_logprobs is not None and chunked.prompt_logprobs is not None
    assert len(chunked.prompt_logprobs) == len(long) - 1
    same(chunked.prompt_logprobs[:63], whole.prompt_logprobs)
    [again] = plain.generate([long], replace(params, max_tokens=1, n=1))
    same(again.prompt_logprobs, chunked.prompt_logprobs)


def test_logprobs_of_an_output_are_those_of_the_same_tokens_in_a_prompt(plain: LLM) -> None:
    params = replace(GREEDY, temperature=1.0, seed=3, presence_penalty=1.0, top_k=4, logprobs=20)
    [output] = plain.generate([PROMPT], params)
    found = output.completions[0].logprobs
    assert found is not None and len(found) == 12 and output.prompt_logprobs is None
    both = [*PROMPT, *output.token_ids]
    [scored] = plain.generate([both], replace(GREEDY, max_tokens=1, prompt_logprobs=20))
    assert scored.prompt_logprobs is not None and scored.completions[0].logprobs is None
    same(found, scored.prompt_logprobs[-12:])


def test_logprobs_survive_preemption_and_are_not_given_twice(cramped: LLM) -> None:
    prompts, params = mixed_requests(24, vocabulary(cramped), seed=7)
    params = [replace(one, prompt_logprobs=1, logprobs=1) for one in params]
    outputs = cramped.generate(prompts, params)
    assert sum(output.times.replays for output in outputs if output.times is not None), "nothing was preempted"
    for output in outputs:
        assert output.prompt_logprobs is not None and len(output.prompt_logprobs) == len(output.prompt_token_ids) - 1
        assert len(output.completions[0].logprobs or ()) == len(output.token_ids)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_stays_within_a_few_roundings_of_float32(dtype: Any) -> None:
    """The root mean square of the logits' errors, measured against their spread: less than 5 units of rounding."""
    config = config_for(CASE)
    with serve(replace(config, model=replace(config.model, dtype=jnp.dtype(dtype).name))) as llm:
        answers = CASE.answers()
        outputs = llm.generate([one.prompt for one in answers], replace(GREEDY, max_tokens=4, prompt_logprobs=20))
    errors = []
    for output, answer in zip(outputs, answers, strict=True):
        expected = log_softmax(answer.prefill_logits)
        for place, found in enumerate(output.prompt_logprobs or ()):
            errors += [value - expected[place, id] for id, value in found.top]
    spread = np.concatenate([answer.prefill_logits for answer in answers]).std()
    assert 0 < np.sqrt(np.mean(np.square(errors))) < 5 * float(jnp.finfo(dtype).eps) * spread


@pytest.mark.parametrize(
    ("params", "param", "says"),
    [
        ({"logit_bias": {10_000: 1.0}}, "logit_bias", "logit_bias has token id 10000; the vocabulary is 0 to"),
        ({"stop_token_ids": (1, 10_000)}, "stop_token_ids", "stop_token_ids has token id 10000"),
        ({"n": 5}, "n", "n = 5 must be at most 4"),
    ],
)
def test_what_the_model_or_the_steps_cannot_hold_is_refused(
    plain: LLM, params: dict[str, Any], param: str, says: str
) -> None:
    with pytest.raises(RequestError, match=says) as caught:
        plain.generate([PROMPT], replace(GREEDY, **params))
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({"min_p": 1.1}, "min_p = 1.1 must be a number from 0 to 1"),
        ({"presence_penalty": -2.1}, "presence_penalty = -2.1 must be a number from -2 to 2"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty = nan must be a number from -2 to 2"),
        ({"repetition_penalty": 0}, "repetition_penalty = 0 must be a number from 0.01 to 100"),
        ({"logit_bias": {3: 101}}, r"logit_bias\[3\] = 101 must be a number from -100 to 100"),
        ({"logit_bias": {-1: 1}}, "logit_bias = -1 must be a whole number"),
        ({"stop_token_ids": (-1,)}, "stop_token_ids = -1 must be a whole number"),
        ({"min_tokens": 17}, "min_tokens = 17 must be at most max_tokens = 16"),
        ({"logprobs": 21}, "logprobs = 21 must be a whole number from 0 to 20"),
        ({"prompt_logprobs": -1}, "prompt_logprobs = -1 must be a whole number from 0 to 20"),
    ],
)
def test_values_out_of_range_are_refused(params: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        SamplingParams(**params)
