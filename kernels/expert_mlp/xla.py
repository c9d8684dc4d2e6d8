"""Tokens sorted by expert, then one product per expert over its own: cost follows the experts that were chosen."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from kernels.projection import project

FEWEST_ROWS, MOST_ROWS = 8, 64
"""Rows of one product on the CPU: about as many as an expert gets, so that few are empty and weights are read once."""

Activation = Callable[[jax.Array], jax.Array]


def apply(
    x: jax.Array, up: jax.Array, down: jax.Array, chosen: jax.Array, weights: jax.Array, *, activation: Activation
) -> jax.Array:
    """See the package. XLA:CPU multiplies every expert with every row of a ragged product, hence a loop there."""
    forms = (functools.partial(form, activation=activation) for form in (in_blocks, ragged))
    cpu, default = forms
    return lax.platform_dependent(x, up, down, chosen, weights, cpu=cpu, default=default)


def sorted_rows(chosen: jax.Array, experts: int) -> tuple[jax.Array, jax.Array]:
    """The order in which entries of `chosen` stand expert by expert (those of no expert last), and how many each has.

    With chosen [[1, 0], [5, 1]] and 2 experts: order 1, 0, 3, 2 and sizes 1, 2.
    """
    flat = chosen.reshape(-1)
    flat = jnp.where((flat >= 0) & (flat < experts), flat, experts)
    return jnp.argsort(flat, stable=True), jnp.bincount(flat, length=experts + 1)[:experts]


def in_blocks(
    x: jax.Array, up: jax.Array, down: jax.Array, chosen: jax.Array, weights: jax.Array, *, activation: Activation
) -> jax.Array:
    """Expert by expert, block by block of its rows; an expert that nobody chose is not looked at."""
    (experts, _, width, embed), per_token = up.shape, chosen.shape[1]
    order, sizes = sorted_rows(chosen, experts)
    rows = min(max(FEWEST_ROWS, chosen.size // experts), MOST_ROWS, len(x))
    token, weight = jnp.pad(order // per_token, (0, rows)), jnp.pad(weights.reshape(-1)[order], (0, rows))
    starts = jnp.cumsum(sizes) - sizes
    blocks = -(-sizes // rows)
    ends = jnp.cumsum(blocks)

    def block(i: jax.Array, out: jax.Array) -> jax.Array:
        expert = jnp.searchsorted(ends, i, side="right")
        first = (i - (ends[expert] - blocks[expert])) * rows
        at = starts[expert] + first
        mine = first + jnp.arange(rows) < sizes[expert]
        tokens = lax.dynamic_slice_in_dim(token, at, rows)
        both = lax.dynamic_index_in_dim(up, expert, keepdims=False).reshape(2 * width, embed)
        inner = project(x[tokens], both)
        inner = activation(inner[:, :width]) * inner[:, width:]
        share = project(inner, lax.dynamic_index_in_dim(down, expert, keepdims=False)).astype(jnp.float32)
        share = share * lax.dynamic_slice_in_dim(weight, at, rows)[:, None]
        # Rows of the next expert are read and not added.
        return out.at[jnp.where(mine, tokens, len(x))].add(share, mode="drop")

    return lax.fori_loop(0, ends[-1], block, jnp.zeros(x.shape, jnp.float32))


def ragged(
    x: jax.Array, up: jax.Array, down: jax.Array, chosen: jax.Array, weights: jax.Array, *, activation: Activation
) -> jax.Array:
    """Two ragged products over all sorted rows."""
    (experts, _, width, embed), per_token = up.shape, chosen.shape[1]
    order, sizes = sorted_rows(chosen, experts)
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    product = functools.partial(lax.ragged_dot, group_sizes=sizes.astype(jnp.int32), precision=precision)
    inner = product(x[order // per_token], up.reshape(experts, 2 * width, embed).swapaxes(1, 2))
    inner = activation(inner[:, :width]) * inner[:, width:]
    share = product(inner, down.swapaxes(1, 2)).astype(jnp.float32) * weights.reshape(-1)[order][:, None]
    share = jnp.where((jnp.arange(len(order)) < sizes.sum())[:, None], share, 0)
    return jnp.zeros(x.shape, jnp.float32).at[order // per_token].add(share)
