"""What prefill attention over pages means: every token is a decode query of its own, as long as it can see."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels.paged_decode_attention import definition as decode


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
    """See the package."""
    token = jnp.arange(q.shape[0])[:, None]
    inside = (token >= starts) & (token < starts + lengths)  # [T, R]
    chunk = jnp.argmax(inside, 1)
    seen = contexts[chunk] + token[:, 0] - starts[chunk] + 1
    seen = jnp.where(inside.any(1), seen, 0)
    return decode.attend(
        q,
        k_pages,
        v_pages,
        page_table[chunk],
        seen,
        k_scales,
        v_scales,
        scale=scale,
        window=window,
        soft_cap=soft_cap,
    )
