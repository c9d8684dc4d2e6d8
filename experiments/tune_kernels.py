"""Try the kernels' choices on the device at hand, and keep the best.

python -m experiments.tune_kernels --output_dir=out/tuning

For every head and page size, each choice of stages, workers and blocks that compiles is timed on a load that fills the
chip, checked against the definition, and the fastest right one is kept. OUTPUT_DIR gets summary.json with all timings
and DEVICE.json; copied to kernels/tuned/ (or with --install) it is what the kernels take from then on.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import itertools
import json
import logging
import time
from typing import Any

from absl import flags
from tqdm import tqdm

from ds_jax.flags import run
from experiments.ceilings import device_seconds
from experiments.kernel_cases import Load, error
from experiments.output import Output, table

log = logging.getLogger(__name__)

_OUTPUT_DIR = flags.DEFINE_string("output_dir", None, "Folder for the results.", required=True)
_HEAD_DIMS = flags.DEFINE_multi_integer("head_dims", [128, 64, 256, 80, 96], "Head sizes, most important first.")
_PAGE_SIZES = flags.DEFINE_multi_integer("page_sizes", [16, 64], "Page sizes.")
_TIME_LIMIT_S = flags.DEFINE_float("time_limit_s", 240.0, "When it is over, what is left keeps its defaults.", 1.0)
_INSTALL = flags.DEFINE_bool("install", False, "Write the file into kernels/tuned/.")

CHOICES: dict[str, dict[str, tuple[int, ...]]] = {
    "decode": {"stages": (2, 3, 4, 6), "workers_per_core": (1, 2, 3)},
    "prefill": {"block": (64, 128), "stages": (2, 3, 4)},
}
WRONG = 2e-2
"""A larger relative error in bfloat16 is no rounding."""


def load_of(operation: str, head_dim: int, page_size: int) -> Load:
    """A load like those that matter: eight KV heads, grouped by four."""
    shape = ("tuning", 32, 8, head_dim, page_size, "bfloat16")
    return Load(*shape, batch=32, context=4096) if operation == "decode" else Load(*shape, chunks=((0, 4096),) * 2)


def main(argv: list[str]) -> None:
    """Time every choice, keep the best."""
    import jax

    from kernels import tuning
    from kernels.mosaic import hopper_only
    from kernels.paged_decode_attention import mosaic as decode
    from kernels.paged_prefill_attention import mosaic as prefill

    if reason := hopper_only():
        raise ValueError(f"there is nothing to tune here: {reason}")
    output = Output(_OUTPUT_DIR.value)
    modules: dict[str, Any] = {"decode": decode, "prefill": prefill}
    begin, rows = time.perf_counter(), []
    best: dict[str, dict[str, dict[str, int]]] = {operation: {} for operation in CHOICES}
    work = list(itertools.product(_HEAD_DIMS.value, _PAGE_SIZES.value, CHOICES))
    for head_dim, page_size, operation in tqdm(work, desc="shapes"):
        if time.perf_counter() - begin > _TIME_LIMIT_S.value:
            break
        load = load_of(operation, head_dim, page_size)
        arrays = load.arrays()
        right = []
        for values in itertools.product(*CHOICES[operation].values()):
            fields = dict(zip(CHOICES[operation], values, strict=True))
            choice = modules[operation].Tuning(**fields)
            form = functools.partial(modules[operation].attend, scale=head_dim**-0.5, tuning=choice)
            function = jax.jit(form)
            row = {"operation": operation, "head_dim": head_dim, "page_size": page_size, **fields}
            try:
                row["error"] = error(load, arrays, function(**arrays))
                row["seconds"] = device_seconds(lambda arrays, f=function: f(**arrays), arrays)
            except (ValueError, jax.errors.JaxRuntimeError) as reason:  # too much shared memory
                row["refused"] = str(reason)[:200]
            rows.append(row)
            if row.get("error", 1.0) < WRONG:
                right.append((row["seconds"], fields))
        if right:
            best[operation][f"{head_dim}/{page_size}"] = min(right, key=lambda pair: pair[0])[1]
    kind = jax.devices()[0].device_kind
    found = {"device": kind, "date": datetime.date.today().isoformat(), "jax": jax.__version__, **best}
    output.summary({"choices": rows, "best": best, "left_out": len(work) - sum(map(len, best.values()))})
    output.json(tuning.file_of(kind).name, found)
    if _INSTALL.value:
        tuning.FOLDER.mkdir(exist_ok=True)
        tuning.file_of(kind).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    shown = [
        (operation, sizes, str(fields)) for operation, by_size in best.items() for sizes, fields in by_size.items()
    ]
    print(table(("kernel", "head/page", "best"), shown))
    print(f"default: {dataclasses.asdict(decode.Tuning())} {dataclasses.asdict(prefill.Tuning())}; {output.folder}")


if __name__ == "__main__":
    run(main)
