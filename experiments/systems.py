"""The systems that the papers compare, the workloads that they compare them on, and one try of a system at one rate.

A system is a policy with its options on a unit of instances. Under `search.rule=joint` all of them run on the same step
times, so that only policies differ; under `published` DistServe and vLLM keep the rules, step times and host overheads
that their public code had.
"""

from __future__ import annotations

import functools
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ds_jax.attainment import Share
from ds_jax.config import SchedulerConfig, SloConfig
from ds_jax.metrics import RequestTimes
from ds_jax.placement.hardware import Hardware
from ds_jax.placement.layouts import Group, Shape, Unit
from ds_jax.placement.trial import BOTH, Requests
from ds_jax.plan import ClusterConfig, PlanConfig, SearchConfig, WorkloadConfig
from ds_jax.protocol import InstanceUp, Role
from ds_jax.scheduling import create_scheduler
from ds_jax.simulation import VirtualTime

if TYPE_CHECKING:
    from absl import flags

MII = SchedulerConfig(chunk_order="splitfuse", token_budget=768)
"""DeepSpeed-MII's scheduler."""
MII_ASSUMED = "DeepSpeed-MII's batch of 768 tokens is its default as far as is remembered"


@dataclass(frozen=True)
class Evaluation:
    """One workload of DistServe's evaluation (section 6.2, Table 1)."""

    name: str
    model: str
    profile: str
    """Step times; empty: a roofline, extrapolated."""
    cluster: ClusterConfig
    workload: str
    slo: SloConfig
    vllm_tp: int
    """Tensor parallelism of vLLM and DeepSpeed-MII: evaluation/2-benchmark-serving/2-start-api-server.py of the public
    code."""
    prefill: Shape
    """The paper's placement (Table 3)."""
    decode: Shape
    goodput_over_vllm: float
    """Published: ratio of the rates at 90 % attainment."""
    goodput_over_mii: float | None
    slo_over_vllm: float
    """Published: how much tighter the targets may be at the same rate."""
    slo_over_mii: float | None

    def plan(self) -> PlanConfig:
        """The evaluation as a plan, to which a placement can be found."""
        return PlanConfig(
            model=self.model,
            profile=self.profile,
            affinity="low",
            cluster=self.cluster,
            slo=self.slo,
            workload=WorkloadConfig(name=self.workload),
        )

    def is_asked_by(self, plan: PlanConfig) -> bool:
        """Whether the published numbers are of this plan: all but the search is the paper's."""
        return replace(plan, search=SearchConfig()) == self.plan()


_13B = ("models/published/opt-13b", "configs/latency/a100_80g_opt_13b.json", ClusterConfig(nodes=1, gpus_per_node=4))
_66B = ("models/published/opt-66b", "configs/latency/a100_80g_opt_66b.json", ClusterConfig(nodes=1, gpus_per_node=8))
_175B = ("models/published/opt-175b", "", ClusterConfig(nodes=4, gpus_per_node=8))
_66B_PLACED = (4, Shape(4, 1), Shape(2, 2))

EVALUATIONS = (
    Evaluation("13B ShareGPT", *_13B, "sharegpt", SloConfig(0.25, 0.1), 1, Shape(2, 1), Shape(1, 1),
               4.60, 7.36, 1.74, 1.80),
    Evaluation("66B ShareGPT", *_66B, "sharegpt", SloConfig(2.5, 0.15), *_66B_PLACED, 2.75, 1.57, 3.14, 1.80),
    Evaluation("175B ShareGPT", *_175B, "sharegpt", SloConfig(4.0, 0.2), 8, Shape(3, 3), Shape(4, 3),
               1.99, None, 1.77, None),
    Evaluation("66B HumanEval", *_66B, "humaneval", SloConfig(0.125, 0.2), *_66B_PLACED, 5.72, 1.59, 1.35, 1.27),
    Evaluation("66B LongBench", *_66B, "longbench", SloConfig(15.0, 0.15), *_66B_PLACED, 4.24, 1.77, 12.59, 2.59),
)  # fmt: skip
"""DistServe, section 6.2: Tables 1 and 3, Figures 8 and 9."""


@dataclass(frozen=True)
class System:
    """What is tried."""

    name: str
    policy: str
    unit: Unit
    options: SchedulerConfig = field(default_factory=SchedulerConfig)
    foretells: bool = False
    """Whether the policy looks at a request's targets: at others it must be tried anew."""


def pair(prefill: Shape, decode: Shape, prefills: int = 1, decodes: int = 1) -> Unit:
    """Prefill and decode instances."""
    return Unit((Group(Role.PREFILL, prefill, prefills), Group(Role.DECODE, decode, decodes)))


def mixed(shape: Shape, instances: int = 1) -> Unit:
    """Instances that do both phases."""
    return Unit((Group(Role.MIXED, shape, instances),))


def multiplexing(unit: Unit) -> Unit:
    """The same instances, those that decode now taking prompts as well."""
    groups = [replace(group, role=Role.MIXED) if group.role is Role.DECODE else group for group in unit.groups]
    return replace(unit, groups=tuple(groups))


# --- one try ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Served:
    """The requests of one try, in order of arrival; all arrays have one element (row) per request."""

    rate_per_gpu: float
    ttft_s: np.ndarray
    """inf: never served."""
    tpot_s: np.ndarray
    stages_s: np.ndarray
    """(requests, 5): seconds in each stage of `protocol.STAGES`."""
    outputs: np.ndarray
    rejected: int
    notes: tuple[str, ...] = ()
    """Steps that the plan's step times were asked for beyond what was measured, here or in earlier tries."""

    def share(self, slo: SloConfig, scale: float = 1.0) -> float:
        """Share of requests inside both targets."""
        return float(np.mean((self.ttft_s <= scale * slo.ttft_s) & (self.tpot_s <= scale * slo.tpot_s)))

    def shares(self, slo: SloConfig) -> tuple[float, float, float]:
        """Shares inside both targets, that of TTFT, and that of TPOT."""
        return (
            self.share(slo),
            float(np.mean(self.ttft_s <= slo.ttft_s)),
            float(np.mean(self.tpot_s <= slo.tpot_s)),
        )

    def interval(self, slo: SloConfig) -> tuple[float, float]:
        """Where the share inside both targets lies, with 95 % confidence."""
        counted = Share()
        for inside in (self.ttft_s <= slo.ttft_s) & (self.tpot_s <= slo.tpot_s):
            counted.add(bool(inside))
        return counted.interval()

    def percentiles(self, at: float) -> tuple[float, float]:
        """That percentile of TTFT and of TPOT."""
        return float(np.percentile(self.ttft_s, at)), float(np.percentile(self.tpot_s, at))


def serve(
    plan: PlanConfig,
    system: System,
    rate_per_gpu: float,
    *,
    count: int = 0,
    phases: Sequence[Role] = BOTH,
    requests: Requests | None = None,
) -> Served:
    """The system serves the first `count` requests (0: all) of the plan's workload, or those given, at this rate.

    Args:
        rate_per_gpu: requests/s per GPU of the unit; of the phase's GPUs where a phase is looked at alone.
    """
    plan = replace(plan, policy=system.policy)  # the public rules give a policy the step times that its system had
    requests, machines = requests or _requests(plan), hardware(plan)
    instances = machines.instances(system.unit, phases, system.policy)
    latency = machines.latency(system.unit, instances, phases, system.policy)
    if system.options == SchedulerConfig():
        scheduler = machines.scheduler(system.unit, system.policy)
    else:
        scheduler = create_scheduler(system.policy, system.options)
    ended: list[RequestTimes] = []
    world = VirtualTime(scheduler, latency, ended.append)
    submissions = requests.at(rate_per_gpu * system.unit.gpus, phases)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # steps beyond a measured range: `notes` tells of them
        world.run([(0, InstanceUp(one)) for one in instances], submissions[:count] if count else submissions)
    delay_s = machines.delay_s(system.policy)
    ended.sort(key=lambda one: one.sequence)
    nothing = float("inf")
    served = [(one.ttft_ns, one.tpot_ns) if not one.rejected else (None, None) for one in ended]
    return Served(
        rate_per_gpu,
        np.array([nothing if ttft is None else ttft / 1e9 + delay_s for ttft, _ in served]),
        np.array([nothing if tpot is None else tpot / 1e9 for _, tpot in served]),
        np.array([one.stages_ns for one in ended]) / 1e9,
        np.array([one.output_tokens for one in ended]),
        sum(one.rejected for one in ended),
        tuple(machines.notes()),
    )


@functools.lru_cache(maxsize=16)
def _requests(plan: PlanConfig) -> Requests:
    return Requests(plan)


@functools.lru_cache(maxsize=16)
def hardware(plan: PlanConfig) -> Hardware:
    """The plan's step times, memory and links."""
    from models.folder import read_configs

    return Hardware(plan, read_configs(plan.model).arch)


FIRST_STEP, LAST_STEP = 1.12, 3.0
"""Factors by which `rate_at` goes up or down from where it begins: the first, and the largest."""


def rate_at(
    share_at: Callable[[float], float],
    share: float = 0.9,
    *,
    first: float = 1.0,
    precision: float = 0.03,
    lowest: float = 0.02,
    highest: float = 100.0,
) -> float:
    """The rate at which the share of good requests falls to `share`: bisection, then linear between the last two rates.

    Args:
        share_at: rate -> share; called at each rate once.
        first: where to begin: the nearer, the fewer rates.
        lowest: where to give up: at low rates nothing is batched, so that runs are long.
        highest: where nobody looks further: a short run may be good at any rate.

    Returns:
        0 if it is below the share at the lowest rate already; the last rate tried if it never falls below.
    """
    rates: dict[float, float] = {}

    def good(rate: float) -> bool:
        rates[rate] = share_at(rate)
        return rates[rate] >= share

    low, high = (first, 0.0) if good(first) else (0.0, first)
    step = FIRST_STEP
    while not high:
        if low >= highest:
            return low
        low, high = (low * step, 0.0) if good(low * step) else (low, low * step)
        step = min(step**2, LAST_STEP)
    while not low:
        if high <= lowest:
            return 0.0
        next_rate = max(high / step, lowest)
        low, high = (next_rate, high) if good(next_rate) else (0.0, next_rate)
        step = min(step**2, LAST_STEP)
    while high > low * (1 + precision):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if good(middle) else (low, middle)
    above, below = rates[low], rates[high]
    return low + (high - low) * (above - share) / (above - below)


# --- what launchers share ---------------------------------------------------------------------------------------------


def parallel[R](function: Callable[..., R], jobs: Sequence[tuple[Any, ...]], what: str, workers: int = 0) -> list[R]:
    """`function(*job)` for each job, on all cores, with a progress bar; results in the order of the jobs.

    Args:
        workers: processes; 0: one per core, 1: none beside this one.
    """
    from tqdm import tqdm

    workers = min(workers or os.cpu_count() or 1, len(jobs))
    if workers <= 1:
        return [function(*job) for job in tqdm(jobs, desc=what, leave=False)]
    method = "fork" if sys.platform == "linux" and "jax" not in sys.modules else "spawn"
    with ProcessPoolExecutor(workers, get_context(method)) as pool:
        futures = [pool.submit(function, *job) for job in jobs]
        return [future.result() for future in tqdm(futures, desc=what, leave=False)]


@dataclass(frozen=True)
class Case:
    """One workload with its plan."""

    name: str
    plan: PlanConfig
    evaluation: Evaluation | None
    """The paper's, where the plan is its plan: only then is there anything published to compare with."""


def chosen_cases(flag_values: flags.FlagValues) -> list[Case]:
    """The plan of --config; without it the five of the paper. Either way with the --config.NAME flags over it."""
    from ds_jax.flags import load_config
    from ds_jax.knobs import knobs, set_knob

    if flag_values["config"].value:
        plan = load_config(PlanConfig, flag_values=flag_values)
        known = next((one for one in EVALUATIONS if one.is_asked_by(plan)), None)
        return [Case(known.name if known else f"{Path(plan.model).name}, {plan.workload.name}", plan, known)]
    cases = []
    for one in EVALUATIONS:
        plan = one.plan()
        for knob in knobs(PlanConfig):
            flag = flag_values[f"config.{knob.name}"]
            if flag.present:
                plan = set_knob(plan, knob.name, flag.value)
        plan.check()
        cases.append(Case(one.name, plan, one if one.is_asked_by(plan) else None))
    return cases


def refuse(flag_values: flags.FlagValues, reasons: Mapping[str, str]) -> None:
    """Refuse flags of knobs that a launcher sets itself.

    Args:
        reasons: flag without its dashes -> what says it in its place.

    Raises:
        ValueError: one of them was given.
    """
    for name, reason in reasons.items():
        if flag_values[name].present:
            raise ValueError(f"--{name} has no effect here: {reason}")
