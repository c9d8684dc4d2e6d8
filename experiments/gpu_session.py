"""Everything that needs a GPU, in one command of at most eight minutes.

python -m experiments.gpu_session --output_dir=out/gpu

Runs one after the other, each in a process of its own with a share of the time: the tests marked `gpu`, the kernels'
benchmark, tuning, the engine with random weights of OPT-13B and Llama-3-8B, and the latency profile. What fails or runs
out of time is reported, and the others go on. OUTPUT_DIR gets a folder and a log of each, and summary.json.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from absl import flags

from ds_jax.flags import CHECKOUT, run
from experiments.output import Output, table

_OUTPUT_DIR = flags.DEFINE_string("output_dir", None, "Folder for the results.", required=True)
_ONLY = flags.DEFINE_multi_string("only", [], "Names of the parts to run; all if none is given.")
_TIME_LIMIT_S = flags.DEFINE_float(
    "time_limit_s", 470.0, "For all parts together; their shares are scaled to it.", 10.0
)

OPT_CASES = [
    {"name": f"b{batch}", "batch": batch, "prompt_tokens": 1024, "output_tokens": 64} for batch in (1, 32, 128)
]
CASES = [*OPT_CASES, {"name": "prefill8k", "batch": 1, "prompt_tokens": 8000, "output_tokens": 2}]
OFFLINE = [
    "--config.policy=colocated",
    "--config.prefill.instances=0",
    "--config.decode.instances=0",
    "--config.mixed.instances=1",
    "--config.mixed.slots=128",
    "--config.mixed.max_step_tokens=8192",
    "--config.mixed.token_buckets=1024,8192",
    "--config.cache.page_size=64",
]


@dataclass(frozen=True)
class Part:
    """One process."""

    name: str
    seconds: float
    """Its share of the time."""
    command: tuple[str, ...]


def parts(folder: Path) -> list[Part]:
    """What is run, most important first."""
    cases, opt_cases = folder / "cases.json", folder / "opt_cases.json"
    cases.write_text(json.dumps(CASES), encoding="utf-8")
    opt_cases.write_text(json.dumps(OPT_CASES), encoding="utf-8")

    def module(name: str, label: str, *arguments: str) -> tuple[str, ...]:
        return sys.executable, "-m", f"experiments.{name}", f"--output_dir={folder / label}", *arguments

    llama = ("--config=configs/llama_3_8b.py", "--config.model.max_model_len=8192", *OFFLINE)
    opt = ("--config=configs/opt_13b.py", *OFFLINE)
    bench = module("bench_kernels", "kernels", "--models=llama-3-8b", "--models=opt-13b", "--time_limit_s=90")
    return [
        Part("tests", 90, (sys.executable, "-m", "pytest", "-m", "gpu", "tests/kernels", "-q", "-x", "--durations=5")),
        Part("kernels", 110, bench),
        Part("llama-3-8b", 90, module("bench_engine", "llama-3-8b", *llama, f"--cases={cases}", "--repeats=2")),
        Part("opt-13b", 70, module("bench_engine", "opt-13b", *opt, f"--cases={opt_cases}", "--repeats=2")),
        Part("tuning", 60, module("tune_kernels", "tuning", "--head_dims=128", "--time_limit_s=45")),
        Part("profile", 50, module("profile", "profile", "--config=configs/opt_13b.py", "--time_limit_s=20")),
    ]


def main(argv: list[str]) -> None:
    """Run all parts, print and write what became of them."""
    output = Output(_OUTPUT_DIR.value)
    wanted = [part for part in parts(output.folder.resolve()) if not _ONLY.value or part.name in _ONLY.value]
    if not wanted:
        raise ValueError(f"only = {_ONLY.value} names none of the parts")
    scale, results = _TIME_LIMIT_S.value / sum(part.seconds for part in wanted), []
    begin, allowed = time.perf_counter(), 0.0
    for part in wanted:
        allowed += part.seconds * scale  # what one part leaves over the next may use
        left, start = allowed - (time.perf_counter() - begin), time.perf_counter()
        with open(output.folder / f"{part.name}.log", "w", encoding="utf-8") as log:
            try:
                code = subprocess.run(
                    part.command, cwd=CHECKOUT, stdout=log, stderr=subprocess.STDOUT, timeout=left
                ).returncode
                outcome = "done" if code == 0 else f"failed ({code})"
            except subprocess.TimeoutExpired:
                outcome = "out of time"
        results.append({"part": part.name, "outcome": outcome, "seconds": time.perf_counter() - start})
        output.summary({"parts": results})
        lines = (output.folder / f"{part.name}.log").read_text(encoding="utf-8", errors="replace").splitlines()
        print("\n".join([f"== {part.name}: {outcome}", *lines[-40:]]), flush=True)
    print(table(("part", "outcome", "s"), [tuple(result.values()) for result in results]))
    if any(result["outcome"] != "done" for result in results):
        sys.exit(1)


if __name__ == "__main__":
    run(main)
