"""Five scheduling systems on seven workloads in simulation: at which rate do 90 % of the requests meet both targets?

python -m experiments.policies --output_dir=out/policies --mooncake=mooncake_conversation_trace.jsonl

Each system has the same GPUs (8 x A100-80G as four tp2 instances with InternLM2.5-20B, Tropical's setting; step times
from published figures: extrapolated) and is tuned for every workload, over placements, chunk budgets and (multiplexed)
queue orders, on a seed of its own. What is reported is of other seeds, with the policies' forecasts 10 % too long and
10 % too short in turn. One set of constants holds for all workloads. --quick tunes over a smaller grid, --report_s and
--tune_s say how long runs are. OUTPUT_DIR gets summary.json, table.md, config.json, goodput.png, and as they come in
results.jsonl and the runs behind them: called again with the same settings it goes on where it was.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
import os
import sys
import time
from pathlib import Path
from typing import Any

from absl import flags
from tqdm import tqdm

from ds_jax.flags import run

POLICIES = ("disaggregated", "colocated", "chunked", "multiplexed", "deflected")
WORKLOADS = ("sharegpt", "humaneval", "longbench", "mooncake", "bursty", "two_classes", "shifting")
FACTORS = (0.7, 0.85, 1.0, 1.15, 1.35)
"""Rates that are reported, relative to the one found in tuning."""
MORE = 3
"""Further rates on either side, if the attainment did not cross the share among those."""

_OUTPUT_DIR = flags.DEFINE_string("output_dir", None, "Folder for the results.", required=True)
_POLICIES = flags.DEFINE_list("policies", list(POLICIES), "Systems to compare.")
_WORKLOADS = flags.DEFINE_list("workloads", list(WORKLOADS), "Workloads to compare on.")
_MOONCAKE = flags.DEFINE_string("mooncake", None, "Trace in Mooncake's JSONL; without: a stand-in from its means.")
_PROFILE = flags.DEFINE_string("profile", None, "Latency profile (JSON) in place of the extrapolated one.")
_GPUS = flags.DEFINE_integer("gpus", 8, "GPUs of each system.", 2)
_TP = flags.DEFINE_integer("tp", 2, "GPUs of each instance.", 1)
_SHARE = flags.DEFINE_float("share", 0.9, "Attainment that goodput asks for.", 0.01, 1.0)
_ERROR = flags.DEFINE_float("error", 0.1, "Relative error of the forecasts, too long and too short in turn.", 0.0, 0.9)
_TUNE_SEED = flags.DEFINE_integer("tune_seed", 0, "Seed of the tuning runs.", 0)
_SEEDS = flags.DEFINE_list("seeds", ["1", "2"], "Seeds of the reported runs.")
_TUNE_S = flags.DEFINE_float("tune_s", 120.0, "Seconds of arrivals of a tuning run.", 1.0)
_REPORT_S = flags.DEFINE_float("report_s", 120.0, "Seconds of arrivals of a reported run.", 1.0)
_QUICK = flags.DEFINE_boolean("quick", False, "Tune over a smaller grid.")
_PROCESSES = flags.DEFINE_integer("processes", 0, "Processes; 0: one for each core.", 0)


def compare(job: dict[str, Any]) -> dict[str, Any]:
    """One system on one workload: tuned, then measured."""
    from experiments import policy_runs as runs

    setting = _setting(job)
    scenario = runs.scenarios(setting, job["mooncake"])[job["workload"]]
    began = time.time()
    bench = runs.Bench(setting, scenario, Path(job["runs"]) / f"{job['workload']}.{job['policy']}.jsonl")
    tuned = runs.tune(
        bench,
        job["policy"],
        length_s=job["tune_s"],
        seed=job["tune_seed"],
        share=job["share"],
        rounds=1 if job["quick"] else 3,
        quick=job["quick"],
    )
    signs = (1, -1)
    seeds = [(seed, signs[index % 2] * job["error"]) for index, seed in enumerate(job["seeds"])]

    def measured(rate: float) -> runs.Point:
        return runs.measure(bench, tuned.candidate, rate, length_s=job["report_s"], runs=seeds)

    points = [measured(tuned.rate * factor) for factor in FACTORS]
    for _ in range(MORE):
        if points[0].low < job["share"]:
            points.insert(0, measured(points[0].rate * 0.8))
        if points[-1].high >= job["share"]:
            points.append(measured(points[-1].rate * 1.2))
    goodput, low, high = runs.curve(points, job["share"])
    return {
        "workload": job["workload"],
        "policy": job["policy"],
        "goodput": goodput,
        "low": low,
        "high": high,
        "per_gpu": goodput / setting.gpus,
        "configuration": str(tuned.candidate),
        "tuning_runs": tuned.tried,
        "seconds": round(time.time() - began, 1),
        "targets": scenario.targets,
        "assumed": scenario.assumed,
        "extrapolated": setting.profile.extrapolated,
        "points": [dataclasses.asdict(point) for point in points],
    }


def _setting(job: dict[str, Any]) -> Any:
    from ds_jax.latency import load
    from experiments.policy_runs import Setting, tropical_profile

    profile = load(job["profile"]) if job["profile"] else tropical_profile()
    return Setting(profile, job["gpus"], job["tp"])


def main(argv: list[str]) -> None:
    """Compare, print the table, write everything."""
    job: dict[str, Any] = {
        "mooncake": _MOONCAKE.value,
        "profile": _PROFILE.value,
        "gpus": _GPUS.value,
        "tp": _TP.value,
        "share": _SHARE.value,
        "error": _ERROR.value,
        "tune_seed": _TUNE_SEED.value,
        "seeds": [int(seed) for seed in _SEEDS.value],
        "tune_s": _TUNE_S.value,
        "report_s": _REPORT_S.value,
        "quick": _QUICK.value,
    }
    for name, chosen, known in (("policies", _POLICIES.value, POLICIES), ("workloads", _WORKLOADS.value, WORKLOADS)):
        for one in chosen:
            if one not in known:
                raise ValueError(f"--{name} = {one!r} must be among {', '.join(known)}")
    if job["tune_seed"] in job["seeds"]:
        raise ValueError(f"--tune_seed = {job['tune_seed']} must not be among --seeds = {','.join(_SEEDS.value)}")
    if job["mooncake"] and not Path(job["mooncake"]).is_file():
        raise FileNotFoundError(f"--mooncake = {job['mooncake']} does not exist")
    if job["gpus"] % job["tp"] or job["gpus"] // job["tp"] < 2:
        raise ValueError(f"--gpus = {job['gpus']} must be a multiple of --tp = {job['tp']}, at least two instances")
    folder = Path(_OUTPUT_DIR.value)
    folder.mkdir(parents=True, exist_ok=True)
    runs = folder / f"runs-{hashlib.sha256(json.dumps(job).encode()).hexdigest()[:8]}"
    runs.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(job, indent=1) + "\n", encoding="utf-8")

    place = {"runs": str(runs)}
    jobs = [job | place | {"policy": policy, "workload": one} for one in _WORKLOADS.value for policy in _POLICIES.value]
    results = _results_so_far(folder, job)
    done = {(one["workload"], one["policy"]) for one in results}
    jobs = [one for one in jobs if (one["workload"], one["policy"]) not in done]
    with multiprocessing.get_context("spawn").Pool(_PROCESSES.value or os.cpu_count()) as pool:
        for result in tqdm(pool.imap_unordered(compare, jobs), total=len(jobs), desc="systems x workloads"):
            results.append(result)
            with open(folder / "results.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(result | {"config": job}) + "\n")
    results.sort(key=lambda one: (WORKLOADS.index(one["workload"]), POLICIES.index(one["policy"])))
    table, verdicts = tabulate(results)
    print(table)
    summary = {"command": sys.argv, "config": job, "verdicts": verdicts, "results": results}
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    (folder / "table.md").write_text(table + "\n", encoding="utf-8")
    draw(results, folder / "goodput.png", job["share"])
    print(f"written to {folder}")


def _results_so_far(folder: Path, config: dict[str, Any]) -> list[dict[str, Any]]:
    """Of earlier calls with the same settings."""
    path = folder / "results.jsonl"
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
    ours = {(one["workload"], one["policy"]): one for one in found if one.pop("config") == config}
    return list(ours.values())


def tabulate(results: list[dict[str, Any]]) -> tuple[str, list[str]]:
    """A Markdown table of goodput in requests/s with intervals, ratios, and where our system is not the best."""
    lines = [
        "| workload | system | goodput, requests/s | 95 % | ours / this | configuration |",
        "|---|---|---|---|---|---|",
    ]
    verdicts = []
    for name in dict.fromkeys(one["workload"] for one in results):
        here = [one for one in results if one["workload"] == name]
        ours = next((one for one in here if one["policy"] == "deflected"), None)
        for one in here:
            ratio = f"{ours['goodput'] / one['goodput']:.2f}" if ours and one["goodput"] else ""
            span = f"{one['low']:.2f} to {one['high']:.2f}"
            cells = [name, one["policy"], f"{one['goodput']:.2f}", span, ratio, one["configuration"]]
            lines.append("| " + " | ".join(cells) + " |")
        best = max(here, key=lambda one: one["goodput"])
        if ours is not None and best is not ours:
            sure = "" if best["low"] > ours["high"] else ", though their intervals overlap"
            verdicts.append(f"{name}: {best['policy']} serves {best['goodput'] / ours['goodput']:.2f}x ours{sure}")
    head = "deflected is the best system on every workload" if not verdicts else "deflected is not the best on:"
    notes = sorted({f"{one['workload']}: {one['assumed']}" for one in results if one["assumed"]})
    if any(one["extrapolated"] for one in results):
        notes.insert(0, "step times are extrapolated from published figures, not measured")
    if any(one["policy"] == "deflected" for one in results):
        lines += ["", head, *(f"* {verdict}" for verdict in verdicts)]
    return "\n".join([*lines, "", *(f"* {note}" for note in notes)]), verdicts


def draw(results: list[dict[str, Any]], path: Path, share: float) -> None:
    """Attainment against rate, one panel for each workload."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(one["workload"] for one in results))
    figure, panels = plt.subplots(1, len(names), figsize=(4 * len(names), 3.6), squeeze=False)
    for panel, name in zip(panels[0], names, strict=True):
        for one in (one for one in results if one["workload"] == name):
            points = one["points"]
            rates = [point["rate"] for point in points]
            panel.plot(rates, [point["both"] for point in points], marker="o", markersize=3, label=one["policy"])
            panel.fill_between(rates, [p["low"] for p in points], [p["high"] for p in points], alpha=0.15)
        panel.axhline(share, color="grey", linewidth=0.8, linestyle=":")
        panel.set(title=name, xlabel="requests/s", ylim=(0, 1.02))
    panels[0][0].set_ylabel("requests inside both targets")
    panels[0][-1].legend(fontsize=7)
    extrapolated = " (step times extrapolated)" if any(one["extrapolated"] for one in results) else ""
    figure.suptitle(f"Attainment in simulation{extrapolated}")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    run(main)
