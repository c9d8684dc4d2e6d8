"""Writing into pages as one scatter, which XLA does in place on a donated pool."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels.kv_write.definition import turned


def write(
    k_pages: jax.Array,
    v_pages: jax.Array,
    k: jax.Array,
    v: jax.Array,
    slots: jax.Array,
    cosine: jax.Array | None = None,
    sine: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """See the package. XLA fuses the turning of the keys into the scatter's operands."""
    if cosine is not None and sine is not None:
        k = turned(k, cosine, sine)
    count, _, size, _ = k_pages.shape
    page = jnp.where(slots < 0, count, slots // size)  # A negative index would count from the end.
    offset = slots % size
    k_pages = k_pages.at[page, :, offset].set(k.astype(k_pages.dtype), mode="drop")
    v_pages = v_pages.at[page, :, offset].set(v.astype(v_pages.dtype), mode="drop")
    return k_pages, v_pages
