"""Decode attention as a loop over the pages in use, with online softmax: nothing is gathered whole, no padding read."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from kernels.paged_blocks import fetch, flat, walk
from kernels.platforms import Over, by_platform

BLOCK_BYTES = 65536
"""Keys of one step, at most: several pages where they are small (fewer steps), one where it fills a core's cache."""
MOST_PAGES = 8


def attend(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page_table: jax.Array,
    lengths: jax.Array,
    k_scales: jax.Array | None = None,
    v_scales: jax.Array | None = None,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
) -> jax.Array:
    """See the package."""
    form = functools.partial(over_sequences, scale=scale, window=window, soft_cap=soft_cap)
    scales = () if k_scales is None or v_scales is None else (k_scales, v_scales)
    return by_platform(form, q, k_pages, v_pages, page_table, lengths, *scales)


def over_sequences(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page_table: jax.Array,
    lengths: jax.Array,
    k_scales: jax.Array | None = None,
    v_scales: jax.Array | None = None,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    over: Over,
) -> jax.Array:
    """The sequences in the order that `over` takes them, each block of pages by block."""
    batch, heads, head_dim = q.shape
    pool, kv_heads, size, _ = k_pages.shape
    pages = max(1, min(BLOCK_BYTES // (kv_heads * size * head_dim * 4), MOST_PAGES, page_table.shape[1]))
    columns = pages * size
    queries = (q.astype(jnp.float32) * scale).reshape(batch, kv_heads, heads // kv_heads, head_dim)
    page_table = jnp.clip(jnp.pad(page_table, ((0, 0), (0, pages - 1))), 0, pool - 1)
    k_rows, v_rows = flat(k_pages, pool), flat(v_pages, pool)

    def taken(rows: jax.Array, scales: jax.Array | None, numbers: jax.Array) -> jax.Array:  # [page, K, slot, D]
        some = fetch(rows, numbers).reshape(pages, kv_heads, size, head_dim)
        return some if scales is None else some * scales[numbers][..., None, None]

    def sequence(b: jax.Array) -> jax.Array:
        query, length = queries[b], lengths[b]
        first = 0 if window is None else jnp.maximum(length - window, 0)

        def block(masked: bool, i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            best, weight, mean = carry
            numbers = lax.dynamic_slice(page_table, (b, i * pages), (1, pages))[0]
            keys, values = taken(k_rows, k_scales, numbers), taken(v_rows, v_scales, numbers)
            # Pages stay as they lie: bringing a head's together would copy them once more.
            several = jnp.broadcast_to(query, (pages, *query.shape))
            scores = jnp.einsum("pkgd,pknd->pkgn", several, keys, precision=lax.Precision.HIGHEST)
            if soft_cap is not None:
                scores = soft_cap * jnp.tanh(scores / soft_cap)
            if masked:
                token = i * columns + jnp.arange(columns).reshape(pages, 1, 1, size)
                seen = (token >= first) & (token < length)
                scores = jnp.where(seen, scores, -jnp.inf)
                # A freed page may hold anything, NaN included, and 0 * NaN is NaN.
                values = jnp.where(seen.swapaxes(2, 3), values, 0)
            new_best = jnp.maximum(best, scores.max((0, 3))[..., None])
            rescale, p = jnp.exp(best - new_best), jnp.exp(scores - new_best)
            sums = jnp.einsum("pkgn,pknd->pkgd", p, values, precision=lax.Precision.HIGHEST)
            return new_best, weight * rescale + p.sum((0, 3))[..., None], mean * rescale + sums.sum(0)

        one = jnp.zeros((*query.shape[:2], 1))
        # The lowest number, not -inf: a block that sees nothing (side by side with longer rows) must not give NaN.
        carry = (one + jnp.finfo(jnp.float32).min, one, jnp.zeros_like(query))
        bounds = first // columns, -(-first // columns), length // columns, -(-length // columns)
        _, weight, mean = walk(block, carry, *bounds)
        return mean / jnp.maximum(weight, jnp.finfo(jnp.float32).tiny)

    return over(sequence, jnp.arange(batch)).reshape(q.shape).astype(q.dtype)
