"""Products of activations with weights, in the form that the platform's XLA multiplies fastest."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from kernels.backends import platform

MOST_ROWS_RIGHT = 64
"""Up to so many rows, activations are the right side of a product on the CPU."""


def project(x: Float[Array, "T I"], weight: Float[Array, "O I"], out: Any = None) -> Float[Array, "T O"]:
    """x times weight transposed, as `out` (x's type if None); float32 at full precision (GPUs would take TF32 else).

    XLA:CPU's library packs the right side of a product of float32, at every call. With few rows that side should be
    the activations, since packing a weight costs more than multiplying with it. (Short types it takes as they are on
    the right; on the left XLA would write the weight as float32 first.)
    """
    rows, out = x.shape[0], out or x.dtype
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    if platform()[0] == "cpu":
        if rows == 1 and x.dtype != jnp.float32:
            return _row_times(x, weight, out)
        if 1 < rows <= MOST_ROWS_RIGHT and x.dtype == jnp.float32:
            # The barriers keep XLA from turning the product round again.
            columns = lax.optimization_barrier(x.T)
            product = lax.dot(weight, columns, precision=precision, preferred_element_type=out)
            return lax.optimization_barrier(product).T
    return lax.dot_general(x, weight, (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=out)


def _row_times(x: Float[Array, "1 I"], weight: Float[Array, "O I"], out: Any) -> Float[Array, "1 O"]:
    """The product of one row of a short type, summed in float32: XLA:CPU would write all of the weight as float32
    first."""
    x = lax.optimization_barrier(x.astype(jnp.float32))  # else it is made again for every row of the weight
    # Else one that is stored with more axes is written as float32 all the same, before its rows are taken together.
    weight = lax.optimization_barrier(weight)
    return (weight.astype(jnp.float32) * x).sum(axis=1)[None].astype(out)
