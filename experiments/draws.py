"""How much the placement search hangs on the draw of its requests: the same search over several seeds.

python -m experiments.draws --output_dir=out/draws

The public simulator judges a placement by 300 requests, drawn at random from ShareGPT. Which ones moves its answer more
than most choices of a system do. Ours shows what the search finds for each of ten draws of lengths and arrivals, by the
published rule, the mean prompt of each draw, and the draw that configs/plan_opt_13b_a100.py has.
--rules=published,joint shows the same for both targets together, over 1000 requests.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

from absl import flags

from ds_jax.flags import define_config, load_config, run
from ds_jax.plan import PlanConfig

define_config(PlanConfig, default_file="configs/plan_opt_13b_a100.py")
_OUTPUT_DIR = flags.DEFINE_string("output_dir", None, "Folder for the results.", required=True)
_SEEDS = flags.DEFINE_integer("seeds", 10, "Draws: seeds from 0.", lower_bound=1)
_RULES = flags.DEFINE_list("rules", ["published"], "Rules to search by: published, joint.")
_WORKERS = flags.DEFINE_integer("workers", 0, "Processes; 0: one per core.", lower_bound=0)

_REFUSED = {
    "config.search.seed": "--seeds says how many draws there are",
    "config.search.rule": "--rules says by which to search",
    "config.policy": "the placements are of the disaggregated policy",
}


def draw(plan: PlanConfig) -> dict[str, Any]:
    """What the search finds for the plan's draw."""
    from ds_jax.placement.search import Infeasible, PlacementSearch
    from experiments.systems import hardware

    with PlacementSearch(plan, hardware(plan).arch) as searching, warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # told as notes
        requests = searching.requests
        try:
            place = searching.place("disaggregated")
        except Infeasible as error:
            raise ValueError(f"seed {plan.search.seed}: {error}") from error
    return {
        "rule": plan.search.rule,
        "seed": plan.search.seed,
        "requests": len(requests.prompts),
        "mean_prompt_tokens": float(requests.prompts.mean()),
        "mean_output_tokens": float(requests.outputs.mean()),
        "unit": str(place.unit),
        "goodput_per_gpu": place.goodput_per_gpu,
        "notes": list(searching.hardware.notes()),
    }


def main(argv: list[str]) -> None:
    """Search every draw, print, plot."""
    from experiments.curves import REQUESTS
    from experiments.output import Output, merged, table
    from experiments.systems import hardware, parallel, refuse

    refuse(flags.FLAGS, _REFUSED)
    plan = load_config(PlanConfig)
    output = Output(_OUTPUT_DIR.value)
    output.config(plan)
    for rule in _RULES.value:
        if rule not in REQUESTS:
            raise ValueError(f"--rules: {rule!r} must be one of {', '.join(REQUESTS)}")
    jobs = []
    for rule in _RULES.value:
        count = plan.search.requests or REQUESTS[rule]
        for seed in range(_SEEDS.value):
            search = replace(plan.search, rule=rule, seed=seed, requests=count, workers=1)  # type: ignore[arg-type]
            jobs.append((replace(plan, search=search),))
    found = parallel(draw, jobs, "draws", _WORKERS.value)
    ranges = {}
    for rule in _RULES.value:
        values = [one["goodput_per_gpu"] for one in found if one["rule"] == rule]
        ranges[rule] = [min(values), max(values)]
    extrapolated = hardware(plan).extrapolated
    notes = merged([(one["rule"], note) for one in found for note in one["notes"]])
    output.summary(
        {"extrapolated": extrapolated, "requests": {one["rule"]: one["requests"] for one in found}, "notes": notes,
         "seed_of_the_plan": plan.search.seed, "ranges": ranges, "draws": found}
    )  # fmt: skip
    _draw(output, plan, found, extrapolated)
    header = ["rule", "seed", "requests", "mean prompt", "mean output", "requests/s/GPU", "placement"]
    print(table(header, [
        [one["rule"], str(one["seed"]) + (" (the plan's)" if one["seed"] == plan.search.seed else ""), one["requests"],
         one["mean_prompt_tokens"], one["mean_output_tokens"], one["goodput_per_gpu"], one["unit"]]
        for one in found
    ]))  # fmt: skip
    for rule, (low, high) in ranges.items():
        print(f"{rule}: {low:.2f} to {high:.2f} requests/s per GPU over {_SEEDS.value} draws")
    for note in notes:
        print(f"note: {note}")
    print(f"written to {output.folder}")


def _draw(output: Any, plan: PlanConfig, found: list[dict[str, Any]], extrapolated: bool) -> None:
    from experiments.output import PALETTE, axes

    figure, (panel,) = axes(width=5.4, height=3.2)
    for (rule, label), colour in zip((("published", "public rules"), ("joint", "joint")), PALETTE, strict=False):
        mine = [one for one in found if one["rule"] == rule]
        for own, marker in ((False, "o"), (True, "*")) if mine else ():
            points = [one for one in mine if (one["seed"] == plan.search.seed) is own]
            panel.plot(
                [one["mean_prompt_tokens"] for one in points],
                [one["goodput_per_gpu"] for one in points],
                marker,
                ms=11 if own else 5,
                color=colour,
                label=f"{label}, {mine[0]['requests']} requests" + (": the plan's draw" if own else ""),
            )
    panel.set(xlabel="mean prompt of the draw, tokens", ylabel="goodput, requests/s per GPU", ylim=(0, None))
    mark = " (extrapolated)" if extrapolated else ""
    title = f"{plan.model.split('/')[-1]}, {plan.slo.ttft_s:g}/{plan.slo.tpot_s:g} s, one point per draw{mark}"
    panel.set_title(title, loc="left")
    panel.legend(loc="lower left", fontsize=8)
    output.figure("draws", figure)


if __name__ == "__main__":
    run(main)
