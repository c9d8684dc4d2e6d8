"""What writing into pages means."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def write(
    k_pages: jax.Array, v_pages: jax.Array, k: jax.Array, v: jax.Array, slots: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Each slot of the pool asks which token, if any, is written to it."""
    return _write(k_pages, k, slots), _write(v_pages, v, slots)


def _write(pages: jax.Array, new: jax.Array, slots: jax.Array) -> jax.Array:
    count, _, size, _ = pages.shape
    written = slots[:, None] == jnp.arange(count * size)  # [T, P * N]
    token = jnp.argmax(written, 0).reshape(count, size)
    hit = written.any(0).reshape(count, 1, size, 1)
    return jnp.where(hit, new[token].transpose(0, 2, 1, 3).astype(pages.dtype), pages)
