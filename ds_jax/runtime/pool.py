"""The paged KV pool of an instance: how large it is, and how long a sequence can therefore be."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh

from ds_jax.architecture import DTYPE_BYTES, Architecture
from ds_jax.config import Config, DecodeConfig, GroupConfig, MixedConfig, PrefillConfig
from ds_jax.protocol import pages_for
from ds_jax.runtime.mesh import Site
from ds_jax.runtime.shapes import Shapes, slot_buckets, step_tokens, token_buckets
from models.sharding import POOL_AXES, TENSOR, sharding_of
from models.transformer import Params

Pool = dict[str, tuple[jax.Array, ...]]
"""{"k": one array per layer, "v": likewise}, each [P, K, N, D], cut along the heads."""

SMALLEST_REQUEST_TOKENS = 1 + 16
"""A pool that cannot hold one prompt token and sixteen of output serves nobody."""
PREFILL_BATCHES = 4
"""Largest steps whose KV a prefill pool holds: one runs, one is queued, two wait to be pulled."""
HOST_SHARE = 0.5
"""Of the host's free memory, what all CPU instances together may take (times memory_fraction)."""


@dataclass(frozen=True)
class Plan:
    """Sizes that fit together, for every instance."""

    shapes: tuple[Shapes, ...]
    """In the order of the sites."""
    max_model_len: int
    limit_reason: str
    """What bounds max_model_len: "model" or "pool"."""


def plan(config: Config, arch: Architecture, dtype: str, sites: Sequence[Site], params: Sequence[Params]) -> Plan:
    """Choose pool sizes and the longest sequence.

    Args:
        config: `cache`, `model.max_model_len` and the groups are read.
        arch: the model.
        dtype: of weights and KV.
        sites: where the instances will live.
        params: their abstract parameters, in the same order.

    Raises:
        ValueError: the model is shorter than model.max_model_len, or a pool cannot hold it, or not even one short
            request.
    """
    asked, size = config.model.max_model_len, config.cache.page_size
    if asked > arch.max_positions:
        raise ValueError(
            f"model.max_model_len = {asked} must be at most {arch.max_positions}, the positions that the model has"
        )
    length = asked or arch.max_positions
    pools = [
        config.cache.num_pages or _pages(config, arch, dtype, site, abstract, length)
        for site, abstract in zip(sites, params, strict=True)
    ]
    tokens = min(pools) * size
    role = sites[pools.index(min(pools))].role
    holds = f"the {role} pool of {min(pools)} pages of {size} tokens holds {tokens} tokens"
    change = "raise cache.num_pages" if config.cache.num_pages else "raise cache.memory_fraction or tp"
    if tokens < min(SMALLEST_REQUEST_TOKENS, length):
        raise ValueError(f"{holds}, too few for one prompt token and 16 of output: {change}")
    if tokens < asked:
        raise ValueError(f"{holds}, fewer than model.max_model_len = {asked}: {change}, or lower model.max_model_len")
    length = min(length, tokens)
    reason = "model" if length == arch.max_positions or asked else "pool"
    shapes = tuple(
        _shapes(config, site.group, min(pages, useful_pages(site.group, length, size)), length)
        if not config.cache.num_pages
        else _shapes(config, site.group, pages, length)
        for site, pages in zip(sites, pools, strict=True)
    )
    return Plan(shapes, length, reason)


def useful_pages(group: GroupConfig, max_model_len: int, page_size: int) -> int:
    """Pages beyond which a pool of this group gains nothing: all slots (and some batches of prompts) at full length."""
    longest = pages_for(max_model_len, page_size)
    pages = longest  # one more sequence, on its way in or replayed
    if isinstance(group, DecodeConfig | MixedConfig):
        pages += group.slots * longest
    if isinstance(group, PrefillConfig):
        step = step_tokens(group, token_buckets(group, max_model_len))
        pages += PREFILL_BATCHES * (pages_for(step, page_size) + group.max_step_sequences)
    return pages


def page_bytes(arch: Architecture, dtype: str, tp: int, page_size: int) -> int:
    """Bytes that one page takes on each device: K and V of all layers, of the device's heads."""
    heads = arch.stored_kv_heads(tp) // tp
    return 2 * arch.num_layers * heads * page_size * arch.head_dim * DTYPE_BYTES[dtype]


def abstract_pool(arch: Architecture, dtype: Any, shapes: Shapes, mesh: Mesh) -> Any:
    """Shape, type and sharding of every array of a pool."""
    heads = arch.stored_kv_heads(mesh.shape[TENSOR])
    shape = (shapes.pages, heads, shapes.page_size, arch.head_dim)
    layer = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding_of(POOL_AXES, mesh))
    return {"k": (layer,) * arch.num_layers, "v": (layer,) * arch.num_layers}


def _shapes(config: Config, group: GroupConfig, pages: int, max_model_len: int) -> Shapes:
    slots, rows = _rows(group)
    return Shapes(
        pages=pages,
        page_size=config.cache.page_size,
        max_model_len=max_model_len,
        slots=slots,
        slot_buckets=slot_buckets(group),
        rows=rows,
        token_buckets=token_buckets(group, max_model_len),
        mixes=config.mixes and bool(slots and rows),
        # Prompts wait for a place; what is preempted was decoding.
        host_pages=config.cache.host_pages if config.swaps and slots else 0,
    )


def _rows(group: GroupConfig) -> tuple[int, int]:
    """Sequences of a decode step, and of a prefill step."""
    return (
        group.slots if isinstance(group, DecodeConfig | MixedConfig) else 0,
        group.max_step_sequences if isinstance(group, PrefillConfig) else 0,
    )


def _pages(config: Config, arch: Architecture, dtype: str, site: Site, params: Params, length: int) -> int:
    """Pages that fit into the devices' memory beside weights and marks (`runtime.marks`), and can be used."""
    size, tp = config.cache.page_size, site.mesh.shape[TENSOR]
    device = site.mesh.devices.flat[0]
    weights = sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(params)
    )
    marks = 8 * arch.vocab_size * sum(_rows(site.group))
    limit = memory_bytes(device, config.devices(), config.cache.memory_fraction)
    pages = (limit - weights - marks) // page_bytes(arch, dtype, tp, size)
    if pages < 1:
        raise ValueError(
            f"cache.memory_fraction = {config.cache.memory_fraction} gives each {site.role} device "
            f"{max(limit, 0) / 2**20:.0f} MiB, too little for {weights / 2**20:.0f} MiB of weights and any KV: "
            f"raise it, or {site.role}.tp"
        )
    return min(pages, useful_pages(site.group, length, size))


def memory_bytes(device: jax.Device, devices: int, fraction: float) -> int:
    """Bytes of a device that weights and KV may still take.

    Where the platform keeps no account of a device's memory (CPU), the host's free memory counts: HOST_SHARE of it,
    shared out among the devices.
    """
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return int(stats["bytes_limit"] * fraction) - stats.get("bytes_in_use", 0)
    return int(_free_host_bytes() * HOST_SHARE * fraction / max(devices, 1))


def _free_host_bytes() -> int:
    try:
        with open("/proc/meminfo") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux: all of the memory stands for what is free
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
