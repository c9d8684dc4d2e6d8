"""What disaggregation gains and what the placement search gains: DistServe-High, DistServe-Low, vLLM++ and vLLM.

python -m experiments.ablation --output_dir=out/ablation

Figure 11 of DistServe shows, in simulation, that vLLM++ (vLLM with its parallelism searched for) is hardly better
than vLLM, that DistServe-Low (a prefill and a decode instance share their nodes) is far better than both, and that
DistServe-High (each phase is placed freely, as fast links between all nodes allow) is somewhat better still. Ours shows
attainment against the rate of the same four, each at what the search finds for it, under our rules (1000 requests a
run) and under those of the public systems (300). DistServe-High is searched for on twice the GPUs, joined by 800
Gbit/s, and in runs of twice the requests; its rates are per GPU as well.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from absl import flags

from ds_jax.flags import run

_OUTPUT_DIR = flags.DEFINE_string("output_dir", None, "Folder for the results.", required=True)
_WORKLOADS = flags.DEFINE_list("workloads", ["13B ShareGPT", "66B ShareGPT"], "Of the paper's five.")
_REQUESTS = flags.DEFINE_integer("requests", 1000, "Requests of each run of our rules; DistServe-High: twice.", 20)
_WORKERS = flags.DEFINE_integer("workers", 0, "Processes; 0: one per core.", lower_bound=0)

SYSTEMS = ("DistServe-High", "DistServe-Low", "vLLM++", "vLLM")
RULES = ("joint", "published")


def plan_of(evaluation: Any, rule: str, system: str, requests: int) -> Any:
    """The paper's plan with the affinity that the system needs."""
    from experiments.curves import REQUESTS

    plan = evaluation.plan()
    count = requests if rule == "joint" else min(requests, REQUESTS["published"])
    affinity, cluster = "low", plan.cluster
    if system == "DistServe-High":
        # Fast links between nodes are what high affinity means: InfiniBand, 800 Gbit/s per node. Twice the GPUs, so
        # that there is room for a ratio of instances; then twice the requests, for runs as long as the others'.
        affinity, count = "high", 2 * count
        nodes, gpus = cluster.nodes, 2 * cluster.gpus_per_node
        nodes, gpus = (nodes, gpus) if gpus <= 8 else (2 * nodes, cluster.gpus_per_node)
        cluster = replace(cluster, nodes=nodes, gpus_per_node=gpus, network_gbits=800.0)
    return replace(plan, affinity=affinity, cluster=cluster, search=replace(plan.search, rule=rule, requests=count))


def main(argv: list[str]) -> None:
    """Search, simulate, compare, draw."""
    from ds_jax.placement.layouts import Shape
    from experiments.curves import find, study
    from experiments.output import Output, merged, table
    from experiments.published import FROM_MEMORY, Compared, ratio, rows
    from experiments.systems import EVALUATIONS, System, hardware, mixed, parallel

    known = {one.name: one for one in EVALUATIONS}
    for name in _WORKLOADS.value:
        if name not in known:
            raise ValueError(f"--workloads: {name!r} must be one of {', '.join(known)}")
    output = Output(_OUTPUT_DIR.value)
    chosen = [known[name] for name in _WORKLOADS.value]
    output.config({"requests": _REQUESTS.value, "plans": {one.name: asdict(one.plan()) for one in chosen}})
    keys = [(one, rule, system) for one in chosen for rule in RULES for system in SYSTEMS]
    plans = {(one.name, rule, system): plan_of(one, rule, system, _REQUESTS.value) for one, rule, system in keys}
    policies = {system: "disaggregated" if system.startswith("DistServe") else "colocated" for system in SYSTEMS}
    searched = [key for key in plans if key[2] != "vLLM"]
    jobs = [(plans[key], policies[key[2]]) for key in searched]
    places = dict(zip(searched, parallel(find, jobs, "placements", _WORKERS.value), strict=True))
    tried, firsts = {}, []
    for one, rule, system in keys:
        place = places[one.name, rule, "vLLM++" if system == "vLLM" else system]
        unit = mixed(Shape(one.vllm_tp, 1)) if system == "vLLM" else place.unit
        if unit is not None:
            tried[one.name, rule, system] = System(system, policies[system], unit)
            firsts.append(place.goodput or 1.0)
    runs = [(plans[key], system, first) for (key, system), first in zip(tried.items(), firsts, strict=True)]
    found = dict(zip(tried, parallel(study, runs, "rates", _WORKERS.value), strict=True))

    extrapolated = [one.name for one in chosen if hardware(plans[one.name, "joint", "vLLM"]).extrapolated]
    summary: dict[str, Any] = {}
    shown: list[list[object]] = []
    for (name, rule, system), result in found.items():
        shape, cluster = str(tried[name, rule, system].unit), plans[name, rule, system].cluster
        links = f", {cluster.network_gbits:g} Gbit/s" if system == "DistServe-High" else ""
        entry = {"unit": shape, "cluster": f"{cluster.nodes}x{cluster.gpus_per_node}{links}", **result}
        entry["over_vllm"] = _over(found, name, rule, system)
        summary.setdefault(name, {}).setdefault(rule, {})[system] = entry
        mark = " *" if name in extrapolated else ""
        shown.append([name + mark, rule, system, entry["cluster"], result["requests"], shape, result["goodput_90"],
                      result["goodput_99"], entry["over_vllm"]])  # fmt: skip
    counts = {rule: plans[_WORKLOADS.value[0], rule, "vLLM"].search.requests for rule in RULES}
    compared = []
    for name in _WORKLOADS.value:
        values = {
            rule: ", ".join(f"{system} {ratio(_over(found, name, rule, system))}" for system in SYSTEMS[:3])
            for rule in RULES
        }
        high = plans[name, "joint", "DistServe-High"].cluster
        compared.append(
            Compared(
                f"{name}: goodput over vLLM (Fig. 11)",
                "vLLM++ about 1x, DistServe-Low well above, DistServe-High above that",
                f"{values['published']} (public rules); {values['joint']} (joint). DistServe-High on "
                f"{high.nodes} x {high.gpus_per_node} GPUs with {high.network_gbits:g} Gbit/s, the others on half. "
                f"Runs of {counts['published']} and {counts['joint']} requests, DistServe-High's twice as long",
                _why(summary[name]),
                extrapolated=name in extrapolated,
                assumed=FROM_MEMORY,
            )
        )
    notes = merged([(key[0], note) for key, result in found.items() for note in result["notes"]])
    output.summary(
        {"extrapolated": extrapolated, "requests": counts, "notes": notes,
         "workloads": summary, "compared": rows(compared)}
    )  # fmt: skip
    _draw(output, found, extrapolated)
    print("goodput in requests/s per GPU; *: extrapolated")
    header = ["workload", "rule", "system", "cluster", "requests", "unit", "90 %", "99 %", "over vLLM"]
    print(table(header, shown))
    for key, place in places.items():
        if place.unit is None:
            print(f"{', '.join(key)}: no placement: {place.why_none}")
    for note in notes:
        print(f"note: {note}")
    print(f"written to {output.folder}")


def _draw(output: Any, found: dict[tuple[str, str, str], dict[str, Any]], extrapolated: list[str]) -> None:
    from experiments.output import PALETTE, axes

    names = list(dict.fromkeys(name for name, *_ in found))
    figure, panels = axes(len(RULES), len(names), width=4.0, height=2.8)
    for row, rule in enumerate(RULES):
        for column, name in enumerate(names):
            panel = panels[row * len(names) + column]
            for system, colour in zip(SYSTEMS, (2, 0, 5, 1), strict=True):
                if (name, rule, system) in found:
                    curve = found[name, rule, system]["curve"]
                    inside = [
                        100 * (point["both"] if rule == "joint" else min(point["ttft"], point["tpot"]))
                        for point in curve
                    ]
                    panel.plot([p["rate"] for p in curve], inside, "o-", ms=2.5, color=PALETTE[colour], label=system)
            most = max(found[key]["goodput_90"] for key in found if key[:2] == (name, rule))
            panel.axhline(90, color="#777777", lw=1, ls=":")
            panel.set(xlim=(0, 1.6 * (most or 1)), ylim=(0, 103), xlabel="requests/s per GPU")
            panel.set_ylabel("both targets, %" if rule == "joint" else "the worse target, %")
            mark = " (extrapolated)" if name in extrapolated else ""
            count = next(found[key]["requests"] for key in found if key == (name, rule, "vLLM"))
            told = f"{name}, {'our' if rule == 'joint' else 'public'} rules, {count} requests{mark}"
            panel.set_title(told, loc="left", fontsize=9)
    handles, labels = panels[0].get_legend_handles_labels()
    title = "DistServe-High: on twice the GPUs, in runs of twice the requests"
    figure.legend(handles, labels, loc="outside upper center", ncols=4, title=title)
    output.figure("fig11_ablation", figure)


def _over(found: dict[tuple[str, str, str], dict[str, Any]], name: str, rule: str, system: str) -> float | None:
    mine, vllm = found.get((name, rule, system)), found.get((name, rule, "vLLM"))
    if mine is None or vllm is None or not vllm["goodput_90"]:
        return None
    return float(mine["goodput_90"] / vllm["goodput_90"])


def _why(entry: dict[str, Any]) -> str:
    """From what was measured."""
    sentences = []
    for rule, told in (("published", "public rules"), ("joint", "joint")):
        units = entry[rule]
        if "vLLM++" in units and "vLLM" in units:
            same = units["vLLM++"]["unit"] == units["vLLM"]["unit"]
            sentences.append(
                f"{told}: vLLM++ is vLLM itself."
                if same
                else f"{told}: the search gives vLLM++ {units['vLLM++']['unit']} in place of {units['vLLM']['unit']}."
            )
    sentences.append(
        "DistServe-High places each phase alone and rounds their ratio to whole instances; the share of requests that "
        "meet both targets is less than that of either, which is seen only when both are simulated together."
    )
    return " ".join(sentences)


if __name__ == "__main__":
    run(main)
