"""Log-probabilities of tokens: computed inside the programs when somebody asks, read on the host when somebody asked.

What a program returns of each token is one row of int32 words (floats by their bits): its log-probability, then the
ids of the likeliest tokens in its place, then their log-probabilities.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from ds_jax.sampling import MOST_TOP_LOGPROBS, TokenLogprobs

BLOCK = 32
"""Prompt tokens whose logits are there at a time."""


def words(vocab: int) -> int:
    """Words of one token."""
    return 1 + 2 * min(MOST_TOP_LOGPROBS, vocab)


def of_tokens(logits: Float[Array, "B V"], tokens: Int[Array, " B"], rows: Array) -> Int[Array, "B W"]:
    """Of one token for each row of logits; zeros, and no work, if nobody asks (`rows`, [B] bool)."""
    empty = jnp.zeros((len(tokens), words(logits.shape[1])), jnp.int32)
    return lax.cond(jnp.any(rows), _of_tokens, lambda *_: empty, logits, tokens)


def _of_tokens(logits: Float[Array, "B V"], tokens: Int[Array, " B"]) -> Int[Array, "B W"]:
    normaliser = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=1, mode="clip")
    top, ids = lax.top_k(logits, words(logits.shape[1]) // 2)
    chosen, top = (lax.bitcast_convert_type(one - normaliser, jnp.int32) for one in (chosen, top))
    return jnp.concatenate([chosen, ids, top], axis=1)


def of_prompt(
    logits: Callable[[Array], Array], vocab: int, hidden: Float[Array, "T E"], following: Int[Array, " T"]
) -> Int[Array, "T W"]:
    """Of the token that follows each place; zeros, and no work, where none is asked for (-1).

    Args:
        logits: hidden states of some places -> logits; never called for more than a block of them.
        vocab: width of the logits.
        hidden: after the last layer.
        following: the token that comes after each place.
    """
    block = min(BLOCK, len(following))

    def step(number: Array, found: Array) -> Array:
        start = jnp.minimum(number * block, len(following) - block)
        tokens = lax.dynamic_slice_in_dim(following, start, block)
        rows = _of_tokens(logits(lax.dynamic_slice_in_dim(hidden, start, block)), tokens)
        return lax.dynamic_update_slice_in_dim(found, rows, start, 0)

    places = jnp.arange(1, len(following) + 1)
    blocks = -(-jnp.max(jnp.where(following >= 0, places, 0)) // block)
    return lax.fori_loop(0, blocks, step, jnp.zeros((len(following), words(vocab)), jnp.int32))


def read(found: np.ndarray, top: int) -> TokenLogprobs:
    """One token's row on the host, with so many of the likeliest."""
    width = len(found) // 2
    floats = found.view(np.float32)
    ids = found[1 : 1 + min(top, width)].tolist()
    return TokenLogprobs(float(floats[0]), tuple(zip(ids, floats[1 + width :].tolist(), strict=False)))
