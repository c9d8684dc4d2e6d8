"""Measure the simulator: simulated requests per second of one core near saturation, and memory by length of a trace.

python -m experiments.bench_simulator --output_dir=out/simulator

Every policy serves ShareGPT lengths with OPT-13B on six A100: a prefill instance of four GPUs and a decode instance of
two, or three workers of two where all are alike. The rate is the highest at which 90 % of the requests keep targets
that only a queue breaks (1 s and 0.2 s). Processor time of the whole simulation counts: scheduler, executor and clock.
It is taken in short stretches, of which the fastest is the machine undisturbed and the median what one may expect.
Memory is the peak of what Python has allocated, at one length of the trace and at ten times that.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
import tracemalloc
from collections.abc import Iterable
from typing import Any

from absl import flags
from tqdm import tqdm

from ds_jax.config import SloConfig
from ds_jax.flags import run
from ds_jax.placement.hardware import Hardware
from ds_jax.placement.layouts import Group, Shape, Unit
from ds_jax.placement.search import Candidate, find_goodput
from ds_jax.placement.trial import BOTH, Trials
from ds_jax.plan import PlanConfig, SearchConfig
from ds_jax.protocol import InstanceUp, Role, Slo
from ds_jax.scheduling import POLICIES
from ds_jax.simulation import VirtualTime
from ds_jax.workload import Submission, workload
from experiments.output import Output, axes, table
from models.folder import read_configs

_OUTPUT_DIR = flags.DEFINE_string("output_dir", None, "Folder for the results.", required=True)
_POLICIES = flags.DEFINE_multi_string("policies", sorted(POLICIES), "Policies to measure.")
_REQUESTS = flags.DEFINE_integer("requests", 5000, "Simulated requests of the timed run.", lower_bound=1000)
_RATE = flags.DEFINE_float("rate", 0.0, "Requests/s offered to the six GPUs; 0: near saturation, found first.", 0.0)
_MEMORY_REQUESTS = flags.DEFINE_integer("memory_requests", 1000, "Shorter trace for memory.", lower_bound=100)
_STRETCH = 250
"""Requests that end in one timed stretch."""

TARGETS = SloConfig(ttft_s=1.0, tpot_s=0.2)
PHASES_APART = Unit((Group(Role.PREFILL, Shape(4, 1)), Group(Role.DECODE, Shape(2, 1))))
ALL_ALIKE = Unit((Group(Role.MIXED, Shape(2, 1), 3),))
ONE_PREFILLS = Unit((Group(Role.PREFILL, Shape(2, 1)), Group(Role.MIXED, Shape(2, 1), 2)))
UNITS = {
    "disaggregated": PHASES_APART,
    "colocated": ALL_ALIKE,
    "chunked": ALL_ALIKE,
    "multiplexed": ONE_PREFILLS,
    "deflected": ONE_PREFILLS,
}


def main(argv: list[str]) -> None:
    """Measure every policy, print and write the results."""
    output = Output(_OUTPUT_DIR.value)
    rows = []
    plan = PlanConfig(
        model="models/published/opt-13b",
        profile="configs/latency/a100_80g_opt_13b.json",
        affinity="low",
        slo=TARGETS,
        search=SearchConfig(requests=2000, precision=0.05, workers=1),
    )
    output.config(plan)
    for policy in tqdm(_POLICIES.value, desc="policies"):
        bench = Bench(dataclasses.replace(plan, policy=policy))
        rate = _RATE.value or bench.saturation()
        rows.append({"policy": policy, "rate": rate} | bench.timed(rate) | bench.memory(rate))
    output.summary({"cases": rows, "requests": _REQUESTS.value})

    figure, (panel,) = axes(width=5.0)
    names = [row["policy"] for row in rows]
    panel.bar(names, [row["requests_per_s"] for row in rows], label="fastest stretch")
    panel.scatter(names, [row["median_requests_per_s"] for row in rows], color="black", label="median", zorder=3)
    panel.set(ylabel="simulated requests per processor second")
    panel.legend()
    output.figure("simulator", figure)
    header = ("policy", "rate", "requests/s", "median", "tokens/s", "events/request", "µs/event", "MiB", "MiB at 10x")
    keys = (
        "requests_per_s", "median_requests_per_s", "tokens_per_s", "events_per_request", "us_per_event", "peak_mib",
        "peak_mib_at_ten_times",
    )  # fmt: skip
    print(table(header, [(row["policy"], row["rate"], *(row[key] for key in keys)) for row in rows]))
    print(f"written to {output.folder}")


class Bench:
    """One policy on its six GPUs."""

    def __init__(self, plan: PlanConfig):
        self.plan = plan
        self.unit = UNITS[plan.policy]
        self.hardware = Hardware(plan, read_configs(plan.model).arch)

    def saturation(self) -> float:
        """The highest rate that keeps TARGETS for 90 % of the requests, in requests/s."""
        trials = Trials(self.plan, self.hardware)
        return find_goodput(trials, Candidate(self.unit, self.plan.policy), 0.0, 5.0).per_gpu * self.unit.gpus

    def timed(self, rate: float) -> dict[str, float]:
        """What a run of `--requests` requests costs."""
        seconds: list[float] = []
        tokens = ended = 0
        last = time.process_time()

        def on_end(one: Any) -> None:
            nonlocal tokens, ended, last
            tokens += one.output_tokens
            ended += 1
            if ended % _STRETCH == 0:
                now = time.process_time()
                seconds.append(now - last)
                last = now

        events = self._simulate(list(self._requests(rate, _REQUESTS.value)), on_end)
        inner = seconds[1:-1]  # neither filling up nor running dry
        each = min(inner) / _STRETCH
        return {
            "requests_per_s": 1 / each,
            "median_requests_per_s": _STRETCH / statistics.median(inner),
            "tokens_per_s": tokens / ended / each,
            "events_per_request": events / ended,
            "us_per_event": each / (events / ended) * 1e6,
        }

    def memory(self, rate: float) -> dict[str, float]:
        """Peak allocation of a run, and of one ten times as long; requests are made as they arrive."""
        peaks = []
        for count in (_MEMORY_REQUESTS.value, 10 * _MEMORY_REQUESTS.value):
            tracemalloc.start()
            self._simulate(self._requests(rate, count), lambda one: None)
            peaks.append(tracemalloc.get_traced_memory()[1] / 2**20)
            tracemalloc.stop()
        return {"peak_mib": peaks[0], "peak_mib_at_ten_times": peaks[1]}

    def _requests(self, rate: float, count: int) -> Iterable[Submission]:
        slo = Slo(round(self.plan.slo.ttft_s * 1e9), round(self.plan.slo.tpot_s * 1e9))
        return workload("sharegpt", rate=rate, count=count, seed=1, slo=slo)

    def _simulate(self, requests: Iterable[Submission], on_end: Any) -> int:
        policy = self.plan.policy
        instances = self.hardware.instances(self.unit, BOTH, policy)
        latency = self.hardware.latency(self.unit, instances, BOTH, policy)
        world = VirtualTime(self.hardware.scheduler(self.unit, policy), latency, on_end)
        world.run([(0, InstanceUp(one)) for one in instances], requests)
        return world.events


if __name__ == "__main__":
    run(main)
