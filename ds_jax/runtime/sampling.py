"""Choosing tokens inside the programs, such that a token depends on its own sequence and on nothing else.

The noise of a token is keyed by (seed, sequence index, position), and the choice is an argmax over logits plus noise
(the Gumbel-max trick), so neither the batch nor the slot nor the number of devices shows in the output.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, UInt

from ds_jax.runtime import marks
from ds_jax.runtime.sequence import Sequence
from ds_jax.sampling import SamplingParams

COLUMNS = 12
"""Int32 words that hold the sampling parameters of one sequence."""
MARKED, LOGPROBS = 1, 2
"""Flags of a row: it is marked (see `marks`); its log-probabilities are asked for."""
GREEDY_BELOW = 1e-5
"""A temperature so low is greedy: dividing by it would leave the range of float32."""


class Sampling(NamedTuple):
    """Sampling parameters of B sequences."""

    temperature: Float[Array, " B"]
    """Below GREEDY_BELOW is greedy."""
    top_p: Float[Array, " B"]
    top_k: Int[Array, " B"]
    """0 keeps all."""
    seed: UInt[Array, "B 2"]
    """High and low word."""
    sequence: Int[Array, " B"]
    """Which of its request's sequences a row is."""
    min_p: Float[Array, " B"]
    penalties: marks.Penalties
    logprobs: Array
    """[B] bool: log-probabilities are asked for."""


def pack(sequence: Sequence) -> list[int]:
    """The COLUMNS int32 words of one sequence; floats by their bits."""
    params, seed = sequence.sampling, sequence.seed
    floats = np.asarray([params.temperature, params.top_p, params.min_p, *marks.amounts(params)], np.float32)
    flags = marks.asked_by(params) * MARKED | (params.logprobs is not None) * LOGPROBS
    earliest_end = len(sequence.prompt) + params.min_tokens
    words = [params.top_k, _int32(seed >> 32), _int32(seed), sequence.index, earliest_end, flags]
    return [*floats.view(np.int32).tolist(), *words]


def unpack(words: Int[Array, "B 12"]) -> Sampling:
    """The device's side of `pack`."""
    floats = lax.bitcast_convert_type(words[:, :6], jnp.float32)
    temperature, top_p, min_p, presence, frequency, repetition = floats.T
    top_k, _, _, sequence, earliest_end, flags = words[:, 6:].T
    seed = lax.bitcast_convert_type(words[:, 7:9], jnp.uint32)
    penalties = marks.Penalties((flags & MARKED) != 0, presence, frequency, repetition, earliest_end)
    return Sampling(temperature, top_p, top_k, seed, sequence, min_p, penalties, (flags & LOGPROBS) != 0)


def is_plain(params: SamplingParams, vocab: int) -> bool:
    """Whether `sample_plainly` gives such a sequence its tokens, and there is nothing to know but the tokens."""
    cut = params.top_p < 1 or 0 < params.top_k < vocab or params.min_p > 0
    greedy = params.temperature < GREEDY_BELOW
    return params.logprobs is None and not marks.asked_by(params) and (greedy or not cut)


def sample_plainly(logits: Float[Array, "B V"], sampling: Sampling, positions: Int[Array, " B"]) -> Int[Array, " B"]:
    """What `sample` gives rows of which none asks for more than a temperature (`is_plain`), without a branch.

    Noise is made for every row, greedy or not.
    """
    hot = sampling.temperature >= GREEDY_BELOW
    return _argmax(_perturb(_scaled(logits, sampling, hot), sampling, positions, hot))


def sample(
    logits: Float[Array, "B V"],
    sampling: Sampling,
    positions: Int[Array, " B"],
    wanted: Array | None = None,
    marked: marks.Marks | None = None,
) -> Int[Array, " B"]:
    """One token per row: argmax of the logits where temperature is 0, else of logits / temperature + noise.

    Biases and penalties come first. min_p keeps the tokens of at least that share of the largest probability, top_k
    the k largest of them; top_p then keeps the smallest set of the largest whose probability reaches top_p. What ties
    with the last one kept is kept too. No work is done for any of it, and no noise made, when no row asks.

    Args:
        logits: float32, over the whole vocabulary.
        sampling: parameters per row.
        positions: tokens before the sampled one, prompt and output.
        wanted: rows whose token matters; the others get any token, and no work is done for their sake.
        marked: what biases and penalties look at (`marks`); None if no row asks for them.
    """
    return _argmax(scores(logits, sampling, positions, wanted, marked))


def scores(
    logits: Float[Array, "B V"],
    sampling: Sampling,
    positions: Int[Array, " B"],
    wanted: Array | None = None,
    marked: marks.Marks | None = None,
) -> Float[Array, "B V"]:
    """What `sample` takes the largest of: penalised logits / temperature, cut by min_p, top_k and top_p, plus noise."""
    hot = sampling.temperature >= GREEDY_BELOW
    if wanted is not None:
        hot = hot & wanted
    if marked is not None:
        logits = marks.apply(logits, sampling.penalties, positions, marked, wanted)
    scaled = _scaled(logits, sampling, hot)
    cut_k = (sampling.top_k > 0) & (sampling.top_k < logits.shape[1])
    cut = hot & ((sampling.top_p < 1) | cut_k | (sampling.min_p > 0))
    kept = lax.cond(jnp.any(cut), _cut, lambda x, *_: x, scaled, sampling, cut)
    return lax.cond(jnp.any(hot), _perturb, lambda x, *_: x, kept, sampling, positions, hot)


def _scaled(logits: Float[Array, "B V"], sampling: Sampling, hot: Array) -> Float[Array, "B V"]:
    """Logits / temperature; those of rows without noise are as they were, to the bit."""
    return logits / jnp.where(hot, sampling.temperature, 1)[:, None]


def _argmax(scores: Float[Array, "B V"]) -> Int[Array, " B"]:
    """The first of the largest scores, as two plain reductions, which XLA:CPU vectorises (it does not jnp.argmax)."""
    last = scores.shape[1] - 1
    tokens = lax.broadcasted_iota(jnp.int32, scores.shape, 1)
    best = scores.max(axis=-1, keepdims=True)
    return jnp.where(scores == best, tokens, last).min(axis=-1)


def _cut(scaled: Float[Array, "B V"], sampling: Sampling, rows: Array) -> Float[Array, "B V"]:
    """-inf for what min_p, top_k and top_p leave out.

    Each keeps what is at least some threshold, found bit by bit: 32 passes over the logits cost less than sorting
    them, to run as to compile.
    """
    ranks = _ranks(scaled)
    best = scaled.max(axis=-1, keepdims=True)
    likelihood = jnp.exp(scaled - best)
    k, min_p, top_p = sampling.top_k[:, None], sampling.min_p[:, None], sampling.top_p[:, None]
    least = jnp.where(min_p > 0, _ranks(best + jnp.log(min_p)), 0)
    kth = _largest(lambda rank: jnp.sum(ranks >= rank, axis=-1, keepdims=True) >= k, k > 0)
    floor = jnp.maximum(least, kth)

    def mass(rank: Array) -> Array:
        return jnp.sum(jnp.where(ranks >= rank, likelihood, 0), axis=-1, keepdims=True)

    enough = top_p * mass(floor)
    nucleus = _largest(lambda rank: mass(jnp.maximum(rank, floor)) >= enough, top_p < 1)
    return jnp.where(rows[:, None] & (ranks < jnp.maximum(floor, nucleus)), -jnp.inf, scaled)


def _ranks(x: Float[Array, "B V"]) -> UInt[Array, "B V"]:
    """Numbers in the order of x: the bits of a float, turned so that they count upwards."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits & sign, ~bits, bits | sign)


def _largest(holds: Callable[[Array], Array], rows: Array) -> UInt[Array, "B 1"]:
    """The largest rank for which `holds`, which is true from 0 up to some rank and false from there on; 0 elsewhere
    than in `rows`."""

    def step(i: Array, rank: Array) -> Array:
        higher = rank | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        return jnp.where(holds(higher), higher, rank)

    rank = lax.fori_loop(0, jnp.where(jnp.any(rows), 32, 0), step, jnp.zeros(rows.shape, jnp.uint32))
    return jnp.where(rows, rank, 0)


def _perturb(scores: Float[Array, "B V"], sampling: Sampling, positions: Array, rows: Array) -> Float[Array, "B V"]:
    """Scores plus Gumbel noise, of a stream of random numbers per sequence that is read at (position, token)."""
    high, low = (word[:, None] for word in sampling.seed.T)
    key = threefry((high, low), (jnp.zeros_like(high), sampling.sequence[:, None].astype(jnp.uint32)))
    key = lax.optimization_barrier(key)  # XLA would make it again for every token
    tokens = lax.broadcasted_iota(jnp.uint32, scores.shape, 1)
    first, second = threefry(key, (positions[:, None].astype(jnp.uint32), tokens))
    uniform = ((first ^ second) >> 9).astype(jnp.float32) * 2**-23 + 2**-24  # inside (0, 1), both ends left out
    return jnp.where(rows[:, None], scores - jnp.log(-jnp.log(uniform)), scores)


def threefry(key: tuple[Array, Array], counter: tuple[Array, Array]) -> tuple[Array, Array]:
    """Threefry-2x32 with 20 rounds (Salmon et al., SC'11), elementwise over broadcast uint32 arrays.

    The random numbers of `jax.random`, which come in loops; unrolled they are one fusion, and quicker to compile.
    """
    keys = (*key, key[0] ^ key[1] ^ jnp.uint32(0x1BD11BDA))
    x, y = counter[0] + keys[0], counter[1] + keys[1]
    for group in range(5):
        for turn in ((13, 15, 26, 6), (17, 29, 16, 24))[group % 2]:
            x = x + y
            y = x ^ ((y << turn) | (y >> (32 - turn)))
        x, y = x + keys[(group + 1) % 3], y + keys[(group + 2) % 3] + jnp.uint32(group + 1)
    return x, y


def _int32(word: int) -> int:
    """The low 32 bits as a signed number."""
    word &= 0xFFFFFFFF
    return word - (1 << 32) if word >> 31 else word
