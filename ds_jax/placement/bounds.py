"""What no simulation is needed for: whether a unit can work at all, and a rate that it cannot pass.

A bound is a closed formula of step times, lengths and memory. It is above what simulation can find (by MARGIN, for the
luck of a finite run), and only ever leaves a candidate out or puts candidates into an order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from ds_jax.placement.hardware import Hardware
from ds_jax.placement.layouts import Group, Unit
from ds_jax.placement.trial import BOTH, Requests
from ds_jax.plan import PlanConfig
from ds_jax.protocol import Role

MARGIN = 1.25


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
    """The value of the obstacle's limit from which on it could: GPUs, seconds, or Gbit/s."""


def bound(unit: Unit, plan: PlanConfig, hardware: Hardware, requests: Requests, phases: Sequence[Role] = BOTH) -> Bound:
    """A rate that the unit cannot pass, and why it cannot serve at all if that is 0."""
    longest = int((requests.prompts + requests.outputs).max()) - 1
    for group in unit.groups:
        if hardware.kv_tokens(group) < longest:
            return Bound(0.0, Obstacle.MEMORY, hardware.fewest_gpus(group, longest))
        if not hardware.measured(group):
            return Bound(0.0, Obstacle.UNMEASURED)
    rates = []
    for group in unit.groups:
        prefills = Role.PREFILL in phases and group.role in (Role.PREFILL, Role.MIXED)
        decodes = Role.DECODE in phases and group.role in (Role.DECODE, Role.MIXED)
        if prefills:
            ttft_s = unloaded_ttft_s(group, hardware, requests, plan.search.attainment)
            if ttft_s > plan.slo.ttft_s:
                return Bound(0.0, Obstacle.TTFT, ttft_s)
        if decodes:
            tpot_s = unloaded_tpot_s(group, hardware, requests)
            if tpot_s > plan.slo.tpot_s:
                return Bound(0.0, Obstacle.TPOT, tpot_s)
        seconds = 0.0
        if prefills and not (group.role is Role.MIXED and unit.group(Role.PREFILL)):
            seconds += _prefill_work_s(group, hardware, requests)
        if decodes:
            seconds += _decode_work_s(group, hardware, requests)
        if seconds:
            span = plan.slo.ttft_s + plan.slo.tpot_s * float(requests.outputs.mean())
            rates.append(group.instances * _of_a_finite_run(1 / seconds, span, len(requests.prompts)))
    if unit.kv_crosses_nodes and len(phases) > 1:
        needed = _network_needed_gbits(unit, plan, hardware, requests)
        if needed > plan.cluster.network_gbits:
            return Bound(0.0, Obstacle.BANDWIDTH, needed)
    return Bound(MARGIN * min(rates) / unit.gpus)


def unloaded_ttft_s(group: Group, hardware: Hardware, requests: Requests, share: float) -> float:
    """TTFT that this share of the requests meets on an idle instance."""
    step = hardware.step_time(group)
    length = int(np.percentile(requests.prompts, 100 * share, method="lower"))
    return step.step_s([(0, length)], 0, 0)


def unloaded_tpot_s(group: Group, hardware: Hardware, requests: Requests) -> float:
    """Time of a decode step for one sequence of a middling context."""
    return hardware.step_time(group).step_s((), 1, int(requests.prompts.min()) + 1)


def _prefill_work_s(group: Group, hardware: Hardware, requests: Requests) -> float:
    """Mean seconds of the first stage per request, in steps as full as they can be."""
    step = hardware.step_time(group)
    base = step.step_s([(0, 1)], 0, 0)
    full = hardware.max_step_tokens
    times = [step.step_s([(0, int(length))], 0, 0) - base * max(0.0, 1 - length / full) for length in requests.prompts]
    return max(float(np.mean(times)), 1e-9) / group.shape.pp


def _decode_work_s(group: Group, hardware: Hardware, requests: Requests) -> float:
    """Mean seconds of a stage per request, in batches as large as memory allows: tokens / (best tokens per second)."""
    step = hardware.step_time(group)
    context = float(requests.prompts.mean() + requests.outputs.mean() / 2)
    most = min(hardware.plan.slots, max(1, int(hardware.kv_tokens(group) / context / group.shape.pp)))
    sizes = sorted({min(most, 2**power) for power in range(12)})
    per_token = min(step.step_s((), size, round(size * context)) / size for size in sizes)
    return per_token * float(requests.outputs.mean() - 1 or 1) / group.shape.pp


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


def _of_a_finite_run(rate: float, span_s: float, count: int) -> float:
    """A run of `count` requests can end before a queue that grows for ever is seen to be too long: 1 / rate is the
    time between departures, and the last of the requests that count may be `span_s` late."""
    gap = 1 / rate - span_s / (0.9 * count)
    return 1 / gap if gap > 0 else float("inf")
