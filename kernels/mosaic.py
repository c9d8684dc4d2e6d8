"""What the kernels for Hopper share."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.backends import platform

SHARED_MEMORY_BYTES = 227 * 1024
"""What one multiprocessor of an H100 or H200 gives to the blocks of threads that run on it."""

HOPPER = jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", platform="gpu", num_cores=132)
"""Stands for the chip where there is none, so that a kernel can be lowered or interpreted."""


CORES = {"H20": 78, "H100 PCIe": 114}
"""Multiprocessors of chips that have fewer than the 132 of an H100 or H200 SXM."""
HEAD_DIMS = (64, 80, 96, 128, 256)
PAGE_SIZES = (16, 32, 64, 128)


def hopper_only() -> str | None:
    """Why kernels for Hopper do not run on this platform; None if they do."""
    name, kind = platform()
    if name != "gpu" or not any(chip in kind for chip in ("H100", "H200", "H800", "H20", "GH200")):
        return f"it is for NVIDIA Hopper, and this is {kind}"
    return None


def cores_of(device_kind: str) -> int:
    """Multiprocessors of a chip."""
    return next((cores for name, cores in CORES.items() if device_kind.endswith(name)), 132)


def cannot_read(q: jax.Array, pages: jax.Array, scales: jax.Array | None) -> str | None:
    """Why these kernels cannot attend with such queries to such pages; None if they can."""
    *_, size, head_dim = pages.shape
    if scales is not None or q.dtype != pages.dtype or q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"queries are {q.dtype} and pages {pages.dtype}, but both must be bfloat16 or both float16"
    if head_dim not in HEAD_DIMS:
        return f"the head size {head_dim} is none of {', '.join(map(str, HEAD_DIMS))}"
    if size not in PAGE_SIZES:
        return f"the page size {size} is none of {', '.join(map(str, PAGE_SIZES))}"
    return None


def swizzled(columns: int, dtype: Any) -> tuple[Any, ...]:
    """How a block with so many columns lies in shared memory: in tiles of eight rows, free of bank conflicts.

    The widest swizzle of which the row is a multiple, as wgmma and TMA want it.
    """
    size = jnp.dtype(dtype).itemsize
    swizzle = next(width for width in (128, 64, 32) if columns * size % width == 0)
    transforms: Any = plgpu  # whose classes are abstract to a type checker
    return transforms.TilingTransform((8, swizzle // size)), transforms.SwizzleTransform(swizzle)


def off_gpu() -> Any:
    """A context in which kernels are lowered for Hopper, or interpreted, on a machine without one."""
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=HOPPER))


def add_product(acc: jax.Array, a: jax.Array, b_ref: Any, through: Any = None) -> jax.Array:
    """acc + a b, with acc and a in registers and b in shared memory.

    The interpreter knows neither accumulators that begin with a value nor operands in registers. There a goes `through`
    a piece of shared memory that is given for it, and the sum is taken afterwards.
    """
    if through is None:
        return pl.run_state(lambda acc_ref: plgpu.wgmma(acc_ref, a, b_ref))(plgpu.ACC.init(acc))
    through[...] = a
    plgpu.commit_smem()

    def product(acc_ref: Any) -> jax.Array:
        plgpu.wgmma(acc_ref, through, b_ref)
        return acc_ref[...]

    return acc + pl.run_scoped(product, plgpu.ACC((acc.shape[0], acc.shape[1]), acc.dtype))
