"""What decode attention over pages means: gather every page, mask, softmax, in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


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
    batch, heads, head_dim = q.shape
    _, kv_heads, size, _ = k_pages.shape
    page_table = jnp.clip(page_table, 0, k_pages.shape[0] - 1)

    def gathered(pages: jax.Array, scales: jax.Array | None) -> jax.Array:  # [B, K, S, D]
        taken = pages[page_table].astype(jnp.float32)  # [B, max_pages, K, N, D]
        if scales is not None:
            taken = taken * scales[page_table][..., None, None]
        return taken.transpose(0, 2, 1, 3, 4).reshape(batch, kv_heads, -1, head_dim)

    grouped = q.astype(jnp.float32).reshape(batch, kv_heads, heads // kv_heads, head_dim)
    scores = (
        jnp.einsum("bkgd,bksd->bkgs", grouped, gathered(k_pages, k_scales), precision=lax.Precision.HIGHEST) * scale
    )
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    token = jnp.arange(scores.shape[-1])
    seen = token < lengths[:, None]
    if window is not None:
        seen &= token >= lengths[:, None] - window
    seen = seen[:, None, None]  # [B, 1, 1, S]
    weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), where=seen)
    # What lies in slots that are not seen may be anything, NaN included: 0 * NaN must not come in.
    values = jnp.where(seen[:, 0, 0, :, None][:, None], gathered(v_pages, v_scales), 0)
    out = jnp.einsum("bkgs,bksd->bkgd", weights, values, precision=lax.Precision.HIGHEST)
    return jnp.where((lengths > 0)[:, None, None], out.reshape(batch, heads, head_dim), 0).astype(q.dtype)
