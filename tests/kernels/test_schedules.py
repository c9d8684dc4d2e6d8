"""How kernels share out work: every block of keys is taken once, and results find their way back."""

from __future__ import annotations

import jax
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.paged_decode_attention.schedule import plan
from kernels.paged_prefill_attention.tiles import aligned, tiles_of

BLOCK, TOKENS = 4, 128


@settings(max_examples=25)
@given(
    lengths=st.lists(st.integers(0, 60), min_size=6, max_size=6),
    workers=st.sampled_from([1, 5, 40]),
    window=st.sampled_from([None, 1, 13]),
)
def test_decode_workers_take_every_block_once_in_equal_shares(lengths, workers, window):
    kv_heads = 2
    share_out = jax.jit(plan, static_argnums=(1, 2, 3, 4))
    work, sequences, places = map(np.asarray, share_out(np.array(lengths), kv_heads, BLOCK, workers, window))
    taken, results = [], {}
    for worker, (sequence, head, block, count, pairs) in enumerate(work):
        met = []
        for _ in range(count):
            row, first, blocks, length = sequences[sequence]
            assert length == lengths[row]
            taken.append((row, head, first + block))
            if (row, head) not in met:
                met.append((row, head))
                place = sequence * kv_heads + head + worker
                assert place not in results
                results[place] = (row, head)
            block += 1
            if block == blocks:
                block, head = 0, head + 1
            if head == kv_heads:
                head, sequence = 0, sequence + 1
        assert len(met) == pairs
    expected = [
        (row, head, block)
        for row, length in enumerate(lengths)
        for head in range(kv_heads)
        for block in range(max(0, length - (window or length)) // BLOCK, -(-length // BLOCK))
    ]
    assert sorted(taken) == sorted(expected)
    assert np.ptp(work[:, 3]) <= 1
    for row, head in np.ndindex(len(lengths), kv_heads):
        first, count = places[row, head]
        mine = [place for place, pair in results.items() if pair == (row, head)]
        assert sorted(mine) == list(range(first, first + count))


@settings(max_examples=25)
@given(
    chunks=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 20)), min_size=4, max_size=4),
    window=st.sampled_from([None, 1, 13]),
)
def test_prefill_tiles_hold_every_token_once_and_see_every_block_that_it_sees(chunks, window):
    lengths, contexts = (np.array(column) for column in zip(*chunks, strict=True))
    starts, rows, multiple = np.cumsum(lengths) - lengths, 8, 2
    spread = jax.jit(aligned, static_argnums=(2, 3))
    begins, source, place = map(np.asarray, spread(starts, lengths, TOKENS, multiple))
    assert not np.any(begins % multiple)
    used = int(lengths.sum())
    np.testing.assert_array_equal(source[place[:used]], np.arange(used))
    assert np.all(place[used:] == len(source))

    cut = jax.jit(tiles_of, static_argnums=(3, 4, 5, 6, 7))
    tiles = np.asarray(cut(begins, lengths, contexts, len(source), rows, multiple, BLOCK, window))
    assert np.all(np.diff(tiles[:, -1]) <= 0)  # longest first
    seen: dict[int, tuple] = {}
    written: list[int] = []
    for sequence, first_row, count, position, begin, end, first, blocks in tiles:
        written += range(first_row * multiple, first_row * multiple + -(-count // multiple) * multiple)
        for i in range(count):
            at = first_row * multiple + i
            assert at not in seen
            seen[at] = sequence, position + i, begin, end, first, blocks
    assert sorted(written) == list(range(len(source)))
    for chunk, (length, context) in enumerate(chunks):
        for i in range(length):
            sequence, position, begin, end, first, blocks = seen[begins[chunk] + i]
            assert (sequence, position, end) == (chunk, context + i, context + length)
            oldest = 0 if window is None else max(0, position - window + 1)
            assert begin <= oldest and first * BLOCK <= oldest and position < (first + blocks) * BLOCK
