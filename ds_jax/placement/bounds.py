"""What no simulation is needed for: whether a unit can work at all, and a rate that it cannot pass.

A bound is a closed formula of step times, lengths and memory. It is above what simulation can find (by MARGIN, for the
luck of a finite run), and only ever leaves a candidate out or puts candidates into an order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from ds_jax.placement.hardware import Hardware
from ds_jax.placement.layouts import Group, Unit, located
from ds_jax.placement.trial import BOTH, Requests
from ds_jax.plan import PlanConfig
from ds_jax.protocol import Role

MARGIN = 1.25

MIXING = ("chunked", "deflected")
"""Policies whose steps have prompts and decodes: the decodes ride along."""


class Obstacle(StrEnum):
    """What rules a unit out."""

    MEMORY = "memory"
    TTFT = "ttft"
    TPOT = "tpot"
    BANDWIDTH = "bandwidth"
    UNMEASURED = "unmeasured"
    """The latency profile does not know its tensor parallelism."""


@dataclass(frozen=True)
class Bound:
    per_gpu: float
    """Requests/s/GPU that the unit cannot pass."""
    obstacle: Obstacle | None = None
    """Why it cannot serve at all."""
    nearest: float = 0.0
    """The value of the obstacle's limit from which on it could: GPUs of the unit, seconds, or Gbit/s; inf: no value is
    known to do."""


def bound(
    unit: Unit,
    plan: PlanConfig,
    hardware: Hardware,
    requests: Requests,
    phases: Sequence[Role] = BOTH,
    policy: str = "disaggregated",
) -> Bound:
    """A rate that the unit cannot pass, and why it cannot serve at all if that is 0."""
    longest = int((requests.prompts + requests.outputs).max()) - 1
    if any(hardware.kv_tokens(group) < longest for group in unit.groups):
        return Bound(0.0, Obstacle.MEMORY, sum(hardware.fewest_gpus(group, longest) for group in unit.groups))
    if not all(hardware.measured(group) for group in unit.groups):
        return Bound(0.0, Obstacle.UNMEASURED)
    prefilling = [one for one in unit.groups if Role.PREFILL in phases and one.role is not Role.DECODE]
    decoding = [one for one in unit.groups if Role.DECODE in phases and one.role is not Role.PREFILL]
    if prefilling:
        # The fastest takes the prompts that no other could take in time.
        ttft_s = min(unloaded_ttft_s(one, hardware, requests, plan.search.attainment, policy) for one in prefilling)
        if ttft_s > plan.slo.ttft_s:
            return Bound(0.0, Obstacle.TTFT, ttft_s)
    if decoding:
        tpot_s = min(unloaded_tpot_s(one, hardware, requests, plan.search.attainment, policy) for one in decoding)
        if tpot_s > plan.slo.tpot_s:
            return Bound(0.0, Obstacle.TPOT, tpot_s)
    if unit.kv_crosses_nodes and len(phases) > 1:
        needed = _network_needed_gbits(unit, plan, hardware, requests)
        if needed > plan.cluster.network_gbits:
            return Bound(0.0, Obstacle.BANDWIDTH, needed)
    rate = _most_work(prefilling, decoding, hardware, requests, policy)
    if unit.kv_crosses_nodes and len(phases) > 1:
        rate = min(rate, _most_copied(unit, plan, hardware, requests))
    # A run can end before a queue that grows for ever is seen to be too long: 1 / rate is the time between departures,
    # and the last of the requests that count may be late by a whole life.
    span_s = plan.slo.ttft_s + plan.slo.tpot_s * float(requests.outputs.mean())
    gap = 1 / rate - span_s / (0.9 * len(requests.prompts))
    return Bound(MARGIN / gap / unit.gpus if gap > 0 else math.inf)


def unloaded_ttft_s(
    group: Group, hardware: Hardware, requests: Requests, share: float, policy: str = "disaggregated"
) -> float:
    """TTFT that this share of the requests meets on an idle instance."""
    length = int(np.percentile(requests.prompts, 100 * share, method="lower"))
    pace = hardware.pace(group, policy)
    return pace.prefill[0] + float(pace.prompts_s(np.array([length]))[0]) + hardware.delay_s(policy)


def unloaded_tpot_s(
    group: Group, hardware: Hardware, requests: Requests, share: float, policy: str = "disaggregated"
) -> float:
    """Time of a decode step for one sequence, which this share of the requests meet: those that have a decode step."""
    contexts = np.where(requests.outputs > 1, requests.prompts + 1, 0)
    context = int(np.percentile(contexts, 100 * share, method="lower"))
    return hardware.pace(group, policy).decode_s(1, context) if context else 0.0


def _most_work(
    prefilling: Sequence[Group], decoding: Sequence[Group], hardware: Hardware, requests: Requests, policy: str
) -> float:
    """Requests/s of which the instances can do all the work, in steps as full as they can be.

    With x of the R requests/s prefilled by instances that do nothing else:

        x p <= n    of those n, p seconds a prompt
        (R - x) p' + R d <= m    of the m that decode in d seconds a request, and prefill in p' seconds a prompt
    """
    if not decoding:
        return sum(one.instances / _prefill_work_s(one, hardware, requests, policy) for one in prefilling)
    (last,) = decoding
    alone_s = _decode_work_s(last, hardware, requests, policy)
    rate = last.instances / alone_s
    if not prefilling:
        return rate
    apart = sum(one.instances / _prefill_work_s(one, hardware, requests, policy) for one in prefilling if one != last)
    if last not in prefilling:
        return min(rate, apart)
    prompt_s = _prefill_work_s(last, hardware, requests, policy)
    beside_s = _riding_work_s(last, hardware, requests, policy) if policy in MIXING else alone_s
    return min(rate, (apart + last.instances / prompt_s) / (1 + beside_s / prompt_s))


def _most_copied(unit: Unit, plan: PlanConfig, hardware: Hardware, requests: Requests) -> float:
    """Requests/s whose KV the nodes of either phase can send or take in, each over one link; inf if a node has both."""
    places = located(plan, unit)
    if places is None:
        return math.inf
    nodes: dict[Role, set[int]] = {}
    instances = [group.role for group in unit.groups for _ in range(group.instances)]
    for role, stages in zip(instances, places, strict=True):
        nodes.setdefault(role, set()).add(stages[0])
    ends = list(nodes.values())
    if set.intersection(*ends):
        return math.inf
    return min(map(len, ends)) / hardware.kv_transfer_s(float(requests.prompts.mean()))


def _prefill_work_s(group: Group, hardware: Hardware, requests: Requests, policy: str) -> float:
    """Mean seconds of the first stage per request, in steps as full as they can be."""
    pace = hardware.pace(group, policy)
    lengths = requests.prompts
    bases = pace.prefill[0] * np.minimum(1.0, lengths / pace.step_tokens)
    return max(float(np.mean(bases + pace.prompts_s(lengths))), 1e-9) / group.shape.pp


def _decode_work_s(group: Group, hardware: Hardware, requests: Requests, policy: str) -> float:
    """Mean seconds of a stage per request, in batches as large as memory allows: tokens / (best tokens per second)."""
    pace = hardware.pace(group, policy)
    context = float(requests.prompts.mean() + requests.outputs.mean() / 2)
    most = min(pace.slots, max(1, int(pace.kv_tokens / context / group.shape.pp)))
    sizes = sorted({min(most, 2**power) for power in range(12)})
    per_token = min(pace.decode_s(size, size * context) / size for size in sizes)
    return _of_all_tokens(per_token, group, requests)


def _riding_work_s(group: Group, hardware: Hardware, requests: Requests, policy: str) -> float:
    """The same of decodes that ride along in steps with prompts: these read the weights anyway."""
    pace = hardware.pace(group, policy)
    context = float(requests.prompts.mean() + requests.outputs.mean() / 2)
    per_token = min(coefficients[1] * context + coefficients[2] for coefficients in (pace.decode, pace.decode_large))
    return _of_all_tokens(max(per_token, 0.0), group, requests)


def _of_all_tokens(per_token_s: float, group: Group, requests: Requests) -> float:
    return max(per_token_s * float(np.maximum(requests.outputs - 1, 0).mean()) / group.shape.pp, 1e-9)


def _network_needed_gbits(unit: Unit, plan: PlanConfig, hardware: Hardware, requests: Requests) -> float:
    """Bandwidth between nodes from which on enough requests keep their TPOT although their KV crosses it, unloaded.

    TPOT = decode step + transfer / (output - 1), so that requests with short outputs feel it most.
    """
    group = unit.group(Role.DECODE) or unit.group(Role.MIXED)
    assert group is not None
    step_s = hardware.step_time(group).step_s((), 1, int(requests.prompts.mean()))
    gaps = np.maximum(requests.outputs - 1, 0)
    transfer_s = np.array([hardware.kv_transfer_s(float(prompt)) for prompt in requests.prompts])
    slack_s = np.maximum(plan.slo.tpot_s - step_s, 1e-9) * gaps
    factors = np.where(gaps > 0, transfer_s / np.maximum(slack_s, 1e-9), 0.0)
    return float(np.percentile(factors, 100 * plan.search.attainment, method="lower")) * plan.cluster.network_gbits
