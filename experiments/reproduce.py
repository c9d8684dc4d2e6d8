"""All experiments of the papers in one go, and one page with every figure beside the published numbers.

python -m experiments.reproduce --output_dir=out/reproduce [--runs=DIR] [--mooncake=FILE.jsonl] [--quick]

Each experiment runs in a process of its own, with its own folder under OUTPUT_DIR; one that fails is shown as failed
and does not stop the others. OUTPUT_DIR/index.html is self-contained: figures are inlined, nothing is fetched. --runs
names a folder of real runs for simulator_accuracy, which is left out without it; --mooncake the trace, for which there
is a stand-in otherwise. --quick takes tiny sizes: whether everything works, not what it gives.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

from absl import flags

from ds_jax.flags import CHECKOUT, run
from experiments.gathered import REFERENCES, gather
from experiments.page import Experiment, Outcome, page

_OUTPUT_DIR = flags.DEFINE_string("output_dir", None, "Folder for the page and all results.", required=True)
_RUNS = flags.DEFINE_string("runs", None, "Folder of real runs (CSV) for simulator_accuracy; without: left out.")
_MOONCAKE = flags.DEFINE_string("mooncake", None, "Trace in Mooncake's JSONL; without: a stand-in from its means.")
_ONLY = flags.DEFINE_list("only", [], "Names of experiments to run; the page shows what else OUTPUT_DIR has.")
_QUICK = flags.DEFINE_boolean("quick", False, "Tiny sizes, to see whether everything works.")
_LIMIT_S = flags.DEFINE_float("limit_s", 900.0, "Most seconds that one experiment may take.", 1.0)


def experiments(runs: str | None, mooncake: str | None, folder: Path) -> list[Experiment]:
    """All of them, in the order of the page."""
    cache = f"--config.search.cache={folder / 'cache'}"
    trace = (f"--mooncake={mooncake}",) if mooncake else ()
    small = ("--config.search.requests=60", "--config.search.precision=0.2")
    found = [
        Experiment("queueing", "queueing", "The simulator against queueing theory", (), ("--requests=20",)),
        Experiment("phase_tradeoffs", "phase_tradeoffs", "Batching and parallelism in each phase (Fig. 3 to 5)"),
        Experiment("interference", "interference", "Prefill and decode in each other's way (Fig. 1 and 2)", (),
                   ("--requests=50",)),
        *(
            Experiment(f"placement_search_{model}", "placement_search",
                       f"The best placement, OPT-{model.upper()} (Table 3)",
                       (f"--config=configs/plan_opt_{model}_a100.py", cache, "--beside=disaggregated,colocated"), small)
            for model in ("13b", "66b", "175b")
        ),
        *(
            Experiment(f"public_search_{name}", "placement_search",
                       f"The public simulator's reference, OPT-{model.upper()}, {ttft:g}/{tpot:g} s",
                       (f"--config=configs/plan_opt_{model}_a100.py", cache, "--config.search.rule=published",
                        f"--config.slo.ttft_s={ttft}", f"--config.slo.tpot_s={tpot}",
                        "--beside=disaggregated,colocated"), small[:1])
            for name, model, ttft, tpot, *_ in REFERENCES
        ),
        Experiment("goodput", "goodput", "Attainment against rate and targets (Fig. 8 and 9)", (cache,),
                   ("--requests=40", "--placements=published", "--workloads=13B ShareGPT")),
        Experiment("latency_breakdown", "latency_breakdown", "Where the time of a request goes (Fig. 10)", (),
                   ("--requests=40",)),
        Experiment("ablation", "ablation", "Disaggregation and search apart (Fig. 11)", (),
                   ("--requests=40", "--workloads=66B ShareGPT")),
        Experiment("search_time", "search_time", "Time of the search (Fig. 12)", (), ("--clusters=1x4", *small)),
        Experiment("multiplexing", "multiplexing", "Decode workers that take prompts (Tropical)", trace,
                   ("--requests=40", "--grid=one")),
        Experiment("replanning", "replanning", "A placement that follows the workload", (),
                   ("--seeds=1", "--stretch_s=30", *small)),
    ]  # fmt: skip
    if runs:
        accuracy = Experiment("simulator_accuracy", "simulator_accuracy", "The simulator against real runs (Table 2)",
                              (f"--runs={runs}",))  # fmt: skip
        found.insert(1, accuracy)
    return [one for one in found if (CHECKOUT / "experiments" / f"{one.module}.py").is_file()]


def attempt(experiment: Experiment, folder: Path, quick: bool, limit_s: float) -> Outcome:
    """Run one experiment to its end, its failure, or its limit."""
    command = [
        sys.executable, "-W", "ignore", "-m", f"experiments.{experiment.module}", *experiment.arguments,
        *(experiment.quick if quick else ()), f"--output_dir={folder / experiment.name}",
    ]  # fmt: skip
    begin = time.perf_counter()
    # A session of its own: when it is stopped, so are the processes that it started.
    process = subprocess.Popen(
        command, cwd=CHECKOUT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        printed, told = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        return _outcome(experiment, folder, limit_s, f"not done after {limit_s:g} s", "")
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    lines = [line for line in told.replace("\r", "\n").splitlines() if line.strip()]
    error = "" if process.returncode == 0 else (lines[-1] if lines else f"exit code {process.returncode}")
    return _outcome(experiment, folder, time.perf_counter() - begin, error, printed)


def _outcome(experiment: Experiment, folder: Path, seconds: float | None, error: str, printed: str) -> Outcome:
    place = folder / experiment.name
    if error:
        return Outcome(experiment, seconds, error, printed)
    (place / "printed.txt").write_text(printed, encoding="utf-8")
    (place / "seconds.json").write_text(json.dumps(seconds), encoding="utf-8")
    return left(experiment, folder)


def left(experiment: Experiment, folder: Path) -> Outcome:
    """What an earlier run of the experiment has left."""
    place = folder / experiment.name
    if not (place / "summary.json").is_file() or not (place / "seconds.json").is_file():
        return Outcome(experiment, None, "not run")
    summary = json.loads((place / "summary.json").read_text(encoding="utf-8"))
    seconds = json.loads((place / "seconds.json").read_text(encoding="utf-8"))
    printed = (place / "printed.txt").read_text(encoding="utf-8")
    return Outcome(experiment, seconds, "", printed, summary, tuple(sorted(place.glob("*.svg"))))


def main(argv: list[str]) -> None:
    """Run, gather, write the page."""
    from tqdm import tqdm

    from experiments.output import Output, table

    output = Output(_OUTPUT_DIR.value)
    folder = output.folder.resolve()
    runs, mooncake = (str(Path(one).resolve()) if one else None for one in (_RUNS.value, _MOONCAKE.value))
    every = experiments(runs, mooncake, folder)
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
            output.text("index.html", page(outcomes, gather(outcomes), _QUICK.value))
    seconds = time.perf_counter() - begin
    compared = gather(outcomes)
    output.summary(
        {
            "seconds": seconds,
            "quick": _QUICK.value,
            "experiments": {
                one.experiment.name: {"seconds": one.seconds, "failed": one.error, "figures": len(one.figures)}
                for one in outcomes
            },
            "compared": compared,
        }
    )
    print(table(["experiment", "seconds", "figures", ""], [
        [one.experiment.name, one.seconds, str(len(one.figures)), one.error] for one in outcomes
    ]))  # fmt: skip
    failed = [one.experiment.name for one in outcomes if one.error and one.error != "not run"]
    print(f"{len(compared)} published numbers beside ours, in {seconds:.0f} s" + _told(failed))
    print(f"open {folder / 'index.html'}")


def _told(failed: list[str]) -> str:
    return f"; failed: {', '.join(failed)}" if failed else ""


if __name__ == "__main__":
    run(main)
