"""KV pages in pinned host memory: what a sequence that is swapped out leaves behind on its instance.

Host memory is kept page by page, one array each, cut over the instance's devices as the pool is. So it is exactly as
large as it says, any page can be written again on its own, and a page is read into whatever page of a pool is free.
One program reads pages out of a pool and one puts them in, a few sizes each. Between the two the arrays move by DMA,
started on a reader's thread, since every array costs the thread that starts it some microseconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from ds_jax.runtime.compilation import compile_ahead
from ds_jax.runtime.pool import Pool, abstract_pool
from ds_jax.runtime.programs import EVERYWHERE, Model, Program
from ds_jax.runtime.shapes import Shapes
from models.sharding import POOL_AXES, TENSOR, spec_of

PAGE = PartitionSpec(None, None, TENSOR)
"""A page is [2, L, K, N, D]: keys then values, layers, heads, offsets, head size."""
PINNED, DEVICE = "pinned_host", "device"


class HostMemory:
    """The host pages of one instance, numbered from 0. Which of them are in use only the scheduler knows.

    Args:
        model: whose mesh the pages are cut for.
        pages: how many there are.
    """

    def __init__(self, model: Model, pages: int):
        self.pages = pages
        self._pinned = NamedSharding(model.mesh, PAGE, memory_kind=PINNED)
        self._device = NamedSharding(model.mesh, PAGE, memory_kind=DEVICE)
        self._kept: dict[int, jax.Array] = {}

    def check(self, numbers: Iterable[int]) -> None:
        """Raises: ValueError, if there is no such page."""
        for number in numbers:
            if not 0 <= number < self.pages:
                raise ValueError(f"host page {number} does not exist: cache.host_pages = {self.pages}")

    def down(self, pages: Sequence[jax.Array]) -> list[jax.Array]:
        """Start pages of this or an equally cut instance on their way to this host memory."""
        return jax.device_put(list(pages), self._pinned)

    def up(self, pages: Sequence[jax.Array]) -> list[jax.Array]:
        """Start pages from host memory on their way to this instance's devices."""
        return jax.device_put(list(pages), self._device)

    def keep(self, numbers: Sequence[int], pages: Sequence[jax.Array]) -> None:
        """Pages that have come down lie in these places now, instead of what lay there."""
        self._kept.update(zip(numbers, pages, strict=True))

    def at(self, numbers: Iterable[int]) -> list[jax.Array]:
        """What lies in these places.

        Raises:
            ValueError: nothing was ever put there.
        """
        numbers = list(numbers)
        for number in numbers:
            if number not in self._kept:
                raise ValueError(f"host page {number} was never written")
        return [self._kept[number] for number in numbers]

    def clear(self) -> None:
        """Let go of all pages."""
        self._kept.clear()


def read_pages(model: Model, shapes: Shapes, bucket: int) -> Program:
    """(pool, pages [n]) -> n pages, a tuple; the pool stays."""

    def read(pool: Pool, pages: jax.Array) -> tuple[jax.Array, ...]:
        both = jnp.stack([jnp.stack([layer[pages] for layer in pool[part]]) for part in ("k", "v")])
        return tuple(both[:, :, i] for i in range(bucket))

    pool = abstract_pool(model.arch, model.dtype, shapes, model.mesh)
    program = model.on_mesh(read, (spec_of(POOL_AXES), EVERYWHERE), (PAGE,) * bucket)
    out = (NamedSharding(model.mesh, PAGE),) * bucket
    return compile_ahead(program, (pool, model.host_array(bucket)), out_shardings=out)


def write_pages(model: Model, shapes: Shapes, bucket: int) -> Program:
    """(pool, numbers [n], n pages) -> pool; the pool is donated. Numbers out of range are padding."""

    def write(pool: Pool, numbers: jax.Array, pages: tuple[jax.Array, ...]) -> Pool:
        both = jnp.stack(pages, axis=2)
        return {
            part: tuple(layer.at[numbers].set(both[i, j], mode="drop") for j, layer in enumerate(pool[part]))
            for i, part in enumerate(("k", "v"))
        }

    pool, pool_spec = abstract_pool(model.arch, model.dtype, shapes, model.mesh), spec_of(POOL_AXES)
    layer = pool["k"][0]
    page = jax.ShapeDtypeStruct(
        (2, model.arch.num_layers, *layer.shape[1:]), model.dtype, sharding=NamedSharding(model.mesh, PAGE)
    )
    program = model.on_mesh(write, (pool_spec, EVERYWHERE, (PAGE,) * bucket), pool_spec)
    return compile_ahead(program, (pool, model.host_array(bucket), (page,) * bucket), donate=(0,))
