"""KV pages between instances of unequal tensor parallelism: every bit arrives, and never through host memory."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.array import ArrayImpl
from jax.sharding import NamedSharding

from ds_jax.architecture import Architecture
from ds_jax.protocol import Copy, Place, Role
from ds_jax.runtime.handover import Cut, Route
from ds_jax.runtime.instance import Instance
from ds_jax.runtime.programs import Model
from ds_jax.runtime.shapes import Shapes
from models.sharding import POOL_AXES, make_mesh, spec_of

PAGES, SIZE, HEAD_DIM, LAYERS = 9, 4, 2, 2
SHAPES = Shapes(pages=PAGES, page_size=SIZE, max_model_len=16)
PAIRS = ((1, 1), (2, 1), (1, 4), (4, 2), (2, 4))


def fits(tp: int, kv_heads: int) -> bool:
    return tp % kv_heads == 0 or kv_heads % tp == 0


def architecture(kv_heads: int) -> Architecture:
    return Architecture("llama", 16, 8, LAYERS, 12, kv_heads, HEAD_DIM, 8, 16)


def instance(
    tp: int, first_device: int, kv_heads: int, dtype: Any, rng: np.random.Generator, shapes: Shapes = SHAPES
) -> Instance:
    """An instance with nothing but a pool of random bits; copies of a head are equal."""
    mesh = make_mesh(jax.devices()[first_device : first_device + tp], tp)
    made = Instance(first_device, Role.PREFILL, Model(architecture(kv_heads), dtype, mesh, None, {}), shapes)
    sharding = NamedSharding(mesh, spec_of(POOL_AXES))

    def layer() -> jax.Array:
        bits = rng.integers(0, 256, (PAGES, kv_heads, SIZE, HEAD_DIM * jnp.dtype(dtype).itemsize), np.uint8)
        heads = np.repeat(bits, max(1, tp // kv_heads), axis=1)
        return jax.device_put(heads.view(jnp.dtype(dtype)), sharding)

    made.pool = {part: tuple(layer() for _ in range(LAYERS)) for part in ("k", "v")}
    return made


def bits(pool: dict[str, tuple[jax.Array, ...]], kv_heads: int) -> np.ndarray:
    """[2, L, P, K, bytes] of the real heads; every copy of a head must agree."""
    whole = np.asarray([[np.asarray(layer).view(np.uint8) for layer in pool[part]] for part in ("k", "v")])
    whole = whole.reshape(2, LAYERS, PAGES, kv_heads, -1, whole.shape[-2] * whole.shape[-1])
    assert np.all(whole == whole[:, :, :, :, :1])
    return whole[:, :, :, :, 0]


@pytest.fixture
def host_reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the ways by which an array's value came to the host."""
    reads: list[str] = []
    value, array = ArrayImpl._value, ArrayImpl.__array__

    def read_value(self: Any) -> Any:
        reads.append("_value")
        return value.fget(self)

    def read_array(self: Any, *args: Any, **options: Any) -> Any:
        reads.append("__array__")
        return array(self, *args, **options)

    monkeypatch.setattr(ArrayImpl, "_value", property(read_value))
    monkeypatch.setattr(ArrayImpl, "__array__", read_array)
    return reads


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16], ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize(
    "tps, kv_heads",
    [(pair, heads) for pair in PAIRS for heads in (1, 2, 3, 4) if all(fits(tp, heads) for tp in pair)]
    + [((1, 3), 3), ((3, 1), 3)],
)
def test_pages_arrive_bit_for_bit(tps: tuple[int, int], kv_heads: int, dtype: Any, host_reads: list[str]):
    rng = np.random.default_rng(0)
    source = instance(tps[0], 0, kv_heads, dtype, rng)
    destination = instance(tps[1], 4, kv_heads, dtype, rng)
    cut = Cut(kv_heads, *tps)
    for compile in (*source.compilations({cut}, set()), *destination.compilations(set(), {cut})):
        compile()
    expected, sent = bits(destination.pool, kv_heads), bits(source.pool, kv_heads)
    here, there = [7, 0, 4], [1, 8, 2]

    host_reads.clear()
    route = Route(cut, destination.model.mesh)
    pieces = source.send(route, here)
    jax.block_until_ready(pieces)
    copy = Copy(0, 5, Place(0, 0), Place(1, 0), tuple(zip(here, there, strict=True)))
    destination.receive(route, copy, pieces)
    jax.block_until_ready(destination.pool)
    assert not host_reads

    expected[:, :, there] = sent[:, :, here]
    assert np.array_equal(bits(destination.pool, kv_heads), expected)
    assert np.array_equal(bits(source.pool, kv_heads), sent)
    assert destination.tables == {5: there}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16], ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_pages_come_back_from_host_memory_bit_for_bit(tp: int, dtype: Any, host_reads: list[str]):
    """More pages than one program moves, in two copies, read back in another order into other pages."""
    rng = np.random.default_rng(0)
    swapping = replace(SHAPES, host_pages=7)
    source = instance(tp, 0, 4, dtype, rng, swapping)
    other = instance(tp, 4, 4, dtype, rng, swapping)
    for one in (source, other):
        for compile in one.compilations(set(), set()):
            compile()
    sent = bits(source.pool, 4)
    expected = bits(other.pool, 4)

    host_reads.clear()
    for pages, places in (([8, 0, 3, 5, 1], [6, 0, 4, 1, 3]), ([2, 7], [0, 2])):  # place 0 is written again
        down = jax.block_until_ready(source.host.down(source.read(pages)))
        assert {page.sharding.memory_kind for page in down} == {"pinned_host"}
        source.host.keep(places, down)
    copy = Copy(0, 5, Place(0, 0), Place(0, 0), ((0, 1), (6, 0), (2, 8), (4, 3), (3, 4)))
    pages = jax.block_until_ready(other.host.up(source.host.at([0, 6, 2, 4, 3])))
    other.restore(copy, pages)
    jax.block_until_ready(other.pool)
    assert not host_reads

    expected[:, :, [1, 0, 8, 3, 4]] = sent[:, :, [2, 8, 7, 3, 1]]
    assert np.array_equal(bits(other.pool, 4), expected)
    assert np.array_equal(bits(source.pool, 4), sent)
    assert other.tables == {5: [1, 0, 8, 3, 4]}


def test_handing_whole_arrays_over_would_go_through_the_host(host_reads: list[str]):
    """Shows that the count above counts, and why arrays are cut into pieces."""
    meshes = [make_mesh(jax.devices()[:4], 4), make_mesh(jax.devices()[4:6], 2)]
    shardings = [NamedSharding(mesh, spec_of(POOL_AXES)) for mesh in meshes]
    array = jax.device_put(np.zeros((1, 4, 1, 1), np.float32), shardings[0])
    jax.block_until_ready(jax.device_put(array, shardings[1]))
    assert host_reads


@pytest.mark.parametrize("kv_heads", [1, 2, 3, 4, 12])
def test_every_device_gets_its_heads_in_order(kv_heads: int):
    tps = [tp for tp in (1, 2, 3, 4, 6, 8, 12) if fits(tp, kv_heads)]

    def held(tp: int) -> list[list[int]]:
        stored = [head // max(1, tp // kv_heads) for head in range(max(kv_heads, tp))]
        return [stored[i * len(stored) // tp : (i + 1) * len(stored) // tp] for i in range(tp)]

    for source, destination in itertools.product(tps, tps):
        cut = Cut(kv_heads, source, destination)
        sent = [[heads[i : i + cut.heads] for i in range(0, len(heads), cut.heads)] for heads in held(source)]
        assert all(len(pieces) == cut.sent for pieces in sent)
        for device, heads in enumerate(held(destination)):
            origins = [cut.origin(device, piece) for piece in range(cut.received)]
            assert [head for origin in origins for head in sent[origin.device][origin.piece]] == heads


def test_those_that_hold_copies_of_a_head_take_turns_sending_it():
    cut = Cut(1, 4, 4)
    assert {cut.origin(device, 0).device for device in range(4)} == {0, 1, 2, 3}
