"""What `experiments.goodput` tells of its runs: ratios, rows beside the published ones, the reasons, the figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ds_jax.placement.goodput import published_rates
from experiments.curves import SCALES, SHARES
from experiments.goodput_runs import AT_TABLE_3
from experiments.published import Compared, ratio
from experiments.systems import MII_ASSUMED, Evaluation

COLOURS = {AT_TABLE_3: 6, "DistServe": 0, "vLLM": 1, "vLLM++": 5, "DeepSpeed-MII": 2, "multiplexed": 3, "deflected": 4}
TOLD = {"joint": "joint", "published": "public rules"}
RUN_LENGTHS = {300: "90.7 %", 600: "60.7 %"}
"""Real A100s, OPT-13B at 6 requests/s: attainment by the number of requests."""


def ratios(found: Mapping[str, Any]) -> dict[str, float | None]:
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


def compare(evaluation: Evaluation | None, name: str, entry: Mapping[str, Any], rules: Sequence[str]) -> list[Compared]:
    """Rows of the table of published ratios; none where the plan is not the paper's.

    Args:
        entry: of the workload in summary.json: results by rule, `ratios_RULE`, `extrapolated`, `assumed`.
        rules: those that were run.
    """
    if evaluation is None:
        return []
    compared = []
    for other, key, published in (
        ("vLLM", "vLLM", evaluation.goodput_over_vllm),
        ("DeepSpeed-MII", "DeepSpeed-MII", evaluation.goodput_over_mii),
        ("vLLM", "vLLM, SLO scale", evaluation.slo_over_vllm),
        ("DeepSpeed-MII", "DeepSpeed-MII, SLO scale", evaluation.slo_over_mii),
    ):
        mine = [f"{ratio(entry[f'ratios_{rule}'].get(key))} {TOLD[rule]}" for rule in rules if other in entry[rule]]
        if published is None or not mine:
            continue
        what = "how much tighter targets may be" if "scale" in key else "goodput"
        compared.append(
            Compared(
                f"{name}: {what}, DistServe over {other}",
                ratio(published),
                "; ".join(mine) + f" ({_requests(entry, rules)})",
                _why(entry, other, "scale" in key, rules),
                extrapolated=entry["extrapolated"],
                assumed=MII_ASSUMED if other == "DeepSpeed-MII" else "",
            )
        )
    units = "; ".join(f"{entry[rule].get('DistServe', {}).get('unit', 'none')} {TOLD[rule]}" for rule in rules)
    compared.append(
        Compared(
            f"{name}: placement (tp,pp) prefill / decode (Table 3)",
            f"{evaluation.prefill.tp},{evaluation.prefill.pp} / {evaluation.decode.tp},{evaluation.decode.pp}",
            f"{units} ({_requests(entry, rules)})",
            " ".join(at_table_3(entry, rule) for rule in rules),
            extrapolated=entry["extrapolated"],
        )
    )
    return compared


def _requests(entry: Mapping[str, Any], rules: Sequence[str]) -> str:
    counts = [max((one["requests"] for one in entry[rule].values()), default=0) for rule in rules]
    return "runs of " + " and ".join(map(str, counts)) + " requests"


def at_table_3(entry: Mapping[str, Any], rule: str) -> str:
    """What the paper's placement is worth here beside the one that was found, and what holds it back."""
    found, paper = entry[rule].get("DistServe"), entry[rule].get(AT_TABLE_3)
    told = TOLD[rule].capitalize()
    if found is None:
        return f"{told}: no placement meets the targets here."
    if paper is None:
        return f"{told}: the paper's placement, {found['goodput_90']:.2f} requests/s per GPU."
    held = binding(paper)
    by = f", where {held} holds it back" if held else ""
    gain = f" ({found['goodput_90'] / paper['goodput_90'] - 1:+.0%})" if paper["goodput_90"] else ""
    return (
        f"{told}: the paper's placement has {paper['goodput_90']:.2f} requests/s per GPU with the step times here{by}; "
        f"{found['unit']} has {found['goodput_90']:.2f}{gain}.{_tied(found, paper) if rule == 'published' else ''}"
    )


def _tied(found: Mapping[str, Any], paper: Mapping[str, Any]) -> str:
    """Why the public rule may prefer a placement with less: it knows goodputs by the steps of its grid alone."""
    step = published_rates()[0]
    passed = found["goodput_90"] // step
    if found["goodput_90"] >= paper["goodput_90"] or passed != paper["goodput_90"] // step:
        return ""
    return f" The search looks at rates in steps of {step:.2f}: both pass {passed * step:.2f}, and fewer GPUs win."


def binding(one: Mapping[str, Any]) -> str:
    """TTFT or TPOT: the target that more requests miss just beyond the goodput; nothing where no rate is beyond."""
    after = _beyond(one)
    return "" if after is None else "TTFT" if after["ttft"] < after["tpot"] else "TPOT"


def _beyond(one: Mapping[str, Any]) -> dict[str, float] | None:
    points = [point for point in one["curve"] if point["rate"] > one["goodput_90"] and point["both"] < SHARES[0]]
    return min(points, key=lambda point: point["rate"], default=None)


def _why(entry: Mapping[str, Any], other: str, scale: bool, rules: Sequence[str]) -> str:
    """From what was measured: which target holds the other system back, and what its own step times make of it."""
    reasons = []
    rule = rules[0]
    one, distserve = entry[rule].get(other), entry[rule].get("DistServe")
    if one is None or not one["goodput_90"]:
        return f"{other} does not reach 90 % at any rate here."
    after = _beyond(one)
    if after is not None:
        reasons.append(f"{binding(one)} holds {other} back (beyond its goodput {after['ttft']:.0%} are inside TTFT, "
                       f"{after['tpot']:.0%} inside TPOT).")  # fmt: skip
    if distserve and distserve["goodput_90"] and not scale:
        reasons.append(f"{TOLD[rule].capitalize()}: DistServe {distserve['goodput_90']:.2f}, {other} "
                       f"{one['goodput_90']:.2f} requests/s per GPU.")  # fmt: skip
    public = entry.get("published", {}).get(other)
    if rule == "joint" and other == "vLLM" and public and public["goodput_90"] and not entry["extrapolated"]:
        reasons.append(
            f"With the step times and host work of vLLM 0.2 it has {public['goodput_90']:.2f}, with ours "
            f"{one['goodput_90']:.2f}: that difference is the engine, not the policy."
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


def compare_lengths(lengths: Sequence[Mapping[str, float]]) -> list[Compared]:
    """Rows of the runs that grow longer."""
    ours = {row["requests"]: f"{row['published']:.1%} public rules; {row['joint']:.1%} joint" for row in lengths}
    longest = max(ours, default=0)
    return [
        Compared(
            f"OPT-13B at 6 requests/s, targets 0.2/0.1 s: attainment of {count} requests on real A100s",
            published,
            ours[count] + ("" if count == longest else f"; after {longest:.0f}: {ours[longest]}"),
            "Near saturation a queue grows as long as the run lasts; where saturation is depends on the last percents "
            "of the step times.",
        )
        for count, published in RUN_LENGTHS.items()
        if count in ours
    ]


def draw(output: Any, summary: Mapping[str, Any], rules: Sequence[str]) -> None:
    """fig8_attainment_RULE: one column per workload, against the rate above, against the scale of targets below."""
    from experiments.output import PALETTE, axes

    names = list(summary)
    for rule in rules:
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
                    scale = one["scale"]
                    lower.plot(scale["scales"], [100 * share for share in scale["values"]], "o-", ms=2.5, color=colour)
            most = max((one["goodput_90"] for one in entry[rule].values()), default=1.0) or 1.0
            upper.set(xlim=(0, 1.5 * most), xlabel="requests/s per GPU", ylim=(0, 103))
            rate = entry[f"rate_of_scales_{rule}"]
            lower.set(xlim=(SCALES[-1], 0), ylim=(0, 103), xlabel=f"scale of targets, at {rate:.2g}/s per GPU")
            for panel in (upper, lower):
                panel.axhline(90, color="#777777", lw=1, ls=":")
            upper.set_title(name + (" (extrapolated)" if entry["extrapolated"] else ""), loc="left")
        panels[0].set_ylabel("attainment, %" if rule == "joint" else "attainment of the worse target, %")
        panels[len(names)].set_ylabel("attainment of both, %")
        handles = {
            label: handle for panel in panels for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
        }
        counts = {one["requests"] for name in names for one in summary[name][rule].values()}
        what = "same step times and rules for all" if rule == "joint" else "rules of the public systems"
        title = f"{what}, runs of {' or '.join(map(str, sorted(counts)))} requests"
        columns = 7 if len(names) > 2 else 4
        figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=columns, title=title)
        output.figure(f"fig8_attainment_{rule}", figure)
