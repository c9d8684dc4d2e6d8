"""Other people's attention on the loads of ours: each says how long it takes, or why it cannot be asked.

| peer | what it reads | from |
|---|---|---|
| `cudnn` | contiguous keys and values of the same lengths | `jax.nn.dot_product_attention` |
| `triton` | pages, decode | `jax.experimental.pallas.ops.gpu.paged_attention`, deprecated |
| `torch` | contiguous, prefill | `scaled_dot_product_attention` |
| `flashinfer` | pages, decode | `BatchDecodeWithPagedKVCacheWrapper` |
"""

from __future__ import annotations

import functools
import importlib
import time
import warnings
from collections.abc import Callable
from statistics import median
from typing import Any

from experiments.ceilings import chained, device_seconds
from experiments.kernel_cases import Load


class Missing(Exception):
    """Why a peer has no number for a load."""


def cudnn(load: Load, arrays: dict[str, Any], links: int) -> float:
    """Seconds of one call, `links` of them in one program."""
    import jax

    if jax.default_backend() != "gpu":
        raise Missing("cuDNN needs a GPU")
    if len(set(load.chunks)) > 1 or len(set(load.lengths)) > 1:
        raise Missing("lengths differ")
    batch, length = len(load.lengths), load.lengths[0]
    queries = load.chunks[0][1] if load.chunks else 1
    if load.chunks and queries != length:  # cuDNN's causal mask begins at the first key
        raise Missing("a cached prefix: cuDNN's mask is not causal then")
    keys = jax.random.split(jax.random.key(1), 3)
    shapes = ((queries, load.heads), (length, load.kv_heads), (length, load.kv_heads))
    q, k, v = (
        jax.random.normal(key, (batch, *shape, load.head_dim), load.dtype)
        for key, shape in zip(keys, shapes, strict=True)
    )

    def attend(q: Any, k: Any, v: Any) -> Any:
        return jax.nn.dot_product_attention(q, k, v, is_causal=bool(load.chunks), implementation="cudnn")

    chain = chained(attend, links)
    return device_seconds(lambda: chain(q=q, k=k, v=v)) / links


def triton(load: Load, arrays: dict[str, Any], links: int) -> float:
    """Likewise."""
    import jax

    if load.chunks:
        raise Missing("it decodes only")
    if jax.default_backend() != "gpu":
        raise Missing("Triton needs a GPU")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        paged = importlib.import_module("jax.experimental.pallas.ops.gpu.paged_attention")
    pools = {name: arrays[name].transpose(1, 0, 2, 3) for name in ("k_pages", "v_pages")}
    rest = {"block_tables": arrays["page_table"], "lengths": arrays["lengths"]}
    scaled = arrays["q"] * load.head_dim**-0.5
    width = rest["block_tables"].shape[1]
    # Splits and blocks must divide the pages of a sequence; its own defaults are 16 and 8, for pages of 16.
    splits = next(number for number in (16, 8, 4, 2, 1) if width % number == 0)
    pages = next(
        number
        for number in (8, 4, 2, 1)
        if number == 1 or (width // splits % number == 0 and number * load.page_size <= 128)
    )
    attend = functools.partial(paged.paged_attention, k_splits=splits, pages_per_compute_block=pages)
    chain = chained(attend, links)
    return device_seconds(lambda: chain(q=scaled, **pools, **rest)) / links


def torch(load: Load, arrays: dict[str, Any], links: int) -> float:
    """Seconds of one call, ten of them queued."""
    if not load.chunks or len(set(load.chunks)) > 1 or load.chunks[0][0]:
        raise Missing("only prompts of one length without a prefix")
    library = _library("torch")
    batch, length = len(load.chunks), load.chunks[0][1]
    q, k, v = (
        library.randn(batch, heads, length, load.head_dim, device="cuda", dtype=getattr(library, load.dtype))
        for heads in (load.heads, load.kv_heads, load.kv_heads)
    )
    attend = library.nn.functional.scaled_dot_product_attention
    grouped = load.heads != load.kv_heads
    return _torch_seconds(library, lambda: attend(q, k, v, is_causal=True, enable_gqa=grouped))


def flashinfer(load: Load, arrays: dict[str, Any], links: int) -> float:
    """Seconds of one call, ten of them queued; its plan is made before."""
    if load.chunks:
        raise Missing("asked to decode only")
    library, wrappers = _library("torch"), _library("flashinfer")
    kind = getattr(library, load.dtype)
    pages = -(-load.context // load.page_size)
    pool = library.randn(
        load.pages, 2, load.kv_heads, load.page_size, load.head_dim, device="cuda", dtype=kind
    )  # fmt: skip
    q = library.randn(load.batch, load.heads, load.head_dim, device="cuda", dtype=kind)
    workspace = library.empty(128 * 2**20, dtype=library.uint8, device="cuda")
    wrapper = wrappers.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND")
    integers = {"device": "cuda", "dtype": library.int32}
    wrapper.plan(
        library.arange(0, load.pages + 1, pages, **integers),
        library.randperm(load.pages, **integers),
        library.full((load.batch,), load.context - (pages - 1) * load.page_size, **integers),
        load.heads,
        load.kv_heads,
        load.head_dim,
        load.page_size,
        data_type=kind,
        q_data_type=kind,
    )
    return _torch_seconds(library, lambda: wrapper.run(q, pool))


Peer = Callable[[Load, dict[str, Any], int], float]
BESIDE: dict[str, Peer] = {"cudnn": cudnn}
"""Measured beside our own kernel."""
AFTER: dict[str, Peer] = {"triton": triton, "torch": torch, "flashinfer": flashinfer}
"""Measured when our own are done: they take seconds to import, or might leave the device in a state that ends all."""


def ask(peer: Peer, load: Load, arrays: dict[str, Any], links: int = 1) -> tuple[float | None, str | None]:
    """Seconds of a peer, or why there are none."""
    try:
        return peer(load, arrays, links), None
    except Missing as reason:
        return None, str(reason)
    except Exception as error:  # whatever goes wrong inside a peer is no failure of ours
        return None, f"{type(error).__name__}: {error}"[:300]


def _library(name: str) -> Any:
    try:
        library = importlib.import_module(name)
    except ImportError as error:
        raise Missing(f"{name} cannot be imported: {error}"[:200]) from error
    if name == "torch" and not library.cuda.is_available():
        raise Missing("torch sees no GPU")
    return library


def _torch_seconds(library: Any, call: Callable[[], Any], repeats: int = 10) -> float:
    times = []
    for _ in range(6):
        library.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        library.cuda.synchronize()
        times.append((time.perf_counter() - start) / repeats)
    return median(times[1:])
