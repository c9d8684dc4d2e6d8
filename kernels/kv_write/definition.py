"""What writing into pages means."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def write(
    k_pages: jax.Array,
    v_pages: jax.Array,
    k: jax.Array,
    v: jax.Array,
    slots: jax.Array,
    cosine: jax.Array | None = None,
    sine: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Each slot of the pool asks which token, if any, is written to it."""
    if cosine is not None and sine is not None:
        k = turned(k, cosine, sine)
    return _write(k_pages, k, slots), _write(v_pages, v, slots)


def turned(x: jax.Array, cosine: jax.Array, sine: jax.Array) -> jax.Array:
    """Each pair (i, i + D / 2) of dimensions turned by its angle, in float32; keeps the type of x."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cosine, sine = cosine[:, None], sine[:, None]
    return jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1).astype(x.dtype)


def _write(pages: jax.Array, new: jax.Array, slots: jax.Array) -> jax.Array:
    count, _, size, _ = pages.shape
    written = slots[:, None] == jnp.arange(count * size)  # [T, P * N]
    token = jnp.argmax(written, 0).reshape(count, size)
    hit = written.any(0).reshape(count, 1, size, 1)
    return jnp.where(hit, new[token].transpose(0, 2, 1, 3).astype(pages.dtype), pages)
