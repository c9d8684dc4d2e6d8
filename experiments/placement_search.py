"""Find the placement with the highest goodput per GPU: how many instances, of which parallelism, for which phase.

python -m experiments.placement_search --config=configs/plan_opt_13b_a100.py --output_dir=out/plan

OUTPUT_DIR gets summary.json, config.json (the resolved plan), serve.py (the placement as a configuration for
experiments.serve), candidates.csv and a figure. --beside names policies whose best placement is told beside it.
"""

from __future__ import annotations

import csv
from typing import Any

from absl import flags

from ds_jax.flags import define_config, load_config, run
from ds_jax.plan import PlanConfig

define_config(PlanConfig, default_file="configs/plan_opt_13b_a100.py")
_OUTPUT_DIR = flags.DEFINE_string("output_dir", None, "Folder for the results.", required=True)
_BESIDE = flags.DEFINE_list("beside", ["disaggregated", "colocated"], "Policies to be compared with, by name.")


def main(argv: list[str]) -> None:
    """Search, print, write down."""
    plan = load_config(PlanConfig)

    from tqdm import tqdm

    from ds_jax.config import ROLES
    from ds_jax.placement.report import serving_config, summary
    from ds_jax.placement.search import PlacementSearch
    from experiments.output import Output, table
    from models.folder import read_configs

    for policy in _BESIDE.value:
        if policy not in ROLES:
            raise ValueError(f"--beside: {policy!r} must be one of {', '.join(ROLES)}")
    checkpoint = read_configs(plan.model)
    dummy = not any(checkpoint.folder.glob("*.safetensors"))
    output = Output(_OUTPUT_DIR.value)
    output.config(plan)
    with tqdm(unit="candidate", leave=False) as bar:

        def progress(done: int, total: int, what: str) -> None:
            bar.total = total
            bar.set_description(what)
            bar.update(done - bar.n)

        with PlacementSearch(plan, checkpoint.arch, progress) as search:
            found = search.find([policy for policy in _BESIDE.value if policy != plan.policy])
    values = summary(plan, found)
    output.summary(values)
    output.text("serve.py", serving_config(plan, found.placement, search.hardware, dummy=dummy))
    with (output.folder / "candidates.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(
            ("policy", "phases", "unit", "gpus", "goodput_per_gpu", "bound_per_gpu", "trials", "ruled_out_by")
        )
        writer.writerows(_row(one) for one in found.judged)
    _draw(output, found, plan)

    rows = [
        [policy, one["unit"], one["replicas"], one["gpus"], one["goodput_per_gpu"], one["ttft_s"], one["tpot_s"]]
        for policy, one in values["placements"].items()
    ]
    percentile = f"P{100 * plan.search.attainment:g}"
    header = ["policy", "unit", "units", "GPUs", "requests/s/GPU", f"{percentile} TTFT s", f"{percentile} TPOT s"]
    print(table(header, rows))
    if values["extrapolated"]:
        print("extrapolated: step times are worked out from published figures of GPU and model, not measured")
    for note in values["notes"]:
        print(f"note: {note}")
    print(values["verdict"])
    print(f"{found.configurations} configurations, {found.simulated} simulated, in {found.search_s:.2f} s")
    print(
        f"written to {output.folder}; serve it with python -m experiments.serve --config={output.folder / 'serve.py'}"
    )


def _row(judged: Any) -> list[object]:
    candidate, known = judged.candidate, judged.goodput
    below = known is None or known.below
    return [
        candidate.policy,
        "+".join(candidate.phases),
        candidate.unit,
        candidate.unit.gpus,
        "" if below else f"{known.per_gpu:.5g}",
        f"{judged.bound.per_gpu:.5g}",
        known.trials if known else 0,
        judged.bound.obstacle or ("the best so far" if below else ""),
    ]


def _draw(output: Any, found: Any, plan: PlanConfig) -> None:
    """Goodput of every candidate that was looked at to the end, best first."""
    from experiments.output import axes

    shown = [one for one in found.judged if one.goodput is not None and one.goodput.per_gpu > 0]
    shown = sorted(shown, key=lambda one: -one.goodput.per_gpu)[:24]
    figure, (panel,) = axes(width=7, height=0.6 + 0.24 * len(shown))
    names = [f"{one.candidate.unit} ({one.candidate.policy})" for one in shown]
    panel.barh(names, [one.goodput.per_gpu for one in shown])
    panel.invert_yaxis()
    panel.set_xlabel("goodput, requests/s per GPU" + (" (extrapolated)" if found.extrapolated else ""))
    panel.set_title(f"TTFT {plan.slo.ttft_s:g} s, TPOT {plan.slo.tpot_s:g} s, {plan.workload.name}", loc="left")
    output.figure("candidates", figure)


if __name__ == "__main__":
    run(main)
