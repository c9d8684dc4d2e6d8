"""Five scheduling systems on seven workloads in simulation: at which rate do 90 % of the requests meet both targets?

python -m experiments.policies --output_dir=out/policies --mooncake=mooncake_conversation_trace.jsonl

Each system has the same GPUs (8 x A100-80G as four tp2 instances with InternLM2.5-20B, Tropical's setting; step times
from published figures: extrapolated) and is tuned for every workload, over placements, chunk budgets and (multiplexed)
queue orders, on a seed of its own. What is reported is of other seeds, each with the policies' forecasts 10 % too long
and 10 % too short. One set of constants holds for all workloads. --quick tunes over a smaller grid, --report_s and
--tune_s say how long runs are. OUTPUT_DIR gets summary.json, table.md, config.json, goodput.png, and as they come in
results.jsonl and the runs behind them: called again with the same settings and the same code it goes on where it was.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from absl import flags
from tqdm import tqdm

from ds_jax.flags import CHECKOUT, is_a_users_mistake, run, sentence_of

POLICIES = ("disaggregated", "colocated", "chunked", "multiplexed", "deflected")
WORKLOADS = ("sharegpt", "humaneval", "longbench", "mooncake", "bursty", "two_classes", "shifting")
FACTORS = (0.85, 1.0, 1.15)
"""Rates that are reported, relative to the one found in tuning."""
MORE = 12
"""Most further rates on either side, until the attainment crosses the share among them."""
CODE = (
    "ds_jax/scheduling", "ds_jax/simulation", "ds_jax/latency", "ds_jax/workload", "ds_jax/attainment.py",
    "ds_jax/metrics.py", "ds_jax/protocol.py", "ds_jax/architecture.py", "ds_jax/config.py",
    "experiments/policy_runs.py",
)  # fmt: skip
"""What decides on the outcome of a run."""

_OUTPUT_DIR = flags.DEFINE_string("output_dir", None, "Folder for the results.", required=True)
_POLICIES = flags.DEFINE_list("policies", list(POLICIES), "Systems to compare.")
_WORKLOADS = flags.DEFINE_list("workloads", list(WORKLOADS), "Workloads to compare on.")
_MOONCAKE = flags.DEFINE_string("mooncake", None, "Trace in Mooncake's JSONL; without: a stand-in from its means.")
_PROFILE = flags.DEFINE_string("profile", None, "Latency profile (JSON) in place of the extrapolated one.")
_GPUS = flags.DEFINE_integer("gpus", 8, "GPUs of each system.", 2)
_TP = flags.DEFINE_integer("tp", 2, "GPUs of each instance.", 1)
_SHARE = flags.DEFINE_float("share", 0.9, "Attainment that goodput asks for.", 0.01, 1.0)
_ERROR = flags.DEFINE_float("error", 0.1, "Relative error of the forecasts, too long and too short.", 0.0, 0.9)
_TUNE_SEED = flags.DEFINE_integer("tune_seed", 0, "Seed of the tuning runs.", 0)
_SEEDS = flags.DEFINE_list("seeds", ["1", "2"], "Seeds of the reported runs.")
_TUNE_S = flags.DEFINE_float("tune_s", 60.0, "Seconds of arrivals of a tuning run.", 1.0)
_REPORT_S = flags.DEFINE_float("report_s", 60.0, "Seconds of arrivals of a reported run.", 1.0)
_QUICK = flags.DEFINE_boolean("quick", False, "Tune over a smaller grid.")
_PROCESSES = flags.DEFINE_integer("processes", 0, "Processes; 0: one for each core.", 0)


def compare(job: dict[str, Any]) -> dict[str, Any]:
    """One system on one workload: tuned, then measured. A user's mistake comes back as `refused`, its sentence."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # what the profile was asked beyond its range is reported
            return _compare(job)
    except (ValueError, OSError) as error:
        if not is_a_users_mistake(error):
            raise
        return {"refused": sentence_of(error)}


def _compare(job: dict[str, Any]) -> dict[str, Any]:
    from experiments import policy_runs as runs

    setting = _setting(job)
    scenario = runs.scenarios(setting, job["mooncake"])[job["workload"]]
    began = time.process_time()
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
    signs = (1, -1) if job["error"] else (0,)
    seeds = [(seed, sign * job["error"]) for seed in job["seeds"] for sign in signs]

    def measured(rate: float) -> runs.Point:
        return runs.measure(bench, tuned.candidate, rate, length_s=job["report_s"], runs=seeds)

    points = runs.bracketed(measured, [tuned.rate * factor for factor in FACTORS], job["share"], MORE)
    found = runs.curve(points, job["share"])
    return {
        "workload": job["workload"],
        "policy": job["policy"],
        "goodput": found.rate,
        **found._asdict(),
        "per_gpu": found.rate / setting.gpus,
        "configuration": str(tuned.candidate),
        "tuning_runs": tuned.tried,
        "cpu_s": round(time.process_time() - began, 1),
        "targets": scenario.targets,
        "assumed": scenario.assumed,
        "extrapolated": setting.profile.extrapolated,
        "outside": setting.profile.outside,
        "points": [dataclasses.asdict(point) for point in points],
    }


def _setting(job: dict[str, Any]) -> Any:
    from ds_jax.latency import load
    from experiments.policy_runs import Setting, tropical_profile

    profile = load(job["profile"]) if job["profile"] else tropical_profile()
    return Setting(profile, job["gpus"], job["tp"])


def main(argv: list[str]) -> None:
    """Compare, print the table, write everything."""
    job = _job()
    folder = Path(_OUTPUT_DIR.value)
    folder.mkdir(parents=True, exist_ok=True)
    same = {name: job[name] for name in ("mooncake", "profile", "gpus", "tp", "code")}
    runs = folder / f"runs-{hashlib.sha256(json.dumps(same).encode()).hexdigest()[:8]}"
    runs.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(job, indent=1) + "\n", encoding="utf-8")

    place = {"runs": str(runs)}
    jobs = [job | place | {"policy": policy, "workload": one} for one in _WORKLOADS.value for policy in _POLICIES.value]
    asked = {(one["workload"], one["policy"]) for one in jobs}
    results = [one for one in _results_so_far(folder, job) if (one["workload"], one["policy"]) in asked]
    done = {(one["workload"], one["policy"]) for one in results}
    jobs = [one for one in jobs if (one["workload"], one["policy"]) not in done]
    with multiprocessing.get_context("spawn").Pool(_PROCESSES.value or os.cpu_count()) as pool:
        for result in tqdm(pool.imap_unordered(compare, jobs), total=len(jobs), desc="systems x workloads"):
            if "refused" in result:
                raise ValueError(result["refused"])
            results.append(result)
            with open(folder / "results.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(result | {"config": job}) + "\n")
    results.sort(key=lambda one: (WORKLOADS.index(one["workload"]), POLICIES.index(one["policy"])))
    table, verdicts = tabulate(results)
    print(table)
    outside = {kind: what for one in results for kind, what in one["outside"].items()}
    for what in outside.values():
        print(f"latency profile: {what}")
    summary = {"command": sys.argv, "config": job, "verdicts": verdicts, "outside": outside, "results": results}
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    (folder / "table.md").write_text(table + "\n", encoding="utf-8")
    draw(results, folder / "goodput.png", job["share"])
    print(f"written to {folder}")


def _job() -> dict[str, Any]:
    """The settings, checked.

    Raises:
        ValueError, FileNotFoundError: one sentence with the flag.
    """
    from experiments.policy_runs import check, scenarios

    for name, chosen, known in (("policies", _POLICIES.value, POLICIES), ("workloads", _WORKLOADS.value, WORKLOADS)):
        for one in chosen:
            if one not in known:
                raise ValueError(f"--{name} = {one!r} must be among {', '.join(known)}")
    for seed in _SEEDS.value:
        if not seed.isdecimal():
            raise ValueError(f"--seeds = {','.join(_SEEDS.value)} must be integers of 0 or more")
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
        "code": _code(),
    }
    if job["tune_seed"] in job["seeds"]:
        raise ValueError(f"--tune_seed = {job['tune_seed']} must not be among --seeds = {','.join(_SEEDS.value)}")
    if job["mooncake"] and not Path(job["mooncake"]).is_file():
        raise FileNotFoundError(f"--mooncake = {job['mooncake']} does not exist")
    if job["gpus"] % job["tp"] or job["gpus"] // job["tp"] < 2:
        raise ValueError(f"--gpus = {job['gpus']} must be a multiple of --tp = {job['tp']}, at least two instances")
    setting = _setting(job)
    made = scenarios(setting, job["mooncake"])
    check(setting, [made[name] for name in _WORKLOADS.value], [job["tune_seed"], *job["seeds"]], job["share"])
    return job


def _code() -> str:
    """A fingerprint of what decides on the outcome of a run: results of other code are not gone on with."""
    files = [file for one in CODE for file in (sorted((CHECKOUT / one).glob("*.py")) or [CHECKOUT / one])]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def _results_so_far(folder: Path, config: dict[str, Any]) -> list[dict[str, Any]]:
    """Of earlier calls with the same settings and code."""
    path = folder / "results.jsonl"
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
    ours = {(one["workload"], one["policy"]): one for one in found if one.pop("config") == config}
    return list(ours.values())


def tabulate(results: list[dict[str, Any]]) -> tuple[str, list[str]]:
    """A Markdown table of goodput in requests/s with intervals, ratios, and where our system is not the best.

    Beside both targets together it has the shares inside each of them alone, at the rate of the goodput: a system could
    buy one with the other. `piles up` is the share of arrivals that surely pile up there: such a run would not last.
    """
    lines = [
        "| workload | system | goodput, requests/s | 95 % | ours / this | TTFT met | TPOT met | piles up | best with |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    verdicts = []
    compared = False
    for name in dict.fromkeys(one["workload"] for one in results):
        here = [one for one in results if one["workload"] == name]
        ours = next((one for one in here if one["policy"] == "deflected"), None)
        for one in here:
            ratio = f"{ours['goodput'] / one['goodput']:.2f}" if ours and one["goodput"] else ""
            bound = "≥ " if one["clipped"] else ""
            rate = f"< {one['points'][0]['rate']:.2f}" if one["missing"] else f"{bound}{one['goodput']:.2f}"
            span = f"{one['low']:.2f} to {bound}{one['high']:.2f}"
            alone = [f"{100 * one[key]:.1f} %" for key in ("ttft", "tpot", "piling")]
            lines.append(
                "| " + " | ".join([name, one["policy"], rate, span, ratio, *alone, one["configuration"]]) + " |"
            )
        others = [one for one in here if one is not ours]
        if ours is not None and others:
            compared = True
            best = max(others, key=lambda one: one["goodput"])
            if best["goodput"] > ours["goodput"]:
                sure = "" if best["low"] > ours["high"] else ", though their intervals overlap"
                times = f"{best['goodput'] / ours['goodput']:.2f}x ours" if ours["goodput"] else "some, ours none"
                verdicts.append(f"{name}: {best['policy']} serves {times}{sure}")
    notes = sorted({f"{one['workload']}: {one['assumed']}" for one in results if one["assumed"]})
    if any(one["extrapolated"] for one in results):
        notes.insert(0, "step times are extrapolated from published figures, not measured")
    if compared:
        head = "deflected is not the best on:" if verdicts else "deflected is the best system on every workload"
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
