"""All experiments of the papers in one go, and one page with every figure beside the published numbers.

python -m experiments.reproduce --output_dir=out/reproduce [--runs=DIR] [--mooncake=FILE.jsonl] [--quick]

Each experiment runs in a process of its own, with its own folder under OUTPUT_DIR; one that fails is shown as failed
and does not stop the others, and the exit code is 1. OUTPUT_DIR/index.html is self-contained: figures are inlined,
nothing is fetched. --runs names a folder of real runs for simulator_accuracy, which has only the published Table 2
without it; --mooncake the trace, for which there is a stand-in otherwise. --quick takes tiny sizes: whether everything
works, not what it gives; what was made so says so, also when the page is made again.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

from absl import flags

from ds_jax.flags import CHECKOUT, run
from experiments.gathered import REFERENCES, gather
from experiments.page import NOT_RUN, Experiment, Outcome, page

_OUTPUT_DIR = flags.DEFINE_string("output_dir", None, "Folder for the page and all results.", required=True)
_RUNS = flags.DEFINE_string("runs", None, "Folder of real runs (CSV) for simulator_accuracy; without: Table 2 alone.")
_MOONCAKE = flags.DEFINE_string("mooncake", None, "Trace in Mooncake's JSONL; without: a stand-in from its means.")
_ONLY = flags.DEFINE_list("only", [], "Names of experiments to run; the page shows what else OUTPUT_DIR has.")
_QUICK = flags.DEFINE_boolean("quick", False, "Tiny sizes, to see whether everything works.")
_LIMIT_S = flags.DEFINE_float("limit_s", 900.0, "Most seconds that one experiment may take.", 1.0)

RECORD = "reproduced.json"
"""In an experiment's folder: how it was run, and what it printed."""


def experiments(runs: str | None, mooncake: str | None) -> list[Experiment]:
    """All of them, in the order of the page."""
    real = (f"--runs={runs}",) if runs else ()
    trace = (f"--mooncake={mooncake}",) if mooncake else ()
    small = ("--config.search.requests=60", "--config.search.precision=0.2")
    beside = "--beside=disaggregated,colocated"
    return [
        Experiment("queueing", "queueing", "The simulator against queueing theory", (), ("--requests=20",)),
        Experiment("simulator_accuracy", "simulator_accuracy", "The simulator against real systems (Table 2)", real,
                   ("--requests=40",)),
        Experiment("phase_tradeoffs", "phase_tradeoffs", "Batch, length and parallelism in each phase (Fig. 3 to 5)"),
        Experiment("interference", "interference", "Prefill and decode in each other's way (Fig. 1 and 2)", (),
                   ("--requests=50",)),
        *(
            Experiment(f"placement_search_{model}", "placement_search",
                       f"The best placement, OPT-{model.upper()} (Table 3)",
                       (f"--config=configs/plan_opt_{model}_a100.py", beside), small)
            for model in ("13b", "66b", "175b")
        ),
        *(
            Experiment(f"public_search_{name}", "placement_search",
                       f"The public simulator's reference, OPT-{model.upper()}, {ttft:g}/{tpot:g} s",
                       (f"--config=configs/plan_opt_{model}_a100.py", "--config.search.rule=published",
                        f"--config.slo.ttft_s={ttft}", f"--config.slo.tpot_s={tpot}", beside), small[:1])
            for name, model, ttft, tpot, *_ in REFERENCES
        ),
        Experiment("draws", "draws", "How much a search hangs on the draw of its requests",
                   ("--config.slo.ttft_s=0.2", "--config.slo.tpot_s=0.1"), ("--seeds=2", *small)),
        Experiment("goodput", "goodput", "Attainment against rate and targets (Fig. 8 and 9)", (),
                   ("--requests=40", "--placements=published", "--workloads=13B ShareGPT")),
        Experiment("latency_breakdown", "latency_breakdown", "Where the time of a request goes (Fig. 10)", (),
                   ("--requests=40",)),
        Experiment("ablation", "ablation", "Disaggregation and search apart (Fig. 11)", (),
                   ("--requests=40", "--workloads=66B ShareGPT")),
        Experiment("search_time", "search_time", "Time of the search (Fig. 12)",
                   (), ("--clusters=1x4", *small)),
        Experiment("multiplexing", "multiplexing", "Decode workers that take prompts (Tropical)", trace,
                   ("--requests=40", "--grid=one")),
        Experiment("replanning", "replanning", "A placement that follows the workload", (),
                   ("--seeds=1", "--stretch_s=30", *small)),
    ]  # fmt: skip


def attempt(experiment: Experiment, folder: Path, quick: bool, limit_s: float) -> Outcome:
    """Run one experiment to its end, its failure, or its limit."""
    place, quick = folder / experiment.name, quick and bool(experiment.quick)
    arguments = (*experiment.arguments, *(experiment.quick if quick else ()))
    command = [
        sys.executable, "-W", "ignore", "-m", f"experiments.{experiment.module}", *arguments, f"--output_dir={place}"
    ]  # fmt: skip
    for old in (place / RECORD, *place.glob("*.svg")):  # what an earlier run left is not this one's
        old.unlink(missing_ok=True)
    begin, busy_s = time.perf_counter(), _busy_s()
    # A session of its own: when it is stopped, so are the processes that it started.
    process = subprocess.Popen(
        command, cwd=CHECKOUT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        printed, told = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        return Outcome(experiment, limit_s, f"not done after {limit_s:g} s", quick=quick, arguments=arguments)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    seconds = time.perf_counter() - begin
    if process.returncode != 0:
        lines = [line for line in told.replace("\r", "\n").splitlines() if line.strip()]
        error = lines[-1] if lines else f"exit code {process.returncode}"
        return Outcome(experiment, seconds, error, printed, quick=quick, arguments=arguments)
    record = {
        "seconds": seconds,
        "cpu_s": _busy_s() - busy_s,
        "quick": quick,
        "arguments": arguments,
        "printed": printed,
    }
    (place / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return left(experiment, folder)


def _busy_s() -> float:
    """Processor seconds of all experiments up to now: what they take is the same on a machine that others use too."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def left(experiment: Experiment, folder: Path) -> Outcome:
    """What a run of the experiment has left, whether it was with tiny sizes or not."""
    place = folder / experiment.name
    if not (place / "summary.json").is_file() or not (place / RECORD).is_file():
        return Outcome(experiment, None, NOT_RUN)
    summary = json.loads((place / "summary.json").read_text(encoding="utf-8"))
    record = json.loads((place / RECORD).read_text(encoding="utf-8"))
    return Outcome(
        experiment,
        record["seconds"],
        cpu_s=record["cpu_s"],
        printed=record["printed"],
        summary=summary,
        figures=tuple(sorted(place.glob("*.svg"))),
        quick=record["quick"],
        arguments=tuple(record["arguments"]),
    )


def main(argv: list[str]) -> int:
    """Run, gather, write the page. Returns the exit code: 1 if an experiment failed."""
    from tqdm import tqdm

    from experiments.output import Output, table

    output = Output(_OUTPUT_DIR.value)
    folder = output.folder.resolve()
    runs, mooncake = (str(Path(one).resolve()) if one else None for one in (_RUNS.value, _MOONCAKE.value))
    every = experiments(runs, mooncake)
    names = [one.name for one in every]
    if wrong := set(_ONLY.value) - set(names):
        raise ValueError(f"--only: {sorted(wrong)[0]!r} must be one of {', '.join(names)}")
    for flag, path in (("runs", runs), ("mooncake", mooncake)):
        if path and not Path(path).exists():
            raise FileNotFoundError(f"--{flag}: {path} does not exist")
    output.config({"quick": _QUICK.value, "runs": _RUNS.value, "mooncake": _MOONCAKE.value,
                   "experiments": [asdict(one) for one in every]})  # fmt: skip
    begin = time.perf_counter()
    outcomes: list[Outcome] = []
    with tqdm(every, unit="experiment", leave=False) as bar:
        for one in bar:
            bar.set_description(one.name)
            if _ONLY.value and one.name not in _ONLY.value:
                outcomes.append(left(one, folder))
            else:
                outcomes.append(attempt(one, folder, _QUICK.value, _LIMIT_S.value))
            # The page grows with every experiment, so that there is one however this ends.
            output.text("index.html", page(outcomes, gather(outcomes)))
    seconds = time.perf_counter() - begin
    compared = gather(outcomes)
    output.summary(
        {
            "seconds": seconds,
            "quick": _QUICK.value,
            "experiments": {
                one.experiment.name: {
                    "seconds": one.seconds,
                    "cpu_s": one.cpu_s,
                    "failed": one.error,
                    "figures": len(one.figures),
                    "quick": one.quick,
                    "extrapolated": one.summary.get("extrapolated", False),
                    "notes": one.summary.get("notes", []),
                }
                for one in outcomes
            },
            "compared": compared,
        }
    )
    print(table(["experiment", "seconds", "CPU seconds", "figures", ""], [
        [one.experiment.name, one.seconds, one.cpu_s, str(len(one.figures)), one.error or "quick" * one.quick]
        for one in outcomes
    ]))  # fmt: skip
    failed = [one.experiment.name for one in outcomes if one.error and one.error != NOT_RUN]
    print(f"{len(compared)} published numbers beside ours, in {seconds:.0f} s" + _told(failed))
    print(f"open {folder / 'index.html'}")
    return 1 if failed else 0


def _told(failed: list[str]) -> str:
    return f"; failed: {', '.join(failed)}" if failed else ""


if __name__ == "__main__":
    run(main)
