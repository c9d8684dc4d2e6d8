"""Who does what: the blocks of keys of all sequences and heads, shared out evenly among a fixed number of workers.

All blocks stand in one row, sequence by sequence, head by head (a *pair*), and every worker takes an equal stretch of
it, wherever pairs begin and end (Stream-K, Osama et al., PPoPP'23). So one sequence fills the chip as well as many of
uneven lengths do. With 2 workers, one head and blocks a a a b:

    worker 0: a a | worker 1: a b     partial results: (a, worker 0), (a, worker 1), (b, worker 1)

The result of pair p by worker w lies in place p + w: where the row of blocks passes a border of either kind, exactly
one of the two grows. The places of one pair lie side by side.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Schedule(NamedTuple):
    """All int32. Sequences are counted in the order in which they are worked on: those with tokens first."""

    work: jax.Array
    """[W, 5] of each worker: sequence, head and block (counted from the sequence's first) that it begins with, how
    many blocks and how many pairs it takes."""
    sequences: jax.Array
    """[B, 4] of each sequence in that order: its row in the batch, its first block, its number of blocks, and its
    length."""
    places: jax.Array
    """[B, K, 2] of each pair, by row in the batch: where its first partial result lies, and how many there are."""


def plan(lengths: jax.Array, kv_heads: int, block: int, workers: int, window: int | None) -> Schedule:
    """Share out the work.

    Args:
        lengths: [B] tokens of each sequence.
        kv_heads: K.
        block: tokens of a block.
        workers: W.
        window: how many of the last tokens are looked at; None: all.
    """
    lengths = lengths.astype(jnp.int32)
    first = jnp.zeros_like(lengths) if window is None else jnp.maximum(lengths - window, 0) // block
    blocks = -(-lengths // block) - first
    # Sorts and searches would be loops of many small kernels; comparing all with all is one.
    full = blocks > 0
    rank = jnp.where(full, jnp.cumsum(full), jnp.sum(full) + jnp.cumsum(~full)) - 1  # of each row of the batch
    row = jnp.arange(len(lengths), dtype=jnp.int32)
    order = jnp.sum(jnp.where(rank == row[:, None], row, 0), axis=1, dtype=jnp.int32)
    sequences = jnp.stack([order, first[order], blocks[order], lengths[order]], axis=1)

    ends = jnp.cumsum(blocks[order] * kv_heads)  # in the row of all blocks
    total = ends[-1]
    each, further = total // workers, total % workers  # the first `further` workers take one more

    def begin_of(worker: jax.Array) -> jax.Array:
        return worker * each + jnp.minimum(worker, further)

    def pair_at(at: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        passed = jnp.searchsorted(ends, at, side="right", method="compare_all")
        sequence = jnp.minimum(passed, len(lengths) - 1).astype(jnp.int32)
        per_head = jnp.maximum(sequences[sequence, 2], 1)
        inside = at - (ends[sequence] - sequences[sequence, 2] * kv_heads)
        return sequence, inside // per_head, inside % per_head

    worker = jnp.arange(workers, dtype=jnp.int32)
    begin, end = begin_of(worker), begin_of(worker + 1)
    sequence, head, inside = pair_at(begin)
    last_sequence, last_head, _ = pair_at(jnp.maximum(end - 1, 0))
    pairs = jnp.where(end > begin, (last_sequence - sequence) * kv_heads + last_head - head + 1, 0)
    work = jnp.stack([sequence, head, inside, end - begin, pairs], axis=1)

    def worker_at(at: jax.Array) -> jax.Array:
        border = further * (each + 1)
        return jnp.where(at < border, at // (each + 1), further + (at - border) // jnp.maximum(each, 1))

    heads = jnp.arange(kv_heads, dtype=jnp.int32)
    start = (ends[rank] - blocks * kv_heads)[:, None] + heads * blocks[:, None]
    low, high = worker_at(start), worker_at(start + blocks[:, None] - 1)
    place = rank[:, None] * kv_heads + heads + low
    count = jnp.where(blocks[:, None] > 0, high - low + 1, 0)
    return Schedule(work, sequences, jnp.stack([place, count], axis=-1))
