"""Measure attention kernels on shapes of published models, against what the device can do and against peers.

python -m experiments.bench_kernels --output_dir=out/kernels --models=llama-3-8b

For every load: seconds, GB/s of keys and values (decode) or TFLOP/s (prefill), the ratio to the device's measured read
or matmul rate, the error against the definition on the first sequence, and the seconds of those peers that can be
imported: cuDNN's attention over contiguous keys and values of the same lengths (`jax.nn.dot_product_attention`), and
PyTorch's. OUTPUT_DIR gets summary.json.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import logging
import time
from typing import Any

from absl import flags
from tqdm import tqdm

from ds_jax.flags import run
from experiments.ceilings import Ceilings, device_seconds, measure
from experiments.kernel_cases import MODELS, Load, error, loads
from experiments.output import Output, table

log = logging.getLogger(__name__)

_OUTPUT_DIR = flags.DEFINE_string("output_dir", None, "Folder for the results.", required=True)
_MODELS = flags.DEFINE_multi_enum("models", ["llama-3-8b", "opt-13b"], list(MODELS), "Whose shapes.")
_BACKENDS = flags.DEFINE_multi_enum("backends", ["auto"], ["auto", "mosaic", "xla"], "Forms to measure.")
_DTYPE = flags.DEFINE_enum("dtype", "auto", ["auto", "bfloat16", "float16", "float32"], "Of queries and pages.")
_PAGE_SIZE = flags.DEFINE_integer("page_size", 64, "Tokens of a page.", 1)
_MOST_GIB = flags.DEFINE_float("most_gib", 0.0, "Largest pool; 0: 8 on a GPU, 1/8 on a CPU.", 0.0)
_TIME_LIMIT_S = flags.DEFINE_float("time_limit_s", 300.0, "When it is over, loads that are left are left out.", 1.0)


def attention(load: Load, backend: str) -> Any:
    """The compiled kernel of a load: arrays by name -> output."""
    import jax

    from kernels import paged_decode_attention, paged_prefill_attention

    package: Any = paged_prefill_attention if load.chunks else paged_decode_attention
    return jax.jit(functools.partial(package.attend, scale=load.head_dim**-0.5, backend=backend))


def cudnn(load: Load) -> float | None:
    """Seconds of cuDNN's attention over contiguous keys and values; None where there is none, or lengths differ."""
    import jax
    import jax.numpy as jnp

    if jax.default_backend() != "gpu" or len(set(load.chunks)) > 1:
        return None
    batch, length = len(load.lengths), load.lengths[0]
    queries = load.chunks[0][1] if load.chunks else 1
    keys = jax.random.split(jax.random.key(1), 3)
    shapes = ((batch, queries, load.heads), (batch, length, load.kv_heads), (batch, length, load.kv_heads))
    q, k, v = (
        jax.random.normal(key, (*shape, load.head_dim), load.dtype) for key, shape in zip(keys, shapes, strict=True)
    )
    options: dict[str, Any] = {"implementation": "cudnn"}
    if load.chunks and queries == length:
        options["is_causal"] = True
    elif load.chunks:  # cuDNN's causal mask begins at the first key: the prefix needs lengths, and is then not causal
        return None
    function = jax.jit(functools.partial(jax.nn.dot_product_attention, **options))
    try:
        return device_seconds(function, q, k, v)
    except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError, RuntimeError) as reason:
        log.warning("cuDNN cannot do %s: %s", load.name, str(reason)[:200])
        return None
    finally:
        for array in (q, k, v):
            jnp.asarray(array).delete()


def torch_sdpa(load: Load) -> float | None:
    """Seconds of PyTorch's attention over contiguous keys and values; None where it cannot be measured."""
    if not load.chunks or len(set(load.chunks)) > 1 or load.chunks[0][0]:
        return None
    try:
        torch = importlib.import_module("torch")
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None
    batch, length = len(load.chunks), load.chunks[0][1]
    kind = getattr(torch, load.dtype)
    q, k, v = (
        torch.randn(batch, heads, length, load.head_dim, device="cuda", dtype=kind)
        for heads in (load.heads, load.kv_heads, load.kv_heads)
    )
    attend = torch.nn.functional.scaled_dot_product_attention
    times = []
    for _ in range(6):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(10):
            attend(q, k, v, is_causal=True, enable_gqa=load.heads != load.kv_heads)
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / 10)
    return sorted(times[1:])[2]


def bench(load: Load, backend: str, ceilings: Ceilings) -> dict[str, Any]:
    """One row of the results."""
    arrays = load.arrays()
    function = attention(load, backend)

    def call(arrays: dict[str, Any]) -> Any:
        return function(**arrays)

    took = device_seconds(call, arrays, repeats=3 if ceilings.device == "cpu" else 20)
    bound_s = max(load.kv_bytes / ceilings.read_bytes_per_s, load.flops / ceilings.matmul_flops_per_s)
    row = {
        **dataclasses.asdict(load),
        "name": load.name,
        "backend": backend,
        "seconds": took,
        "gb_per_s": load.kv_bytes / took / 1e9,
        "tflop_per_s": load.flops / took / 1e12,
        "of_bound": bound_s / took,
        "error": error(load, arrays, call(arrays)),
    }
    del arrays
    peers = {"cudnn": cudnn(load), "torch": torch_sdpa(load)}
    return row | {"peers_s": peers, "of_cudnn": peers["cudnn"] and peers["cudnn"] / took}


def main(argv: list[str]) -> None:
    """Measure every load, print and write the results."""
    import jax

    output = Output(_OUTPUT_DIR.value)
    on_gpu = jax.default_backend() == "gpu"
    dtype = _DTYPE.value if _DTYPE.value != "auto" else "bfloat16" if on_gpu else "float32"
    ceilings = measure(dtype)
    most = (_MOST_GIB.value or (8 if on_gpu else 1 / 8)) * 2**30
    every = list(loads(_MODELS.value, dtype, _PAGE_SIZE.value, int(most), 1e14 if on_gpu else 1e11))
    begin, rows = time.perf_counter(), []
    work = [(load, backend) for load in every for backend in _BACKENDS.value]
    for load, backend in tqdm(work, desc="loads"):
        if time.perf_counter() - begin > _TIME_LIMIT_S.value:
            break
        rows.append(bench(load, backend, ceilings))
        output.summary({"device": dataclasses.asdict(ceilings), "left_out": len(work) - len(rows), "cases": rows})
    header = ("load", "form", "µs", "GB/s", "TFLOP/s", "of bound", "of cuDNN", "error")
    shown = ("name", "backend", "us", "gb_per_s", "tflop_per_s", "of_bound", "of_cudnn", "error")
    print(table(header, [[(row | {"us": row["seconds"] * 1e6})[name] for name in shown] for row in rows]))
    rates = f"{ceilings.read_bytes_per_s / 1e9:.4g} GB/s read, {ceilings.matmul_flops_per_s / 1e12:.4g} TFLOP/s"
    print(f"{ceilings.device}: {rates}; {len(work) - len(rows)} of {len(work)} left out; written to {output.folder}")


if __name__ == "__main__":
    run(main)
