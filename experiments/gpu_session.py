"""Everything that needs a GPU, in one command of at most eight minutes.

python -m experiments.gpu_session --output_dir=out/gpu

Runs one part after the other, each in a process of its own with a share of the time (PARTS), the most important first:
smoke tests of the kernels, their benchmark, the engine with random weights of Llama-3-8B and OPT-13B, a latency profile
and what the simulator makes of it, tuning. What fails or runs out of time is reported, and the others go on; what one
leaves over the next may use. A kernel that neither passes a test nor gives right results in its benchmark is replaced
by XLA's in the engine.

OUTPUT_DIR gets two files, brought up to date while parts run, so that little is lost whenever the session ends:
session.json with date, versions, device and, of every part, outcome, seconds, results and the end of its log; and
details.tar.gz with all logs and files. Commit session.json as experiments/results/DEVICE_DATE.json, the profile in it
under configs/latency/ and the tuned choices under kernels/tuned/.

--quick runs the same on a tiny model, on whatever platform there is: it tests this command, not a device.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from absl import flags

from ds_jax.flags import CHECKOUT, run
from experiments.engine_cases import mixed_requests
from experiments.output import table

_OUTPUT_DIR = flags.DEFINE_string("output_dir", None, "Folder for the results.", required=True)
_ONLY = flags.DEFINE_multi_string("only", [], "Names of the parts to run; all if none is given.")
_TIME_LIMIT_S = flags.DEFINE_float(
    "time_limit_s", 470.0, "For all parts together; their shares are scaled to it.", 10.0
)
_QUICK = flags.DEFINE_bool("quick", False, "Try the command itself, with a tiny model.")

PARTS = {
    "tests_decode": 35,
    "tests_prefill": 35,
    "kernels_decode": 60,
    "kernels_prefill": 40,
    "llama_3_8b": 120,
    "opt_13b": 85,
    "profile": 70,
    "prediction": 5,
    "tuning": 30,
}
"""Seconds of each part, 480 in all, most important first."""

LLAMA_CASES: list[dict[str, Any]] = [
    {"name": "b1", "batch": 1, "prompt_tokens": 1024, "output_tokens": 64},
    {"name": "b128", "batch": 128, "prompt_tokens": 512, "output_tokens": 64},
    {"name": "b32", "batch": 32, "prompt_tokens": 1024, "output_tokens": 64},
    {"name": "prefill8k", "batch": 1, "prompt_tokens": 8000, "output_tokens": 2},
    {"name": "mixed256", "requests": mixed_requests(256, 1024, 256)},
]
# Keys and values of 128 sequences would not fit beside the weights: 1,088 tokens take 0.9 GB each.
OPT_CASES: list[dict[str, Any]] = [
    {"name": "b32", "batch": 32, "prompt_tokens": 1024, "output_tokens": 64},
    {"name": "b1", "batch": 1, "prompt_tokens": 1024, "output_tokens": 64},
    {"name": "mixed128", "requests": mixed_requests(128, 1024, 256)},
    {"name": "b64", "batch": 64, "prompt_tokens": 1024, "output_tokens": 64},
]
QUICK_CASES: list[dict[str, Any]] = [
    {"name": "b4", "batch": 4, "prompt_tokens": 16, "output_tokens": 8},
    {"name": "mixed8", "requests": mixed_requests(8, 32, 16)},
]


def offline(*, slots: int, step: int, buckets: str, pages: int, longest: int, page_size: int = 64) -> tuple[str, ...]:
    """Flags of one instance that prefills and decodes. Few buckets, since each is a program to compile; a fixed number
    of pages, so that parts with the same model find each other's programs."""
    return (
        "--config.policy=colocated",
        "--config.prefill.instances=0",
        "--config.decode.instances=0",
        "--config.mixed.instances=1",
        f"--config.mixed.slots={slots}",
        f"--config.mixed.max_step_tokens={step}",
        f"--config.mixed.token_buckets={buckets}",
        f"--config.cache.page_size={page_size}",
        f"--config.cache.num_pages={pages}",
        f"--config.model.max_model_len={longest}",
    )


LLAMA = (
    "--config=configs/llama_3_8b.py",
    *offline(slots=128, step=8192, buckets="1024,8192", pages=4096, longest=8192),
)
OPT = ("--config=configs/opt_13b.py", *offline(slots=64, step=2048, buckets="512,2048", pages=1216, longest=2048))
STORY = (
    "--config=configs/story.py",
    *offline(slots=8, step=64, buckets="64", pages=128, longest=256, page_size=16),
)


@dataclass(frozen=True)
class Part:
    """One process."""

    name: str
    command: tuple[str, ...]
    ends_before_s: float | None = None
    """It is told to end so many seconds before its time is over (--time_limit_s), for what it does not look at the
    clock in; None: it has no such flag."""
    of_kernel: str = ""
    """Operation whose Mosaic kernel it measures."""
    serves: bool = False
    """Whether it runs the engine, for which kernels that do not work are replaced."""


def parts(folder: Path, quick: bool) -> list[Part]:
    """What is run, with the results in `folder`."""
    for name, cases in (("llama", LLAMA_CASES), ("opt", OPT_CASES)):
        (folder / f"{name}_cases.json").write_text(json.dumps(QUICK_CASES if quick else cases), encoding="utf-8")

    def module(name: str, part: str, *arguments: str) -> tuple[str, ...]:
        return sys.executable, "-m", f"experiments.{name}", f"--output_dir={folder / part}", *arguments

    def tests(operation: str) -> tuple[str, ...]:
        suite = "tests/kernels/test_every_backend.py"
        chosen = ("-m", "gpu", "-k", f"smoke_of_{operation}", "-vv", "--tb=short", "--durations=10")
        return sys.executable, "-m", "pytest", suite, *chosen, "-p", "no:cacheprovider"

    def kernels(operation: str) -> tuple[str, ...]:
        models = ("--models=llama-3-8b", "--models=opt-13b")
        few = ("--models=llama-3.2-1b", "--most_gib=0.01", "--most_loads=1")
        return module("bench_kernels", f"kernels_{operation}", f"--operations={operation}", *(few if quick else models))

    llama, opt = (STORY, STORY) if quick else (LLAMA, OPT)
    repeats = "--repeats=1" if quick else "--repeats=2"
    llama = (*llama, f"--cases={folder / 'llama_cases.json'}", repeats)
    engine = f"--engine={folder / 'opt_13b'}", f"--profile={folder / 'profile' / 'profile.json'}"
    traced = "--trace_case=b4" if quick else "--trace_case=b32"
    opt_cases = (f"--cases={folder / 'opt_cases.json'}", repeats)
    return [
        Part("tests_decode", tests("decode")),
        Part("tests_prefill", tests("prefill")),
        Part("kernels_decode", kernels("decode"), 10, "decode"),
        Part("kernels_prefill", kernels("prefill"), 10, "prefill"),
        Part("llama_3_8b", module("bench_engine", "llama_3_8b", *llama, traced), 5, serves=True),
        Part("opt_13b", module("bench_engine", "opt_13b", *opt, *opt_cases), 5, serves=True),
        Part("profile", module("profile", "profile", *opt, "--config.cache.host_pages=8"), 35, serves=True),
        Part("prediction", module("engine_prediction", "prediction", *engine)),
        Part("tuning", module("tune_kernels", "tuning", "--head_dims=128", "--page_sizes=64"), 6),
    ]


def flags_of(part: Part, left_s: float, told: Mapping[str, dict[str, Any]]) -> list[str]:
    """What a part is told beside its command, by the time that is left and by what became of the parts before."""
    found = []
    if part.ends_before_s is not None:
        found.append(f"--time_limit_s={max(2.0, left_s - part.ends_before_s):.0f}")
    tried = [operation for operation in ("decode", "prefill") if f"tests_{operation}" in told]
    if part.serves and not all(works(operation, told) for operation in tried):
        found.append("--config.kernels.backend=xla")
    if part.of_kernel in tried and told[f"tests_{part.of_kernel}"]["outcome"] == OUT_OF_TIME:
        found.append("--backends=xla")  # it would hang again
    return found


def works(operation: str, told: Mapping[str, dict[str, Any]]) -> bool:
    """Whether a kernel can be served with, where there was a GPU to try it on: the test with the sizes of most models
    has passed, or its benchmark gave right results."""
    tests = told[f"tests_{operation}"].get("tests", {})
    if any(outcome in ("PASSED", "SKIPPED") for name, outcome in tests.items() if name.endswith("[bfloat16-128-64]")):
        return True
    cases = told.get(f"kernels_{operation}", {}).get("files", {}).get("summary.json", {}).get("cases", [])
    return any(case.get("form") == "mosaic" and case.get("error", 1.0) < WRONG for case in cases)


OUT_OF_TIME = "out of time"
WRONG = 0.05
"""A larger relative error is no rounding."""
LARGEST_BYTES = 4 * 2**20
"""Larger files stay out of the archive: raw traces."""
ARCHIVE_BYTES = 48 * 2**20
LOG_LINES = 60
_TEST = re.compile(r"^(\S+::.*?\]) ?(PASSED|FAILED|SKIPPED|ERROR)?", re.MULTILINE)


def outcomes_of(log: str) -> dict[str, str]:
    """What became of each test in a log of `pytest -vv`; `unfinished`: it had begun when the log ends."""
    found: dict[str, str] = {}
    for name, outcome in _TEST.findall(log):
        if outcome or name.split("::")[-1] not in found:
            found[name.split("::")[-1]] = outcome or "unfinished"
    return found


class Session:
    """What came of the parts so far, and the files that say so."""

    def __init__(self, output: Path, work: Path, quick: bool = False):
        self.output, self.work = output, work
        output.mkdir(parents=True, exist_ok=True)
        self.told: dict[str, dict[str, Any]] = {}
        self.head: dict[str, Any] = {
            "command": " ".join([Path(sys.argv[0]).stem, *sys.argv[1:]]),
            "begun": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "quick": quick,
            **surroundings(),
        }
        self._begin = time.perf_counter()

    def collect(self, part: Part, outcome: str, seconds: float, share_s: float) -> None:
        """Note what a part has left so far; a file that is being written keeps the content it had before."""
        before = self.told.get(part.name, {})
        log = (self.work / f"{part.name}.log").read_bytes().decode("utf-8", errors="replace")
        files = dict(before.get("files", {}))
        for path in sorted((self.work / part.name).glob("*.json")):
            try:
                files[path.name] = json.loads(path.read_text(encoding="utf-8"))
            except ValueError:
                continue
        lines = [
            line.rstrip("\r").split("\r")[-1] for line in log.split("\n") if line.strip()
        ]  # of a progress bar its last state
        told = {"outcome": outcome, "seconds": round(seconds, 1), "share_s": round(share_s, 1), "files": files}
        if part.name.startswith("tests_"):
            told["tests"] = outcomes_of(log)
        self.told[part.name] = before | told | {"log": [line[:300] for line in lines[-LOG_LINES:]]}

    def write(self) -> None:
        """session.json, whole at any moment."""
        record = self.head | {"seconds": round(time.perf_counter() - self._begin, 1), "parts": self.told}
        new = self.output / "session.json.new"
        new.write_text(json.dumps(record, ensure_ascii=False) + "\n", encoding="utf-8")
        new.replace(self.output / "session.json")

    def archive(self) -> None:
        """details.tar.gz, likewise."""
        new, total = self.output / "details.tar.gz.new", 0
        with tarfile.open(new, "w:gz") as archive:
            for path in sorted(self.work.rglob("*")):
                size = path.stat().st_size if path.is_file() else LARGEST_BYTES
                if size < LARGEST_BYTES and total + size < ARCHIVE_BYTES and CACHE not in path.parts:
                    total += size
                    archive.add(path, path.relative_to(self.work))
        new.replace(self.output / "details.tar.gz")


CACHE = "compiled"


def surroundings() -> dict[str, Any]:
    """Machine and versions."""
    asked = (
        "nvidia-smi",
        "--query-gpu=name,driver_version,memory.total,clocks.sm,power.limit",
        "--format=csv,noheader",
    )
    versions: dict[str, str | None] = {}
    for name in ("jax", "jaxlib", "jax-cuda13-plugin", "nvidia-cudnn-cu13", "flax", "numpy", "torch", "triton"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "gpus": _said_by(asked),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "versions": versions,
        "commit": _said_by(("git", "rev-parse", "HEAD")),
        "changed": _said_by(("git", "status", "--short", "--untracked-files=no")),
    }


def _said_by(command: Sequence[str]) -> list[str] | None:
    try:
        answer = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.splitlines() if answer.returncode == 0 else None


def execute(part: Part, session: Session, left_s: float) -> str:
    """Run a part for at most `left_s`, collecting what it writes; returns what became of it."""
    command = [*part.command, *flags_of(part, left_s, session.told)]
    session.told[part.name] = {"command": " ".join([Path(command[0]).name, *command[1:]])}
    (session.work / part.name).mkdir(exist_ok=True)
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(session.work / CACHE),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }
    environment = {**os.environ, **cache, "PYTHONUNBUFFERED": "1"}
    start = time.perf_counter()
    outcome, seen = "running", start
    with open(session.work / f"{part.name}.log", "w", encoding="utf-8") as log:
        process = subprocess.Popen(
            command,
            cwd=CHECKOUT,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            while (code := process.poll()) is None:
                now = time.perf_counter()
                if now - start > left_s:
                    outcome = OUT_OF_TIME
                    break
                if now - seen > 5:
                    seen = now
                    session.collect(part, outcome, now - start, left_s)
                    session.write()
                time.sleep(0.1)
            else:
                outcome = "done" if code == 0 else f"failed ({code})"
        finally:
            if process.poll() is None:  # out of time, or we are interrupted: with all that it has started
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    session.collect(part, outcome, time.perf_counter() - start, left_s)
    session.write()
    session.archive()
    return outcome


def main(argv: list[str]) -> None:
    """Run all parts, print and write what became of them."""
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="gpu_session_", ignore_cleanup_errors=True) as name:
        work = Path(name)
        every = parts(work, _QUICK.value)
        unknown = sorted(set(_ONLY.value) - PARTS.keys())
        if unknown:
            raise ValueError(f"--only={','.join(unknown)} is none of the parts: {', '.join(PARTS)}")
        wanted = [part for part in every if part.name in (_ONLY.value or PARTS)]
        if _QUICK.value:
            wanted = [part for part in wanted if part.name != "tuning"]  # which needs the device
        session = Session(Path(_OUTPUT_DIR.value).resolve(), work, _QUICK.value)
        session.write()
        scale, allowed = _TIME_LIMIT_S.value / sum(PARTS[part.name] for part in wanted), 0.0
        for part in wanted:
            allowed += PARTS[part.name] * scale  # what one part leaves over the next may use
            outcome = execute(part, session, allowed - (time.perf_counter() - begin))
            shown = [line[:200] for line in session.told[part.name]["log"]][-16:]
            print("\n".join([f"== {part.name}: {outcome}", *shown]), flush=True)
    rows = [(name, told["outcome"], told["seconds"], told["share_s"]) for name, told in session.told.items()]
    print(table(("part", "outcome", "s", "of"), rows))
    print(f"written to {session.output}")
    if any(told["outcome"] != "done" for told in session.told.values()):
        sys.exit(1)


if __name__ == "__main__":
    run(main)
