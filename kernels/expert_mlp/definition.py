"""What a mixture of experts means: every expert over every token, and of that what was asked for, in float32."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax


def apply(
    x: jax.Array,
    up: jax.Array,
    down: jax.Array,
    chosen: jax.Array,
    weights: jax.Array,
    *,
    activation: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """See the package."""
    x, up, down = (array.astype(jnp.float32) for array in (x, up, down))
    gate, inputs = jnp.einsum("te,xime->itxm", x, up, precision=lax.Precision.HIGHEST)
    outputs = jnp.einsum("txm,xem->txe", activation(gate) * inputs, down, precision=lax.Precision.HIGHEST)
    share = jnp.einsum("tk,tkx->tx", weights, chosen[:, :, None] == jnp.arange(len(up)))
    return jnp.einsum("tx,txe->te", share, outputs, precision=lax.Precision.HIGHEST)
