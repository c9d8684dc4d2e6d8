"""Replanning: the placement follows the workload (DistServe, section 4.3: in the paper only).

A monitor hears every request. When the shift test tells that rate or lengths have changed, the phases are placed anew
for the requests since then, and instances change over: those that stay are not touched; those that go take no new work,
and after a while what they still have is run again elsewhere; those that come load their weights first, unless the same
GPUs held the same shares of them in the other role.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ds_jax.architecture import Architecture
from ds_jax.latency import StepTime
from ds_jax.placement.hardware import Hardware
from ds_jax.placement.layouts import Group, Shape, Unit, shapes
from ds_jax.placement.search import Candidate, Infeasible, PlacementSearch
from ds_jax.placement.trial import BOTH, Requests
from ds_jax.plan import PlanConfig
from ds_jax.protocol import Drain, Event, Instance, InstanceLost, InstanceUp, Role
from ds_jax.simulation import PlacedLatency
from ds_jax.workload import Lengths, Submission, submissions
from ds_jax.workload.monitor import Observation, Shift, ShiftTest, pattern_of

HEADROOM = 1.25
"""A fleet that serves so many times the present rate has no need to change."""
GAIN = 1.15
"""Another fleet must serve so many times as much to be worth a change."""

Fleet = tuple[Group, Group]
"""All prefill and all decode instances of a cluster."""


@dataclass(frozen=True)
class ChangeCost:
    """What it takes to change over."""

    drain_s: float = 5.0
    """How long an instance that goes may finish what it has; the rest is run again elsewhere."""
    load_bytes_per_s: float = 2e9
    """Bandwidth at which each GPU loads its share of the weights."""
    start_s: float = 2.0
    """Beside the weights: making the pool, loading compiled programs."""
    search_s: float = 5.0
    """From the shift being seen to the new plan being known."""


@dataclass(frozen=True)
class Change:
    """One replanning."""

    shift: Shift
    before: Fleet
    after: Fleet
    at_ns: int
    """When the change began."""
    up_ns: int
    """When the last new instance was up."""
    moved: int
    """Instances that went."""
    loaded_bytes: float
    """Weights that were loaded."""


class Replanner:
    """Plans the fleet of one cluster for what its requests look like. `plan.workload` is not looked at."""

    def __init__(self, plan: PlanConfig, arch: Architecture, cost: ChangeCost | None = None):
        self.plan, self.arch = plan, arch
        self.hardware = Hardware(plan, arch)
        self.cost = cost or ChangeCost()
        self.gpus = plan.cluster.nodes * plan.cluster.gpus_per_node

    def fleet(self, history: Sequence[Observation], now: Fleet | None = None) -> Fleet:
        """The prefill and decode instances that together serve the most requests like these.

        Each shape's goodput is found for each phase alone, as in Algorithm 1, if it is not far below the best one's;
        then every pair of shapes and counts that
        the cluster has GPUs for is weighed by min(prefill, decode). Of equals the one with the fewest GPUs at work.

        Args:
            now: the fleet that there is. It stays as long as it can serve HEADROOM times the rate of the history, or as
                no other serves GAIN times as much.

        Raises:
            Infeasible: no pair of shapes serves these requests inside the targets.
        """
        search = PlacementSearch(self.plan, self.arch, requests=self._like(history))
        options: dict[Role, list[tuple[Shape, float]]] = {}
        with search:
            for role in BOTH:
                present = [group.shape for group in now or () if group.role is role]
                possible = shapes(self.arch, self.plan, self._most_gpus())
                units = [Unit((Group(role, shape),)) for shape in dict.fromkeys(present + possible)]
                judged = search.judge(
                    [Candidate(unit, "disaggregated", (role,)) for unit in units], f"{role} alone", within=0.6
                )
                options[role] = [
                    (one.candidate.unit.groups[0].shape, one.goodput.per_gpu * one.candidate.unit.gpus)
                    for one in judged
                    if one.goodput is not None and one.goodput.per_gpu > 0
                ]
        best: tuple[float, int, Fleet] | None = None
        for prefill, prefill_rate in options[Role.PREFILL]:
            for decode, decode_rate in options[Role.DECODE]:
                for n in range(1, (self.gpus - decode.gpus) // prefill.gpus + 1):
                    m = (self.gpus - n * prefill.gpus) // decode.gpus
                    rate = min(n * prefill_rate, m * decode_rate)
                    fleet = (Group(Role.PREFILL, prefill, n), Group(Role.DECODE, decode, m))
                    key = (round(rate, 3), -sum(group.gpus for group in fleet))
                    if m and (best is None or key > best[:2]):
                        best = (*key, fleet)
        if best is None:
            raise Infeasible(f"no instances serve {pattern_of(list(history))} inside the targets on {self.gpus} GPUs")
        if now is not None:
            rates = {role: dict(found) for role, found in options.items()}
            served = min(group.instances * rates[group.role].get(group.shape, 0.0) for group in now)
            if served >= HEADROOM * pattern_of(list(history)).rate or served * GAIN >= best[0]:
                return now
        return best[2]

    def _most_gpus(self) -> int:
        """Of one instance: both phases need one, and a cluster with a single one of each is hard to balance."""
        return min(self.plan.cluster.gpus_per_node, max(1, self.gpus // 2))

    def _like(self, history: Sequence[Observation]) -> Requests:
        """Requests with lengths drawn from the history, arriving at random."""
        count = self.plan.search.requests or 400
        random = np.random.default_rng(self.plan.search.seed)
        lengths = [history[index].lengths for index in random.integers(0, len(history), count)]
        gaps = np.cumsum(random.exponential(1e9, count)).astype(int)
        return Requests(self.plan, submissions([int(gap) for gap in gaps], lengths))

    # --- one trace ----------------------------------------------------------------------------------------------------

    def follow(
        self,
        requests: Iterable[Submission],
        first: Fleet,
        *,
        test: ShiftTest | None = None,
        settle: int = 300,
        on_shift: Callable[[Shift], None] | None = None,
    ) -> list[Change]:
        """The changes that this trace brings about.

        Args:
            requests: in order of arrival.
            first: the fleet at the beginning.
            settle: requests of the new pattern that a plan is made from.
        """
        test = test or ShiftTest()
        fleet, changes = first, []
        pending: Shift | None = None
        for one in requests:
            lengths = Lengths(one.request.prompt_tokens, _most(one.output_tokens))
            told = test.observe(one.arrival_ns, lengths)
            if told is not None:
                pending = told
                if on_shift is not None:
                    on_shift(told)
            if pending is None:
                continue
            history = test.history(pending.since_ns)
            if len(history) < settle:
                continue
            shift, pending = pending, None
            wanted = self.fleet(history, fleet)
            if wanted != fleet:
                change = self._change(shift, fleet, wanted, one.arrival_ns)
                changes.append(change)
                fleet = wanted
        return changes

    def _change(self, shift: Shift, before: Fleet, after: Fleet, now_ns: int) -> Change:
        going = _instances(before) - _instances(after)
        coming = _instances(after) - _instances(before)
        loaded = self._to_load(going, coming)
        load_s = max(loaded.values(), default=0.0) / self.cost.load_bytes_per_s
        at_ns = now_ns + round(self.cost.search_s * 1e9)
        up_ns = at_ns + round((self.cost.drain_s + self.cost.start_s + load_s) * 1e9)
        total = sum(per_gpu * shape.gpus * coming[role, shape] for (role, shape), per_gpu in loaded.items())
        return Change(shift, before, after, at_ns, up_ns, going.total(), total)

    def _to_load(
        self, going: Counter[tuple[Role, Shape]], coming: Counter[tuple[Role, Shape]]
    ) -> dict[tuple[Role, Shape], float]:
        """Bytes that each GPU of the new instances loads, by kind; none where as many of the same shape have gone."""
        held = Counter[Shape]()
        for (_, shape), count in going.items():
            held[shape] += count
        weights = self.arch.parameters() * 2
        return {
            (role, shape): 0.0 if held[shape] >= count else weights / shape.gpus
            for (role, shape), count in coming.items()
        }

    # --- the run ------------------------------------------------------------------------------------------------------

    def events(self, first: Fleet, changes: Sequence[Change]) -> tuple[list[Instance], list[tuple[int, Event]]]:
        """The instances at the beginning, and what happens to them and to those that follow."""
        living: dict[tuple[Role, Shape], list[Instance]] = {}
        made = 0

        def make(role: Role, shape: Shape, count: int) -> list[Instance]:
            nonlocal made
            new = self.hardware.instances(Unit((Group(role, shape, count),)), BOTH)
            new = [replace(one, id=made + index) for index, one in enumerate(new)]
            made += count
            living.setdefault((role, shape), []).extend(new)
            return new

        begin = [one for group in first for one in make(group.role, group.shape, group.instances)]
        events: list[tuple[int, Event]] = []
        for change in changes:
            going = _instances(change.before) - _instances(change.after)
            coming = _instances(change.after) - _instances(change.before)
            lost_ns = change.at_ns + round(self.cost.drain_s * 1e9)
            for kind, count in going.items():
                for _ in range(count):
                    gone = living[kind].pop()
                    events += [(change.at_ns, Drain(gone.id)), (lost_ns, InstanceLost(gone.id, gone.epoch))]
            for (role, shape), count in coming.items():
                events += [(change.up_ns, InstanceUp(one)) for one in make(role, shape, count)]
        return begin, sorted(events, key=lambda event: event[0])

    def latency(self, first: Fleet, changes: Sequence[Change]) -> PlacedLatency:
        """Step times of all instances that there ever are, numbered as in `events`."""
        kinds = [(group.role, group.shape) for group in first for _ in range(group.instances)]
        for change in changes:
            coming = _instances(change.after) - _instances(change.before)
            kinds += [kind for kind, count in coming.items() for _ in range(count)]
        steps: dict[int, StepTime] = {
            id: self.hardware.step_time(Group(role, shape)) for id, (role, shape) in enumerate(kinds)
        }
        return self.hardware.placed(steps, {id: shape.gpus for id, (_, shape) in enumerate(kinds)})


def _instances(fleet: Fleet) -> Counter[tuple[Role, Shape]]:
    return Counter({(group.role, group.shape): group.instances for group in fleet})


def _most(outputs: int | tuple[int, ...]) -> int:
    return outputs if isinstance(outputs, int) else max(outputs)
