"""What the device at hand can do at best, measured: a large copy and a large matrix product."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any


@dataclass(frozen=True)
class Ceilings:
    """Rates that nothing exceeds for long."""

    device: str
    copy_bytes_per_s: float
    """Bytes read plus bytes written."""
    read_bytes_per_s: float
    """Bytes read by a sum; the copy's rate where that is higher."""
    matmul_flops_per_s: float
    dtype: str


def device_seconds(step: Callable[..., Any], *arguments: Any, repeats: int = 20, least_s: float = 0.02) -> float:
    """Seconds of one call on the device, launch gaps left out: calls are queued and waited for at once.

    Args:
        step: what to call; it has been compiled when this returns.
        arguments: of every call.
        repeats: most calls that are queued together.
        least_s: fewer are queued if they take this long.
    """
    import jax

    jax.block_until_ready(step(*arguments))
    start = time.perf_counter()
    jax.block_until_ready(step(*arguments))
    repeats = max(1, min(repeats, round(least_s / (time.perf_counter() - start))))
    times = []
    for _ in range(5):
        start = time.perf_counter()
        results = [step(*arguments) for _ in range(repeats)]
        jax.block_until_ready(results)
        times.append((time.perf_counter() - start) / repeats)
    return median(times)


def chained(attend: Callable[..., Any], links: int) -> Callable[..., Any]:
    """One program of `links` calls of `attend`, the output of each the queries of the next: as the layers of a model,
    which share what depends on lengths and page tables alone. Takes `attend`'s arguments by name, `q` among them, and
    returns the outputs of the first and of the last call."""
    import jax

    def chain(q: Any, **rest: Any) -> tuple[Any, Any]:
        first = out = attend(q=q, **rest)
        for _ in range(links - 1):
            out = attend(q=out, **rest)
        return first, out

    return jax.jit(chain)


def measure(dtype: str = "auto") -> Ceilings:
    """Measure both on the first device: about a second."""
    import jax
    import jax.numpy as jnp

    device = jax.devices()[0]
    on_cpu = device.platform == "cpu"
    dtype = ("float32" if on_cpu else "bfloat16") if dtype == "auto" else dtype
    # Random numbers: products of zeros take less power, hence less time.
    large = jax.random.normal(jax.random.key(0), (2**24 if on_cpu else 2**30,), jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    copied = device_seconds(copy, large, repeats=2 if on_cpu else 4)
    rate = 2 * large.nbytes / copied
    read = large.nbytes / device_seconds(jax.jit(jnp.sum), large, repeats=2 if on_cpu else 4)
    del large
    size = 2048 if on_cpu else 8192
    a, b = jax.random.normal(jax.random.key(1), (2, size, size), jnp.float32).astype(dtype)
    product = jax.jit(lambda a, b: jnp.dot(a, b, precision="highest" if dtype == "float32" else None))
    multiplied = device_seconds(product, a, b, repeats=2 if on_cpu else 10)
    return Ceilings(device.device_kind, rate, max(rate, read), 2 * size**3 / multiplied, dtype)
