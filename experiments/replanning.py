"""A workload whose mix shifts, with a placement that follows it and with one that stays.

python -m experiments.replanning --config=configs/plan_opt_13b_shifting.py --output_dir=out/replanning

The trace has four stretches: the first, the same at a higher rate, other lengths, and back. Both runs begin with the
placement that is best for the first; --hindsight also runs every other split of the GPUs among its instances, from
beginning to end. OUTPUT_DIR gets summary.json, config.json and a figure of attainment over time. --seeds stationary
traces are watched as well: the shift test must never tell of any.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from absl import flags

from ds_jax.flags import define_config, load_config, run
from ds_jax.plan import PlanConfig

if TYPE_CHECKING:
    from ds_jax.placement.changeover import Change, Fleet
    from ds_jax.placement.following import Followed
    from ds_jax.workload import Lengths, Submission
    from experiments.output import Output

define_config(PlanConfig, default_file="configs/plan_opt_13b_shifting.py")
_OUTPUT_DIR = flags.DEFINE_string("output_dir", None, "Folder for the results.", required=True)
_LOAD = flags.DEFINE_float("load", 0.75, "Rate of a stretch as a share of what its best placement serves.", 0.05, 2.0)
_FIRST_LOAD = flags.DEFINE_float(
    "first_load", 0.45, "The same of the first stretch, which has another rate.", 0.05, 2.0
)
_STRETCH_S = flags.DEFINE_float("stretch_s", 240.0, "Length of each stretch in seconds.", lower_bound=10.0)
_WORKLOADS = flags.DEFINE_list("workloads", ["100/300", "longbench"], "Lengths before, and after they shift.")
_HINDSIGHT = flags.DEFINE_boolean("hindsight", True, "Run the other splits of the GPUs too, fixed.")
_SEEDS = flags.DEFINE_integer("seeds", 100, "Stationary traces to watch for false alarms.", lower_bound=0)
_SAMPLE = 1000
WINDOW_S = 20.0


@dataclass(frozen=True)
class Stretch:
    """A part of the trace."""

    workload: str
    rate: float
    begin_s: float
    end_s: float


def main(argv: list[str]) -> None:
    """Plan for every stretch, run all fleets, print and draw."""
    plan = load_config(PlanConfig)
    if len(_WORKLOADS.value) != 2:
        raise ValueError(
            f"--workloads must name two, the lengths before and after the shift; got {len(_WORKLOADS.value)}"
        )
    before, after = _WORKLOADS.value

    from tqdm import tqdm

    from ds_jax.placement.following import follow
    from ds_jax.placement.replanning import Replanner
    from experiments.output import Output, table
    from models.folder import read_configs

    output = Output(_OUTPUT_DIR.value)
    output.config(plan)
    replanner = Replanner(plan, read_configs(plan.model).arch)
    with tqdm(total=5 + _SEEDS.value, leave=False) as bar:
        fleets, served = {}, {}
        for name in (before, after):
            bar.set_description(f"planning for {name}")
            sample = lengths_of(name, plan.search.seed + 1000)
            fleets[name] = replanner.fleet(sample)
            served[name] = replanner.served(fleets[name], sample)
            bar.update()
        first = fleets[before]
        trace, stretches = shifting(plan, before, after, served)
        runs: dict[str, Followed] = {}
        for label, replan in (("fixed", False), ("replanned", True)):
            bar.set_description(f"running {label}")
            runs[label] = follow(replanner, trace, first, replan=replan)
            bar.update()
        others = {}
        if _HINDSIGHT.value:
            splits = [fleet for fleet in {*replanner.splits(first), fleets[after]} if fleet != first]
            bar.total += len(splits) - 1
            for fleet in sorted(splits, key=str):
                bar.set_description(f"running {_name(fleet)}")
                others[fleet] = _share(inside(plan, trace, follow(replanner, trace, fleet, replan=False)))
                bar.update()
        alarms = 0
        for seed in range(_SEEDS.value):
            bar.set_description("watching stationary traces")
            alarms += false_alarm(before, seed)
            bar.update()

    ok = {label: inside(plan, trace, one) for label, one in runs.items()}
    followed = runs["replanned"]
    told = [_stretch(one, ok, followed) for one in stretches]
    totals = {label: _share(pairs) for label, pairs in ok.items()}
    fixed = {first: totals["fixed"], **others}
    best = max(fixed, key=lambda fleet: fixed[fleet])
    output.summary(
        {
            "stretches": told,
            "attainment_fixed": totals["fixed"],
            "attainment_replanned": totals["replanned"],
            "requests_inside_per_s_per_gpu_fixed": _per_gpu(ok["fixed"], trace, replanner.gpus),
            "requests_inside_per_s_per_gpu_replanned": _per_gpu(ok["replanned"], trace, replanner.gpus),
            "requests": len(trace),
            "changes": len(followed.changes),
            "sequences_run_again": followed.replayed,
            "planning_s": followed.planning_s,
            "first_fleet": _name(first),
            "best_fleets": {name: _name(fleet) for name, fleet in fleets.items()},
            "served_requests_per_s": served,
            "fixed_fleets": {_name(fleet): share for fleet, share in fixed.items()},
            "best_fixed_in_hindsight": _name(best) if others else None,
            "false_alarms": alarms,
            "stationary_traces": _SEEDS.value,
            "extrapolated": replanner.hardware.extrapolated,
        }
    )
    _draw(output, ok, stretches, followed)
    rows = [
        [f"{one['workload']}, {one['rate']:.3g}/s", one["attainment_fixed"], one["attainment_replanned"],
         f"{one['shifts'][0]['seen_after_s']:.0f} s" if one["shifts"] else "-",
         f"{one['changes'][0]['up_after_s']:.0f} s" if one["changes"] else "-",
         one["changes"][-1]["fleet"] if one["changes"] else "as it was"]
        for one in told
    ]  # fmt: skip
    print(table(["stretch", "fixed", "replanned", "seen after", "changed after", "new fleet"], rows))
    print(f"first fleet: {_name(first)}; whole trace: {totals['fixed']:.3f} fixed, {totals['replanned']:.3f} replanned")
    if others:
        print(f"the best of {len(fixed)} fixed fleets in hindsight: {_name(best)}, {fixed[best]:.3f}")
    if followed.planning_s:
        print(f"a plan took {max(followed.planning_s):.1f} s at most; {followed.replayed} sequences were run again")
    print(f"false alarms on {_SEEDS.value} stationary traces: {alarms}")
    print(f"written to {output.folder}")


# --- requests ---------------------------------------------------------------------------------------------------------


def lengths_of(name: str, seed: int, count: int = _SAMPLE) -> list[Lengths]:
    """A sample of a workload's requests."""
    from ds_jax.workload import Lengths, workload

    drawn = workload(name, rate=1.0, count=count, seed=seed)
    return [Lengths(one.request.prompt_tokens, int(one.output_tokens)) for one in drawn]  # type: ignore[arg-type]


def shifting(
    plan: PlanConfig, before: str, after: str, served: dict[str, float]
) -> tuple[list[Submission], list[Stretch]]:
    """The trace, ids counted through, and its stretches. `served`: requests/s that each one's best fleet serves."""
    from ds_jax.protocol import Slo
    from ds_jax.workload import workload

    slo = Slo(round(plan.slo.ttft_s * 1e9), round(plan.slo.tpot_s * 1e9))
    loads = ((before, _FIRST_LOAD.value), (before, _LOAD.value), (after, _LOAD.value), (before, _LOAD.value))
    trace: list[Submission] = []
    stretches = []
    for index, (name, load) in enumerate(loads):
        begin_s, rate = index * _STRETCH_S.value, load * served[name]
        stretches.append(Stretch(name, rate, begin_s, begin_s + _STRETCH_S.value))
        for one in workload(name, rate=rate, cv=plan.workload.cv, seed=plan.search.seed + index, slo=slo):
            if one.arrival_ns >= _STRETCH_S.value * 1e9:
                break
            request = replace(one.request, id=len(trace), seed=len(trace))
            trace.append(one._replace(arrival_ns=round(begin_s * 1e9) + one.arrival_ns, request=request))
    return trace, stretches


def false_alarm(name: str, seed: int) -> int:
    """Whether a stationary trace is told to have shifted, its outputs heard of when requests end: 30 ms a token."""
    from ds_jax.workload import workload
    from ds_jax.workload.monitor import ShiftTest

    test = ShiftTest()
    heard: list[tuple[int, int, int, int]] = []
    for one in workload(name, rate=5.0, count=3000, seed=seed):
        tokens = int(one.output_tokens)  # type: ignore[arg-type]
        heard.append((one.arrival_ns, 0, one.request.id, one.request.prompt_tokens))
        heard.append((one.arrival_ns + 30_000_000 * tokens, 1, one.request.id, tokens))
    tests = (test.arrived, test.ended)
    return int(any(tests[ended](id, at_ns, tokens) for at_ns, ended, id, tokens in sorted(heard)))


# --- what came of it --------------------------------------------------------------------------------------------------


def inside(plan: PlanConfig, trace: Sequence[Submission], followed: Followed) -> list[tuple[float, bool]]:
    """When each request arrived, in seconds, and whether it was inside both targets."""
    pairs = []
    for one in trace:
        life = followed.times[one.request.id]
        ttft_ns, tpot_ns = life.ttft_ns, life.tpot_ns
        ok = not life.rejected and ttft_ns is not None and tpot_ns is not None
        ok = ok and ttft_ns <= plan.slo.ttft_s * 1e9 and tpot_ns <= plan.slo.tpot_s * 1e9  # type: ignore[operator]
        pairs.append((one.arrival_ns / 1e9, ok))
    return pairs


def _share(pairs: Sequence[tuple[float, bool]]) -> float:
    return sum(ok for _, ok in pairs) / len(pairs) if pairs else float("nan")


def _per_gpu(pairs: Sequence[tuple[float, bool]], trace: Sequence[Submission], gpus: int) -> float:
    return sum(ok for _, ok in pairs) / (trace[-1].arrival_ns / 1e9) / gpus


def _name(fleet: Fleet) -> str:
    return " + ".join(map(str, fleet))


def _stretch(stretch: Stretch, ok: dict[str, list[tuple[float, bool]]], followed: Followed) -> dict[str, Any]:
    begin, end = stretch.begin_s, stretch.end_s

    def here(at_ns: int) -> bool:
        return begin <= at_ns / 1e9 < end

    of = {label: _share([pair for pair in pairs if begin <= pair[0] < end]) for label, pairs in ok.items()}
    return {
        "workload": stretch.workload,
        "rate": stretch.rate,
        "start_s": begin,
        "attainment_fixed": of["fixed"],
        "attainment_replanned": of["replanned"],
        "shifts": [
            {"seen_after_s": one.at_ns / 1e9 - begin, "what": list(one.what)}
            for one in followed.shifts
            if here(one.at_ns)
        ],
        "stayed_after_s": [at_ns / 1e9 - begin for _, at_ns in followed.stays if here(at_ns)],
        "changes": [_changed(one, begin) for one in followed.changes if here(one.shift.at_ns)],
    }


def _changed(change: Change, begin_s: float) -> dict[str, Any]:
    return {
        "what": list(change.shift.what),
        "seen_after_s": change.shift.at_ns / 1e9 - begin_s,
        "planned_after_s": change.planned_ns / 1e9 - begin_s,
        "up_after_s": change.up_ns / 1e9 - begin_s,
        "fleet": _name(change.after),
        "instances_moved": change.moved,
        "loaded_gb": change.loaded_bytes / 1e9,
    }


def _draw(
    output: Output, ok: dict[str, list[tuple[float, bool]]], stretches: Sequence[Stretch], followed: Followed
) -> None:
    from experiments.output import axes

    figure, (panel,) = axes(width=7.5, height=3.4)
    for label, pairs in ok.items():
        windows: dict[int, list[tuple[float, bool]]] = {}
        for pair in pairs:
            windows.setdefault(int(pair[0] // WINDOW_S), []).append(pair)
        shares = [100 * _share(one) for one in windows.values()]
        style: dict[str, Any] = {"linestyle": "--", "linewidth": 2.0, "zorder": 3} if label == "fixed" else {}
        panel.plot([(w + 0.5) * WINDOW_S for w in windows], shares, label=label, clip_on=False, **style)
    for one in stretches:
        panel.axvline(one.begin_s, color="#999999", linestyle=":", linewidth=1)
        panel.text(one.begin_s, 104, f" {one.workload}, {one.rate:.3g}/s", fontsize=8, color="#555555")
    for index, shift in enumerate(followed.shifts):
        name = "shift is seen" if index == 0 else None
        panel.plot([shift.at_ns / 1e9], [0], marker="^", color="black", linestyle="", clip_on=False, label=name)
    for index, change in enumerate(followed.changes):
        name = "changing over" if index == 0 else None
        panel.axvspan(change.planned_ns / 1e9, change.up_ns / 1e9, color="#ccbb44", alpha=0.35, label=name)
    panel.axhline(90, color="#999999", linewidth=0.8)
    panel.set_ylim(0, 102)
    panel.set_xlabel("time of arrival, s (dotted: the workload shifts)")
    panel.set_ylabel("requests inside both targets, %")
    panel.legend(loc="center left")
    output.figure("attainment", figure)


if __name__ == "__main__":
    run(main)
