"""What the simulator foretells of a benchmark of the engine, from a latency profile of the same device, beside what was
measured.

python -m experiments.engine_prediction --engine=out/bench --profile=out/profile/profile.json --output_dir=out/checked

ENGINE is the output of experiments.bench_engine, whose config.json says policy and instances' sizes and whose
summary.json the cases; PROFILE one of experiments.profile with the same model. Nothing here needs a device. OUTPUT_DIR
gets summary.json with `cases`: seconds measured and simulated, and how far they are apart.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from absl import flags

from ds_jax.config import SchedulerConfig
from ds_jax.flags import run
from ds_jax.latency import LatencyProfile, load
from ds_jax.protocol import Instance, Request, Role
from ds_jax.scheduling import create_scheduler
from ds_jax.simulation import Links, PlacedLatency, simulate
from ds_jax.workload import Submission
from experiments.output import Output, table

_ENGINE = flags.DEFINE_string("engine", None, "Output folder of experiments.bench_engine.", required=True)
_PROFILE = flags.DEFINE_string("profile", None, "Latency profile.", required=True)
_OUTPUT_DIR = flags.DEFINE_string("output_dir", None, "Folder for the results.", required=True)


def simulated(
    requests: Sequence[tuple[int, int]],
    instances: Sequence[Instance],
    config: dict[str, Any],
    profile: LatencyProfile,
    tp: int,
) -> tuple[list[float], list[float]]:
    """Seconds until the first token and until the last one, of requests (prompt, output tokens) given at once."""
    page_bytes = profile.kv_bytes_per_token * instances[0].page_size
    latency = PlacedLatency(
        {one.id: profile.step_time(tp) for one in instances},
        Links.of(profile),
        page_bytes,
        host_overhead_s=profile.host_overhead_s,
    )
    scheduler = create_scheduler(config["policy"], SchedulerConfig(**config["scheduler"]))
    submissions = [
        Submission(0, Request(id, prompt, output, seed=id), output) for id, (prompt, output) in enumerate(requests)
    ]
    times = simulate(scheduler, instances, submissions, latency).times
    lives = [times[id] for id in range(len(requests))]
    return [(life.first_token_ns or 0) / 1e9 for life in lives], [life.end_ns / 1e9 for life in lives]


def checked(
    case: dict[str, Any], instances: Sequence[Instance], config: dict[str, Any], profile: LatencyProfile, tp: int
) -> list[dict[str, Any]]:
    """Rows (what, measured, simulated, error) of one case of a benchmark."""

    def ends(requests: Sequence[tuple[int, int]]) -> tuple[list[float], list[float]]:
        return simulated(requests, instances, config, profile, tp)

    if "requests" in case:
        firsts, lasts = ends([(prompt, output) for prompt, output in case["requests"]])
        pairs = {
            "all": (case["total_seconds"], max(lasts)),
            "mean first token": (mean(case["first_token_s"]), mean(firsts)),
            "mean end": (mean(case["end_s"]), mean(lasts)),
        }
    else:
        _, prefill = ends([(case["prompt_tokens"], 1)] * case["batch"])
        _, total = ends([(case["prompt_tokens"], case["output_tokens"])] * case["batch"])
        pairs = {
            "prefill": (case["prefill_seconds"], max(prefill)),
            "all": (case["total_seconds"], max(total)),
            "decode": (case["total_seconds"] - case["prefill_seconds"], max(total) - max(prefill)),
        }
    return [
        {"case": case["name"], "what": what, "measured_s": real, "simulated_s": told, "error": told / real - 1}
        for what, (real, told) in pairs.items()
        if real > 0
    ]


def main(argv: list[str]) -> None:
    """Simulate every case, compare."""
    output, profile = Output(_OUTPUT_DIR.value), load(_PROFILE.value)
    config, summary = (
        json.loads((Path(_ENGINE.value) / name).read_text(encoding="utf-8")) for name in ("config.json", "summary.json")
    )
    if not summary["cases"]:
        raise ValueError(f"{_ENGINE.value}/summary.json has no case that was measured")
    instances = [Instance(**{**one, "role": Role(one["role"])}) for one in summary["instances"]]
    tps = {config[str(one.role)]["tp"] for one in instances}
    if len(tps) != 1:
        raise ValueError(f"{_ENGINE.value}/config.json has instances of tp {sorted(tps)}; one and the same is needed")
    rows = [row for case in summary["cases"] for row in checked(case, instances, config, profile, min(tps))]
    errors = [abs(row["error"]) for row in rows if row["what"] == "all"]
    output.summary(
        {
            "device": profile.device,
            "model": profile.model,
            "mean_abs_error": mean(errors),
            "max_abs_error": max(errors),
            "outside_measured_range": sorted(profile.outside.values()),
            "cases": rows,
        }
    )
    print(table(("case", "what", "measured s", "simulated s", "error"), [tuple(row.values()) for row in rows]))
    print(f"whole cases: mean error {mean(errors):.1%}, at most {max(errors):.1%}; written to {output.folder}")


if __name__ == "__main__":
    run(main)
