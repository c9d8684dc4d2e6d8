"""Attainment of every system against the rate and against the scale of the targets, and its goodput.

python -m experiments.goodput --output_dir=out/goodput                                   the paper's five workloads
python -m experiments.goodput --config=configs/plan_opt_13b_a100.py --output_dir=...     a plan of one's own

Figures 8 and 9 of DistServe: the share of requests inside both targets falls with the rate per GPU (upper row) and with
targets that are tightened together at one rate (lower row); DistServe's curve lies right of those of vLLM and
DeepSpeed-MII, at 90 % by the factors of EVALUATIONS in `experiments/systems.py`. Ours shows the same curves, simulated,
with vLLM++ and the policies that multiplex beside them. A goodput is the rate at which 90 % (99 %) are inside both.

Twice: `joint`, where all systems have the same step times and our engine's rules, so that only policies and placements
differ, over `search.requests` requests; and `published`, where DistServe and vLLM have the rules, step times and host
overheads of their public code, and the P90s of TTFT and TPOT are looked at apart over 300 requests, as that code's
search does. The placement of DistServe and of vLLM++ is what the search finds under the same rule; vLLM and MII have
the paper's parallelism; those that multiplex have DistServe's instances, where the ones that decode take prompts too.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from absl import flags

from ds_jax.flags import define_config, run
from ds_jax.plan import PlanConfig

if TYPE_CHECKING:
    from experiments.systems import Evaluation, System

define_config(PlanConfig)
_OUTPUT_DIR = flags.DEFINE_string("output_dir", None, "Folder for the results.", required=True)
_PLACEMENTS = flags.DEFINE_enum(
    "placements", "found", ["found", "published"], "DistServe's placement: found by the search, or the paper's Table 3."
)
_REQUESTS = flags.DEFINE_integer("requests", 300, "Requests of each run, unless --config.search.requests says so.", 20)
_WORKLOADS = flags.DEFINE_list("workloads", [], "Without --config: only these, such as 13B ShareGPT; empty: all five.")
_WORKERS = flags.DEFINE_integer("workers", 0, "Processes; 0: one per core.", lower_bound=0)

AT_TABLE_3 = "DistServe, Table 3"
COLOURS = {AT_TABLE_3: 6, "DistServe": 0, "vLLM": 1, "vLLM++": 5, "DeepSpeed-MII": 2, "multiplexed": 3, "deflected": 4}


def systems_of(plan: PlanConfig, evaluation: Evaluation | None, disaggregated: Any, colocated: Any) -> list[System]:
    """What is compared, of what has a placement."""
    from ds_jax.placement.layouts import Shape
    from experiments.systems import MII, System, mixed, multiplexing, pair

    found: list[System] = []
    vllm = mixed(Shape(evaluation.vllm_tp, 1)) if evaluation else colocated
    if disaggregated is not None:
        found.append(System("DistServe", "disaggregated", disaggregated))
    if evaluation and disaggregated not in (None, pair(evaluation.prefill, evaluation.decode)):
        found.append(System(AT_TABLE_3, "disaggregated", pair(evaluation.prefill, evaluation.decode)))
    if vllm is not None:
        found.append(System("vLLM", "colocated", vllm))
    if plan.search.rule == "published":
        return found
    if colocated is not None and colocated != vllm:
        found.append(System("vLLM++", "colocated", colocated))
    if vllm is not None:
        found.append(System("DeepSpeed-MII", "chunked", vllm, MII))
    if disaggregated is not None:
        found += [
            System(policy, policy, multiplexing(disaggregated), foretells=True)
            for policy in ("multiplexed", "deflected")
        ]
    return found


def run_length(counts: Sequence[int] = (300, 600, 1200, 2400)) -> list[dict[str, float]]:
    """DistServe on OPT-13B, prefill tp 2 and decode tp 1, 6 requests/s in all: attainment of longer and longer runs."""
    from ds_jax.config import SloConfig
    from experiments.systems import EVALUATIONS, System, pair, serve

    one = EVALUATIONS[0]
    plan = replace(one.plan(), slo=SloConfig(0.2, 0.1))
    system = System("DistServe", "disaggregated", pair(one.prefill, one.decode))
    rows = []
    for count in counts:
        row = {"requests": float(count)}
        for rule in ("joint", "published"):
            longer = replace(plan, search=replace(plan.search, rule=rule, requests=count))
            row[rule] = serve(longer, system, 6 / system.unit.gpus).share(plan.slo)
        rows.append(row)
    return rows


def main(argv: list[str]) -> None:
    """Search, simulate, compare, draw."""
    from experiments.curves import find, study, tighten
    from experiments.output import Output, table
    from experiments.published import ratio, rows
    from experiments.systems import chosen_plans, hardware, pair, parallel

    chosen = chosen_plans(flags.FLAGS)
    names = [evaluation.name if evaluation else plan.workload.name for evaluation, plan in chosen]
    if wrong := set(_WORKLOADS.value) - set(names):
        raise ValueError(f"--workloads: {sorted(wrong)[0]!r} must be one of {', '.join(names)}")
    chosen = [one for one, name in zip(chosen, names, strict=True) if name in (_WORKLOADS.value or names)]
    names = [name for name in names if name in (_WORKLOADS.value or names)]
    rules = ("joint", "published")
    plans = {}
    for (_, plan), name in zip(chosen, names, strict=True):
        for rule in rules:
            count = plan.search.requests or _REQUESTS.value
            # The published rule takes 300 requests; where fewer are asked for, these.
            count = count if rule == "joint" else min(count, 300)
            plans[name, rule] = replace(plan, search=replace(plan.search, rule=rule, requests=count))  # type: ignore[arg-type]
    output = Output(_OUTPUT_DIR.value)
    output.config(
        {
            "placements": _PLACEMENTS.value,
            "plans": {name: asdict(plan) for name, (_, plan) in zip(names, chosen, strict=True)},
        }
    )

    searched = [(name, rule, policy) for name in names for rule in rules for policy in ("disaggregated", "colocated")]
    if _PLACEMENTS.value == "published":
        searched = [one for one in searched if one[2] == "colocated"]
    found = dict(
        zip(
            searched,
            parallel(find, [(plans[one[:2]], one[2]) for one in searched], "placements", _WORKERS.value),
            strict=True,
        )
    )
    systems: dict[tuple[str, str], list[System]] = {}
    for (evaluation, plan), name in zip(chosen, names, strict=True):
        for rule in rules:
            unit = found.get((name, rule, "disaggregated"), (None, ""))[0]
            if _PLACEMENTS.value == "published":
                if evaluation is None:
                    raise ValueError(f"--placements=published: the paper has none for {plan.model}, {name}")
                unit = pair(evaluation.prefill, evaluation.decode)
            colocated = found[name, rule, "colocated"][0]
            systems[name, rule] = systems_of(plans[name, rule], evaluation, unit, colocated)
    jobs = [(plans[key], system, 1.0) for key, every in systems.items() for system in every]
    keys = [(*key, system.name) for key, every in systems.items() for system in every]
    results = dict(zip(keys, parallel(study, jobs, "rates", _WORKERS.value), strict=True))

    # The lower row: at vLLM's goodput (where it has none, at half of DistServe's).
    at: dict[tuple[str, str], float] = {}
    for key in systems:
        own = [results[(*key, name)]["goodput_90"] for name in ("vLLM", "DistServe") if (*key, name) in results]
        at[key] = next((value * part for value, part in zip(own, (1.0, 0.5), strict=False) if value), 0.0)
    scaled = [(key, system) for key, every in systems.items() for system in every if at[key]]
    tightened = parallel(tighten, [(plans[key], system, at[key]) for key, system in scaled], "targets", _WORKERS.value)
    for (key, system), one in zip(scaled, tightened, strict=True):
        results[(*key, system.name)]["scale"] = one

    summary: dict[str, Any] = {}
    shown = []
    for name in names:
        machines = hardware(plans[name, "joint"])
        entry: dict[str, Any] = {"extrapolated": machines.extrapolated, "assumed": _assumed(plans[name, "joint"])}
        for rule in rules:
            entry[rule] = {
                system.name: {"unit": str(system.unit), **results[name, rule, system.name]}
                for system in systems[name, rule]
            }
            entry[f"ratios_{rule}"] = _ratios(entry[rule])
            entry[f"rate_of_scales_{rule}"] = at[name, rule]
            for system in systems[name, rule]:
                one = results[name, rule, system.name]
                shown.append(
                    [name + (" *" if machines.extrapolated else ""), rule, system.name, str(system.unit),
                     one["goodput_90"], one["goodput_99"], one.get("scale", {}).get("tightest")]
                )  # fmt: skip
        entry["without_placement"] = {
            f"{rule} {policy}": found[name, rule, policy][1]
            for rule, policy in itertools.product(rules, ("disaggregated", "colocated"))
            if (name, rule, policy) in found and found[name, rule, policy][0] is None
        }
        summary[name] = entry
    lengths = run_length() if not flags.FLAGS["config"].value and not _WORKLOADS.value else []
    compared = [row for (one, _), name in zip(chosen, names, strict=True) for row in _compare(one, name, summary[name])]
    compared += _compare_lengths(lengths)
    first = summary[names[0]] if len(names) == 1 else {}
    output.summary(
        {
            "goodput_per_gpu": {
                system: {"90": one["goodput_90"], "99": one["goodput_99"]}
                for system, one in first.get("joint", {}).items()
            },
            "ratios": first.get("ratios_joint", {}),
            "workloads": summary,
            "run_length": lengths,
            "compared": rows(compared),
        }
    )
    _draw(output, names, summary)
    header = ["workload", "rule", "system", "unit", "90 %", "99 %", "SLO scale"]
    print("goodput in requests/s per GPU; SLO scale: the tightest that 90 % keep at vLLM's goodput; *: extrapolated")
    print(table(header, shown))
    for name in names:
        for rule in rules:
            text = ", ".join(f"{key} {ratio(value)}" for key, value in summary[name][f"ratios_{rule}"].items())
            print(f"{name}, {rule}: DistServe over {text}")
        for what, why in summary[name]["without_placement"].items():
            print(f"{name}, {what}: no placement: {why}")
    for row in lengths:
        print(f"13B at 6 requests/s, {row['requests']:.0f} requests: {row['joint']:.1%}; public {row['published']:.1%}")
    print(f"written to {output.folder}")


def _assumed(plan: PlanConfig) -> str:
    from ds_jax.placement.trial import Requests

    return Requests(plan).assumed


def _ratios(found: dict[str, Any]) -> dict[str, float | None]:
    """DistServe's goodput over that of the others, and the others' tightest scale over DistServe's."""
    ours = found.get("DistServe")
    if ours is None:
        return {}
    values: dict[str, float | None] = {}
    for name, one in found.items():
        if name == "DistServe":
            continue
        values[name] = ours["goodput_90"] / one["goodput_90"] if one["goodput_90"] else None
        scales = [each.get("scale", {}).get("tightest") for each in (one, ours)]
        values[f"{name}, SLO scale"] = scales[0] / scales[1] if all(scales) else None
    return values


def _compare(evaluation: Evaluation | None, name: str, entry: dict[str, Any]) -> list[Any]:
    """Rows of the table of published ratios."""
    from experiments.published import Compared, ratio

    if evaluation is None:
        return []
    joint, public = entry["ratios_joint"], entry["ratios_published"]
    compared = []
    for other, key, published in (
        ("vLLM", "vLLM", evaluation.goodput_over_vllm),
        ("DeepSpeed-MII", "DeepSpeed-MII", evaluation.goodput_over_mii),
        ("vLLM", "vLLM, SLO scale", evaluation.slo_over_vllm),
        ("DeepSpeed-MII", "DeepSpeed-MII, SLO scale", evaluation.slo_over_mii),
    ):
        if published is None:
            continue
        what = "how much tighter targets may be" if "scale" in key else "goodput"
        mine = f"{ratio(joint.get(key))} joint"
        if other == "vLLM":
            mine = f"{ratio(public.get(key))} public rules; {mine}"
        compared.append(
            Compared(
                f"{name}: {what}, DistServe over {other}",
                ratio(published),
                mine,
                _why(entry, other, "scale" in key),
                extrapolated=entry["extrapolated"],
            )
        )
    unit = {rule: entry[rule].get("DistServe", {}).get("unit", "none") for rule in ("published", "joint")}
    compared.append(
        Compared(
            f"{name}: placement (tp,pp) prefill / decode",
            f"{evaluation.prefill.tp},{evaluation.prefill.pp} / {evaluation.decode.tp},{evaluation.decode.pp}",
            f"{unit['published']} public rules; {unit['joint']} joint",
            " ".join(filter(None, (_at_table_3(entry, rule) for rule in ("published", "joint")))) or "The same.",
            extrapolated=entry["extrapolated"],
        )
    )
    return compared


def _at_table_3(entry: dict[str, Any], rule: str) -> str:
    """What the paper's placement is worth here beside the one that was found."""
    found, paper = entry[rule].get("DistServe"), entry[rule].get(AT_TABLE_3)
    if found is None or paper is None:
        return ""
    told = "public rules" if rule == "published" else rule
    return (
        f"{told}: the paper's placement has {paper['goodput_90']:.2f} requests/s per GPU here, ours "
        f"{found['goodput_90']:.2f}."
    )


def _why(entry: dict[str, Any], other: str, scale: bool) -> str:
    """From what was measured: which target holds the other system back, and what its own step times make of it."""
    from experiments.curves import SHARES

    reasons = []
    one = entry["joint"].get(other)
    if one is None or not one["goodput_90"]:
        return f"{other} does not reach 90 % at any rate here."
    after = min((point for point in one["curve"] if point["both"] < SHARES[0]), key=lambda p: p["rate"], default=None)
    if after is not None:
        binding = "TTFT" if after["ttft"] < after["tpot"] else "TPOT"
        reasons.append(f"{binding} holds {other} back (beyond its goodput {after['ttft']:.0%} are inside TTFT, "
                       f"{after['tpot']:.0%} inside TPOT).")  # fmt: skip
    public = entry["published"].get(other)
    if other == "vLLM" and public and public["goodput_90"] and not entry["extrapolated"]:
        reasons.append(
            f"With the step times and host work of vLLM 0.2 it has {public['goodput_90']:.2f} requests/s per GPU, with "
            f"ours {one['goodput_90']:.2f}: the difference is the engine, not the policy."
        )
    if other == "DeepSpeed-MII":
        reasons.append("It has the same step times here; nobody published its own.")
    if scale:
        reasons.append("The paper does not say at which rate; ours is vLLM's goodput.")
    if entry["extrapolated"]:
        reasons.append("Step times of this model are worked out, not measured.")
    if entry["assumed"]:
        reasons.append("Of the lengths only the means are published.")
    return " ".join(reasons)


def _compare_lengths(lengths: list[dict[str, float]]) -> list[Any]:
    from experiments.published import Compared

    published = {300: "90.7 %", 600: "60.7 %"}
    return [
        Compared(
            f"OPT-13B at 6 requests/s, targets 0.2/0.1 s: attainment of {count} requests on real A100s",
            value,
            next(f"{row['published']:.1%} public rules; {row['joint']:.1%} joint" for row in lengths
                 if row["requests"] == count),
            "Near saturation a queue grows as long as the run lasts; where saturation is depends on the last percents "
            "of the step times.",
        )
        for count, value in published.items()
        if any(row["requests"] == count for row in lengths)
    ]  # fmt: skip


def _draw(output: Any, names: list[str], summary: dict[str, Any]) -> None:
    from experiments.curves import SCALES
    from experiments.output import PALETTE, axes

    for rule, what in (("joint", "same step times and rules"), ("published", "public systems' rules")):
        figure, panels = axes(2, len(names), width=3.1 if len(names) > 1 else 5.5, height=2.7)
        for column, name in enumerate(names):
            upper, lower = panels[column], panels[len(names) + column]
            entry = summary[name]
            for system, one in entry[rule].items():
                colour = PALETTE[COLOURS[system]]
                curve = one["curve"]
                key = [point["both"] if rule == "joint" else min(point["ttft"], point["tpot"]) for point in curve]
                upper.plot([p["rate"] for p in curve], [100 * value for value in key], "o-", ms=2.5, color=colour,
                           label=system)  # fmt: skip
                if "scale" in one:
                    lower.plot(SCALES, [100 * value for value in one["scale"]["values"]], "o-", ms=2.5, color=colour)
            most = max((one["goodput_90"] for one in entry[rule].values()), default=1.0) or 1.0
            upper.set(xlim=(0, 1.5 * most), xlabel="requests/s per GPU", ylim=(0, 103))
            lower.set(
                xlim=(SCALES[-1], 0), ylim=(0, 103), xlabel=f"SLO scale at {entry[f'rate_of_scales_{rule}']:.2g}/s"
            )
            for panel in (upper, lower):
                panel.axhline(90, color="#777777", lw=1, ls=":")
            upper.set_title(name + (" (extrapolated)" if entry["extrapolated"] else ""), loc="left")
        panels[0].set_ylabel("attainment, %" if rule == "joint" else "attainment of the worse target, %")
        panels[len(names)].set_ylabel("attainment of both, %")
        handles = {
            label: handle for panel in panels for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
        }
        figure.legend(
            handles.values(), handles.keys(), loc="outside upper center", ncols=6 if len(names) > 2 else 3, title=what
        )
        output.figure(f"fig8_attainment_{rule}", figure)


if __name__ == "__main__":
    run(main)
