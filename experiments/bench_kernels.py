"""Measure attention kernels on shapes of published models, against what the device can do and against peers.

python -m experiments.bench_kernels --output_dir=out/kernels --models=llama-3-8b

For every load: seconds, GB/s of keys and values (decode) or TFLOP/s (prefill), the ratio to the device's measured read
or matmul rate, the error against the definition on the first sequence, and the seconds of those peers that can be
imported (experiments/kernel_peers.py). Calls are chained as the layers of a model are: what depends on lengths alone is
computed once per chain, and timed beside it as plan_seconds. OUTPUT_DIR gets summary.json, written after every load; a
load whose kernel fails is told of there, and the others go on.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import time
from typing import Any

from absl import flags
from tqdm import tqdm

from ds_jax.flags import run
from experiments.ceilings import Ceilings, chained, device_seconds, measure
from experiments.kernel_cases import MODELS, Load, error, loads
from experiments.kernel_peers import AFTER, BESIDE, ask
from experiments.output import Output, table

log = logging.getLogger(__name__)

_OUTPUT_DIR = flags.DEFINE_string("output_dir", None, "Folder for the results.", required=True)
_MODELS = flags.DEFINE_multi_enum("models", ["llama-3-8b", "opt-13b"], list(MODELS), "Whose shapes.")
_OPERATIONS = flags.DEFINE_multi_enum("operations", ["decode", "prefill"], ["decode", "prefill"], "What is measured.")
_BACKENDS = flags.DEFINE_multi_enum("backends", ["auto"], ["auto", "mosaic", "xla"], "Forms to measure.")
_DTYPE = flags.DEFINE_enum("dtype", "auto", ["auto", "bfloat16", "float16", "float32"], "Of queries and pages.")
_PAGE_SIZE = flags.DEFINE_integer("page_size", 64, "Tokens of a page.", 1)
_MOST_GIB = flags.DEFINE_float(
    "most_gib", 0.0, "Largest keys and values of a load; 0: a sixth of a GPU's memory, 1/8 GiB on a CPU.", 0.0
)
_MOST_LOADS = flags.DEFINE_integer("most_loads", 0, "How many loads to measure; 0: all.", 0)
_TIME_LIMIT_S = flags.DEFINE_float("time_limit_s", 300.0, "When it is over, loads that are left are left out.", 1.0)

SHARE = 6
"""A load may take this part of the memory: peers hold copies of its keys and values in their own form."""
LINKS = {"decode": 16, "prefill": 2}
"""Calls of a chain on a GPU."""
OWN_SHARE = 0.7
"""Of the time for our own kernels; the peers that come after them have the rest."""
CPU_MOST_BYTES = 2**27
CPU_MOST_FLOPS = 1e11


def most_bytes() -> float:
    """Keys and values of the largest load that this device is given."""
    import jax

    if _MOST_GIB.value:
        return float(_MOST_GIB.value * 2**30)
    if jax.default_backend() == "cpu":
        return float(CPU_MOST_BYTES)
    stats = jax.devices()[0].memory_stats() or {}
    return float(stats.get("bytes_limit", 48 * 2**30)) / SHARE


def plan_seconds(load: Load, arrays: dict[str, Any]) -> float:
    """Seconds of what the Mosaic kernel's form computes from the lengths, once for all layers of a step."""
    import jax

    from kernels.backends import platform
    from kernels.mosaic import cores_of
    from kernels.tuning import chosen

    kind = platform()[1]
    sizes = load.head_dim, load.page_size
    names: tuple[str, ...]
    if load.chunks:
        from kernels.paged_prefill_attention import mosaic as prefill
        from kernels.paged_prefill_attention.tiles import aligned, tiles_of

        block, _ = prefill.Tuning(**chosen("prefill", kind, *sizes)).of(load.head_dim)
        rows, tokens = prefill.CONSUMERS * prefill.ROWS, len(arrays["q"])

        def plan(starts: Any, lengths: Any, contexts: Any) -> Any:
            spread = aligned(starts, lengths, tokens, prefill.ALIGNMENT)
            places = len(spread.source)
            return spread, tiles_of(
                spread.starts, lengths, contexts, places, rows, prefill.ALIGNMENT, block, None
            )  # fmt: skip

        names = ("starts", "lengths", "contexts")
    else:
        from kernels.paged_decode_attention import mosaic as decode
        from kernels.paged_decode_attention import schedule

        tuning = decode.Tuning(cores=cores_of(kind), **chosen("decode", kind, *sizes))
        workers = tuning.cores * tuning.workers_per_core
        plan = functools.partial(
            schedule.plan, kv_heads=load.kv_heads, block=decode.BLOCK, workers=workers, window=None
        )
        names = ("lengths",)
    return device_seconds(jax.jit(plan), *(arrays[name] for name in names))


def bench(load: Load, backend: str, ceilings: Ceilings) -> dict[str, Any]:
    """One row of the results."""
    from kernels import paged_decode_attention, paged_prefill_attention
    from kernels.mosaic import cannot_read, hopper_only

    on_cpu = ceilings.device == "cpu"
    links = 2 if on_cpu else LINKS[load.operation]
    package: Any = paged_prefill_attention if load.chunks else paged_decode_attention
    arrays = load.arrays()
    chain = chained(functools.partial(package.attend, scale=load.head_dim**-0.5, backend=backend), links)
    first, _ = chain(**arrays)
    row = {**dataclasses.asdict(load), "name": load.name, "operation": load.operation, "backend": backend}
    mosaic = backend != "xla" and not (hopper_only() or cannot_read(arrays["q"], arrays["k_pages"], None))
    row["form"] = "mosaic" if mosaic else "xla"
    row["error"] = error(load, arrays, first)
    took = device_seconds(lambda: chain(**arrays), repeats=3 if on_cpu else 20) / links
    bound_s = max(load.kv_bytes / ceilings.read_bytes_per_s, load.flops / ceilings.matmul_flops_per_s)
    row |= {
        "seconds": took,
        "gb_per_s": load.kv_bytes / took / 1e9,
        "tflop_per_s": load.flops / took / 1e12,
        "of_bound": bound_s / took,
        "of_copy": load.kv_bytes / took / ceilings.copy_bytes_per_s,
        "links": links,
        "plan_seconds": plan_seconds(load, arrays) if mosaic else None,
        "peers_s": {},
        "peers_missing": {},
    }
    for name in BESIDE:
        ask_into(row, name, load, arrays, links)
    return row


def ask_into(row: dict[str, Any], name: str, load: Load, arrays: dict[str, Any], links: int = 1) -> None:
    """Put into a row what a peer takes, how we compare (above 1: we are faster), or why there is no such number."""
    seconds, missing = ask((BESIDE | AFTER)[name], load, arrays, links)
    row["peers_s"][name] = seconds
    row[f"of_{name}"] = seconds and seconds / row["seconds"]
    if missing:
        row["peers_missing"][name] = missing


def main(argv: list[str]) -> None:
    """Measure every load, print and write the results."""
    begin = time.perf_counter()

    import jax

    output = Output(_OUTPUT_DIR.value)
    on_gpu = jax.default_backend() == "gpu"
    dtype = _DTYPE.value if _DTYPE.value != "auto" else "bfloat16" if on_gpu else "float32"
    ceilings = measure(dtype)
    every = loads(_MODELS.value, dtype, _PAGE_SIZE.value, _OPERATIONS.value)
    bytes_, flops = most_bytes(), float("inf") if on_gpu else CPU_MOST_FLOPS
    fitting = [load for load in every if load.kv_bytes <= bytes_ and load.flops <= flops]
    work = [(load, backend) for load in fitting[: _MOST_LOADS.value or None] for backend in _BACKENDS.value]
    rows: list[dict[str, Any]] = []
    summary = {
        "device": dataclasses.asdict(ceilings),
        "time_limit_s": _TIME_LIMIT_S.value,
        "too_large": [load.name for load in every if load not in fitting],
        "cases": rows,
    }

    def write() -> None:
        output.summary(summary | {"left_out": len(every) * len(_BACKENDS.value) - len(rows)})

    write()
    for load, backend in tqdm(work, desc="loads"):
        if time.perf_counter() - begin > OWN_SHARE * _TIME_LIMIT_S.value:
            break
        try:
            rows.append(bench(load, backend, ceilings))
        except Exception as reason:  # of whatever a compiler for a device raises the next load may be free
            log.exception("%s as %s", load.name, backend)
            failed = f"{type(reason).__name__}: {reason}"[:500]
            rows.append({"name": load.name, "operation": load.operation, "backend": backend, "failed": failed})
        write()
    named = {load.name: load for load, _ in work}
    for row in [row for row in rows if "failed" not in row and on_gpu]:
        load = named[row["name"]]
        arrays = load.arrays()
        for name in AFTER:
            if time.perf_counter() - begin < _TIME_LIMIT_S.value:
                ask_into(row, name, load, arrays, LINKS[load.operation])
                write()
    columns = {
        "load": "name",
        "form": "form",
        "µs": "us",
        "plan µs": "plan_us",
        "GB/s": "gb_per_s",
        "TFLOP/s": "tflop_per_s",
        "of bound": "of_bound",
        **{name: f"of_{name}" for name in ("cudnn", "triton", "torch")},
        "error": "error",
    }
    scaled = {"us": "seconds", "plan_us": "plan_seconds"}
    lines = [row | {new: row.get(old) and row[old] * 1e6 for new, old in scaled.items()} for row in rows]
    print(table(list(columns), [[line.get(name) for name in columns.values()] for line in lines]))
    rates = f"{ceilings.read_bytes_per_s / 1e9:.4g} GB/s read, {ceilings.matmul_flops_per_s / 1e12:.4g} TFLOP/s"
    left = f"{len(every) * len(_BACKENDS.value) - len(rows)} left out, {len(every) - len(fitting)} of them too large"
    print(f"{ceilings.device}: {rates}; {left}; written to {output.folder}")


if __name__ == "__main__":
    run(main)
