"""Runs of policies on workloads in simulation, and the rates that they can serve: what `experiments.policies` compares.

All share the truth: step times of a latency profile, its links inside one node, its host overhead. Policies that
foretell get step times of their own, those of the profile wrong by a factor.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from ds_jax.architecture import Architecture
from ds_jax.attainment import Attainment, goodput
from ds_jax.config import FORETELLING, SchedulerConfig
from ds_jax.latency import FittedStepTime, LatencyProfile, wrong_by
from ds_jax.latency.gpus import gpu
from ds_jax.latency.roofline import roofline
from ds_jax.protocol import Instance, Role, Slo
from ds_jax.scheduling import create_scheduler
from ds_jax.simulation import Links, PlacedLatency, simulate
from ds_jax.workload import (
    LONGBENCH,
    SHAREGPT,
    Lengths,
    Phase,
    RequestClass,
    Submission,
    TraceWorkload,
    Workload,
    mix,
    workload,
)

PAGE_SIZE = 16
SLOTS = 512
LOOKED_AT = 300
"""Requests of each seed that are looked at before a comparison."""
MAX_TOKENS = 2048
"""What every request asks for at most, so that no scheduler knows its output."""
MOST_REQUESTS = 4000
"""Of one run."""
PART = 2000
"""Requests of a trace that belong to one seed, so that runs of different seeds have none in common."""
TTFT_FACTOR = 5
"""Tropical's target of the first token: so many times the unloaded prefill."""

MOST_PILING = 0.05
"""Share of the arrivals that may surely pile up in a run that passes; of a minute's run, start-up alone is 1 or 2 %,"""
LONG_ENOUGH_S = 60.0
"""and in one of fewer seconds it cannot be told from a queue that grows."""
KEPT = 6
"""Candidates that go on when rates with and without one that passes are known."""

INTERNLM_20B = Architecture(
    family="internlm2",
    vocab_size=92544,
    hidden_size=6144,
    num_layers=48,
    num_heads=48,
    num_kv_heads=8,
    head_dim=128,
    intermediate_size=16384,
    max_positions=262144,
)


def tropical_profile() -> LatencyProfile:
    """InternLM2.5-20B on A100-80G, from published figures: extrapolated."""
    return roofline(INTERNLM_20B, gpu("a100-80g"), "bfloat16", model="InternLM2.5-20B", tps=(1, 2, 4, 8))


@dataclass(frozen=True)
class Setting:
    """The machine: equal instances over a number of GPUs."""

    profile: LatencyProfile
    gpus: int = 8
    tp: int = 2

    @property
    def instances(self) -> int:
        return self.gpus // self.tp

    @property
    def kv_tokens(self) -> int:
        """Tokens of KV that an instance holds.

        Raises:
            ValueError: the profile does not say, for this tensor parallelism.
        """
        if (held := self.profile.kv_tokens.get(f"{self.tp},1")) is None:
            known = ", ".join(sorted(self.profile.kv_tokens)) or "none"
            raise ValueError(
                f"the latency profile of {self.profile.model} has no kv_tokens for tp,pp = {self.tp},1: it has {known}"
            )
        return held

    def step_time(self) -> FittedStepTime:
        """The truth: what is asked beyond the measured ranges is noted in the profile."""
        return self.profile.step_time(self.tp, 1)

    def foretold(self) -> FittedStepTime:
        """What policies are given: the same fit, and nobody minds what they ask it."""
        return FittedStepTime(self.profile.fit_of(self.tp))

    def unloaded_prefill_s(self, tokens: int) -> float:
        return self.profile.fit_of(self.tp).step_s([(0, tokens)], 0, 0)

    def tropical_slo(self, lengths: Lengths) -> Slo:
        """TTFT five times the unloaded prefill, TPOT 100 ms."""
        return slo(TTFT_FACTOR * self.unloaded_prefill_s(lengths.prompt), 0.1)


@dataclass(frozen=True)
class Candidate:
    """A policy with its placement and its budget."""

    policy: str
    roles: tuple[tuple[Role, int], ...]
    """How many instances of each role."""
    step_tokens: int
    options: SchedulerConfig = field(default_factory=SchedulerConfig)

    def __str__(self) -> str:
        parts = ["+".join(f"{count}{str(role)[0].upper()}" for role, count in self.roles)]
        budget = self.options.token_budget if self.policy == "chunked" else self.step_tokens
        parts.append(f"{budget} tokens")
        if self.policy == "multiplexed":
            parts.append(self.options.queue_order)
        return ", ".join(parts)


def candidates(policy: str, instances: int, quick: bool = False) -> list[Candidate]:
    """The small grid that each system is tuned over: chunk budget, placement and, of Tropical, queue order."""
    budgets = (2048,) if quick else (1024, 2048, 8192)
    splits = [(first, instances - first) for first in range(1, instances)]
    if policy == "colocated":
        return [Candidate(policy, ((Role.MIXED, instances),), budget) for budget in budgets]
    if policy == "chunked":
        every = ((Role.MIXED, instances),)
        chunks = (512, 2048) if quick else (256, 512, 1024, 2048)
        return [Candidate(policy, every, 8192, SchedulerConfig(token_budget=budget)) for budget in chunks]
    second = Role.DECODE if policy == "disaggregated" else Role.MIXED
    placements = [((Role.PREFILL, one), (second, other)) for one, other in splits]
    orders: tuple[Literal["fcfs", "sjf"], ...] = ("sjf", "fcfs") if policy == "multiplexed" and not quick else ("sjf",)
    found = [
        Candidate(policy, placement, budget, SchedulerConfig(queue_order=order))
        for placement, budget, order in itertools.product(placements, budgets, orders)
    ]
    if policy == "deflected":
        found += [Candidate(policy, ((Role.MIXED, instances),), budget) for budget in budgets]
    return found


def slo(ttft_s: float, tpot_s: float) -> Slo:
    return Slo(round(ttft_s * 1e9), round(tpot_s * 1e9))


class Scenario(NamedTuple):
    """A workload, made at a rate for a seed."""

    name: str
    make: Callable[[float, int, int], Iterable[Submission]]
    """From rate, count and seed."""
    targets: str
    assumed: str
    guess: float
    """Requests/s where to begin the search."""
    most: int = MOST_REQUESTS
    """Requests of one run."""


def scenarios(setting: Setting, mooncake: str | None) -> dict[str, Scenario]:
    """The workloads of the comparison, by name."""
    chat, tropical = slo(0.25, 0.1), setting.tropical_slo
    code, summary = slo(0.125, 0.2), slo(15.0, 0.15)

    def published(name: str, targets: Slo | Callable[[Lengths], Slo], cv: float = 1.0):
        def make(rate: float, count: int, seed: int) -> Workload | TraceWorkload:
            return workload(name, rate=rate, cv=cv, count=count, seed=seed, slo=targets, max_tokens=MAX_TOKENS)

        return make

    def trace(rate: float, count: int, seed: int) -> TraceWorkload:
        """Another part of the trace for each seed."""
        assert mooncake is not None
        return workload(mooncake, rate=rate, count=count, skip=PART * seed, slo=tropical, max_tokens=MAX_TOKENS)  # type: ignore[return-value]

    def classes(phases: tuple[Phase, ...]):
        both = (RequestClass("chat", SHAREGPT, chat, 0.7), RequestClass("summary", LONGBENCH, summary, 0.3))

        def make(rate: float, count: int, seed: int) -> Workload:
            return mix(both, rate=rate, count=count, seed=seed, phases=phases, max_tokens=MAX_TOKENS)

        return make

    shift = (Phase(20.0, (1.0, 0.0)), Phase(20.0, (0.5, 0.5)), Phase(20.0, (0.1, 0.9)))
    five = "TTFT 5x unloaded prefill, TPOT 0.1 s"
    apart = "chat 0.25/0.1 s, summary 15/0.15 s"
    every = [
        Scenario("sharegpt", published("sharegpt", chat), "0.25/0.1 s", "", 24.0),
        Scenario("humaneval", published("humaneval", code), "0.125/0.2 s", workload("humaneval", rate=1).assumed, 80.0),
        Scenario("longbench", published("longbench", tropical), five, workload("longbench", rate=1).assumed, 14.0),
        Scenario("mooncake", trace, five, "", 0.6, PART)
        if mooncake
        else Scenario("mooncake", published("mooncake", tropical), five, workload("mooncake", rate=1).assumed, 0.6),
        Scenario("bursty", published("sharegpt", slo(2.5, 0.15), cv=4.0), "ShareGPT, cv 4, 2.5/0.15 s", "", 32.0),
        Scenario("two_classes", classes(()), apart, "70 % ShareGPT, 30 % LongBench; " + LONGBENCH.assumed, 18.0),
        Scenario("shifting", classes(shift), apart, "shares shift every 20 s; " + LONGBENCH.assumed, 18.0),
    ]
    return {one.name: one for one in every}


def check(setting: Setting, made: Iterable[Scenario], seeds: Iterable[int], share: float) -> None:
    """Refuse, before anything is run, what would end in nothing but rejections, or in the midst of a trace.

    Raises:
        ValueError: an instance holds too little for `share` of the requests of a workload; a trace has a malformed line
            in a part that is used, or no part for a seed.
    """
    held = setting.kv_tokens
    seeds = list(seeds)
    for scenario in made:
        prompts: list[int] = []
        for seed in seeds:
            count = min(LOOKED_AT, scenario.most) if scenario.most == MOST_REQUESTS else scenario.most
            try:
                prompts += [one.request.prompt_tokens for one in scenario.make(scenario.guess, count, seed)]
            except ValueError as error:
                raise ValueError(f"workload {scenario.name}, seed {seed}: {error}") from None
        needed = sorted(prompts)[math.ceil(share * len(prompts)) - 1] + MAX_TOKENS - 1
        if needed > held:
            raise ValueError(
                f"workload {scenario.name}: {100 * share:g} % of its requests need KV pages of up to {needed} tokens, "
                f"an instance of {setting.profile.model} with tp = {setting.tp} holds {held}: it needs more --tp, or "
                f"devices with more memory"
            )


def run(setting: Setting, candidate: Candidate, work: Iterable[Submission], error: float) -> Attainment:
    """Serve the requests in simulation. `error` is the relative error of what the policy foretells."""
    profile, tp = setting.profile, setting.tp
    step_time = setting.step_time()
    pages = setting.kv_tokens // PAGE_SIZE
    instances = [
        Instance(
            id,
            role,
            0,
            pages,
            PAGE_SIZE,
            slots=SLOTS,
            max_step_tokens=candidate.step_tokens,
            max_step_sequences=64,
            saturation_tokens=min(profile.l_m(tp), candidate.step_tokens),
        )
        for id, role in enumerate([role for role, count in candidate.roles for _ in range(count)])
    ]
    foretold = setting.foretold()
    scheduler = create_scheduler(candidate.policy, candidate.options, wrong_by(lambda instance: foretold, 1 + error))
    truth = PlacedLatency(
        {one.id: step_time for one in instances},
        Links.of(profile),
        PAGE_SIZE * profile.kv_bytes_per_token,
        gpus={one.id: tp for one in instances},
        host_overhead_s=profile.host_overhead_s,
    )
    brought: dict[int, Submission] = {}

    def told() -> Iterable[Submission]:
        for one in work:
            brought[one.request.id] = one
            yield one

    attained = Attainment()

    def end(times) -> None:
        one = brought.pop(times.sequence)
        attained.add(times, one.request.slo, one.label)

    simulate(scheduler, instances, told(), truth, on_end=end)
    return attained


def requests(rate: float, length_s: float, most: int = MOST_REQUESTS) -> int:
    """So many that the arrivals last so long, within 300 and `most` requests."""
    return min(max(300, round(rate * length_s)), most)


@dataclass(frozen=True)
class Outcome:
    """What came of one run."""

    both: float
    low: float
    high: float
    ttft: float
    tpot: float
    ttft_p90_s: float
    tpot_p90_s: float
    piling: float
    """Share of the arrivals that pile up, at least (the lower end of the drift's interval)."""
    labels: dict[str, float]

    @property
    def stable(self) -> bool:
        return self.piling <= MOST_PILING


class Bench:
    """Runs on one scenario, each done once: what is known stays in a file, so that a comparison can be broken off."""

    def __init__(self, setting: Setting, scenario: Scenario, file: Path | None = None):
        self.setting, self.scenario = setting, scenario
        self._file = file
        self._known: dict[str, Outcome] = {}
        if file is not None and file.is_file():
            for line in file.read_text(encoding="utf-8").splitlines():
                key, outcome = json.loads(line)
                self._known[key] = Outcome(**outcome)

    def outcome(self, candidate: Candidate, rate: float, length_s: float, seed: int, error: float) -> Outcome:
        """Of this run, done now or before."""
        error = error if candidate.policy in FORETELLING else 0.0
        count = requests(rate, length_s, self.scenario.most)
        key = f"{candidate.policy}: {candidate} at {rate!r}, {count} requests, seed {seed}, error {error}"
        if key not in self._known:
            made = run(self.setting, candidate, self.scenario.make(rate, count, seed), error)
            shares = made.shares()
            self._known[key] = outcome = Outcome(
                shares.both,
                *shares.both_interval,
                shares.ttft,
                shares.tpot,
                made.ttft_s().p90,
                made.tpot_s().p90,
                made.drift().interval.low,
                {label: made.shares(label).both for label in made.labels},
            )
            if self._file is not None:
                with open(self._file, "a", encoding="utf-8") as file:
                    file.write(json.dumps([key, asdict(outcome)]) + "\n")
        return self._known[key]


class Tuned(NamedTuple):
    candidate: Candidate
    rate: float
    """Highest rate at which it passed on the tuning seed."""
    tried: int


def tune(bench: Bench, policy: str, *, length_s: float, seed: int, share: float, rounds: int, quick: bool) -> Tuned:
    """The candidate that passes at the highest rate: bisection over the rate, with those that still pass.

    The predictors are exact here; errors are for the reported runs. A run whose queue grows does not pass: a longer one
    would not have. Who fails where another passes is out.
    """
    scenario = bench.scenario
    alive = candidates(policy, bench.setting.instances, quick)
    best, tried = alive[0], 0
    low, high = 0.0, 0.0
    rate = scenario.guess
    while not (low and high) or rounds > 0:
        rounds -= bool(low and high)
        attained = {}
        for candidate in alive:
            outcome = bench.outcome(candidate, rate, length_s, seed, 0.0)
            passes = outcome.stable or length_s < LONG_ENOUGH_S
            attained[candidate] = outcome.both if passes else 0.0
        tried += len(alive)
        alive.sort(key=lambda candidate: -attained[candidate])
        if attained[alive[0]] >= share:
            low, best = rate, alive[0]
            alive = [candidate for candidate in alive if attained[candidate] >= share]
        else:
            high = rate
            if not low or attained[alive[0]] >= share - 0.1:  # a near miss tells more than a rate that all pass
                best = alive[0]
        if high and low:
            rate = (low * high) ** 0.5
            alive = alive[:KEPT]
        elif high:
            rate /= 1.6
            if rate < scenario.guess / 100:
                break
        else:
            rate *= 1.6
        if len(alive) == 1 and low and high and high / low < 1.15:
            break
    return Tuned(best, low or rate, tried)


@dataclass(frozen=True)
class Point(Outcome):
    """Outcome at one rate, over all reported seeds and errors."""

    rate: float


def measure(
    bench: Bench, candidate: Candidate, rate: float, *, length_s: float, runs: Iterable[tuple[int, float]]
) -> Point:
    """Pool the runs (seed, predictor error) at this rate."""
    made = [bench.outcome(candidate, rate, length_s, seed, error) for seed, error in runs]

    def mean(values: Iterable[float]) -> float:
        return sum(values) / len(made)

    both = mean(one.both for one in made)
    # Independent runs: the half widths add like standard errors.
    below = sum((one.both - one.low) ** 2 for one in made) ** 0.5 / len(made)
    above = sum((one.high - one.both) ** 2 for one in made) ** 0.5 / len(made)
    labels = made[0].labels
    return Point(
        both=both,
        low=max(0.0, both - below),
        high=min(1.0, both + above),
        ttft=mean(one.ttft for one in made),
        tpot=mean(one.tpot for one in made),
        ttft_p90_s=mean(one.ttft_p90_s for one in made),
        tpot_p90_s=mean(one.tpot_p90_s for one in made),
        piling=max(one.piling for one in made),
        labels={label: mean(one.labels[label] for one in made) for label in labels if len(labels) > 1},
        rate=rate,
    )


class Goodput(NamedTuple):
    """The rate at which the attainment falls to a share, with an interval."""

    rate: float
    low: float
    high: float
    clipped: bool
    """The attainment, or the upper end of its interval, did not fall so far at any rate that was tried: `rate` and
    `high` are lower bounds."""
    missing: bool
    """It was below at all of them: nothing is known but that."""
    ttft: float
    tpot: float
    """Shares inside either target alone, at `rate`."""
    piling: float
    """Share of the arrivals that surely pile up, at the highest rate that was tried up to `rate`."""


def curve(points: list[Point], share: float) -> Goodput:
    """Goodput with its interval: where attainment, and both ends of its interval, fall below `share`."""
    rates = [point.rate for point in points]
    by = [[point.both for point in points], [point.low for point in points], [point.high for point in points]]
    middle, low, high = (goodput(rates, values, share) for values in by)
    below = [point for point in points if point.rate <= middle]
    return Goodput(
        middle,
        low,
        high,
        clipped=points[-1].high >= share,
        missing=points[0].both < share,
        ttft=_between(rates, [point.ttft for point in points], middle),
        tpot=_between(rates, [point.tpot for point in points], middle),
        piling=max([point.piling for point in below], default=0.0),
    )


def bracketed(
    measured: Callable[[float], Point], rates: Iterable[float], share: float, most: int, step: float = 1.2
) -> list[Point]:
    """Points at these rates, and at further ones until the attainment with its interval crosses `share` among them.

    Args:
        most: further points on either side.
        step: ratio of further rates.
    """
    points = [measured(rate) for rate in sorted(rates)]
    for _ in range(most):
        if points[0].low < share:
            points.insert(0, measured(points[0].rate / step))
        if points[-1].high >= share:
            points.append(measured(points[-1].rate * step))
    return points


def _between(rates: list[float], values: list[float], rate: float) -> float:
    """Linear between the rates that were measured."""
    for index in range(1, len(rates)):
        if rates[index - 1] <= rate <= rates[index]:
            part = (rate - rates[index - 1]) / (rates[index] - rates[index - 1])
            return values[index - 1] + part * (values[index] - values[index - 1])
    return values[0] if rate < rates[0] else values[-1]
