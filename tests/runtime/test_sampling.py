"""Sampling against a definition in plain NumPy."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend import random as jax_random

from ds_jax.runtime import sampling
from ds_jax.runtime.sequence import Sequence
from ds_jax.sampling import SamplingParams

V = 37


@functools.cache
def program(batch: int):
    return jax.jit(lambda logits, words, positions: sampling.sample(logits, sampling.unpack(words), positions))


def sample(logits: np.ndarray, rows: list[Sequence], positions: list[int]) -> list[int]:
    words = np.asarray([sampling.pack(row) for row in rows], np.int32)
    return np.asarray(program(len(rows))(logits, words, np.asarray(positions, np.int32))).tolist()


def row(seed: int = 0, index: int = 0, **params: float) -> Sequence:
    return Sequence(0, [0], SamplingParams(**params), seed, index)


def noise(seed: int, index: int, position: int, vocab: int) -> np.ndarray:
    """Gumbel noise from random bits that jax makes for the key fold_in(key(seed), index) and (position, token)."""
    key = jax.random.wrap_key_data(np.asarray([seed >> 32 & 0xFFFFFFFF, seed & 0xFFFFFFFF], np.uint32))
    key = jax.random.key_data(jax.random.fold_in(key, index))
    counter = np.concatenate([np.full(vocab, position), np.arange(vocab)]).astype(np.uint32)
    first, second = np.split(np.asarray(jax_random.threefry_2x32(key, counter)), 2)
    uniform = ((first ^ second) >> np.uint32(9)) * np.float64(2**-23) + 2**-24
    return -np.log(-np.log(uniform))


def kept(scaled: np.ndarray, top_k: int, top_p: float) -> np.ndarray:
    """Which tokens may be chosen, in float64."""
    order = np.argsort(-scaled, kind="stable")
    if top_k:
        order = order[:top_k]
    mask = scaled >= scaled[order[-1]]
    likelihood = np.where(mask, np.exp(scaled - scaled.max()), 0)
    ranked = -np.sort(-likelihood / likelihood.sum())
    # The smallest set that reaches top_p: what stands before a member has not reached it.
    count = int(np.sum(np.cumsum(ranked) - ranked < top_p))
    return mask & (scaled >= np.sort(scaled)[::-1][count - 1])


@given(
    seed=st.integers(-(2**63), 2**64 - 1),
    index=st.integers(0, 3),
    position=st.integers(0, 10**6),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 3, V - 1, V, 10**6]),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 1.0]),
    shape=st.integers(0, 10**6),
)
@settings(max_examples=150)
def test_a_token_is_the_definitions(seed, index, position, temperature, top_k, top_p, shape):
    logits = np.random.default_rng(shape).normal(size=(1, V)).astype(np.float32) * 2
    request = row(seed, index, temperature=temperature, top_k=top_k, top_p=top_p)
    (token,) = sample(logits, [request], [position])
    if temperature == 0:
        assert token == np.argmax(logits[0])
        return
    scaled = (logits[0] / np.float32(temperature)).astype(np.float64)
    scores = np.where(kept(scaled, top_k, top_p), scaled + noise(seed, index, position, V), -np.inf)
    assert scores[token] > scores.max() - 1e-4


def test_random_bits_are_those_of_jax():
    key, counter = np.asarray([7, 2**32 - 1], np.uint32), np.arange(10, dtype=np.uint32)
    ours = jax.jit(lambda key, counter: sampling.threefry((key[0], key[1]), (counter[:5], counter[5:])))(key, counter)
    assert np.concatenate(ours).tolist() == np.asarray(jax_random.threefry_2x32(key, counter)).tolist()


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
    logits = np.asarray([[-1e4, 2e4, 2.1e4, 3.0]], np.float32)
    words = np.asarray([sampling.pack(row(temperature=temperature, top_p=0.5))], np.int32)
    assert program(1)(logits, words, np.zeros(1, np.int32)).tolist() == [2]


def test_a_token_does_not_depend_on_the_rest_of_the_batch():
    rng = np.random.default_rng(0)
    rows = [
        row(seed=i, temperature=[0.0, 1.0, 0.7][i % 3], top_k=[0, 5][i % 2], top_p=[1.0, 0.8, 0.3, 1.0][i % 4])
        for i in range(12)
    ]
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


def test_frequencies_follow_the_softmax():
    logits = np.asarray([2.0, 1.0, 0.0, -1.0], np.float32)
    draws = 4096
    words = np.tile(np.asarray(sampling.pack(row(seed=11, temperature=1.0)), np.int32), (draws, 1))
    tokens = program(draws)(np.tile(logits, (draws, 1)), words, np.arange(draws, dtype=np.int32))
    expected = np.exp(logits) / np.exp(logits).sum()
    # Five deviations of a count of independent draws.
    error = np.abs(np.bincount(np.asarray(tokens), minlength=4) / draws - expected)
    assert np.all(error < 5 * np.sqrt(expected * (1 - expected) / draws))
