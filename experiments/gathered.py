"""Rows of the table of published numbers, from what experiments have left; `placement_search` gives none itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from experiments.page import Outcome
from experiments.published import PUBLIC_SIMULATOR, Compared, rows

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


def gather(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """All rows, in the order of the experiments; `quick` marks those of tiny sizes."""
    found: list[dict[str, Any]] = []
    summaries = {one.experiment.name: one.summary for one in outcomes if one.summary}
    for one in outcomes:
        name, summary = one.experiment.name, one.summary
        told = list(summary.get("compared", []))
        if summary and name.startswith("public_search_"):
            told += rows(_reference(name.removeprefix("public_search_"), summary, summaries.get("draws", {})))
        elif summary and name.startswith("placement_search_"):
            told += rows([_placement(name.removeprefix("placement_search_"), summary, summaries.get("goodput", {}))])
        found += [{**row, "quick": one.quick} for row in told]
    return found


def _reference(name: str, summary: dict[str, Any], draws: dict[str, Any]) -> list[Compared]:
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
    if model == "13b":
        why += _chosen(draws)
    found = [Compared(what, f"{distserve:g}" + (f", {placement}" if placement else ""), mine, why, PUBLIC_SIMULATOR)]
    if vllm is not None:
        own = places.get("colocated")
        told = "none" if own is None else f"{own['goodput_per_gpu']:.2f}, {own['unit']}"
        found.append(Compared(what + ", best vLLM", f"{vllm:g}", told, why, PUBLIC_SIMULATOR))
    if name == "13b_200":
        what = f"search of 9 configurations, OPT-13B on 1 x 4 (ours: {summary['configurations']})"
        why = f"Bounds leave {summary['simulated']} to be simulated, and a trial ends when it cannot pass any more."
        seconds = "answered from a cache" if summary.get("cached") else f"{summary['search_s']:.1f} s"
        found.append(Compared(what, "about 28 s on 2 cores", seconds, why, PUBLIC_SIMULATOR))
    return found


def _chosen(draws: dict[str, Any]) -> str:
    """configs/plan_opt_13b_a100.py has one of several draws of lengths and arrivals: what the others come to."""
    text = (
        " Its 300 requests are one draw of several, chosen because it is most like the requests of the published runs"
    )
    found = [one["goodput_per_gpu"] for one in draws.get("draws", []) if one["rule"] == "published"]
    if not found:
        return text + "; what the others come to is told by experiments.draws, which was not run."
    return (
        text + f": {len(found)} draws come to {min(found):.2f} to {max(found):.2f} at 200/100 ms (experiments.draws)."
    )


def _placement(model: str, summary: dict[str, Any], goodput: dict[str, Any]) -> Compared:
    """The placement beside Table 3, and what the paper's would be worth here."""
    from experiments.goodput_report import at_table_3

    ours = "{prefill_tp},{prefill_pp} / {decode_tp},{decode_pp}".format(**summary)
    what = f"OPT-{model.upper()}, ShareGPT: (tp,pp) prefill / decode (Table 3), joint rule, 1000 requests a run"
    entry = goodput.get("workloads", {}).get(f"{model.upper()} ShareGPT", {})
    if ours == _PLACEMENTS[model]:
        why = "The same."
    elif "joint" in entry:
        why = at_table_3(entry, "joint")
    else:
        why = "What the paper's placement is worth here is told by experiments.goodput, which was not run."
    return Compared(
        what,
        _PLACEMENTS[model],
        f"{ours}; {summary['goodput_per_gpu']:.2f} requests/s per GPU",
        why,
        extrapolated=bool(summary["extrapolated"]),
    )
