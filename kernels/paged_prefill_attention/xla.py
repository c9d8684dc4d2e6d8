"""Prefill attention as a loop over the pairs of query and key block that exist, with online softmax."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

QUERY_BLOCK = 128
KEY_BLOCK = 128


def attend(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page_table: jax.Array,
    starts: jax.Array,
    lengths: jax.Array,
    contexts: jax.Array,
    *,
    scale: float,
) -> jax.Array:
    """See the package. Cost follows the chunks' real lengths, rounded up to blocks."""
    tokens, heads, head_dim = q.shape
    pool, kv_heads, size, _ = k_pages.shape
    group = heads // kv_heads
    rows = min(QUERY_BLOCK, tokens)
    pages = min(max(1, KEY_BLOCK // size), page_table.shape[1])
    columns = pages * size
    # A block may begin at the last token, and a run of pages at the last page: room for both to run over.
    queries = (q.astype(jnp.float32) * scale).reshape(tokens, kv_heads, group, head_dim)
    queries = jnp.pad(queries, ((0, rows), (0, 0), (0, 0), (0, 0)))
    page_table = jnp.clip(jnp.pad(page_table, ((0, 0), (0, pages - 1))), 0, pool - 1)

    def chunk(r: jax.Array, out: jax.Array) -> jax.Array:
        def query_block(i: jax.Array, out: jax.Array) -> jax.Array:
            first = starts[r] + i * rows
            query = lax.dynamic_slice_in_dim(queries, first, rows).transpose(1, 2, 0, 3)  # [K, G, rows, D]
            query = query.reshape(kv_heads, group * rows, head_dim)
            position = contexts[r] + i * rows + jnp.arange(rows)
            end = contexts[r] + jnp.minimum((i + 1) * rows, lengths[r])  # Keys that the block's last token sees.

            def key_block(j: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
                best, weight, sum_ = carry
                numbers = lax.dynamic_slice(page_table, (r, j * pages), (1, pages))[0]

                def gathered(pool: jax.Array) -> jax.Array:  # [K, columns, D]
                    taken = pool[numbers].transpose(1, 0, 2, 3).astype(jnp.float32)
                    return taken.reshape(kv_heads, columns, head_dim)

                key = j * columns + jnp.arange(columns)
                scores = jnp.einsum("kqd,ksd->kqs", query, gathered(k_pages), precision=lax.Precision.HIGHEST)
                seen = (key <= position[:, None]) & (key < end)
                scores = scores.reshape(kv_heads, group, rows, columns)
                scores = jnp.where(seen, scores, -jnp.inf).reshape(kv_heads, group * rows, columns)
                new_best = jnp.maximum(best, scores.max(-1, keepdims=True))
                rescale, p = jnp.exp(best - new_best), jnp.exp(scores - new_best)
                values = jnp.where((key < end)[:, None], gathered(v_pages), 0)
                sum_ = sum_ * rescale + jnp.einsum("kqs,ksd->kqd", p, values, precision=lax.Precision.HIGHEST)
                return new_best, weight * rescale + p.sum(-1, keepdims=True), sum_

            start = (
                jnp.full((kv_heads, group * rows, 1), jnp.finfo(jnp.float32).min),
                jnp.zeros((kv_heads, group * rows, 1)),
                jnp.zeros((kv_heads, group * rows, head_dim)),
            )
            _, weight, sum_ = lax.fori_loop(0, -(-end // columns), key_block, start)
            block = (sum_ / jnp.maximum(weight, 1e-30)).reshape(kv_heads, group, rows, head_dim).transpose(2, 0, 1, 3)
            old = lax.dynamic_slice_in_dim(out, first, rows)
            mine = (i * rows + jnp.arange(rows) < lengths[r])[:, None, None, None]
            return lax.dynamic_update_slice_in_dim(out, jnp.where(mine, block, old), first, 0)

        return lax.fori_loop(0, -(-lengths[r] // rows), query_block, out)

    out = lax.fori_loop(0, starts.shape[0], chunk, jnp.zeros_like(queries))
    return out[:tokens].reshape(q.shape).astype(q.dtype)
