"""Where a request's time goes: the shares of its five stages against the rate, and how long its KV is on the way.

python -m experiments.latency_breakdown --output_dir=out/latency_breakdown

Figure 10 of DistServe shows, for OPT-175B on ShareGPT, that prefill and decode queueing and execution make up all of
the latency and KV transmission less than 0.1 % of it, and that more than 95 % of the requests have their KV moved
within 30 ms for OPT-13B, 66B and 175B. Ours shows the same shares, and the distribution of the seconds from the pull's
command until it has landed, at the paper's placements (Table 3). Waiting for a decode instance to pull counts as decode
queueing.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from absl import flags

from ds_jax.flags import run

_OUTPUT_DIR = flags.DEFINE_string("output_dir", None, "Folder for the results.", required=True)
_REQUESTS = flags.DEFINE_integer("requests", 1000, "Requests of each run.", 20)
_WORKERS = flags.DEFINE_integer("workers", 0, "Processes; 0: one per core.", lower_bound=0)

NAMES = ("13B ShareGPT", "66B ShareGPT", "175B ShareGPT")
LOADS = (0.2, 0.4, 0.6, 0.8, 0.95)
"""Shares of the goodput."""
PUBLISHED_SHARE, PUBLISHED_WITHIN_S = 0.001, 0.030


def study(plan: Any, system: Any) -> dict[str, Any]:
    """Mean seconds per stage at each load, and all KV transmission times at the goodput."""
    from experiments.systems import rate_at, serve

    goodput = rate_at(lambda rate: serve(plan, system, rate).share(plan.slo), 0.9, first=0.5, precision=0.05)
    if not goodput:
        raise ValueError(
            f"{plan.model}: {system.unit} keeps its targets for 90 % at no rate, of {plan.search.requests}"
        )
    rows = []
    for load in LOADS:
        served = serve(plan, system, load * goodput)
        rows.append({"rate": load * goodput, "stages_s": served.stages_s.mean(axis=0).tolist()})
    sent = served.outputs > 1  # the others end with their first token: nothing is moved
    transfers_s = sorted(served.stages_s[sent, 2].tolist())
    return {"goodput": goodput, "rows": rows, "transfers_s": transfers_s, "notes": list(served.notes)}


def main(argv: list[str]) -> None:
    """Simulate, compare, draw."""
    from ds_jax.protocol import STAGES
    from experiments.output import Output, merged, table
    from experiments.published import Compared, rows
    from experiments.systems import EVALUATIONS, System, hardware, pair, parallel

    chosen = [one for one in EVALUATIONS if one.name in NAMES]
    plans = [replace(one.plan(), search=replace(one.plan().search, requests=_REQUESTS.value)) for one in chosen]
    output = Output(_OUTPUT_DIR.value)
    output.config({"plans": {one.name: asdict(plan) for one, plan in zip(chosen, plans, strict=True)}})
    systems = [System("DistServe", "disaggregated", pair(one.prefill, one.decode)) for one in chosen]
    found = parallel(study, list(zip(plans, systems, strict=True)), "breakdown", _WORKERS.value)
    summary: dict[str, Any] = {}
    compared = []
    shown: list[list[object]] = []
    for one, plan, system, result in zip(chosen, plans, systems, found, strict=True):
        machines = hardware(plan)
        transfers = result["transfers_s"]
        within = sum(value <= PUBLISHED_WITHIN_S for value in transfers) / max(1, len(transfers))
        shares = [[value / sum(row["stages_s"]) for value in row["stages_s"]] for row in result["rows"]]
        summary[one.name] = {
            "unit": str(system.unit),
            "extrapolated": machines.extrapolated,
            "goodput": result["goodput"],
            "stages": list(STAGES),
            "rows": [{**row, "shares": share} for row, share in zip(result["rows"], shares, strict=True)],
            "transfer_share": shares[-1][2],
            "transfers_within_30ms": within,
            "transfer_p50_s": transfers[len(transfers) // 2],
            "transfer_p95_s": transfers[int(0.95 * len(transfers))],
        }
        mark = " *" if machines.extrapolated else ""
        for row, share in zip(result["rows"], shares, strict=True):
            shown.append([one.name + mark, row["rate"], *(100 * value for value in share)])
        bytes_512 = 512 * machines.arch.kv_bytes_per_token(plan.dtype)
        summary[one.name]["kv_bytes_of_512_tokens"] = bytes_512
        compared.append(
            Compared(
                f"{one.name}: requests whose KV has moved within 30 ms (Fig. 10)",
                "> 95 %",
                f"{100 * within:.1f} % (median {1e3 * summary[one.name]['transfer_p50_s']:.1f} ms, "
                f"P95 {1e3 * summary[one.name]['transfer_p95_s']:.1f} ms), {_REQUESTS.value} requests",
                "Low node affinity: KV takes the links inside a node, at 300 GB/s (NVLink's data sheet) and "
                "0.5 ms per copy; what a real copy loses to page tables and launches is not in that.",
                extrapolated=machines.extrapolated,
            )
        )
        if one.name.startswith("175B"):
            compared.append(
                Compared(
                    "175B ShareGPT: KV transmission's share of the latency (Fig. 10)",
                    "< 0.1 %",
                    f"{100 * shares[-1][2]:.3f} % near the goodput, {100 * shares[0][2]:.3f} % at a fifth of it",
                    "From the pull's command until it has landed; waiting for the pull counts as decode queueing.",
                    extrapolated=machines.extrapolated,
                )
            )
        if one.name.startswith("66B"):
            compared.append(
                Compared(
                    "KV of a 512-token request, OPT-66B",
                    "1.13 GB",
                    f"{bytes_512 / 2**30:.3f} GiB = {bytes_512 / 1e9:.2f} GB",
                    "1.13 is in units of 2^30 bytes: 2 x 64 layers x 9216 numbers x 2 bytes x 512 tokens.",
                )
            )
    extrapolated = [name for name, entry in summary.items() if entry["extrapolated"]]
    notes = merged([(one.name, note) for one, result in zip(chosen, found, strict=True) for note in result["notes"]])
    output.summary({"extrapolated": extrapolated, "requests": {"joint": _REQUESTS.value}, "notes": notes,
                    "workloads": summary, "compared": rows(compared)})  # fmt: skip
    transfers = {one.name: result["transfers_s"] for one, result in zip(chosen, found, strict=True)}
    _draw(output, summary, transfers, STAGES)
    print(f"share of each stage in the mean latency, %, in runs of {_REQUESTS.value} requests; *: extrapolated")
    print(table(["workload", "requests/s/GPU", *STAGES], shown))
    for name, entry in summary.items():
        print(
            f"{name}: KV moved within 30 ms for {entry['transfers_within_30ms']:.1%}, "
            f"{100 * entry['transfer_share']:.3f} % of the latency near the goodput"
        )
    for note in notes:
        print(f"note: {note}")
    print(f"written to {output.folder}")


def _draw(output: Any, summary: dict[str, Any], transfers_s: dict[str, list[float]], stages: Any) -> None:
    """The shares of the largest model's stages, and the distribution of transmission times of all."""
    from experiments.output import axes

    figure, panels = axes(1, 2, width=4.6, height=3.6)
    last = summary[NAMES[-1]]
    bottom = [0.0] * len(LOADS)
    labels = [f"{row['rate']:.2g}" for row in last["rows"]]
    for index, stage in enumerate(stages):
        values = [100 * row["shares"][index] for row in last["rows"]]
        panels[0].bar(range(len(LOADS)), values, bottom=bottom, label=stage.replace("_", " "), width=0.7)
        bottom = [below + value for below, value in zip(bottom, values, strict=True)]
    panels[0].set_xticks(range(len(LOADS)), labels)
    panels[0].set(xlabel="requests/s per GPU", ylabel="share of mean latency, %")
    panels[0].set_title(NAMES[-1] + (" (extrapolated)" if last["extrapolated"] else ""), loc="left")
    panels[0].legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)
    for name, times_s in transfers_s.items():
        inside = [100 * (index + 1) / len(times_s) for index in range(len(times_s))]
        mark = " (extrapolated)" if summary[name]["extrapolated"] else ""
        panels[1].plot([1e3 * value for value in times_s], inside, label=name + mark)
    panels[1].axvline(1e3 * PUBLISHED_WITHIN_S, color="#777777", lw=1, ls=":")
    panels[1].set(xscale="log", xlabel="KV transmission, ms (dotted: 30 ms)", ylabel="requests, %", ylim=(0, 102))
    panels[1].set_xticks([0.5, 1, 3, 10, 30], ["0.5", "1", "3", "10", "30"])
    panels[1].minorticks_off()
    panels[1].set_title(f"near the goodput, {_REQUESTS.value} requests", loc="left")
    panels[1].legend(loc="upper center", bbox_to_anchor=(0.5, -0.2))
    output.figure("fig10_latency_breakdown", figure)


if __name__ == "__main__":
    run(main)
