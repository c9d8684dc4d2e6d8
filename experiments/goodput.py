"""Attainment of every system against the rate and against the scale of the targets, and its goodput.

python -m experiments.goodput --output_dir=out/goodput                                   the paper's five workloads
python -m experiments.goodput --config=configs/plan_opt_13b_a100.py --output_dir=...     a plan of one's own

Figures 8 and 9 of DistServe: the share of requests inside both targets falls with the rate per GPU (upper row) and with
targets that are tightened together at one rate (lower row); DistServe's curve lies right of those of vLLM and
DeepSpeed-MII, at 90 % by the factors of EVALUATIONS in `experiments/systems.py`. Ours shows the same curves, simulated,
with vLLM++ and the policies that multiplex beside them. A goodput is the rate at which 90 % (99 %) are inside both.

Twice, unless --config.search.rule says which: `joint`, where all systems have the same step times and our engine's
rules, so that only policies and placements differ, in runs of 1000 requests; and `published`, where DistServe and vLLM
have the rules, step times and host overheads of their public code, and the P90s of TTFT and TPOT are looked at apart
over 300 requests, as that code's search does. The placement of DistServe and of vLLM++ is what the search finds under
the same rule, in runs as long; vLLM and MII have the parallelism that they were started with; those that multiplex have
DistServe's instances, where the ones that decode take prompts too. A plan that is not the paper's has nothing published
beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from absl import flags

from ds_jax.flags import define_config, run
from ds_jax.plan import PlanConfig

if TYPE_CHECKING:
    from experiments.goodput_runs import Trial
    from experiments.systems import Case

define_config(PlanConfig)
_OUTPUT_DIR = flags.DEFINE_string("output_dir", None, "Folder for the results.", required=True)
_PLACEMENTS = flags.DEFINE_enum(
    "placements", "found", ["found", "published"], "DistServe's placement: found by the search, or the paper's Table 3."
)
_REQUESTS = flags.DEFINE_integer(
    "requests", 1000, "Requests of each run of the joint rule, unless --config.search.requests says so.", 20
)
_WORKLOADS = flags.DEFINE_list("workloads", [], "Without --config: only these, such as 13B ShareGPT; empty: all five.")
_WORKERS = flags.DEFINE_integer("workers", 0, "Processes; 0: one per core.", lower_bound=0)

_REFUSED = {
    "config.policy": "all policies are compared",
    "config.search.workers": "--workers says how many processes there are",
}


def main(argv: list[str]) -> None:
    """Search, simulate, compare, draw."""
    from experiments.goodput_report import compare_lengths, draw
    from experiments.goodput_runs import measure, run_length, search, trials
    from experiments.output import Output
    from experiments.published import rows
    from experiments.systems import chosen_cases, refuse

    refuse(flags.FLAGS, _REFUSED)
    cases = _wanted(chosen_cases(flags.FLAGS))
    rules = _rules(cases)
    output = Output(_OUTPUT_DIR.value)
    output.config({"placements": _PLACEMENTS.value, "rules": rules, "plans": {one.name: asdict(one) for one in cases}})
    every = trials(cases, rules, _REQUESTS.value)
    search(every, _PLACEMENTS.value == "published", _WORKERS.value)
    measure(every, _WORKERS.value)
    lengths = run_length(_WORKERS.value) if not flags.FLAGS["config"].value and not _WORKLOADS.value else []

    summary = {case.name: _entry([one for one in every if one.case is case]) for case in cases}
    values = _summary(cases, every, summary)
    values |= {"run_length": lengths}
    values["compared"] += rows(compare_lengths(lengths))
    output.summary(values)
    draw(output, summary, rules)
    _print(cases, every, values)
    print(f"written to {output.folder}")


def _wanted(cases: list[Case]) -> list[Case]:
    names = [one.name for one in cases]
    if wrong := set(_WORKLOADS.value) - set(names):
        raise ValueError(f"--workloads: {sorted(wrong)[0]!r} must be one of {', '.join(names)}")
    for one in cases:
        if one.plan.search.attainment != 0.9:
            raise ValueError(
                f"search.attainment = {one.plan.search.attainment:g} must be 0.9: goodputs are told at 90 % and at 99 %"
            )
    return [one for one in cases if one.name in (_WORKLOADS.value or names)]


def _rules(cases: Sequence[Case]) -> tuple[str, ...]:
    """Both, unless the plan or its flag asks for one; in a plan's file only `published` differs from the default."""
    rule = cases[0].plan.search.rule
    asked = flags.FLAGS["config.search.rule"].present or rule == "published"
    return (rule,) if asked else ("joint", "published")


def _entry(trials: Sequence[Trial]) -> dict[str, Any]:
    """One workload of summary.json."""
    from ds_jax.placement.trial import Requests
    from experiments.goodput_report import ratios
    from experiments.systems import hardware

    plan = trials[0].plan
    entry: dict[str, Any] = {
        "extrapolated": hardware(plan).extrapolated,
        "assumed": Requests(plan).assumed,
        "the_papers": trials[0].case.evaluation is not None,
        "without_placement": {
            f"{one.rule} {policy}": place.why_none
            for one in trials
            for policy, place in one.places.items()
            if place.unit is None
        },
    }
    for one in trials:
        entry[one.rule] = one.entry()
        entry[f"ratios_{one.rule}"] = ratios(entry[one.rule])
        entry[f"rate_of_scales_{one.rule}"] = one.rate_of_scales
    return entry


def _summary(cases: Sequence[Case], every: Sequence[Trial], summary: dict[str, Any]) -> dict[str, Any]:
    from experiments.goodput_report import compare
    from experiments.output import merged
    from experiments.published import rows
    from experiments.systems import MII_ASSUMED

    rules = list(dict.fromkeys(one.rule for one in every))
    alone = summary[cases[0].name] if len(cases) == 1 else {}
    first = alone.get(rules[0], {})
    mii = any(system.name == "DeepSpeed-MII" for one in every for system in one.systems)
    notes = [(one.case.name, note) for one in every for each in one.results.values() for note in each["notes"]]
    return {
        "goodput_per_gpu": {name: {"90": one["goodput_90"], "99": one["goodput_99"]} for name, one in first.items()},
        "ratios": alone.get(f"ratios_{rules[0]}", {}),
        "requests": {one.rule: one.plan.search.requests for one in every},
        "extrapolated": [name for name, entry in summary.items() if entry["extrapolated"]],
        "assumed": [MII_ASSUMED] * mii
        + [f"{name}: {entry['assumed']}" for name, entry in summary.items() if entry["assumed"]],
        "notes": merged(notes),
        "workloads": summary,
        "compared": rows(row for one in cases for row in compare(one.evaluation, one.name, summary[one.name], rules)),
    }


def _print(cases: Sequence[Case], every: Sequence[Trial], values: dict[str, Any]) -> None:
    from experiments.output import table
    from experiments.published import ratio

    header = ["workload", "rule", "requests", "system", "unit", "90 %", "99 %", "SLO scale"]
    shown = [
        [one.case.name + (" *" if one.case.name in values["extrapolated"] else ""), one.rule, result["requests"],
         system.name, str(system.unit), result["goodput_90"], result["goodput_99"],
         result.get("scale", {}).get("tightest")]
        for one in every
        for system, result in zip(one.systems, one.results.values(), strict=True)
    ]  # fmt: skip
    print("goodput in requests/s per GPU; SLO scale: the tightest that 90 % keep at vLLM's goodput; *: extrapolated; "
          "99 %: - where it is less than a third of that at 90 %")  # fmt: skip
    print(table(header, shown))
    for case in cases:
        entry = values["workloads"][case.name]
        for rule in values["requests"]:
            text = ", ".join(f"{key} {ratio(value)}" for key, value in entry[f"ratios_{rule}"].items())
            print(f"{case.name}, {rule}: DistServe over {text}")
        for what, why in entry["without_placement"].items():
            print(f"{case.name}, {what}: no placement: {why}")
        if case.evaluation is None:
            print(f"{case.name}: not the paper's plan, so there is nothing published to compare with")
    for row in values["run_length"]:
        print(f"13B at 6 requests/s, {row['requests']:.0f} requests: {row['joint']:.1%}; public {row['published']:.1%}")
    for kind in ("assumed", "notes"):
        for note in values[kind]:
            print(f"{'note' if kind == 'notes' else kind}: {note}")


if __name__ == "__main__":
    run(main)
