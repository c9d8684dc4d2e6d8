"""KV pages from one instance to another, device to device, whatever the tp of the two.

The source gathers a sequence's pages of all layers in one program, cut into pieces of as many heads as both sides hold
whole: gcd(heads per source device, heads per destination device). Each piece then goes straight to the device that
needs it, and one program at the destination puts the pieces together and scatters them into its pool. Take 4 KV heads
from tp 4 to tp 2: a piece is one head, and destination device 0 receives the pieces of source devices 0 and 1. Where
tp exceeds the heads, devices hold copies of a head, and the receivers take turns among those that could send.

(Handing such an array to `jax.device_put` whole would go through host memory.)
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from ds_jax.protocol import Role
from ds_jax.runtime.compilation import compile_ahead
from ds_jax.runtime.pool import Pool, abstract_pool
from ds_jax.runtime.programs import EVERYWHERE, Model, Program
from ds_jax.runtime.shapes import Shapes
from models.sharding import POOL_AXES, TENSOR, spec_of

PIECE = PartitionSpec(None, None, None, TENSOR)
"""Pieces are [2, L, n, g, N, D]: keys then values, layers, pages, heads, offsets, head size."""


class Origin(NamedTuple):
    """Which piece of which source device."""

    device: int
    piece: int


@dataclass(frozen=True)
class Cut:
    """How K heads, held by `source` devices, are shared out to `destination` devices."""

    kv_heads: int
    source: int
    destination: int

    @property
    def heads(self) -> int:
        """Heads in a piece."""
        return math.gcd(self._held(self.source), self._held(self.destination))

    @property
    def sent(self) -> int:
        """Pieces that each source device has."""
        return self._held(self.source) // self.heads

    @property
    def received(self) -> int:
        """Pieces that each destination device needs."""
        return self._held(self.destination) // self.heads

    def origin(self, device: int, piece: int) -> Origin:
        """Where a destination device's piece comes from."""
        head = device * self.kv_heads // self.destination + piece * self.heads
        holders = max(1, self.source // self.kv_heads)
        if holders > 1:
            return Origin(head * holders + device % holders, 0)
        held = self._held(self.source)
        return Origin(head // held, head % held // self.heads)

    def _held(self, tp: int) -> int:
        """Heads that each device of an instance holds."""
        return max(1, self.kv_heads // tp)


def gather(model: Model, shapes: Shapes, cut: Cut, bucket: int) -> Program:
    """(pool, pages [n]) -> the pieces of each device, a tuple; the pool stays."""

    def read(pool: Pool, pages: jax.Array) -> tuple[jax.Array, ...]:
        both = jnp.stack([jnp.stack([layer[pages] for layer in pool[part]]) for part in ("k", "v")])
        return tuple(jnp.split(both, cut.sent, axis=3))

    pool = abstract_pool(model.arch, model.dtype, shapes, model.mesh)
    program = model.on_mesh(read, (spec_of(POOL_AXES), EVERYWHERE), (PIECE,) * cut.sent)
    # Without this the compiler might call the pieces of a single device's program unsharded.
    out = (NamedSharding(model.mesh, PIECE),) * cut.sent
    return compile_ahead(program, (pool, model.host_array(bucket)), out_shardings=out)


def insert(model: Model, shapes: Shapes, cut: Cut, bucket: int) -> Program:
    """(pool, pages [n], pieces) -> pool; the pool is donated. Pages out of range are padding."""

    def write(pool: Pool, pages: jax.Array, pieces: tuple[jax.Array, ...]) -> Pool:
        both = jnp.concatenate(pieces, axis=3)
        return {
            part: tuple(layer.at[pages].set(both[i, j], mode="drop") for j, layer in enumerate(pool[part]))
            for i, part in enumerate(("k", "v"))
        }

    pool, pool_spec = abstract_pool(model.arch, model.dtype, shapes, model.mesh), spec_of(POOL_AXES)
    piece = jax.ShapeDtypeStruct(
        _whole_piece(model, shapes, cut, bucket), model.dtype, sharding=NamedSharding(model.mesh, PIECE)
    )
    pieces = (piece,) * cut.received
    program = model.on_mesh(write, (pool_spec, EVERYWHERE, (PIECE,) * cut.received), pool_spec)
    return compile_ahead(program, (pool, model.host_array(bucket), pieces), donate=(0,))


def duplicate(model: Model, shapes: Shapes, bucket: int) -> Program:
    """(pool, from [n], to [n]) -> pool; the pool is donated. Pages out of range are padding."""

    def write(pool: Pool, sources: jax.Array, destinations: jax.Array) -> Pool:
        return jax.tree.map(lambda layer: layer.at[destinations].set(layer[sources], mode="drop"), pool)

    pool, pool_spec = abstract_pool(model.arch, model.dtype, shapes, model.mesh), spec_of(POOL_AXES)
    program = model.on_mesh(write, (pool_spec, EVERYWHERE, EVERYWHERE), pool_spec)
    return compile_ahead(program, (pool, model.host_array(bucket), model.host_array(bucket)), donate=(0,))


def pad(pages: Sequence[int], bucket: int, padding: int) -> np.ndarray:
    """Page numbers as the programs take them."""
    padded = np.full(bucket, padding, np.int32)
    padded[: len(pages)] = pages
    return padded


class Route:
    """The way from one instance to another."""

    def __init__(self, cut: Cut, destination: Mesh):
        self.cut = cut
        self._sharding = NamedSharding(destination, PIECE)
        self._origins, self._targets = [], []
        for piece in range(cut.received):
            for number, device in enumerate(destination.devices.flat):
                self._origins.append(cut.origin(number, piece))
                self._targets.append(SingleDeviceSharding(device))

    def send(self, gathered: Sequence[jax.Array]) -> list[jax.Array]:
        """Start every piece on its way to where it is needed. Returns at once; the pieces land later."""
        pieces = [[piece.addressable_data(i) for i in range(self.cut.source)] for piece in gathered]
        return jax.device_put([pieces[origin.piece][origin.device] for origin in self._origins], self._targets)

    def assemble(self, landed: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
        """The pieces as the arrays that `insert` takes."""
        devices = self.cut.destination
        shape = list(landed[0].shape)
        shape[3] *= devices
        return tuple(
            jax.make_array_from_single_device_arrays(tuple(shape), self._sharding, landed[i : i + devices])
            for i in range(0, len(landed), devices)
        )


def routes(roles: Sequence[Role], between: Collection[tuple[Role, Role]] | None) -> list[tuple[int, int]]:
    """(source, destination) pairs between which pages may move, as indices into `roles`: instances of these pairs of
    roles, or any two if None."""
    return [
        (i, j)
        for i, source in enumerate(roles)
        for j, destination in enumerate(roles)
        if i != j and (between is None or (source, destination) in between)
    ]


def _whole_piece(model: Model, shapes: Shapes, cut: Cut, bucket: int) -> tuple[int, ...]:
    arch: Any = model.arch
    return (2, arch.num_layers, bucket, cut.heads * cut.destination, shapes.page_size, arch.head_dim)
