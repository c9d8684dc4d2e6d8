"""What batch, length and parallelism do to each phase: throughput and latency of prefill and decode, from profiles.

python -m experiments.phase_tradeoffs --output_dir=out/phase_tradeoffs

* Figure 3 of DistServe: tokens/s against the batch. The paper shows that prompts saturate a GPU at a few hundred tokens
  already, so that batching them gains nothing, and that decoding gains with every sequence more. Ours shows the same
  curves, of the step times that DistServe fitted, with the latency of each step below; and, in a figure of its own,
  latency and throughput against the length of the prompt and of the context, for every tensor parallelism.
* Figure 4: mean TTFT against rate, for a pipeline and for tensor parallelism. The paper shows OPT-66B on two GPUs, and
  that the better of the two changes with rate and speed-up. Ours shows the M/D/1 formulas with the fitted step times of
  OPT-66B on four GPUs: it does not fit on one.
* Figure 5: decode latency and throughput against the number of GPUs. The paper shows that tensor parallelism shortens
  the step, less with every GPU, and that pipelines only add throughput, nearly in proportion. Ours shows both.

No simulation: every point is one step by the profile.
"""

from __future__ import annotations

from typing import Any

from absl import flags

from ds_jax.flags import run

_OUTPUT_DIR = flags.DEFINE_string("output_dir", None, "Folder for the results.", required=True)
_PROFILE = flags.DEFINE_string(
    "profile", "configs/latency/a100_80g_opt_13b.json", "Latency profile of batching and of decoding on more GPUs."
)
_LARGE_PROFILE = flags.DEFINE_string(
    "large_profile",
    "configs/latency/a100_80g_opt_66b.json",
    "Latency profile of prefill on more GPUs; needs tp 2 and 4.",
)
_TPOT_S = flags.DEFINE_float("tpot_s", 0.1, "Target of a decode step, for the largest batch inside it.")

LENGTHS = (128, 256, 512, 1024)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256)
PROMPT_BATCHES = (1, 2, 3, 4, 6, 8)
PROMPTS = (16, 32, 64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
CONTEXTS = (64, 128, 256, 384, 512, 768, 1024, 1536, 2048)
DECODES = 32
"""Sequences of the decode steps that are shown against the length."""


def batching(profile: Any) -> dict[str, Any]:
    """Step times and tokens/s of prompt batches and decode batches on an instance of the smallest tensor parallelism.

    Each by the length of a prompt, or of a context, in the order of PROMPT_BATCHES and of BATCHES; these as far as the
    KV fits.
    """
    tp = min(profile.fits)
    step = profile.step_time(tp)
    prefill_s = {length: [step.step_s([(0, length)] * batch, 0, 0) for batch in PROMPT_BATCHES] for length in LENGTHS}
    decode_s = {
        length: [step.step_s((), batch, batch * length) for batch in BATCHES if _fits(profile, tp, batch, length)]
        for length in LENGTHS
    }
    return {
        "tp": tp,
        "l_m": profile.l_m(tp),
        "prefill_s": prefill_s,
        "decode_s": decode_s,
        "prefill_tokens_per_s": {
            length: [batch * length / time_s for batch, time_s in zip(PROMPT_BATCHES, times_s, strict=True)]
            for length, times_s in prefill_s.items()
        },
        "decode_tokens_per_s": {
            length: [batch / time_s for batch, time_s in zip(BATCHES, times_s, strict=False)]
            for length, times_s in decode_s.items()
        },
    }


def by_length(profile: Any) -> dict[str, dict[int, list[list[float]]]]:
    """Per tp, (length, step time in s) of one prompt, and of DECODES sequences as far as their KV fits."""
    prefill, decode = {}, {}
    for tp in sorted(profile.fits):
        step = profile.step_time(tp)
        prefill[tp] = [[length, step.step_s([(0, length)], 0, 0)] for length in PROMPTS]
        decode[tp] = [
            [length, step.step_s((), DECODES, DECODES * length)]
            for length in CONTEXTS
            if _fits(profile, tp, DECODES, length)
        ]
    return {"prefill": prefill, "decode": decode}


def decode_parallelism(profile: Any, batch: int = 128, length: int = 256) -> list[dict[str, Any]]:
    """Latency of a step and tokens/s on 1, 2, 4 GPUs, in a pipeline or tensor parallel, at one batch per stage."""
    base = profile.step_time(min(profile.fits)).step_s((), batch, batch * length)
    rows = []
    for tp in sorted(profile.fits):
        if tp & (tp - 1):
            continue
        step_s = profile.step_time(tp).step_s((), batch, batch * length)
        gpus = tp // min(profile.fits)
        rows.append({"kind": "tensor", "gpus": gpus, "latency_s": step_s, "speed_up": base / step_s})
        # A pipeline has as many batches as stages: each takes the whole step, one comes out per stage time.
        rows.append({"kind": "pipeline", "gpus": gpus, "latency_s": base, "speed_up": float(gpus)})
    for row in rows:
        through = row["gpus"] if row["kind"] == "pipeline" else row["speed_up"]
        row["tokens_per_s"] = batch / base * through
    return rows


def prefill_parallelism(profile: Any, length: int = 512) -> dict[str, Any]:
    """Mean TTFT of tp 2 x pp 2 and of tp 4 by the formulas of section 3.1, for prompts of one length."""
    import numpy as np

    from experiments.md1 import Server, crossing

    whole_s = profile.step_time(2).step_s([(0, length)], 0, 0)
    halved_s = profile.step_time(4).step_s([(0, length)], 0, 0)
    pipeline, tensor = Server("tp 2, pp 2", 2, whole_s), Server("tp 4", 1, halved_s)
    curves = {}
    for server in (pipeline, tensor):
        rates = np.linspace(0, 0.93 * server.capacity, 80)
        curves[server.name] = {"rate": rates.tolist(), "ttft_s": [server.formula_s(rate) for rate in rates]}
    return {"speed_up": whole_s / halved_s, "crossing_rate": crossing(pipeline, tensor), "curves": curves}


def largest_batch(profile: Any, tpot_s: float, length: int) -> dict[int, int]:
    """Per tp, the most sequences of this context whose decode step is inside the target and whose KV fits."""
    found = {}
    for tp in sorted(profile.fits):
        step = profile.step_time(tp)
        found[tp] = max(
            (
                batch
                for batch in range(1, 513)
                if _fits(profile, tp, batch, length) and step.step_s((), batch, batch * length) <= tpot_s
            ),
            default=0,
        )
    return found


def _fits(profile: Any, tp: int, batch: int, length: int) -> bool:
    return batch * length <= profile.kv_tokens.get(f"{tp},1", float("inf"))


def main(argv: list[str]) -> None:
    """Work out, draw, print."""
    from ds_jax.latency import load
    from experiments.output import Output, merged, table
    from experiments.published import FROM_MEMORY, Compared, rows

    small, large = load(_PROFILE.value), load(_LARGE_PROFILE.value)
    for tp in (2, 4):
        large.fit_of(tp)
    if not _TPOT_S.value > 0:
        raise ValueError(f"--tpot_s = {_TPOT_S.value} must be greater than 0")
    output = Output(_OUTPUT_DIR.value)
    output.config({"profile": _PROFILE.value, "large_profile": _LARGE_PROFILE.value, "tpot_s": _TPOT_S.value})
    batch, decode, prefill = batching(small), decode_parallelism(small), prefill_parallelism(large)
    largest = largest_batch(small, _TPOT_S.value, 512)
    alone = small.step_time(batch["tp"])
    best = max(length / alone.step_s([(0, length)], 0, 0) for length in range(16, 2049, 16))
    at_512 = batch["prefill_tokens_per_s"][512][0] / best
    last = decode[-2]
    gain = [values[-1] / values[0] for values in batch["decode_tokens_per_s"].values()]
    cross = prefill["crossing_rate"]
    better = f"tensor up to {cross:.2f} requests/s, pipeline beyond" if cross else "tensor at all rates"
    extrapolated = small.extrapolated or large.extrapolated
    compared = [
        Compared(
            "prompt length that saturates one A100, OPT-13B (Fig. 3a)",
            "about 512 tokens",
            f"L_m = {batch['l_m']} tokens for 90 % of the best prompt alone, 512 tokens for {100 * at_512:.0f} %",
            f"The fit has {1e3 * small.fit_of(batch['tp']).prefill[0]:.0f} ms per step whatever its length, which a "
            "prompt must outweigh; from where on to call a curve that flattens saturated is a choice.",
            extrapolated=small.extrapolated,
            assumed=FROM_MEMORY,
        ),
        Compared(
            "decode throughput grows with the batch (Fig. 3b)",
            "nearly in proportion",
            f"x {min(gain):.1f} to {max(gain):.1f} from one sequence to as many as fit (up to 256)",
            "Reading KV and the work per sequence grow with the batch; only the reading of the weights is shared.",
            extrapolated=small.extrapolated,
            assumed=FROM_MEMORY,
        ),
        Compared(
            "tensor parallel decode (Fig. 5)",
            "shorter steps, with diminishing returns; pipelines scale throughput nearly linearly",
            f"{last['gpus']} GPUs: step x {1 / last['speed_up']:.2f}, throughput x {last['speed_up']:.2f} tensor "
            f"parallel, x {last['gpus']} in a pipeline",
            "A pipeline of the profile loses nothing to the passing on of activations: that is not in the fits.",
            extrapolated=small.extrapolated,
            assumed=FROM_MEMORY,
        ),
        Compared(
            "better prefill parallelism (Fig. 4)",
            "tensor at low rates, pipeline at high ones",
            f"OPT-66B on 4 GPUs, 512 tokens, K = {prefill['speed_up']:.2f}: tensor up to "
            + (
                f"{prefill['crossing_rate']:.2f} requests/s, pipeline beyond" if prefill["crossing_rate"] else "the end"
            ),
            "The paper shows two GPUs; the model fits there only without room for KV, and no fit of one GPU is public.",
            extrapolated=large.extrapolated,
            assumed=FROM_MEMORY,
        ),
    ]
    summary = {"batching": batch, "by_length": by_length(small), "decode": decode, "prefill": prefill,
               "largest_batch_512": largest}  # fmt: skip
    notes = merged([(profile.model, note) for profile in (small, large) for note in profile.outside.values()])
    output.summary(summary | {"extrapolated": extrapolated, "notes": notes, "compared": rows(compared)})
    _draw(output, small, large, summary)
    header = ["GPUs", "kind", "decode step ms", "speed-up", "tokens/s"]
    shown = [
        [str(row["gpus"]), row["kind"], 1e3 * row["latency_s"], row["speed_up"], row["tokens_per_s"]] for row in decode
    ]
    print(f"{small.model} on {small.device}, 128 sequences of 256 tokens" + _mark(small))
    print(table(header, shown))
    sizes = ", ".join(f"tp {tp}: {size}" for tp, size in largest.items())
    print(f"most sequences of 512 tokens inside {_TPOT_S.value:g} s and memory: {sizes}")
    print(f"L_m = {batch['l_m']} tokens; 512 tokens run at {100 * at_512:.0f} % of the best tokens/s of one prompt")
    print(f"{large.model}, prefill on 4 GPUs: K = {prefill['speed_up']:.3f}, {better}")
    for note in notes:
        print(f"note: {note}")
    print(f"written to {output.folder}")


def _mark(profile: Any) -> str:
    return " (extrapolated)" if profile.extrapolated else ""


def _draw(output: Any, small: Any, large: Any, found: dict[str, Any]) -> None:
    from experiments.output import axes

    figure, panels = axes(2, 2)
    batch = found["batching"]
    for length in LENGTHS:
        for column, (phase, batches) in enumerate((("prefill", PROMPT_BATCHES), ("decode", BATCHES))):
            rates, times_s = batch[f"{phase}_tokens_per_s"][length], batch[f"{phase}_s"][length]
            shown = batches[: len(rates)]
            panels[column].plot(shown, [rate / 1e3 for rate in rates], "o-", ms=3, label=f"{length} tokens")
            panels[2 + column].plot(shown, [1e3 * time_s for time_s in times_s], "o-", ms=3)
    for panel, label in zip(panels, ("thousand tokens/s",) * 2 + ("step, ms",) * 2, strict=True):
        panel.set(ylabel=label, ylim=(0, None))
    panels[2].set_xlabel("prompts in a batch")
    panels[3].set_xlabel("sequences in a batch, as far as KV fits")
    panels[0].set_title(f"prefill, {small.model}{_mark(small)}", loc="left")
    panels[1].set_title(f"decode, {small.model}{_mark(small)}", loc="left")
    panels[0].legend(title="prompt")
    panels[1].legend(title="context")
    output.figure("fig3_batching", figure)

    figure, panels = axes(2, 2)
    for column, phase in enumerate(("prefill", "decode")):
        tokens = DECODES if phase == "decode" else 0
        for tp, points in found["by_length"][phase].items():
            lengths = [length for length, _ in points]
            panels[column].plot(lengths, [1e3 * time_s for _, time_s in points], "o-", ms=3, label=f"tp {tp}")
            rates = [(tokens or length) / time_s / 1e3 for length, time_s in points]
            panels[2 + column].plot(lengths, rates, "o-", ms=3)
    for panel, label in zip(panels, ("step, ms",) * 2 + ("thousand tokens/s",) * 2, strict=True):
        panel.set(ylabel=label, ylim=(0, None))
    panels[2].set_xlabel("tokens of the prompt")
    panels[3].set_xlabel("tokens of context of each sequence, as far as KV fits")
    panels[0].set_title(f"prefill of one prompt, {small.model}{_mark(small)}", loc="left")
    panels[1].set_title(f"decode of {DECODES} sequences{_mark(small)}", loc="left")
    panels[0].legend()
    output.figure("fig3_lengths", figure)

    figure, (panel,) = axes(width=5.2)
    for name, curve in found["prefill"]["curves"].items():
        panel.plot(curve["rate"], curve["ttft_s"], label=name)
    if found["prefill"]["crossing_rate"]:
        panel.axvline(found["prefill"]["crossing_rate"], color="#777777", lw=1, ls=":")
    panel.set(xlabel="requests/s", ylabel="mean TTFT, s", ylim=(0, None))
    panel.set_title(f"prefill of 512 tokens, {large.model} on 4 GPUs{_mark(large)}", loc="left")
    panel.legend()
    output.figure("fig4_prefill_parallelism", figure)

    figure, panels = axes(1, 2)
    for kind in ("tensor", "pipeline"):
        mine = [row for row in found["decode"] if row["kind"] == kind]
        gpus = [row["gpus"] for row in mine]
        panels[0].plot(gpus, [1e3 * row["latency_s"] for row in mine], "o-", label=kind)
        panels[1].plot(gpus, [row["tokens_per_s"] / 1e3 for row in mine], "o-", label=kind)
    for panel, label in zip(panels, ("decode step, ms", "thousand tokens/s"), strict=True):
        panel.set(xlabel="GPUs", ylabel=label, ylim=(0, None), xticks=gpus)
    panels[0].legend(loc="lower left")
    panels[0].set_title(f"latency, {small.model}, batch 128{_mark(small)}", loc="left")
    panels[1].set_title("throughput", loc="left")
    output.figure("fig5_decode_parallelism", figure)


if __name__ == "__main__":
    run(main)
