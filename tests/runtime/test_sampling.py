"""Sampling against a definition in plain NumPy."""

from __future__ import annotations

import functools
import random
from typing import Any

import jax
import numpy as np
import pytest
from jax.extend import random as jax_random

from ds_jax.runtime import logprobs, marks, sampling
from ds_jax.runtime.sequence import Sequence
from ds_jax.sampling import SamplingParams

V = 37
END_IDS = (3, 30)


@functools.cache
def program(batch: int):
    def run(logits, words, positions, marked):
        return sampling.sample(logits, sampling.unpack(words), positions, marked=marked)

    return jax.jit(run)


@functools.cache
def mark_writer():
    return jax.jit(marks.write)


def marked_rows(rows: list[Sequence]) -> Any:
    """Marks as an instance keeps them: stale where nobody asks."""
    marked = jax.numpy.full((2, len(rows), V), 2**29 + 5, np.int32)
    for number, row in enumerate(rows):
        if marks.asked_by(row.sampling):
            _, packed = marks.pack(row, number, V)
            marked = mark_writer()(marked, packed)
    return marked


def sample(logits: np.ndarray, rows: list[Sequence], positions: list[int]) -> list[int]:
    words = np.asarray([sampling.pack(row) for row in rows], np.int32)
    tokens = program(len(rows))(logits, words, np.asarray(positions, np.int32), marked_rows(rows))
    return np.asarray(tokens).tolist()


def row(seed: int = 0, index: int = 0, **params: Any) -> Sequence:
    return Sequence(0, [0], SamplingParams(**params), seed, index, end_ids=END_IDS)


# --- the definition ---------------------------------------------------------------------------------------------------


def threefry(key: tuple[np.ndarray, np.ndarray], counter: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, ...]:
    """Threefry-2x32-20 as its paper has it."""
    keys = [*key, key[0] ^ key[1] ^ np.uint32(0x1BD11BDA)]
    x, y = counter[0] + keys[0], counter[1] + keys[1]
    for round in range(20):
        turn = np.uint32((13, 15, 26, 6, 17, 29, 16, 24)[round % 8])
        x = x + y
        y = (y << turn | y >> (np.uint32(32) - turn)) ^ x
        if round % 4 == 3:
            injection = round // 4 + 1
            x, y = x + keys[injection % 3], y + keys[(injection + 1) % 3] + np.uint32(injection)
    return x, y


def words(*numbers: Any) -> tuple[np.ndarray, ...]:
    return tuple(np.atleast_1d(np.asarray(number)).astype(np.uint32) for number in numbers)


def noise(seed: int, index: int, position: int) -> np.ndarray:
    """Gumbel noise of the stream (seed, index), read at (position, token)."""
    key = threefry(words(seed >> 32 & 0xFFFFFFFF, seed & 0xFFFFFFFF), words(0, index))
    first, second = threefry(key, words([position] * V, range(V)))
    uniform = ((first ^ second) >> np.uint32(9)) * np.float64(2**-23) + 2**-24
    return -np.log(-np.log(uniform))


def penalised(logits: np.ndarray, sequence: Sequence) -> np.ndarray:
    """The model's logits with everything that depends on the tokens so far, one token after the other."""
    params = sequence.sampling
    adjusted = logits.astype(np.float64)
    for token, bias in dict(params.logit_bias).items():
        adjusted[token] += bias
    if len(sequence.output) < params.min_tokens:
        adjusted[[*sequence.end_ids, *params.stop_token_ids]] = -np.inf
    for token in {*sequence.prompt, *sequence.output}:
        adjusted[token] *= params.repetition_penalty ** (-1 if adjusted[token] > 0 else 1)
    for token in set(sequence.output):
        adjusted[token] -= params.presence_penalty
        adjusted[token] -= params.frequency_penalty * sequence.output.count(token)
    return adjusted


def kept(scaled: np.ndarray, params: SamplingParams) -> np.ndarray:
    """Which tokens may be chosen."""
    likelihood = np.exp(scaled - scaled.max())
    mask = likelihood >= params.min_p
    if params.top_k:
        mask &= scaled >= np.sort(scaled)[::-1][min(params.top_k, V) - 1]
    likelihood = np.where(mask, likelihood, 0)
    ranked = -np.sort(-likelihood / likelihood.sum())
    # The smallest set that reaches top_p: what stands before a member has not reached it.
    count = int(np.sum(np.cumsum(ranked) - ranked < params.top_p))
    return mask & (scaled >= np.sort(scaled)[::-1][count - 1])


def defined(logits: np.ndarray, sequence: Sequence) -> int:
    """The token that the definition chooses, in float64."""
    params = sequence.sampling
    adjusted = penalised(logits, sequence)
    if params.temperature == 0:
        return int(np.argmax(adjusted))
    scaled = adjusted / params.temperature
    scores = scaled + noise(sequence.seed, sequence.index, len(sequence))
    return int(np.argmax(np.where(kept(scaled, params), scores, -np.inf)))


def drawn(draw: random.Random) -> Sequence:
    """A sequence in the middle of its life, with parameters of which each is off half of the time."""

    def maybe(value: Any, off: Any) -> Any:
        return value if draw.random() < 0.5 else off

    output = [draw.randrange(V) for _ in range(draw.randrange(30))]
    params = SamplingParams(
        max_tokens=100,
        temperature=maybe(draw.uniform(0.1, 3), draw.choice([0.0, 1.0])),
        top_p=maybe(draw.uniform(0.05, 1), 1.0),
        top_k=maybe(draw.choice([1, 2, 5, V - 1, V, 10**6]), 0),
        min_p=maybe(draw.uniform(0, 0.3), 0.0),
        presence_penalty=maybe(draw.uniform(-2, 2), 0.0),
        frequency_penalty=maybe(draw.uniform(-2, 2), 0.0),
        repetition_penalty=maybe(draw.uniform(0.5, 2), 1.0),
        logit_bias=maybe({draw.randrange(V): draw.uniform(-5, 5) for _ in range(draw.randrange(1, 9))}, {}),
        min_tokens=maybe(draw.randrange(40), 0),
        stop_token_ids=maybe(tuple(draw.sample(range(V), 3)), ()),
    )
    made = Sequence(0, [draw.randrange(V) for _ in range(draw.randint(1, 30))], params, 0, draw.randrange(4))
    made.seed = draw.randrange(-(2**63), 2**64)
    made.output, made.end_ids = output, (*END_IDS, *params.stop_token_ids)
    return made


def test_the_tokens_of_a_thousand_random_parameter_sets_are_the_definitions():
    draw = random.Random(0)
    rows = [drawn(draw) for _ in range(1000)]
    logits = np.random.default_rng(0).normal(size=(1000, V)).astype(np.float32) * 2
    tokens = sample(logits, rows, [len(row) for row in rows])
    assert tokens == [defined(own, row) for own, row in zip(logits, rows, strict=True)]


def test_counts_that_the_programs_keep_are_those_of_the_tokens():
    """What a decode step adds to the marks is what a replay would write from the tokens."""
    draw = random.Random(1)
    rows = [drawn(draw) for _ in range(50)]
    marked = marked_rows(rows)
    tokens = np.asarray([draw.randrange(V) for _ in rows], np.int32)
    active = np.asarray([draw.random() < 0.8 for _ in rows])
    penalties = sampling.unpack(np.asarray([sampling.pack(row) for row in rows], np.int32)).penalties
    after = jax.jit(marks.count)(marked, tokens, penalties, active)
    for row, token, runs in zip(rows, tokens.tolist(), active, strict=True):
        row.output += [token] * bool(runs)
    assert np.array_equal(after, marked_rows(rows))


def test_random_bits_are_those_of_jax():
    key, counter = np.asarray([7, 2**32 - 1], np.uint32), np.arange(10, dtype=np.uint32)
    ours = jax.jit(lambda key, counter: sampling.threefry((key[0], key[1]), (counter[:5], counter[5:])))(key, counter)
    assert np.concatenate(ours).tolist() == np.asarray(jax_random.threefry_2x32(key, counter)).tolist()
    assert np.concatenate(threefry(words(7, 2**32 - 1), (counter[:5], counter[5:]))).tolist() == (
        np.concatenate(ours).tolist()
    )


# --- its edges --------------------------------------------------------------------------------------------------------


def test_what_ties_with_the_last_one_kept_is_kept_too():
    logits = np.zeros((1, V), np.float32)
    logits[0, :3] = 5.0
    tokens = {sample(logits, [row(temperature=1.0, top_k=2)], [position])[0] for position in range(60)}
    assert tokens == {0, 1, 2}


def test_the_first_of_equal_logits_is_the_greedy_choice():
    logits = np.zeros((1, V), np.float32)
    logits[0, [9, 4]] = 1.0
    assert sample(logits, [row(temperature=0.0)], [0]) == [4]


@pytest.mark.parametrize("temperature", [1e-6, 1e-30, 1e-45])
def test_a_temperature_too_low_to_divide_by_is_greedy(temperature: float):
    logits = np.full((1, V), -1e4, np.float32)
    logits[0, [1, 2, 3]] = 2e4, 2.1e4, 3.0
    assert sample(logits, [row(temperature=temperature, top_p=0.5)], [0]) == [2]


def test_min_p_of_one_keeps_the_likeliest_and_what_ties_with_it():
    logits = np.zeros((1, V), np.float32)
    logits[0, [5, 8]] = 3.0
    assert {sample(logits, [row(temperature=1.0, min_p=1.0)], [position])[0] for position in range(30)} == {5, 8}


def test_a_token_does_not_depend_on_the_rest_of_the_batch():
    rng, draw = np.random.default_rng(0), random.Random(2)
    rows = [drawn(draw) for _ in range(12)]
    logits, positions = rng.normal(size=(12, V)).astype(np.float32), list(range(12))
    together = sample(logits, rows, positions)
    alone = [sample(logits[i : i + 1], [rows[i]], [positions[i]])[0] for i in range(12)]
    assert together == alone
    order = rng.permutation(12)
    assert sample(logits[order], [rows[i] for i in order], [positions[i] for i in order]) == [alone[i] for i in order]


@pytest.mark.parametrize("changed", [{"seed": 1}, {"seed": 1 << 32}, {"seed": -1}, {"index": 1}])
def test_seed_and_index_give_other_streams(changed: dict):
    logits = np.zeros((1, V), np.float32)
    streams = [
        [sample(logits, [row(temperature=1.0, **options)], [position])[0] for position in range(12)]
        for options in ({}, changed)
    ]
    assert streams[0] != streams[1]


@pytest.mark.parametrize("params", [{}, {"presence_penalty": 1.5, "logit_bias": {2: 1.0}, "top_p": 0.9, "min_p": 0.02}])
def test_frequencies_follow_the_softmax_by_a_chi_squared_test(params: dict[str, Any]):
    logits = np.full(V, -30.0, np.float32)
    logits[:6] = 2.0, 1.0, 0.0, -0.5, -1.0, -3.0
    request = row(seed=11, temperature=1.3, **params)
    request.output = [0, 4]
    draws = 1000
    scaled = penalised(logits, request) / request.sampling.temperature
    expected = np.where(kept(scaled, request.sampling), np.exp(scaled), 0)
    expected *= 4 * draws / expected.sum()
    counts = np.zeros(V)
    for part in range(4):
        tokens = sample(np.tile(logits, (draws, 1)), [request] * draws, list(range(part * draws, (part + 1) * draws)))
        counts += np.bincount(tokens, minlength=V)
    likely = expected > 5
    assert 3 <= likely.sum() <= 6 and counts[~likely].sum() < 20
    # One in a thousand samples of 5 degrees of freedom lies above 20.5.
    assert np.sum((counts - expected)[likely] ** 2 / expected[likely]) < 20.5


# --- log-probabilities ------------------------------------------------------------------------------------------------


def log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    return (
        wide - np.log(np.exp(wide - wide.max(-1, keepdims=True)).sum(-1, keepdims=True)) - wide.max(-1, keepdims=True)
    )


def check(found: np.ndarray, token: int, logits: np.ndarray) -> None:
    expected = log_softmax(logits)
    read = logprobs.read(found, 20)
    np.testing.assert_allclose(read.logprob, expected[token], atol=1e-5)
    ids, values = zip(*read.top, strict=True)
    assert list(ids) == np.argsort(-logits, kind="stable")[:20].tolist()
    np.testing.assert_allclose(values, expected[list(ids)], atol=1e-5)
    assert logprobs.read(found, 2).top == read.top[:2] and logprobs.read(found, 0).top == ()


def test_logprobs_are_the_log_softmax_of_the_logits():
    logits = np.random.default_rng(0).normal(size=(5, V)).astype(np.float32) * 4
    tokens = np.asarray([0, 5, V - 1, 7, 7], np.int32)
    found = jax.jit(logprobs.of_tokens)(logits, tokens, np.asarray([True, False, True, True, True]))
    for own, token, values in zip(np.asarray(found), tokens, logits, strict=True):
        check(own, token, values)
    assert not np.asarray(jax.jit(logprobs.of_tokens)(logits, tokens, np.zeros(5, bool))).any()


@pytest.mark.parametrize("places", [range(50), range(3, 7), range(0)])
def test_a_prompts_logprobs_are_found_block_by_block(places: range):
    rng = np.random.default_rng(1)
    hidden, head = rng.normal(size=(50, 8)).astype(np.float32), rng.normal(size=(V, 8)).astype(np.float32)
    following = np.full(50, -1, np.int32)
    following[places] = rng.integers(0, V, len(places))
    found = np.asarray(jax.jit(lambda h, f: logprobs.of_prompt(lambda x: x @ head.T, V, h, f))(hidden, following))
    for place in places:
        check(found[place], following[place], hidden[place] @ head.T)
    assert not found[-(-places.stop // logprobs.BLOCK) * logprobs.BLOCK :].any(), "work for places nobody asks about"
