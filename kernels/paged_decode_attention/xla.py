"""Decode attention as a loop over the pages in use, with online softmax: nothing is gathered, nothing padded read."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


def attend(
    q: jax.Array, k_pages: jax.Array, v_pages: jax.Array, page_table: jax.Array, lengths: jax.Array, *, scale: float
) -> jax.Array:
    """See the package."""
    batch, heads, head_dim = q.shape
    _, kv_heads, size, _ = k_pages.shape
    group = heads // kv_heads
    queries = (q.astype(jnp.float32) * scale).reshape(batch, kv_heads, group, head_dim)

    def sequence(b: jax.Array, out: jax.Array) -> jax.Array:
        query, length = queries[b], lengths[b]

        def page(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            best, weight, sum_ = carry
            number = page_table[b, i]
            keys = lax.dynamic_index_in_dim(k_pages, number, keepdims=False).astype(jnp.float32)
            values = lax.dynamic_index_in_dim(v_pages, number, keepdims=False).astype(jnp.float32)
            seen = i * size + jnp.arange(size) < length
            scores = jnp.einsum("kgd,knd->kgn", query, keys, precision=lax.Precision.HIGHEST)
            scores = jnp.where(seen, scores, -jnp.inf)
            new_best = jnp.maximum(best, scores.max(-1, keepdims=True))
            rescale = jnp.exp(best - new_best)
            p = jnp.exp(scores - new_best)
            values = jnp.where(seen[:, None], values, 0)
            sum_ = sum_ * rescale + jnp.einsum("kgn,knd->kgd", p, values, precision=lax.Precision.HIGHEST)
            return new_best, weight * rescale + p.sum(-1, keepdims=True), sum_

        first = (
            jnp.full((kv_heads, group, 1), -jnp.inf),
            jnp.zeros((kv_heads, group, 1)),
            jnp.zeros((kv_heads, group, head_dim)),
        )
        _, weight, sum_ = lax.fori_loop(0, -(-length // size), page, first)
        return lax.dynamic_update_index_in_dim(out, sum_ / jnp.maximum(weight, 1e-30), b, 0)

    out = lax.fori_loop(0, batch, sequence, jnp.zeros((batch, kv_heads, group, head_dim)))
    return out.reshape(q.shape).astype(q.dtype)
