"""The simulator against queueing theory: mean TTFT of one prefill instance, alone, as a pipeline, and tensor parallel.

python -m experiments.queueing --output_dir=out/queueing

Prompts are all of one length, one runs at a time, arrivals are Poisson: an M/D/1 queue, for which DistServe's section
3.1 has formulas (D: unloaded prefill, R: rate, K: speed-up by two GPUs that share each layer):

    one GPU                  D + R D^2 / (2 (1 - R D))
    pipeline of two stages   D + R D^2 / (4 (2 - R D))
    tensor parallel, two     D / K + R D^2 / (2 K (K - R D))

Beside the formula, which holds in the long run, stands the recursion for the very arrivals that were simulated
(Lindley, 1952): from that one the simulator must not differ at all.

The paper's Figure 4 shows measured curves of this form, and that tensor parallelism is better at low rates, pipelines
at high ones. Ours shows the formulas as lines and the simulator as points on them, and where the lines cross.
"""

from __future__ import annotations

from typing import Any

from absl import flags

from ds_jax.flags import run
from experiments.md1 import Server, crossing

_OUTPUT_DIR = flags.DEFINE_string("output_dir", None, "Folder for the results.", required=True)
_REQUESTS = flags.DEFINE_integer(
    "requests", 700, "Requests of a run at a load near 0; 1 / (1 - load)^2 times as many at others, up to 12 times.", 20
)
_SPEED_UP = flags.DEFINE_float("speed_up", 1.6, "K: how much faster two GPUs run a layer that they share, 1 to 2.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the arrivals.")
_WORKERS = flags.DEFINE_integer("workers", 0, "Processes; 0: one per core.", lower_bound=0)

PREFILL_S = 0.1
"""D. All times scale with it."""
PROMPT_TOKENS = 1000
LOADS = (0.1, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Shares of the rate that the system can serve at all."""


def servers(speed_up: float) -> tuple[Server, Server, Server]:
    """The three of the paper."""
    return (
        Server("one GPU", 1, PREFILL_S),
        Server("pipeline, 2 stages", 2, PREFILL_S),
        Server(f"tensor parallel 2, K = {speed_up:g}", 1, PREFILL_S / speed_up),
    )


def mean_ttft_s(server: Server, rate: float, requests: int, seed: int) -> tuple[float, float, float]:
    """Mean TTFT in the simulator, half the width of its 95 % interval (from the means of 20 batches), and the mean by
    Lindley's recursion for the same arrivals."""
    import numpy as np

    from ds_jax.config import SchedulerConfig
    from ds_jax.protocol import Instance, Role
    from ds_jax.scheduling import create_scheduler
    from ds_jax.simulation import LinearLatency, simulate
    from ds_jax.workload import fixed, poisson, submissions

    instance = Instance(
        0,
        Role.PREFILL,
        0,
        10**5,
        16,
        lanes=server.lanes,
        max_step_tokens=PROMPT_TOKENS,
        max_step_sequences=1,
        saturation_tokens=1,
    )
    latency = LinearLatency(prefill_base_ns=0, prefill_token_ns=server.prefill_s * 1e9 / PROMPT_TOKENS)
    arrivals_ns = list(poisson(rate, requests, seed))
    work = submissions(arrivals_ns, fixed(PROMPT_TOKENS, 1, requests))
    # One step in flight on a lane: a second one would be bound to its lane before it is known which is free first.
    scheduler = create_scheduler("disaggregated", SchedulerConfig(steps_per_lane=1))
    times = simulate(scheduler, [instance], work, latency).times
    ttft_s = np.array([one.ttft_ns or 0 for one in times.values()]) / 1e9
    means = [part.mean() for part in np.array_split(ttft_s, 20)]
    half_s = float(2.093 * np.std(means, ddof=1) / len(means) ** 0.5)
    stage_s, wait_s, waits_s = server.prefill_s / server.lanes, 0.0, 0.0
    for before_ns, at_ns in zip(arrivals_ns, arrivals_ns[1:], strict=False):
        wait_s = max(0.0, wait_s + stage_s - (at_ns - before_ns) / 1e9)
        waits_s += wait_s
    return float(ttft_s.mean()), half_s, server.prefill_s + waits_s / requests


def runs_of(load: float, requests: int) -> int:
    """Requests for a mean that is about as sure at every load: the spread of M/D/1 grows as 1 / (1 - load)^2."""
    return round(requests * min(12.0, (1 - load) ** -2))


def main(argv: list[str]) -> None:
    """Simulate, compare, draw."""
    from experiments.output import Output, table
    from experiments.published import Compared, rows
    from experiments.systems import parallel

    if not 1 < _SPEED_UP.value <= 2:
        raise ValueError(f"--speed_up = {_SPEED_UP.value} must be greater than 1, at most 2")
    output = Output(_OUTPUT_DIR.value)
    output.config({"requests": _REQUESTS.value, "speed_up": _SPEED_UP.value, "seed": _SEED.value})
    systems = servers(_SPEED_UP.value)
    jobs = [
        (one, load * one.capacity, runs_of(load, _REQUESTS.value), _SEED.value) for one in systems for load in LOADS
    ]
    found = parallel(mean_ttft_s, jobs, "queueing", _WORKERS.value)
    points: list[dict[str, Any]] = [
        {
            "system": server.name,
            "rate": rate,
            "load": rate / server.capacity,
            "simulated_s": mean_s,
            "half_width_s": half_s,
            "formula_s": server.formula_s(rate),
            "recursion_s": recursion_s,
            "requests": count,
            "error": mean_s / server.formula_s(rate) - 1,
        }
        for (server, rate, count, _), (mean_s, half_s, recursion_s) in zip(jobs, found, strict=True)
    ]
    worst = {one.name: max(abs(point["error"]) for point in points if point["system"] == one.name) for one in systems}
    cross = crossing(systems[1], systems[2])
    exact = max(abs(point["simulated_s"] / point["recursion_s"] - 1) for point in points)
    compared = [
        Compared(
            f"mean TTFT, {one.name}",
            "formula of section 3.1",
            f"within {100 * worst[one.name]:.1f} % at loads of {LOADS[0]:g} to {LOADS[-1]:g}",
            "A finite run of random arrivals: the formula holds for endless ones. From the recursion for the same "
            f"arrivals the simulator differs by {100 * exact:.2g} % at most.",
        )
        for one in systems
    ]
    output.summary(
        {
            "points": points,
            "requests_at_each_load": {f"{load:g}": runs_of(load, _REQUESTS.value) for load in LOADS},
            "worst_error": worst,
            "worst_error_to_recursion": exact,
            "crossing_rate": cross,
            "compared": rows(compared),
        }
    )
    _draw(output, systems, points, cross)
    header = ["system", "R D", "load", "requests", "formula s", "recursion s", "simulated s", "+- s"]
    shown = [
        [p["system"], PREFILL_S * p["rate"], p["load"], p["requests"], p["formula_s"], p["recursion_s"],
         p["simulated_s"], p["half_width_s"]]
        for p in points
    ]  # fmt: skip
    print(table(header, shown))
    if cross is not None:
        print(f"tensor parallelism has the lower mean TTFT up to R D = {PREFILL_S * cross:.3g}, the pipeline beyond")
    print(f"written to {output.folder}")


def _draw(output: Any, systems: tuple[Server, ...], points: list[dict[str, Any]], cross: float | None) -> None:
    import numpy as np

    from experiments.output import PALETTE, axes

    figure, (panel,) = axes(width=6, height=3.6)
    for one, colour in zip(systems, PALETTE, strict=False):
        rates = np.linspace(0, 0.94 * one.capacity, 200)
        panel.plot(PREFILL_S * rates, [one.formula_s(rate) / PREFILL_S for rate in rates], color=colour, label=one.name)
        mine = [point for point in points if point["system"] == one.name]
        panel.errorbar(
            [PREFILL_S * point["rate"] for point in mine],
            [point["simulated_s"] / PREFILL_S for point in mine],
            [point["half_width_s"] / PREFILL_S for point in mine],
            fmt="o",
            ms=4,
            color=colour,
        )
    if cross is not None:
        panel.axvline(PREFILL_S * cross, color="#777777", lw=1, ls=":")
        for x, side, text in ((-0.02, "right", "tensor\nbetter"), (0.02, "left", "pipeline\nbetter")):
            panel.text(PREFILL_S * cross + x, 5.9, text, ha=side, va="top", color="#777777")
    panel.set_xlabel("rate x unloaded prefill, R D")
    panel.set_ylabel("mean TTFT / D")
    panel.set_ylim(0, 6)
    panel.set_title("M/D/1 formulas (lines) and simulator (points, 95 % intervals)", loc="left")
    panel.legend(loc="upper left")
    output.figure("queueing", figure)


if __name__ == "__main__":
    run(main)
