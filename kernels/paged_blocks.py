"""What XLA's forms of paged attention share: fetching blocks of pages, and walking over them."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

Number = int | jax.Array
Carry = tuple[jax.Array, ...]


def flat(pool: Array, rows: int) -> Float[Array, "rows E"]:
    """The pool as so many rows, no copy.

    The barrier keeps XLA from writing new keys through this view as well: then it would copy the pool.
    """
    return lax.optimization_barrier(pool).reshape(rows, -1)


def fetch(rows: Float[Array, "rows E"], numbers: Int[Array, " n"]) -> Float[Array, "n E"]:
    """These rows of a `flat` pool, in float32.

    Flat, and held apart from what follows: XLA:CPU copies such rows at a core's bandwidth, and takes twice to ten
    times as long where it has fused the copy with arrays of more axes. Row by row: it splits a gather in two for the
    sake of a second thread, which here costs more than it brings.
    """
    some = [lax.dynamic_slice_in_dim(rows, number, 1) for number in numbers]
    return lax.optimization_barrier(jnp.concatenate(some).astype(jnp.float32))


def walk(
    block: Callable[[bool, jax.Array, Carry], Carry],
    carry: Carry,
    begin: Number,
    whole: Number,
    rest: Number,
    end: Number,
) -> Carry:
    """The carry after block(masked, i, carry) for i from begin to end, in order.

    Only blocks from `whole` to `rest`, which every query sees whole, are not masked. Where `begin` is known when the
    program is traced (0: no window), so is `whole`, and nothing is compiled for blocks before.
    """

    def masked(i: jax.Array, carry: Carry) -> Carry:
        return block(True, i, carry)

    if not isinstance(begin, int):
        carry = lax.fori_loop(begin, jnp.minimum(whole, end), masked, carry)
    carry = lax.fori_loop(whole, rest, lambda i, carry: block(False, i, carry), carry)
    return lax.fori_loop(jnp.maximum(whole, rest), end, masked, carry)
