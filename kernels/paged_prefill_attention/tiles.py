"""The tiles of packed chunks: which queries a block of threads takes, and which blocks of keys they see."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

COLUMNS = 8


class Spread(NamedTuple):
    """Chunks that begin at multiples of some number of rows. With chunks of 3 and 2 tokens and multiples of 4:

    packed   a a a b b          spread   a a a . b b . .
    starts   0, 4               source   0 1 2 - 3 4 - -        place   0 1 2 4 5
    """

    starts: jax.Array
    """[R] where each chunk begins."""
    source: jax.Array
    """[T'] the packed token in each place; T where there is none."""
    place: jax.Array
    """[T] where each packed token is; T' for those of no chunk."""


def aligned(starts: jax.Array, lengths: jax.Array, tokens: int, multiple: int) -> Spread:
    """Spread out packed chunks."""
    starts, lengths = starts.astype(jnp.int32), lengths.astype(jnp.int32)
    room = -(-lengths // multiple) * multiple
    ends = jnp.cumsum(room)
    begins = ends - room
    places = -(-tokens // multiple) * multiple + multiple * len(starts)
    at = jnp.arange(places, dtype=jnp.int32)
    chunk = jnp.minimum(jnp.searchsorted(ends, at, side="right", method="compare_all"), len(starts) - 1)
    inside = at - begins[chunk]
    held = inside < lengths[chunk]
    source = jnp.where(held, starts[chunk] + inside, tokens)
    place = jnp.full(tokens, places, jnp.int32).at[source].set(at, mode="drop")
    return Spread(begins, source, place)


def tiles_of(
    starts: jax.Array,
    lengths: jax.Array,
    contexts: jax.Array,
    tokens: int,
    rows: int,
    multiple: int,
    block: int,
    window: int | None,
) -> jax.Array:
    """[tokens // rows + R + 1, COLUMNS] int32: every chunk in tiles of `rows` tokens, and so the padding behind them.

    Columns: the row of the page table, the first token in multiples of `multiple`, how many tokens (0: an empty tile),
    the first one's position, the sequence's first token that any query of the tile sees, one more than its last token,
    and the first block of keys and the number of blocks that the tile sees. Those with most blocks come first, so that
    none is left over when all others are done. Padding sees no block.
    """
    starts, lengths, contexts = (x.astype(jnp.int32) for x in (starts, lengths, contexts))
    chunks, count = len(starts), tokens // rows + len(starts) + 1
    used = jnp.max(-(-(starts + lengths) // multiple) * multiple, where=lengths > 0, initial=0)
    starts, contexts = jnp.append(starts, used), jnp.append(contexts, 0)
    lengths = jnp.append(lengths, jnp.maximum(tokens - used, 0))

    each = -(-lengths // rows)
    ends = jnp.cumsum(each)
    number = jnp.arange(count, dtype=jnp.int32)
    chunk = jnp.minimum(jnp.searchsorted(ends, number, side="right", method="compare_all"), chunks).astype(jnp.int32)
    before = (number - (ends - each)[chunk]) * rows
    inside = jnp.clip(lengths[chunk] - before, 0, rows)
    position = contexts[chunk] + before
    sees = (chunk < chunks) & (inside > 0)
    begin = jnp.zeros_like(position) if window is None else jnp.maximum(position - window + 1, 0)
    first = begin // block
    blocks = jnp.where(sees, -(-(position + inside) // block) - first, 0)
    columns = jnp.minimum(chunk, chunks - 1), (starts[chunk] + before) // multiple, inside, position, begin
    tiles = jnp.stack([*columns, contexts[chunk] + lengths[chunk], first, blocks], axis=1)
    # A sort would be a loop of many small kernels; comparing all with all is one.
    before_me = (blocks > blocks[:, None]) | ((blocks == blocks[:, None]) & (number < number[:, None]))
    rank = jnp.sum(before_me, axis=1, dtype=jnp.int32)
    return jnp.zeros_like(tiles).at[rank].set(tiles, unique_indices=True)
