"""A workload whose mix shifts, with a placement that follows it and with one that stays.

python -m experiments.replanning --config=configs/plan_opt_13b_shifting.py --output_dir=out/replanning

The trace has four stretches: the first, the same at another rate, other lengths, and back. Both runs begin with the
placement that is best for the first. OUTPUT_DIR gets summary.json, config.json and a figure of attainment over time.
--seeds stationary traces are watched as well: the shift test must never tell of any.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from absl import flags

from ds_jax.flags import define_config, load_config, run
from ds_jax.plan import PlanConfig

define_config(PlanConfig, default_file="configs/plan_opt_13b_shifting.py")
_OUTPUT_DIR = flags.DEFINE_string("output_dir", None, "Folder for the results.", required=True)
_LOAD = flags.DEFINE_float("load", 0.75, "Rate of a stretch as a share of what its best placement serves.", 0.05, 2.0)
_STRETCH_S = flags.DEFINE_float("stretch_s", 300.0, "Length of each stretch in seconds.", lower_bound=10.0)
_WORKLOADS = flags.DEFINE_list("workloads", ["sharegpt", "longbench"], "Lengths before, and after they shift.")
_SEEDS = flags.DEFINE_integer("seeds", 100, "Stationary traces to watch for false alarms.", lower_bound=0)
_FIRST_REQUESTS = 600
WINDOW_S = 20.0


def main(argv: list[str]) -> None:
    """Plan for every stretch, run both, print and draw."""
    plan = load_config(PlanConfig)
    before, after = _two(_WORKLOADS.value)

    from tqdm import tqdm

    from ds_jax.placement.replanning import Replanner
    from ds_jax.scheduling import create_scheduler
    from ds_jax.simulation import simulate
    from ds_jax.workload.monitor import Shift
    from experiments.output import Output, table
    from models.folder import read_configs

    output = Output(_OUTPUT_DIR.value)
    output.config(plan)
    replanner = Replanner(plan, read_configs(plan.model).arch)
    with tqdm(total=5 + _SEEDS.value, leave=False) as bar:
        bar.set_description("planning for the first stretch")
        sample = {name: _observed(name, plan.search.seed) for name in (before, after)}
        fleets = {before: replanner.fleet(sample[before])}
        bar.update()
        bar.set_description("planning for the other lengths")
        fleets[after] = replanner.fleet(sample[after])
        bar.update()
        served = {name: _served(replanner, fleets[name], name) for name in (before, after)}
        rates = [0.6 * served[before], served[before], served[after], 0.6 * served[before]]
        names = [before, before, after, before]
        trace, starts_s = _trace(plan, names, [_LOAD.value * rate for rate in rates])
        bar.set_description("following the trace")
        shifts: list[Shift] = []
        changes = replanner.follow(trace, fleets[before], on_shift=shifts.append)
        bar.update()
        runs = {}
        for label, made in (("fixed", []), ("replanned", changes)):
            bar.set_description(f"running {label}")
            instances, events = replanner.events(fleets[before], made)
            latency = replanner.latency(fleets[before], made)
            runs[label] = simulate(create_scheduler("disaggregated"), instances, trace, latency, events=events).times
            bar.update()
        alarms = 0
        for seed in range(_SEEDS.value):
            bar.set_description("watching stationary traces")
            alarms += _false_alarms(before, seed)
            bar.update()

    inside = {label: _inside(plan, trace, times) for label, times in runs.items()}
    rows, stretches = [], []
    for index, name in enumerate(names):
        begin, end = starts_s[index], (starts_s[index + 1] if index + 1 < len(names) else float("inf"))
        of = {label: [ok for at_s, ok in pairs if begin <= at_s < end] for label, pairs in inside.items()}
        told = [one for one in shifts if begin <= one.at_ns / 1e9 < end]
        seen = [one for one in changes if begin <= one.shift.at_ns / 1e9 < end]
        stretches.append(
            {
                "workload": name,
                "rate": _LOAD.value * rates[index],
                "start_s": begin,
                "attainment_fixed": _share(of["fixed"]),
                "attainment_replanned": _share(of["replanned"]),
                "shifts": [{"seen_after_s": one.at_ns / 1e9 - begin, "what": list(one.what)} for one in told],
                "changes": [_told(one, begin) for one in seen],
            }
        )
        delay = f"{told[0].at_ns / 1e9 - begin:.0f} s" if told else "-"
        fleet = " + ".join(map(str, seen[-1].after)) if seen else "as it was"
        rows.append(
            [f"{name}, {_LOAD.value * rates[index]:.3g}/s", *(_share(of[label]) for label in runs), delay, fleet]
        )
    totals = {label: _share([ok for _, ok in pairs]) for label, pairs in inside.items()}
    span_s = trace[-1].arrival_ns / 1e9
    output.summary(
        {
            "stretches": stretches,
            "attainment_fixed": totals["fixed"],
            "attainment_replanned": totals["replanned"],
            "requests_inside_per_s_per_gpu_fixed": sum(ok for _, ok in inside["fixed"]) / span_s / replanner.gpus,
            "requests_inside_per_s_per_gpu_replanned": sum(ok for _, ok in inside["replanned"])
            / span_s
            / replanner.gpus,
            "changes": len(changes),
            "first_fleet": " + ".join(map(str, fleets[before])),
            "false_alarms": alarms,
            "stationary_traces": _SEEDS.value,
            "extrapolated": replanner.hardware.extrapolated,
        }
    )
    _draw(output, inside, starts_s, changes)
    print(table(["stretch", "fixed", "replanned", "seen after", "new fleet"], rows))
    print(f"whole trace: attainment {totals['fixed']:.3f} fixed, {totals['replanned']:.3f} replanned")
    print(f"false alarms on {_SEEDS.value} stationary traces: {alarms}")
    print(f"written to {output.folder}")


def _two(names: Sequence[str]) -> tuple[str, str]:
    if len(names) != 2:
        raise ValueError(f"--workloads must name two, the lengths before and after the shift; got {len(names)}")
    return names[0], names[1]


def _observed(name: str, seed: int, count: int = _FIRST_REQUESTS) -> list[Any]:
    from ds_jax.workload import Lengths, workload
    from ds_jax.workload.monitor import Observation

    drawn = workload(name, rate=1.0, count=count, seed=seed + 1000)
    return [
        Observation(one.arrival_ns, Lengths(one.request.prompt_tokens, int(one.output_tokens)))  # type: ignore[arg-type]
        for one in drawn
    ]


def _served(replanner: Any, fleet: Any, name: str) -> float:
    """Requests/s that the fleet serves inside both targets."""
    from dataclasses import replace

    from ds_jax.placement.layouts import Unit
    from ds_jax.placement.search import Candidate, PlacementSearch

    plan = replace(replanner.plan, workload=replace(replanner.plan.workload, name=name))
    # Long enough to see a queue grow on a whole cluster, which serves many requests at a time.
    plan = replace(plan, search=replace(plan.search, requests=2500))
    unit = Unit(fleet)
    with PlacementSearch(plan, replanner.arch) as search:
        (judged,) = search.judge([Candidate(unit, "disaggregated")], name)
    if judged.goodput is None or not judged.goodput.per_gpu:
        raise ValueError(f"the cluster cannot serve workload {name} inside the targets at any rate")
    return judged.goodput.per_gpu * unit.gpus


def _trace(plan: PlanConfig, names: list[str], rates: list[float]) -> tuple[list[Any], list[float]]:
    """Stretches one after another, with ids counted through, and where each begins in seconds."""
    from dataclasses import replace

    from ds_jax.protocol import Slo
    from ds_jax.workload import workload

    slo = Slo(round(plan.slo.ttft_s * 1e9), round(plan.slo.tpot_s * 1e9))
    trace: list[Any] = []
    starts_s = []
    for index, (name, rate) in enumerate(zip(names, rates, strict=True)):
        start_ns = round(index * _STRETCH_S.value * 1e9)
        starts_s.append(start_ns / 1e9)
        for one in workload(name, rate=rate, cv=plan.workload.cv, seed=plan.search.seed + index, slo=slo):
            if one.arrival_ns >= _STRETCH_S.value * 1e9:
                break
            request = replace(one.request, id=len(trace), seed=len(trace))
            trace.append(one._replace(arrival_ns=start_ns + one.arrival_ns, request=request))
    return trace, starts_s


def _false_alarms(name: str, seed: int) -> int:
    """Whether a stationary trace is told to have shifted."""
    from ds_jax.workload import Lengths, workload
    from ds_jax.workload.monitor import ShiftTest

    test = ShiftTest()
    drawn = workload(name, rate=5.0, count=3000, seed=seed)
    return int(
        any(test.observe(one.arrival_ns, Lengths(one.request.prompt_tokens, int(one.output_tokens))) for one in drawn)  # type: ignore[arg-type]
    )


def _inside(plan: PlanConfig, trace: list[Any], times: Any) -> list[tuple[float, bool]]:
    """When each request arrived, and whether it was inside both targets."""
    pairs = []
    for one in trace:
        life = times[one.request.id]
        ok = not life.rejected and life.ttft_ns is not None and life.ttft_ns <= plan.slo.ttft_s * 1e9
        pairs.append((one.arrival_ns / 1e9, bool(ok and life.tpot_ns <= plan.slo.tpot_s * 1e9)))
    return pairs


def _share(inside: list[bool]) -> float:
    return sum(inside) / len(inside) if inside else float("nan")


def _told(change: Any, begin_s: float) -> dict[str, Any]:
    return {
        "seen_after_s": change.shift.at_ns / 1e9 - begin_s,
        "what": list(change.shift.what),
        "up_after_s": change.up_ns / 1e9 - begin_s,
        "fleet": " + ".join(map(str, change.after)),
        "instances_moved": change.moved,
        "loaded_gb": change.loaded_bytes / 1e9,
    }


def _draw(output: Any, inside: dict[str, list[tuple[float, bool]]], starts_s: list[float], changes: list[Any]) -> None:
    from experiments.output import axes

    figure, (panel,) = axes(width=7.5, height=3.2)
    for label, pairs in inside.items():
        windows: dict[int, list[bool]] = {}
        for at_s, ok in pairs:
            windows.setdefault(int(at_s // WINDOW_S), []).append(ok)
        panel.plot([(w + 0.5) * WINDOW_S for w in windows], [100 * _share(ok) for ok in windows.values()], label=label)
    for start_s in starts_s[1:]:
        panel.axvline(start_s, color="#999999", linestyle=":", linewidth=1)
    for index, change in enumerate(changes):
        name = "replanning" if index == 0 else None
        panel.axvspan(change.shift.at_ns / 1e9, change.up_ns / 1e9, color="#ccbb44", alpha=0.3, label=name)
    panel.axhline(90, color="#999999", linewidth=0.8)
    panel.set_xlabel("time, s (dotted: the workload shifts)")
    panel.set_ylabel("requests inside both targets, %")
    panel.legend(loc="lower left")
    output.figure("attainment", figure)


if __name__ == "__main__":
    run(main)
