"""Attention of one whole sequence, as the formula says it."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ds_jax.architecture import Architecture


def attention(arch: Architecture, layer: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """softmax(scores) V of q [T, H, D] over k, v [T, K, D], each token seeing itself and what stands before it."""
    k, v = (jnp.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    scores = jnp.einsum("thd,shd->hts", q, k, preferred_element_type=jnp.float32) * arch.attention_scale
    if arch.attention_soft_cap is not None:
        scores = arch.attention_soft_cap * jnp.tanh(scores / arch.attention_soft_cap)
    back = jnp.arange(len(q))[:, None] - jnp.arange(len(q))  # How far each key stands before each query
    window = arch.kind(layer).window
    seen = (back >= 0) & (back < (len(q) if window is None else window))
    return jnp.einsum("hts,shd->thd", jax.nn.softmax(jnp.where(seen, scores, -jnp.inf)), v).astype(q.dtype)
