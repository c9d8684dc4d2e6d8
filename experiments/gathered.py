"""Rows of the table of published numbers, from what experiments have left; for those that give none themselves too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from experiments.page import Outcome
from experiments.published import DEFLECTION, DISTSERVE, PUBLIC_SIMULATOR, Compared, rows

REFERENCES = (
    ("13b_200", "13b", 0.2, 0.1, 1.56, None, "prefill tp2, decode tp1"),
    ("13b_250", "13b", 0.25, 0.1, 2.11, 1.41, ""),
    ("66b_400", "66b", 0.4, 0.1, 0.33, 0.20, ""),
    ("66b_2500", "66b", 2.5, 0.15, 0.95, 0.38, ""),
)
"""Of the public simulator, ShareGPT lengths: name, model, targets, requests/s per GPU of DistServe, of the best vLLM,
and the placement."""

_PLACEMENTS = {"13b": "2,1 / 1,1", "66b": "4,1 / 2,2", "175b": "3,3 / 4,3"}
"""DistServe, Table 3: (tp,pp) of prefill / decode."""

_ACCURACY = (
    ("colocated", "simulator against real vLLM, at 7 rates (Table 2)", "at most 1.8 points apart", DISTSERVE),
    ("d-tp1pp1", "simulator against real DistServe-Low, at 7 rates (Table 2)", "at most 1.1 points apart", DISTSERVE),
    ("d-tp1pp1", "error against real A100 runs, decode tp1 pp1", "mean 3.0 points, at most 10", PUBLIC_SIMULATOR),
    ("d-tp1pp2", "error against real A100 runs, decode tp1 pp2", "mean 11 points, at most 50", PUBLIC_SIMULATOR),
    ("colocated", "error against real A100 runs, colocated", "mean 5.5 points, at most 9.2", PUBLIC_SIMULATOR),
)  # fmt: skip
"""Part of a run's name, what is compared, the published figure, its source."""


def gather(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """All rows, in the order of the experiments."""
    found: list[dict[str, Any]] = []
    for one in outcomes:
        found += one.summary.get("compared", [])
        name = one.experiment.name
        if not one.summary:
            continue
        if name.startswith("public_search_"):
            found += rows(_reference(name.removeprefix("public_search_"), one.summary))
        elif name.startswith("placement_search_"):
            found += rows([_placement(name.removeprefix("placement_search_"), one.summary)])
        elif name == "multiplexing":
            found += rows(_deflection(one.summary))
    accuracy = next((one.summary for one in outcomes if one.experiment.name == "simulator_accuracy"), {})
    return found + rows(_accuracy(accuracy))


def _reference(name: str, summary: dict[str, Any]) -> list[Compared]:
    """The search under the public rule beside what the public simulator finds."""
    (known,) = (one for one in REFERENCES if one[0] == name)
    _, model, ttft, tpot, distserve, vllm, placement = known
    what = f"OPT-{model.upper()}, ShareGPT, {ttft:g}/{tpot:g} s: requests/s per GPU"
    places = summary["placements"]
    why = (
        "The same rule: P90s apart, 300 requests, steps of 0.16. Ours has the public code's serial decode loop, swap, "
        "limited KV and host work, which its simulator leaves out, and draws lengths from quantiles."
    )
    mine = f"{summary['goodput_per_gpu']:.2f}, {places['disaggregated']['unit']}"
    found = [Compared(what, f"{distserve:g}" + (f", {placement}" if placement else ""), mine, why, PUBLIC_SIMULATOR)]
    if vllm is not None:
        own = places.get("colocated")
        told = "none" if own is None else f"{own['goodput_per_gpu']:.2f}, {own['unit']}"
        found.append(Compared(what + ", best vLLM", f"{vllm:g}", told, why, PUBLIC_SIMULATOR))
    if name == "13b_200":
        what = f"search of 9 configurations, OPT-13B on 1 x 4 (ours: {summary['configurations']}, colocated included)"
        why = f"Bounds leave {summary['simulated']} to be simulated, and a trial ends when it cannot pass any more."
        found.append(Compared(what, "about 28 s on 2 cores", f"{summary['search_s']:.1f} s", why, PUBLIC_SIMULATOR))
    return found


def _placement(model: str, summary: dict[str, Any]) -> Compared:
    ours = "{prefill_tp},{prefill_pp} / {decode_tp},{decode_pp}".format(**summary)
    what = f"OPT-{model.upper()}, ShareGPT: (tp,pp) prefill / decode (Table 3), joint rule"
    goodput = f"; {summary['goodput_per_gpu']:.2f} requests/s per GPU"
    return Compared(
        what, _PLACEMENTS[model], ours + goodput, summary["verdict"], extrapolated=bool(summary["extrapolated"])
    )


def _deflection(summary: dict[str, Any]) -> list[Compared]:
    """Prefill Deflection's figures beside those of `deflected`, which is not its algorithm but of its kind."""
    found = []
    for name, label in summary["labels"].items():
        at = {policy: one.get("at_shared_rate") for policy, one in summary["workloads"][name].items()}
        mine, other = at.get("deflected"), at.get("disaggregated")
        if mine and other:
            ttft = 100 * (mine["ttft_p90_s"] / other["ttft_p90_s"] - 1)
            both = f"attainment {other['both']:.0%} -> {mine['both']:.0%}"
            found.append(
                Compared(
                    f"{label}: deflected against disaggregated",
                    "P95 TTFT -81 %, attainment +79 %",
                    f"P90 TTFT {ttft:+.0f} %, {both}, at {mine['rate']:.2g} requests/s per GPU",
                    "Another model, workload and load; ours also waits with banked slack. Where disaggregation "
                    "is past saturation the difference is as large as one likes.",
                    DEFLECTION,
                    True,
                )
            )
    return found


def _accuracy(summary: dict[str, Any]) -> list[Compared]:
    """Errors against real runs; without these, what is missing."""
    real = [one for one in summary.get("runs", []) if "real" in one]
    why = (
        "The runs differ: ours are those given, at their own rates. The public simulator does not model KV capacity, "
        "swap and the pull rule; ours does."
    )
    found = []
    for part, what, published, source in _ACCURACY:
        errors = [abs(one["error_points"]) for one in real if part in one["run"]]
        mine = f"mean {sum(errors) / len(errors):.1f} points, at most {max(errors):.1f}, {len(errors)} runs" if errors \
            else "not run: needs real runs, --runs"  # fmt: skip
        found.append(Compared(what, published, mine, why, source))
    for requests, value in ((300, "90.7 %"), (600, "60.7 %")):
        same = [one for one in real if one["requests"] == requests and abs(one["rate"] - 6) < 0.1]
        mine = f"{same[0]['simulated']['attainment']:.1%} (real {same[0]['real']['attainment']:.1%})" if same else "-"
        found.append(
            Compared(f"real run of {requests} requests at 6/s, OPT-13B, its own arrivals simulated", value, mine,
                     "The run is close to saturation, where a percent of step time moves attainment by many points.")
        )  # fmt: skip
    worst = max(real, key=lambda one: one["real"]["tpot_p90_s"], default=None)
    mine = "-" if worst is None else (
        f"{1e3 * worst['simulated']['tpot_p90_s']:.0f} ms (real {1e3 * worst['real']['tpot_p90_s']:.0f} ms, "
        f"{worst['run']})"
    )  # fmt: skip
    found.append(
        Compared("P90 TPOT past saturation, real 575 ms", "110 ms simulated", mine,
                 "Past saturation KV runs out and sequences are swapped: that sets TPOT, and has to be simulated.",
                 PUBLIC_SIMULATOR)
    )  # fmt: skip
    return found
