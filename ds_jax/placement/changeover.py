"""From one fleet to another: which instances stay, go and come, when, and what that costs.

Instances that stay are not touched. Those that go take no new work; after a while what they still have is run again
elsewhere, prompt and output so far: no KV is copied. Those that come load their weights first, unless GPUs that go held
the same shares of them.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from ds_jax.latency.capacity import weight_bytes_per_gpu
from ds_jax.placement.hardware import Hardware
from ds_jax.placement.layouts import Group, Shape, Unit
from ds_jax.placement.trial import BOTH
from ds_jax.protocol import Drain, Event, Instance, InstanceLost, InstanceUp, Role
from ds_jax.workload.monitor import Shift

Fleet = tuple[Group, Group]
"""All prefill and all decode instances of a cluster."""

Kind = tuple[Role, Shape]


@dataclass(frozen=True)
class ChangeCost:
    """What it takes to change over."""

    search_s: float = 10.0
    """From the decision to plan until the new plan is known."""
    drain_s: float = 5.0
    """How long an instance that goes may finish what it has; the rest is run again elsewhere."""
    load_bytes_per_s: float = 2e9
    """Bandwidth at which each GPU loads its share of the weights."""
    start_s: float = 2.0
    """Beside the weights: making the pool, loading compiled programs."""


@dataclass(frozen=True)
class Change:
    """One replanning."""

    shift: Shift
    before: Fleet
    after: Fleet
    planned_ns: int
    """When enough was known of the new requests to plan for them."""
    at_ns: int
    """When the change began: the plan was known."""
    up_ns: int
    """When the last new instance was up."""
    moved: int
    """Instances that went."""
    loaded_bytes: float
    """Weights that were loaded, by all GPUs together."""


class Changeover:
    """The instances of one cluster through its changes, one change at a time."""

    def __init__(self, first: Fleet, hardware: Hardware, cost: ChangeCost | None = None):
        self.fleet = first
        self.hardware = hardware
        self.cost = cost or ChangeCost()
        self.up_ns = 0
        """When the last change is over."""
        self.kinds: dict[int, Kind] = {}
        """Of every instance that there ever was."""
        self._living: dict[Kind, list[Instance]] = {}
        for group in first:
            self._make((group.role, group.shape), group.instances)

    @property
    def instances(self) -> list[Instance]:
        """Those that live, or will when the change is over, by id."""
        return sorted((one for living in self._living.values() for one in living), key=lambda one: one.id)

    def change(self, after: Fleet, shift: Shift, now_ns: int) -> tuple[Change, list[tuple[int, Event]]]:
        """Begin to change now, as soon as the plan is known; and what happens when.

        Raises:
            ValueError: the last change is not over.
        """
        if now_ns < self.up_ns:
            raise ValueError(f"a change at {now_ns} ns must wait until the last one is over, at {self.up_ns} ns")
        before, cost = self.fleet, self.cost
        going, coming = _count(before) - _count(after), _count(after) - _count(before)
        loading = self._loading(going, coming)
        weights = {shape: self._weight_bytes(shape) for _, shape in loading}
        load_s = max((weights[shape] for _, shape in loading), default=0.0) / cost.load_bytes_per_s
        at_ns = now_ns + round(cost.search_s * 1e9)
        lost_ns = at_ns + round(cost.drain_s * 1e9)
        self.up_ns = lost_ns + round((cost.start_s + load_s) * 1e9)
        events: list[tuple[int, Event]] = []
        for kind, count in going.items():
            for _ in range(count):
                gone = self._living[kind].pop()
                events += [(at_ns, Drain(gone.id)), (lost_ns, InstanceLost(gone.id, gone.epoch))]
        for kind, count in coming.items():
            events += [(self.up_ns, InstanceUp(one)) for one in self._make(kind, count)]
        self.fleet = after
        loaded = sum(count * shape.gpus * weights[shape] for (_, shape), count in loading.items())
        change = Change(shift, before, after, now_ns, at_ns, self.up_ns, going.total(), loaded)
        return change, sorted(events, key=lambda event: event[0])

    def _make(self, kind: Kind, count: int) -> list[Instance]:
        new = self.hardware.instances(Unit((Group(*kind, count),)), BOTH)
        made = [replace(one, id=len(self.kinds) + index) for index, one in enumerate(new)]
        self.kinds |= dict.fromkeys((one.id for one in made), kind)
        self._living.setdefault(kind, []).extend(made)
        return made

    def _loading(self, going: Counter[Kind], coming: Counter[Kind]) -> Counter[Kind]:
        """Of the instances that come, those that load weights: there are no GPUs that held the same shares."""
        held = Counter[Shape]()
        for (_, shape), count in going.items():
            held[shape] += count
        loading = Counter[Kind]()
        for (role, shape), count in coming.items():
            kept = min(held[shape], count)
            held[shape] -= kept
            loading[role, shape] = count - kept
        return +loading

    def _weight_bytes(self, shape: Shape) -> float:
        """Of one GPU of an instance."""
        return weight_bytes_per_gpu(self.hardware.arch, self.hardware.plan.dtype, shape.tp, shape.pp)


def _count(fleet: Fleet) -> Counter[Kind]:
    return Counter({(group.role, group.shape): group.instances for group in fleet})
