"""Try the kernels' choices on the device at hand, and keep the best.

python -m experiments.tune_kernels --output_dir=out/tuning

For every head and page size, each choice of stages, workers and blocks that compiles is timed on a load that fills the
chip, checked against the definition, and the fastest right one is kept. OUTPUT_DIR gets summary.json with all timings
and DEVICE.json, both after every choice; copied to kernels/tuned/ (or with --install) it is what the kernels take from
then on.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import itertools
import json
import logging
import time
from collections.abc import Sequence
from typing import Any

from absl import flags
from tqdm import tqdm

from ds_jax.flags import run
from experiments.ceilings import chained, device_seconds
from experiments.kernel_cases import Load, error
from experiments.output import Output, table

log = logging.getLogger(__name__)

_OUTPUT_DIR = flags.DEFINE_string("output_dir", None, "Folder for the results.", required=True)
_HEAD_DIMS = flags.DEFINE_multi_integer("head_dims", [128, 64, 256, 80, 96], "Head sizes, most important first.")
_PAGE_SIZES = flags.DEFINE_multi_integer("page_sizes", [64, 16], "Page sizes, most important first.")
_TIME_LIMIT_S = flags.DEFINE_float("time_limit_s", 240.0, "When it is over, what is left is not tried.", 1.0)
_INSTALL = flags.DEFINE_bool("install", False, "Write the file into kernels/tuned/.")

CHOICES: dict[str, dict[str, tuple[int, ...]]] = {
    "decode": {"stages": (2, 4, 3, 6), "workers_per_core": (2, 1, 3)},
    "prefill": {"block": (128, 64), "stages": (2, 3, 4)},
}
"""What is tried, likely ones first."""
LINKS = 4
"""Calls of a chain."""
WRONG = 2e-2
"""A larger relative error in bfloat16 is no rounding."""


def load_of(operation: str, head_dim: int, page_size: int) -> Load:
    """A load like those that matter: eight KV heads, grouped by four."""
    shape = ("tuning", 32, 8, head_dim, page_size, "bfloat16")
    return Load(*shape, batch=32, context=4096) if operation == "decode" else Load(*shape, chunks=((0, 4096),) * 2)


def work(head_dims: Sequence[int], page_sizes: Sequence[int]) -> list[tuple[str, int, int, dict[str, int]]]:
    """All (operation, head size, page size, choice): sizes in their order, and of each the operations by turns, so that
    a run which ends early has tried some choices of both."""
    found: list[tuple[str, int, int, dict[str, int]]] = []
    for head_dim, page_size in itertools.product(head_dims, page_sizes):
        of_each = []
        for operation, fields in CHOICES.items():
            every = [dict(zip(fields, values, strict=True)) for values in itertools.product(*fields.values())]
            of_each.append([(operation, head_dim, page_size, choice) for choice in every])
        turns = itertools.zip_longest(*of_each)
        found += [one for turn in turns for one in turn if one is not None]
    return found


def best_of(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, dict[str, int]]]:
    """The fastest right choice of each operation by head size / page size."""
    best: dict[str, dict[str, dict[str, int]]] = {operation: {} for operation in CHOICES}
    for row in sorted((row for row in rows if row.get("error", 1.0) < WRONG), key=lambda row: -row["seconds"]):
        fields = {name: row[name] for name in CHOICES[row["operation"]]}
        best[row["operation"]][f"{row['head_dim']}/{row['page_size']}"] = fields
    return best


def main(argv: list[str]) -> None:
    """Time every choice, keep the best."""
    begin = time.perf_counter()

    import jax

    from kernels import tuning
    from kernels.mosaic import cores_of, hopper_only
    from kernels.paged_decode_attention import mosaic as decode
    from kernels.paged_prefill_attention import mosaic as prefill

    if reason := hopper_only():
        raise ValueError(f"there is nothing to tune here: {reason}")
    output = Output(_OUTPUT_DIR.value)
    modules: dict[str, Any] = {"decode": decode, "prefill": prefill}
    kind = jax.devices()[0].device_kind
    every, rows, found = work(_HEAD_DIMS.value, _PAGE_SIZES.value), list[dict[str, Any]](), dict[str, Any]()
    inputs: dict[tuple[str, int, int], tuple[Load, dict[str, Any]]] = {}
    for operation, head_dim, page_size, fields in tqdm(every, desc="choices"):
        if time.perf_counter() - begin > _TIME_LIMIT_S.value:
            break
        sizes = operation, head_dim, page_size
        if sizes not in inputs:
            inputs = {known: value for known, value in inputs.items() if known[1:] == sizes[1:]}  # free what is done
            load = load_of(*sizes)
            inputs[sizes] = load, load.arrays()
        load, arrays = inputs[sizes]
        choice = modules[operation].Tuning(**fields)
        if operation == "decode":
            choice = dataclasses.replace(choice, cores=cores_of(kind))
        form = functools.partial(modules[operation].attend, scale=head_dim**-0.5, tuning=choice)
        chain = chained(form, LINKS)
        row: dict[str, Any] = {"operation": operation, "head_dim": head_dim, "page_size": page_size, **fields}
        try:
            first, _ = chain(**arrays)
            row["seconds"] = device_seconds(lambda chain=chain, arrays=arrays: chain(**arrays)) / LINKS
            row["error"] = error(load, arrays, first)
        except Exception as reason:  # too much shared memory, and whatever else a compiler refuses
            row["refused"] = f"{type(reason).__name__}: {reason}"[:300]
        rows.append(row)
        best = best_of(rows)
        found = {"device": kind, "date": datetime.date.today().isoformat(), "jax": jax.__version__, **best}
        output.summary({"choices": rows, "best": best, "left_out": len(every) - len(rows)})
        output.json(tuning.file_of(kind).name, found)
    if _INSTALL.value and found:
        tuning.FOLDER.mkdir(exist_ok=True)
        tuning.file_of(kind).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    shown = [(name, sizes, str(fields)) for name, of in best_of(rows).items() for sizes, fields in of.items()]
    print(table(("kernel", "head/page", "best"), shown))
    print(f"{len(every) - len(rows)} of {len(every)} choices left out; written to {output.folder}")


if __name__ == "__main__":
    run(main)
