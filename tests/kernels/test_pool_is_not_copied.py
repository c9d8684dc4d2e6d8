"""A donated pool is written in place: the compiled programs hold no copy of it."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import pytest

from kernels import kv_write, paged_decode_attention, paged_prefill_attention

LAYERS, PAGES, KV_HEADS, PAGE, HEAD_DIM = 3, 64, 2, 8, 16
LAYER_SHAPE = f"f32[{PAGES},{KV_HEADS},{PAGE},{HEAD_DIM}]"


def decode(pool, q, kv, table, lengths, slots):
    out = q
    for layer, (k_pages, v_pages) in enumerate(pool):
        pool[layer] = kv_write.write(k_pages, v_pages, kv, kv + out[:, :KV_HEADS], slots)
        out = paged_decode_attention.attend(out, *pool[layer], table, lengths, scale=1.0)
    return pool, out


def prefill(pool, q, kv, table, lengths, slots):
    out, rows = q, jnp.arange(len(lengths))
    for layer, (k_pages, v_pages) in enumerate(pool):
        pool[layer] = kv_write.write(k_pages, v_pages, kv, kv + out[:, :KV_HEADS], slots)
        out = paged_prefill_attention.attend(out, *pool[layer], table, rows, jnp.ones_like(rows), lengths, scale=1.0)
    return pool, out


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("program", [decode, prefill])
def test_the_compiled_program_holds_no_copy_of_the_pool(program, batch):
    layer = jax.ShapeDtypeStruct((PAGES, KV_HEADS, PAGE, HEAD_DIM), jnp.float32)
    integers = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((batch, 6), (batch,), (batch,))]
    q, kv = (jax.ShapeDtypeStruct((batch, heads, HEAD_DIM), jnp.float32) for heads in (4, KV_HEADS))
    lowered = jax.jit(program, donate_argnums=0).lower([(layer, layer)] * LAYERS, q, kv, *integers)
    done = lowered.compile()
    copies = [line for line in done.as_text().splitlines() if re.search(r"= \S+ (copy|copy-start)\(", line)]
    assert not [line for line in copies if LAYER_SHAPE in line]
    pool_bytes = 2 * LAYERS * layer.size * 4
    memory = done.memory_analysis()
    assert memory.alias_size_in_bytes >= pool_bytes
    assert memory.temp_size_in_bytes < layer.size * 4
