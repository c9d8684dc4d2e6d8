"""Find the placement with the highest goodput per GPU: how many instances, of which parallelism, for which phase.

python -m experiments.placement_search --config=configs/plan_opt_13b_a100.py --output_dir=out/plan

OUTPUT_DIR gets summary.json, config.json (the resolved plan), serve.py (the placement as a configuration for
experiments.serve), candidates.csv and a figure. --beside names policies whose best placement is told beside it. Where
the placement has pipeline stages, which only the simulator runs, serve_pp1.py is the best one without.

A plan with several applications (configs/plan_two_applications_a100.py) divides the cluster among them: serve_NAME.py
for each.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from absl import flags

from ds_jax.flags import define_config, load_config, run
from ds_jax.plan import PlanConfig

if TYPE_CHECKING:
    from ds_jax.placement.comparison import Comparison
    from ds_jax.placement.search import Judged, Placement
    from experiments.output import Output

define_config(PlanConfig, default_file="configs/plan_opt_13b_a100.py")
_OUTPUT_DIR = flags.DEFINE_string("output_dir", None, "Folder for the results.", required=True)
_BESIDE = flags.DEFINE_list(
    "beside",
    ["disaggregated", "colocated", "multiplexed"],
    "Policies to be compared with, by name (deflected takes the longest); not for a plan with several applications.",
)
EXTRAPOLATED = "extrapolated: step times are worked out from published figures of GPU and model, not measured"


def main(argv: list[str]) -> None:
    """Search, print, write down."""
    plan = load_config(PlanConfig)

    from ds_jax.config import ROLES
    from experiments.output import Output
    from models.folder import read_configs

    for policy in _BESIDE.value:
        if policy not in ROLES:
            raise ValueError(f"--beside: {policy!r} must be one of {', '.join(ROLES)}")
    checkpoint = read_configs(plan.model)
    dummy = not any(checkpoint.folder.glob("*.safetensors"))
    output = Output(_OUTPUT_DIR.value)
    output.config(plan)
    if plan.applications:
        _place_several(plan, checkpoint.arch, output, dummy)
    else:
        _place_one(plan, checkpoint.arch, output, dummy)


@contextmanager
def _bar(unit: str) -> Iterator[Callable[[int, int, str], None]]:
    """A progress bar, and what a search tells it."""
    from tqdm import tqdm

    with tqdm(unit=unit, leave=False) as bar:

        def progress(done: int, total: int, what: str) -> None:
            bar.total = total
            bar.set_description(what)
            bar.update(done - bar.n)

        yield progress


# --- one workload -----------------------------------------------------------------------------------------------------


def _place_one(plan: PlanConfig, arch: Any, output: Output, dummy: bool) -> None:
    from ds_jax.placement.comparison import compare
    from ds_jax.placement.report import describe, pipelined, serving_config, summary
    from ds_jax.placement.search import Infeasible, PlacementSearch
    from experiments.output import table

    with _bar("candidate") as progress, PlacementSearch(plan, arch, progress) as search:
        found = compare(search, _BESIDE.value)
    served = found.placement or found.best
    unpiped = _without_pipeline(plan, arch, served.policy) if served and pipelined(served) else None
    values = summary(plan, found) | {"without_pipeline": describe(unpiped) if unpiped else None}
    output.summary(values)
    _write_candidates(output, found)
    if found.best is not None:
        _draw(output, found, plan)
    if served is not None:
        text = serving_config(plan, served, search.hardware, dummy=dummy, instead="serve_pp1.py" if unpiped else "")
        output.text("serve.py", text)
    if unpiped is not None:
        output.text("serve_pp1.py", serving_config(plan, unpiped, search.hardware, dummy=dummy))

    rows = [[policy, *_cells(one)] for policy, one in values["placements"].items()]
    if unpiped is not None:
        rows.append([f"{unpiped.policy}, pp 1", *_cells(values["without_pipeline"])])
    if rows:
        print(table(_header(plan, "policy"), rows))
    if values["extrapolated"]:
        print(EXTRAPOLATED)
    for note in values["notes"]:
        print(f"note: {note}")
    if found.placement is None:
        raise Infeasible(found.refusal() + (f": {output.folder / 'serve.py'}" if served else ""))
    for policy, why in found.infeasible.items():
        print(f"{policy} has no placement: {why.removeprefix(f'{policy}: ')}")
    print(values["verdict"])
    print(f"{values['configurations']} configurations, {values['simulated']} simulated, in {found.search_s:.2f} s")
    if found.beside_s:
        print("beside it " + ", ".join(f"{policy} in {one:.2f} s" for policy, one in found.beside_s.items()))
    _tell_how_to_serve(output, found.placement, unpiped)


def _without_pipeline(plan: PlanConfig, arch: Any, policy: str) -> Placement | None:
    """The best placement that the engine serves: without pipeline stages. None if there is none."""
    from ds_jax.placement.search import Infeasible, PlacementSearch

    with PlacementSearch(replace(plan, search=replace(plan.search, max_pp=1)), arch) as search:
        try:
            return search.place(policy)
        except Infeasible:
            return None


def _tell_how_to_serve(output: Output, placement: Placement, unpiped: Placement | None) -> None:
    from ds_jax.placement.report import pipelined

    print(f"written to {output.folder}")
    if not pipelined(placement):
        print(f"serve it with python -m experiments.serve --config={output.folder / 'serve.py'}")
    elif unpiped is not None:
        share = unpiped.goodput_per_gpu / placement.goodput_per_gpu
        print(
            "its pipeline stages are for the simulator: the engine serves pp = 1; the best placement with that, "
            f"{share:.2f} x as good, with python -m experiments.serve --config={output.folder / 'serve_pp1.py'}"
        )
    else:
        print("its pipeline stages are for the simulator: the engine serves pp = 1, and no placement with that fits")


def _header(plan: PlanConfig, first: str) -> list[str]:
    percentile = f"P{100 * plan.search.attainment:g}"
    return [first, "unit", "units", "GPUs", "requests/s/GPU", f"{percentile} TTFT s", f"{percentile} TPOT s"]


def _cells(one: dict[str, Any]) -> list[object]:
    unit = one["unit"] + (" (simulated only)" if one["pipelined"] else "")
    return [unit, one["replicas"], one["gpus"], one["goodput_per_gpu"], one["ttft_s"], one["tpot_s"]]


def _write_candidates(output: Output, found: Comparison) -> None:
    with (output.folder / "candidates.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(
            ("policy", "phases", "unit", "gpus", "goodput_per_gpu", "bound_per_gpu", "trials", "ruled_out_by")
        )
        writer.writerows(_row(one) for one in found.judged)


def _row(judged: Judged) -> list[object]:
    candidate, known = judged.candidate, judged.goodput
    below = known is None or known.below
    return [
        candidate.policy,
        "+".join(candidate.phases),
        candidate.unit,
        candidate.unit.gpus,
        "" if known is None or below else f"{known.per_gpu:.5g}",
        f"{judged.bound.per_gpu:.5g}",
        known.trials if known else 0,
        judged.bound.obstacle or ("the best so far" if below else ""),
    ]


def _draw(output: Output, found: Comparison, plan: PlanConfig) -> None:
    """Goodput of every candidate that was looked at to the end, best first."""
    from experiments.output import axes

    known = [
        (one.goodput.per_gpu, f"{one.candidate.unit} ({one.candidate.policy})")
        for one in found.judged
        if one.goodput is not None and one.goodput.per_gpu > 0
    ]
    shown = sorted(known, key=lambda one: -one[0])[:24]
    figure, (panel,) = axes(width=7, height=0.6 + 0.24 * len(shown))
    panel.barh([name for _, name in shown], [goodput for goodput, _ in shown])
    panel.invert_yaxis()
    panel.set_xlabel("goodput, requests/s per GPU" + (" (extrapolated)" if found.extrapolated else ""))
    panel.set_title(f"TTFT {plan.slo.ttft_s:g} s, TPOT {plan.slo.tpot_s:g} s, {plan.workload.name}", loc="left")
    output.figure("candidates", figure)


# --- several applications ---------------------------------------------------------------------------------------------


def _place_several(plan: PlanConfig, arch: Any, output: Output, dummy: bool) -> None:
    from ds_jax.placement.division import place_applications
    from ds_jax.placement.report import describe, pipelined, serving_config
    from experiments.output import table

    with _bar("search") as progress:
        division = place_applications(plan, arch, progress)
    applications, rows = [], []
    for tenant, served in zip(division.tenants, division.served, strict=True):
        one, placement = tenant.application, tenant.placement
        alone = plan.alone(one, plan.cluster)
        output.text(f"serve_{one.name}.py", serving_config(alone, placement, tenant.hardware, dummy=dummy))
        described = describe(placement)
        applications.append(
            {
                "name": one.name,
                "workload": one.workload.name,
                "ttft_s": one.slo.ttft_s,
                "tpot_s": one.slo.tpot_s,
                "rate": one.workload.rate or None,
                "share": str(tenant.share),
                "share_gpus": tenant.share.gpus,
                "served_requests_per_s": tenant.served,
                "carried": tenant.carried,
                "placement": described,
                "served_by_share": {str(share): rate for share, rate in served.items()},
            }
        )
        rows.append([f"{one.name}: {tenant.share}", *_cells(described), tenant.served, tenant.carried])
    total = sum(tenant.served for tenant in division.tenants)
    gpus = sum(tenant.placement.gpus for tenant in division.tenants)
    extrapolated = any(tenant.hardware.extrapolated for tenant in division.tenants)
    output.summary(
        {
            "policy": plan.policy,
            "applications": applications,
            "carried": division.carried,
            "served_requests_per_s": total,
            "gpus": gpus,
            "goodput_per_gpu": total / gpus,
            "configurations": division.configurations,
            "search_s": division.search_s,
            "rule": plan.search.rule,
            "extrapolated": extrapolated,
            "notes": list(division.notes),
        }
    )
    _draw_division(output, division)
    print(table([*_header(plan, "application"), "requests/s", "of its rate"], rows))
    if extrapolated:
        print(EXTRAPOLATED)
    for note in division.notes:
        print(f"note: {note}")
    if division.carried is not None:
        worst = min(division.tenants, key=lambda tenant: tenant.carried or 0.0)
        enough = "carries them all" if division.carried >= 1 else "is too small for them"
        print(
            f"the cluster {enough}: {worst.application.name}, the worst off, gets {division.carried:.2f} x its rate of "
            f"{worst.application.workload.rate:g} requests/s inside its targets"
        )
    print(f"{division.configurations} configurations in {division.search_s:.2f} s; written to {output.folder}")
    for tenant in division.tenants:
        file = output.folder / f"serve_{tenant.application.name}.py"
        if pipelined(tenant.placement):
            print(f"{file}: its pipeline stages are for the simulator; --config.search.max_pp=1 finds what is served")
        else:
            print(f"serve it with python -m experiments.serve --config={file}")


def _draw_division(output: Output, division: Any) -> None:
    """What each application would serve on every share, and the share that it got."""
    from experiments.output import PALETTE, axes

    figure, (panel,) = axes(width=5.5, height=3.2)
    for index, (tenant, served) in enumerate(zip(division.tenants, division.served, strict=True)):
        color = PALETTE[index % len(PALETTE)]
        points = sorted((share.gpus, rate) for share, rate in served.items())
        panel.plot(*zip(*points, strict=True), marker=".", color=color, label=tenant.application.name)
        panel.plot([tenant.share.gpus], [served[tenant.share]], marker="o", markersize=9, color=color)
        if tenant.application.workload.rate:
            panel.axhline(tenant.application.workload.rate, color=color, linestyle=":", linewidth=1)
    panel.set_ylim(bottom=0)
    panel.set_xlabel("GPUs of its share (large: the one that it got)")
    panel.set_ylabel("requests/s inside the targets\n(dotted: asked for)")
    panel.legend()
    output.figure("division", figure)


if __name__ == "__main__":
    run(main)
