"""Prefill attention as a loop over the pairs of query and key block that exist, with online softmax.

A pair's scores fit into a core's cache (FlashAttention's blocks, one KV head at a time on the CPU).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from kernels.paged_blocks import fetch, flat, walk
from kernels.platforms import Over, by_platform

QUERY_BLOCK = 128
"""Rows of one block: queries times the heads that share a KV head."""
KEY_BLOCK = 128
"""Tokens of one key block, or a page where that is more."""


def attend(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page_table: jax.Array,
    starts: jax.Array,
    lengths: jax.Array,
    contexts: jax.Array,
    k_scales: jax.Array | None = None,
    v_scales: jax.Array | None = None,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
) -> jax.Array:
    """See the package. Cost follows the chunks' real lengths, rounded up to blocks."""
    form = functools.partial(over_heads, scale=scale, window=window, soft_cap=soft_cap)
    scales = () if k_scales is None or v_scales is None else (k_scales, v_scales)
    return by_platform(form, q, k_pages, v_pages, page_table, starts, lengths, contexts, *scales)


def over_heads(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page_table: jax.Array,
    starts: jax.Array,
    lengths: jax.Array,
    contexts: jax.Array,
    k_scales: jax.Array | None = None,
    v_scales: jax.Array | None = None,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    over: Over,
) -> jax.Array:
    """Chunk by chunk, query block by query block, and in each the KV heads in the order that `over` takes them."""
    tokens, heads, head_dim = q.shape
    pool, kv_heads, size, _ = k_pages.shape
    group = heads // kv_heads
    rows = min(max(QUERY_BLOCK // group, 16), tokens)
    pages = min(max(1, KEY_BLOCK // size), page_table.shape[1])
    columns = pages * size
    queries = q.reshape(tokens, kv_heads, group, head_dim)
    # A run of pages may begin at the last page: room for it to run over.
    page_table = jnp.clip(jnp.pad(page_table, ((0, 0), (0, pages - 1))), 0, pool - 1)
    k_rows, v_rows = flat(k_pages, pool * kv_heads), flat(v_pages, pool * kv_heads)

    def taken(rows: jax.Array, scales: jax.Array | None, numbers: jax.Array, h: jax.Array) -> jax.Array:
        some = fetch(rows, numbers * kv_heads + h)
        if scales is not None:
            some = some * scales[numbers, h][:, None]
        return some.reshape(columns, head_dim)

    def chunk(r: jax.Array, out: jax.Array) -> jax.Array:
        return lax.fori_loop(0, -(-lengths[r] // rows), functools.partial(query_block, r), out)

    def query_block(r: jax.Array, i: jax.Array, out: jax.Array) -> jax.Array:
        first = contexts[r] + i * rows
        end = contexts[r] + jnp.minimum((i + 1) * rows, lengths[r])  # Tokens that the block's last query sees.
        begin = 0 if window is None else jnp.maximum(first - window + 1, 0)  # The first that its first one sees.
        common = 0 if window is None else jnp.maximum(first + rows - window, 0)  # The first that all see.
        bounds = begin // columns, -(-common // columns), (first + 1) // columns, -(-end // columns)
        # Where tokens end before the block does, it begins earlier, and what is not its own is computed in vain.
        place = jnp.minimum(starts[r] + i * rows, tokens - rows)
        number = place - starts[r] + jnp.arange(rows)
        position = contexts[r] + number

        def head(h: jax.Array) -> jax.Array:
            query = lax.dynamic_slice(queries, (place, h, 0, 0), (rows, 1, group, head_dim))
            query = query.reshape(rows * group, head_dim).astype(jnp.float32) * scale

            def key_block(masked: bool, j: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
                best, weight, mean = carry
                numbers = lax.dynamic_slice(page_table, (r, j * pages), (1, pages))[0]
                keys, values = taken(k_rows, k_scales, numbers, h), taken(v_rows, v_scales, numbers, h)
                scores = jnp.einsum("qd,sd->qs", query, keys, precision=lax.Precision.HIGHEST)
                if soft_cap is not None:
                    scores = soft_cap * jnp.tanh(scores / soft_cap)
                if masked:
                    key = j * columns + jnp.arange(columns)
                    seen = (key <= position[:, None]) & (key < end)
                    if window is not None:
                        seen &= key > position[:, None] - window
                    by_head = scores.reshape(rows, group, columns)
                    scores = jnp.where(seen[:, None], by_head, -jnp.inf).reshape(scores.shape)
                    # A freed page may hold anything, NaN included, and 0 * NaN is NaN.
                    values = jnp.where(((key >= begin) & (key < end))[:, None], values, 0)
                new_best = jnp.maximum(best, scores.max(-1, keepdims=True))
                rescale, p = jnp.exp(best - new_best), jnp.exp(scores - new_best)
                mean = mean * rescale + jnp.einsum("qs,sd->qd", p, values, precision=lax.Precision.HIGHEST)
                return new_best, weight * rescale + p.sum(-1, keepdims=True), mean

            one = jnp.zeros((rows * group, 1))
            # The lowest number, not -inf: a row of padding sees nothing, and must not give NaN.
            carry = (one + jnp.finfo(jnp.float32).min, one, jnp.zeros_like(query))
            _, weight, mean = walk(key_block, carry, *bounds)
            return (mean / jnp.maximum(weight, jnp.finfo(jnp.float32).tiny)).reshape(rows, group, head_dim)

        block = over(head, jnp.arange(kv_heads)).swapaxes(0, 1).astype(q.dtype)
        mine = ((number >= i * rows) & (number < lengths[r]))[:, None, None, None]
        old = lax.dynamic_slice_in_dim(out, place, rows)
        return lax.dynamic_update_slice_in_dim(out, jnp.where(mine, block, old), place, axis=0)

    return lax.fori_loop(0, starts.shape[0], chunk, jnp.zeros_like(queries)).reshape(q.shape)
