"""How long the placement search takes against the number of GPUs, with high and with low node affinity.

python -m experiments.search_time --output_dir=out/search_time

Figure 12 of DistServe shows that both algorithms take up to 1.3 minutes for 32 GPUs on 96 cores, and that the time
hardly depends on the model. The public simulator takes about 28 s for 9 and 70 s for 61 configurations on two cores.
Ours shows seconds of wall time on the cores of this machine, with the configurations that there were, those that were
simulated at all (the others are ruled out by their bounds), and the trials that these took. No cache is used: every
time is of a whole search. --clusters=1x8,4x8,16x8 for larger ones.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from absl import flags

from ds_jax.flags import define_config, load_config, run
from ds_jax.plan import PlanConfig

define_config(PlanConfig, default_file="configs/plan_opt_66b_a100.py")
_OUTPUT_DIR = flags.DEFINE_string("output_dir", None, "Folder for the results.", required=True)
_CLUSTERS = flags.DEFINE_list("clusters", ["1x4", "1x8", "2x8", "4x8"], "Clusters: NODESxGPUS_PER_NODE.")

_REFUSED = {f"config.cluster.{name}": "--clusters says which there are" for name in ("nodes", "gpus_per_node")} | {
    "config.affinity": "both are searched",
    "config.search.cache": "a search that is answered from a cache has no time of its own",
}

TARGETS_S = {"1x8": 3.0, "4x8": 15.0, "16x8": 120.0}
"""What this project asks of two idle cores."""


def measure(plan: PlanConfig) -> dict[str, Any]:
    """One search of the plan's policy alone: wall time, and what it looked at."""
    from ds_jax.placement.search import PlacementSearch
    from experiments.systems import hardware

    arch = hardware(plan).arch
    begin, busy = time.perf_counter(), time.process_time()
    with PlacementSearch(plan, arch) as search:
        found = search.find(())
    seconds = time.perf_counter() - begin
    return {
        "seconds": seconds,
        "own_cpu_s": time.process_time() - busy,
        "configurations": found.configurations,
        "simulated": found.simulated,
        "trials": sum(one.goodput.trials for one in found.judged if one.goodput is not None),
        "unit": str(found.placement.unit),
        "goodput_per_gpu": found.placement.goodput_per_gpu,
        "extrapolated": found.extrapolated,
        "notes": list(found.notes),
    }


def parse(cluster: str) -> tuple[int, int]:
    """4x8 -> (4, 8). Raises ValueError."""
    nodes, _, gpus = cluster.partition("x")
    if not (nodes.isdecimal() and gpus.isdecimal() and int(nodes) and int(gpus)):
        raise ValueError(f"--clusters: {cluster!r} must be NODESxGPUS_PER_NODE, such as 4x8")
    return int(nodes), int(gpus)


def main(argv: list[str]) -> None:
    """Search every cluster with both algorithms; print and draw."""
    from dataclasses import replace

    from tqdm import tqdm

    from experiments.output import Output, axes, merged, table
    from experiments.published import PUBLIC_SIMULATOR, Compared, rows
    from experiments.systems import refuse

    refuse(flags.FLAGS, _REFUSED)
    plan = load_config(PlanConfig)
    clusters = [(name, *parse(name)) for name in _CLUSTERS.value]
    output = Output(_OUTPUT_DIR.value)
    output.config(plan)
    cores, load = os.cpu_count() or 1, os.getloadavg()[0]
    results: list[dict[str, Any]] = []
    jobs = [(*cluster, affinity) for cluster in clusters for affinity in ("low", "high")]
    for name, nodes, gpus, affinity in tqdm(jobs, desc="searches", leave=False):
        sized = replace(
            plan,
            affinity=affinity,
            cluster=replace(
                plan.cluster,
                nodes=nodes,
                gpus_per_node=gpus,
                # High affinity means fast links between nodes: InfiniBand, 800 Gbit/s.
                network_gbits=800.0 if affinity == "high" else plan.cluster.network_gbits,
            ),
            search=replace(plan.search, cache=""),
        )
        row = {"cluster": name, "gpus": nodes * gpus, "affinity": affinity}
        try:
            results.append(row | measure(sized))
        except ValueError as error:  # Infeasible, such as a model that one small node cannot hold
            results.append(row | {"infeasible": str(error)})
    done = [row for row in results if "seconds" in row]
    model = Path(plan.model).name
    compared = []
    for row in done:
        if row["gpus"] == 32:
            compared.append(
                Compared(
                    f"search for {row['cluster']} GPUs, {model}, {row['affinity']} affinity (Fig. 12)",
                    "up to 1.3 min on 96 cores",
                    f"{row['seconds']:.1f} s on {cores} cores (load average {load:.1f} before)",
                    f"Bounds leave {row['simulated']} of {row['configurations']} configurations to be simulated, in "
                    f"{row['trials']} trials; a decode step of the simulator costs what changes, not its batch.",
                )
            )
        elif (row["cluster"], model, row["affinity"]) == ("1x8", "opt-66b", "low"):
            compared.append(
                Compared(
                    f"search of 61 configurations, OPT-66B on 1 x 8 (ours: {row['configurations']})",
                    "about 70 s on 2 cores",
                    f"{row['seconds']:.1f} s on {cores} cores (load average {load:.1f} before)",
                    f"Pruned to {row['simulated']} simulated configurations, {row['trials']} trials.",
                    source=PUBLIC_SIMULATOR,
                )
            )
    notes = merged([(f"{row['cluster']} {row['affinity']}", note) for row in done for note in row["notes"]])
    output.summary(
        {"extrapolated": any(row["extrapolated"] for row in done), "notes": notes, "cores": cores,
         "load_average": load, "targets_s": TARGETS_S, "searches": results, "compared": rows(compared)}
    )  # fmt: skip
    figure, (panel,) = axes(width=5.0)
    for affinity in ("low", "high"):
        mine = [row for row in done if row["affinity"] == affinity]
        panel.plot([row["gpus"] for row in mine], [row["seconds"] for row in mine], "o-", label=f"{affinity} affinity")
    panel.plot([32], [78], "x", color="#777777", label="published, on 96 cores")
    panel.set(xscale="log", yscale="log", xlabel="GPUs", ylabel="seconds")
    ticks = sorted({row["gpus"] for row in done} | {32})
    panel.set_xticks(ticks, [str(tick) for tick in ticks])
    panel.minorticks_off()
    seconds = [row["seconds"] for row in done] + [1.0, 78.0]
    marks = [mark for mark in (0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000) if min(seconds) / 3 < mark < 3 * max(seconds)]
    panel.set_yticks(marks, [f"{mark:g}" for mark in marks])
    panel.set_ylim(min(seconds) / 1.5, 2 * max(seconds))
    extrapolated = " (extrapolated)" if any(row["extrapolated"] for row in done) else ""
    panel.set_title(f"{model}{extrapolated} on {cores} cores, load average {load:.1f}", loc="left")
    panel.legend()
    output.figure("fig12_search_time", figure)
    header = ["cluster", "affinity", "seconds", "target", "configurations", "simulated", "trials", "best"]
    shown = [
        [row["cluster"], row["affinity"], row["seconds"], TARGETS_S.get(row["cluster"]), row["configurations"],
         row["simulated"], row["trials"], f"{row['goodput_per_gpu']:.3g}/s/GPU, {row['unit']}"]
        for row in done
    ]  # fmt: skip
    print(table(header, shown))
    for row in results:
        if "infeasible" in row:
            print(f"{row['cluster']}, {row['affinity']}: {row['infeasible']}")
    for note in notes:
        print(f"note: {note}")
    print(f"{cores} cores, load average {load:.1f} before; written to {output.folder}")


if __name__ == "__main__":
    run(main)
