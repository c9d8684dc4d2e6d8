"""Rotary positions (RoFormer, eq. 34), with the two ways of stretching them that Llama checkpoints ask for."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ds_jax.architecture import LayerKind, LinearScaling, Llama3Scaling


def inverse_frequencies(kind: LayerKind, head_dim: int) -> np.ndarray:
    """Radians per position of each pair of a head's dimensions, [D / 2] float32."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = np.float32(1) / np.float32(kind.rope_theta) ** exponents
    match kind.rope_scaling:
        case LinearScaling(factor):
            frequencies = frequencies / np.float32(factor)
        case Llama3Scaling(factor, low, high, original):
            wavelengths = 2 * math.pi / frequencies
            # 0 where fewer than `low` turns fit into the original context, 1 where more than `high` do.
            kept = np.clip((original / wavelengths - low) / (high - low), 0, 1)
            frequencies = (1 - kept) * frequencies / factor + kept * frequencies
    return frequencies.astype(np.float32)


def angles(
    kind: LayerKind, head_dim: int, positions: Int[Array, " T"]
) -> tuple[Float[Array, "T D/2"], Float[Array, "T D/2"]]:
    """Cosine and sine for each token, float32."""
    turned = positions.astype(jnp.float32)[:, None] * inverse_frequencies(kind, head_dim)
    return jnp.cos(turned), jnp.sin(turned)


def rotate(x: Float[Array, "T H D"], cosine: Float[Array, "T D/2"], sine: Float[Array, "T D/2"]) -> jax.Array:
    """Turn dimension i with dimension i + D/2 (the layout of Hugging Face checkpoints); keeps the type of x."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cosine, sine = cosine[:, None], sine[:, None]
    turned = jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
    return turned.astype(x.dtype)
