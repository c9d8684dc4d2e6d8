"""Prefill and decode in each other's way, and what each could do alone on a GPU of its own.

python -m experiments.interference --output_dir=out/interference

* Figure 1 of DistServe: OPT-13B on one A100, prompts of 512 and outputs of 64 tokens. The paper shows that vLLM keeps
  its targets up to 1.6 requests/s, while a GPU that only prefills would serve 5.6 and one that only decodes 10: two of
  the first and one of the second serve 3.3 per GPU. Ours shows P90 TTFT and P90 TPOT of the same against the rate.
* Figure 2: a decode step alone, and with one prompt in the batch. Ours is worked out from the latency profile.

Twice: with all on the same step times and our engine's rules (`ours`), and with the step times, rules and host
overheads of the public systems (`public`): what differs between the two is not disaggregation.
"""

from __future__ import annotations

import functools
from typing import Any

from absl import flags

from ds_jax.flags import run

_OUTPUT_DIR = flags.DEFINE_string("output_dir", None, "Folder for the results.", required=True)
_REQUESTS = flags.DEFINE_integer("requests", 1000, "Requests of each run.", lower_bound=50)
_TTFT_S = flags.DEFINE_float("ttft_s", 0.4, "Target of P90 TTFT.")
_TPOT_S = flags.DEFINE_float("tpot_s", 0.04, "Target of P90 TPOT.")
_WORKERS = flags.DEFINE_integer("workers", 0, "Processes; 0: one per core.", lower_bound=0)

PROMPT, OUTPUT = 512, 64
PROFILE = "configs/latency/a100_80g_opt_13b.json"
TARGETS_ASSUMED = "the targets of Fig. 1, 0.4 s and 0.04 s, are told from memory"
RATES = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 10.0, 12.0, 16.0)
PUBLISHED = {"colocated": 1.6, "prefill": 5.6, "decode": 10.0, "2 prefill + 1 decode": 3.3}
"""Requests/s per GPU: DistServe, section 1 and Figure 1."""
BATCHES = (1, 8, 16, 32, 64, 96, 128)


def systems() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """What is tried: system and the phases that are looked at."""
    from ds_jax.placement.layouts import Group, Shape, Unit
    from ds_jax.placement.trial import BOTH
    from ds_jax.protocol import Role
    from experiments.systems import System, mixed, pair

    one = Shape(1, 1)
    prefill, decode = (Unit((Group(role, one),)) for role in BOTH)
    return {
        "colocated": (System("vLLM", "colocated", mixed(one)), BOTH),
        "prefill": (System("prefill alone", "disaggregated", prefill), (Role.PREFILL,)),
        "decode": (System("decode alone", "disaggregated", decode), (Role.DECODE,)),
        "2 prefill + 1 decode": (System("DistServe", "disaggregated", pair(one, one, 2, 1)), BOTH),
    }


def study(kind: str, rule: str, slo: Any, requests: int) -> dict[str, Any]:
    """Percentiles against the rate, and the rates up to which the targets hold.

    Args:
        kind: a key of `systems`.
        rule: joint: our rules; published: those of the public systems.
    """
    import numpy as np

    from ds_jax.placement.trial import Requests
    from ds_jax.plan import PlanConfig, SearchConfig, WorkloadConfig
    from ds_jax.protocol import Slo
    from ds_jax.workload import fixed, poisson, submissions
    from experiments.systems import rate_at, serve

    plan = PlanConfig(
        profile=PROFILE,
        slo=slo,
        workload=WorkloadConfig(f"{PROMPT}/{OUTPUT}"),
        search=SearchConfig(rule=rule),  # type: ignore[arg-type]
    )
    targets = Slo(round(slo.ttft_s * 1e9), round(slo.tpot_s * 1e9))
    work = submissions(list(poisson(1.0, requests)), fixed(PROMPT, OUTPUT, requests), slo=targets)
    drawn = Requests(plan, work)
    system, phases = systems()[kind]

    @functools.cache
    def served(rate: float) -> Any:
        return serve(plan, system, rate, phases=phases, requests=drawn)

    def shares(rate: float) -> tuple[float, float, float]:
        one = served(rate)
        ttft, tpot = one.ttft_s <= slo.ttft_s, one.tpot_s <= slo.tpot_s
        if len(phases) == 1:
            ttft, tpot = (ttft, ttft) if kind == "prefill" else (tpot, tpot)
        return float(np.mean(ttft & tpot)), float(np.mean(ttft)), float(np.mean(tpot))

    first = PUBLISHED[kind]
    found = [rate_at(lambda rate, one=one: shares(rate)[one], first=first, precision=0.05) for one in range(3)]  # type: ignore[misc]
    rows = []
    for rate in RATES:
        ttft_s, tpot_s = served(rate).percentiles(90)
        rows.append({"rate": rate, "ttft_p90_s": ttft_s, "tpot_p90_s": tpot_s, "attainment": shares(rate)[0]})
    ttft_s, tpot_s = served(first).percentiles(90)
    notes = list(served(first).notes)  # all rates up to now have added to them
    return {
        "goodput": found[0],
        "ttft_alone": found[1],
        "tpot_alone": found[2],
        "at_published_rate": {"ttft_p90_s": ttft_s, "tpot_p90_s": tpot_s},
        "rows": rows,
        "notes": notes,
    }


def steps(context: int = PROMPT + OUTPUT // 2) -> tuple[list[dict[str, float]], list[str]]:
    """Figure 2: a decode step of each batch, alone and with a prompt of so many tokens; and the prompt's own step.
    With it, what was outside the measured ranges."""
    from ds_jax.latency import load

    profile = load(PROFILE)
    step = profile.step_time(1)
    rows = []
    for batch in BATCHES:
        row = {"batch": float(batch), "alone_s": step.step_s((), batch, batch * context)}
        for length in (128, 512, 1024):
            row[f"with_{length}_s"] = step.step_s([(0, length)], batch, batch * context)
            row[f"prompt_{length}_s"] = step.step_s([(0, length)], 0, 0)
        rows.append(row)
    return rows, list(profile.outside.values())


def main(argv: list[str]) -> None:
    """Simulate, compare, draw."""
    from ds_jax.config import SloConfig
    from experiments.output import Output, merged, table
    from experiments.published import FROM_MEMORY, Compared, ratio, rows
    from experiments.systems import parallel

    for name, value in (("ttft_s", _TTFT_S.value), ("tpot_s", _TPOT_S.value)):
        if not value > 0:
            raise ValueError(f"--{name} = {value} must be greater than 0")
    slo = SloConfig(_TTFT_S.value, _TPOT_S.value)
    output = Output(_OUTPUT_DIR.value)
    output.config(
        {"requests": _REQUESTS.value, "slo": [slo.ttft_s, slo.tpot_s], "assumed": TARGETS_ASSUMED, "prompt": PROMPT,
         "output": OUTPUT, "profile": PROFILE}
    )  # fmt: skip
    jobs = [(kind, rule, slo, _REQUESTS.value) for rule in ("joint", "published") for kind in PUBLISHED]
    results = parallel(study, jobs, "interference", _WORKERS.value)
    found: dict[str, dict[str, Any]] = {"ours": {}, "public": {}}
    for (kind, rule, *_), result in zip(jobs, results, strict=True):
        found["ours" if rule == "joint" else "public"][kind] = result
    slowed, outside = steps()
    compared = [_compare(kind, found, slo) for kind in PUBLISHED]
    gain = {
        name: one["2 prefill + 1 decode"]["goodput"] / one["colocated"]["goodput"]
        if one["colocated"]["goodput"]
        else None
        for name, one in found.items()
    }
    compared.append(
        Compared(
            "2 prefill + 1 decode against colocated, per GPU",
            "2.1x",
            f"{ratio(gain['public'])}; {ratio(gain['ours'])} with our rules ({_REQUESTS.value} requests a run)",
            "Of the two rows above: with our rules colocation has faster kernels and no host work.",
            assumed=TARGETS_ASSUMED,
        )
    )
    middle = next(row for row in slowed if row["batch"] == 32)
    compared.append(
        Compared(
            "decode step with one prompt in the batch (Fig. 2)",
            "much longer, the more so the longer the prompt",
            f"32 sequences: {1e3 * middle['alone_s']:.0f} ms alone, {1e3 * middle['with_128_s']:.0f}, "
            f"{1e3 * middle['with_512_s']:.0f}, {1e3 * middle['with_1024_s']:.0f} ms with 128, 512, 1024 prompt tokens",
            "Worked out: the fits are of prompts and of decodes apart, and a mixed step has the larger of their "
            "constants and both their costs.",
            assumed=FROM_MEMORY,
        )
    )
    told = [(f"{kind}, {name}", note) for name, one in found.items() for kind in one for note in one[kind]["notes"]]
    notes = merged([*told, *(("Fig. 2", note) for note in outside)])
    output.summary(
        {"requests": {"joint": _REQUESTS.value, "published": _REQUESTS.value}, "assumed": [TARGETS_ASSUMED],
         "notes": notes, "goodput": found, "published": PUBLISHED, "gain": gain, "steps": slowed,
         "compared": rows(compared)}
    )  # fmt: skip
    _draw(output, found, slowed, slo)
    header = ["requests/s/GPU", "published", "public rules", "TTFT alone", "TPOT alone", "our rules", "TTFT ", "TPOT "]
    shown = [
        [kind, PUBLISHED[kind]]
        + [found[name][kind][key] for name in ("public", "ours") for key in ("goodput", "ttft_alone", "tpot_alone")]
        for kind in PUBLISHED
    ]
    print(table(header, shown))
    print(f"{_REQUESTS.value} requests a run; assumed: {TARGETS_ASSUMED}")
    gains = f"public rules {ratio(gain['public'])}, ours {ratio(gain['ours'])}"
    print(f"2 prefill + 1 decode over colocated: published 2.1x, {gains}")
    for note in notes:
        print(f"note: {note}")
    print(f"written to {output.folder}")


def _compare(kind: str, found: dict[str, dict[str, Any]], slo: Any) -> Any:
    from experiments.published import Compared

    public, ours = found["public"][kind], found["ours"][kind]
    why = {
        "colocated": f"TPOT binds: TTFT alone would allow {public['ttft_alone']:.2f}. With our rules a step costs no "
        f"host work and all systems have DistServe's faster kernels: TPOT allows {ours['tpot_alone']:.2f}.",
        "prefill": "An M/D/1 queue: the step time of one prompt decides. At the published rate our P90 TTFT is "
        f"{1e3 * public['at_published_rate']['ttft_p90_s']:.0f} ms, far inside {1e3 * slo.ttft_s:.0f} ms: "
        "its prompts took longer than the published fits say, or its target was tighter.",
        "decode": "TPOT is a mean over 63 steps, which hardly differ: all requests are in time until the batch that "
        "the rate needs has a step longer than the target, host work included.",
        "2 prefill + 1 decode": "The one decode GPU sets the rate, as published (10 / 3): "
        f"TTFT alone would allow {public['ttft_alone']:.2f}.",
    }[kind]
    return Compared(
        f"OPT-13B, 512/64 tokens, {kind}, requests/s/GPU (Fig. 1)",
        f"{PUBLISHED[kind]:g}",
        f"{public['goodput']:.2f}; {ours['goodput']:.2f} with our rules ({_REQUESTS.value} requests a run)",
        why,
        assumed=TARGETS_ASSUMED,
    )


def _draw(output: Any, found: dict[str, dict[str, Any]], slowed: list[dict[str, float]], slo: Any) -> None:
    from experiments.output import PALETTE, axes

    figure, panels = axes(1, 2)
    for panel, key, target, kinds in (
        (panels[0], "ttft_p90_s", slo.ttft_s, ("colocated", "prefill")),
        (panels[1], "tpot_p90_s", slo.tpot_s, ("colocated", "decode")),
    ):
        for kind, colour in zip(kinds, PALETTE[:: 1 if "prefill" in kinds else 2], strict=False):
            for name, style in (("public", "-"), ("ours", "--")):
                rows = found[name][kind]["rows"]
                label = f"{kind} alone" if kind != "colocated" else kind
                panel.plot(
                    [row["rate"] for row in rows],
                    [1e3 * row[key] for row in rows],
                    style,
                    color=colour,
                    label=f"{label}, {'our' if name == 'ours' else name} rules",
                )
        panel.axhline(1e3 * target, color="#777777", lw=1, ls=":")
        panel.set(xlabel="requests/s per GPU", ylim=(0, 2.5e3 * target), xlim=(0, RATES[-1]))
        panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2, fontsize=8)
    panels[0].set(ylabel="P90 TTFT, ms")
    panels[1].set(ylabel="P90 TPOT, ms")
    panels[0].set_title("OPT-13B, 512 prompt and 64 output tokens", loc="left")
    panels[1].set_title(f"{_REQUESTS.value} requests a run", loc="left")
    output.figure("fig1_goodput_of_phases", figure)

    figure, (panel,) = axes(width=5.2)
    batches = [row["batch"] for row in slowed]
    panel.plot(batches, [1e3 * row["alone_s"] for row in slowed], "o-", ms=3, label="decodes alone")
    for length in (128, 512, 1024):
        values = [1e3 * row[f"with_{length}_s"] for row in slowed]
        panel.plot(batches, values, "o-", ms=3, label=f"with a prompt of {length}")
    panel.set(xlabel="sequences that decode (544 tokens each)", ylabel="step, ms", ylim=(0, None))
    panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)
    panel.set_title("OPT-13B, one A100: a prompt in the batch (worked out)", loc="left")
    output.figure("fig2_step_with_prompt", figure)


if __name__ == "__main__":
    run(main)
