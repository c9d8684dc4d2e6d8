"""Running one function over many rows, the way that suits the platform."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax import lax

Over = Callable[[Callable[[jax.Array], jax.Array], jax.Array], jax.Array]
"""(function of a row's number, the numbers) -> results along a new first axis."""


def one_by_one(function: Callable[[jax.Array], jax.Array], numbers: jax.Array) -> jax.Array:
    """A loop: each row's work is small enough for a core's cache, and its loops end when that row is done."""
    return lax.map(function, numbers)


def side_by_side(function: Callable[[jax.Array], jax.Array], numbers: jax.Array) -> jax.Array:
    """All rows in each operation: few launches, loops that end with the last row."""
    return jax.vmap(function)(numbers)


def by_platform(form: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
    """form(*arrays, over=...): one row after the other on the CPU, all at once elsewhere.

    The choice falls when the program is lowered, for the platform that it is lowered for.
    """

    def bound(over: Over) -> Callable[..., Any]:
        return lambda *arrays: form(*arrays, over=over)

    return lax.platform_dependent(*arrays, cpu=bound(one_by_one), default=bound(side_by_side))
