"""Choosing tokens inside the programs, such that a token depends on its own sequence and on nothing else.

The noise of a token is keyed by (seed, sequence index, position), and the choice is an argmax over logits plus noise
(the Gumbel-max trick), so neither the batch nor the slot nor the number of devices shows in the output.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, UInt

from ds_jax.runtime.sequence import Sequence

COLUMNS = 6
"""Int32 words that hold the sampling parameters of one sequence."""


class Sampling(NamedTuple):
    """Sampling parameters of B sequences."""

    temperature: Float[Array, " B"]
    """0 is greedy."""
    top_p: Float[Array, " B"]
    top_k: Int[Array, " B"]
    """0 keeps all."""
    seed: UInt[Array, "B 2"]
    """High and low word."""
    index: Int[Array, " B"]
    """Which of its request's sequences a row is."""


def pack(sequence: Sequence) -> list[int]:
    """The COLUMNS int32 words of one sequence; floats by their bits."""
    params, seed = sequence.sampling, sequence.seed
    temperature, top_p = np.asarray([params.temperature, params.top_p], np.float32).view(np.int32).tolist()
    return [temperature, top_p, params.top_k, _int32(seed >> 32), _int32(seed), sequence.index]


def unpack(words: Int[Array, "B 6"]) -> Sampling:
    """The device's side of `pack`."""
    floats = lax.bitcast_convert_type(words[:, :2], jnp.float32)
    seed = lax.bitcast_convert_type(words[:, 3:5], jnp.uint32)
    return Sampling(floats[:, 0], floats[:, 1], words[:, 2], seed, words[:, 5])


def sample(
    logits: Float[Array, "B V"], sampling: Sampling, positions: Int[Array, " B"], wanted: Array | None = None
) -> Int[Array, " B"]:
    """One token per row: argmax of the logits where temperature is 0, else of logits / temperature + noise.

    top_k keeps the k largest logits; top_p then keeps the smallest set of the largest whose probability reaches
    top_p. What ties with the last one kept is kept too. Nothing is sorted and no noise is made when no row asks.

    Args:
        logits: float32, over the whole vocabulary.
        sampling: parameters per row.
        positions: tokens before the sampled one, prompt and output.
        wanted: rows whose token matters; the others get any token, and no work is done for their sake.
    """
    hot = sampling.temperature > 0
    if wanted is not None:
        hot = hot & wanted
    # Rows in which no noise is wanted divide by 1: a greedy row must not see its logits changed.
    scaled = logits / jnp.where(hot, sampling.temperature, 1)[:, None]
    cut = hot & ((sampling.top_p < 1) | ((sampling.top_k > 0) & (sampling.top_k < logits.shape[1])))
    scores = lax.cond(jnp.any(cut), _cut, lambda x, *_: x, scaled, sampling, cut)
    scores = lax.cond(jnp.any(hot), _perturb, lambda x, *_: x, scores, sampling, positions, hot)
    return jnp.argmax(scores, axis=-1).astype(jnp.int32)


def _cut(scaled: Float[Array, "B V"], sampling: Sampling, rows: Array) -> Float[Array, "B V"]:
    """-inf for what top_k and top_p leave out."""
    vocab = scaled.shape[1]
    ranked = -jnp.sort(-scaled, axis=-1)
    k = jnp.where(sampling.top_k > 0, jnp.minimum(sampling.top_k, vocab), vocab)
    ranked = jnp.where(jnp.arange(vocab) < k[:, None], ranked, -jnp.inf)
    probabilities = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    # The first is always kept. top_p = 1 keeps all of top_k, whatever rounding makes of the sum.
    kept = (before < sampling.top_p[:, None]) | (sampling.top_p >= 1)[:, None]
    kept = (kept & (ranked > -jnp.inf)).at[:, 0].set(True)
    threshold = jnp.min(jnp.where(kept, ranked, jnp.inf), axis=-1)
    return jnp.where(rows[:, None] & (scaled < threshold[:, None]), -jnp.inf, scaled)


def _perturb(scores: Float[Array, "B V"], sampling: Sampling, positions: Array, rows: Array) -> Float[Array, "B V"]:
    def noise(seed: Array, index: Array, position: Array) -> Array:
        key = jax.random.wrap_key_data(seed, impl="threefry2x32")
        key = jax.random.fold_in(jax.random.fold_in(key, index), position)
        return jax.random.gumbel(key, scores.shape[1:], jnp.float32)

    gumbel = jax.vmap(noise)(sampling.seed, sampling.index, positions)
    return jnp.where(rows[:, None], scores + gumbel, scores)


def _int32(word: int) -> int:
    """The low 32 bits as a signed number."""
    word &= 0xFFFFFFFF
    return word - (1 << 32) if word >> 31 else word
