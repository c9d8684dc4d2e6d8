"""Which placements there are: shapes of instances, and units of instances that are replicated."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ds_jax.architecture import Architecture
from ds_jax.plan import PlanConfig
from ds_jax.protocol import Role


@dataclass(frozen=True, order=True)
class Shape:
    """Parallelism of one instance."""

    tp: int
    pp: int

    @property
    def gpus(self) -> int:
        return self.tp * self.pp

    def __str__(self) -> str:
        return f"tp{self.tp} pp{self.pp}"


@dataclass(frozen=True)
class Group:
    """Equal instances of one role."""

    role: Role
    shape: Shape
    instances: int = 1

    @property
    def gpus(self) -> int:
        return self.shape.gpus * self.instances

    def __str__(self) -> str:
        return f"{self.instances} x {self.role} {self.shape}"


@dataclass(frozen=True)
class Unit:
    """Instances that serve together; a plan is a number of equal units."""

    groups: tuple[Group, ...]
    segments: int = 1
    """Nodes over which each instance is spread: its stages are cut into this many segments (Algorithm 2)."""
    kv_crosses_nodes: bool = False
    """Whether a hand-over goes over the network between nodes."""

    @property
    def gpus(self) -> int:
        return sum(group.gpus for group in self.groups)

    @property
    def gpus_per_node(self) -> int:
        """Of a unit whose instances are cut into segments of equal size."""
        return self.gpus // self.segments

    def group(self, role: Role) -> Group | None:
        return next((group for group in self.groups if group.role is role), None)

    def __str__(self) -> str:
        return " + ".join(map(str, self.groups))


def shapes(arch: Architecture, plan: PlanConfig, gpus: int) -> list[Shape]:
    """Shapes of at most `gpus` GPUs: tp inside a node and dividing the heads, pp dividing the layers.

    Memory is not looked at: what does not fit is told apart from what does not exist.
    """
    most_tp = min(plan.cluster.gpus_per_node, plan.search.max_tp or gpus, gpus)
    tps = [tp for tp in range(1, most_tp + 1) if _splits(arch, tp)]
    pps = [pp for pp in range(1, min(plan.search.max_pp or gpus, gpus) + 1) if arch.num_layers % pp == 0]
    return [Shape(tp, pp) for tp in tps for pp in pps if tp * pp <= gpus]


def _splits(arch: Architecture, tp: int) -> bool:
    try:
        arch.check_tp(tp)
    except ValueError:
        return False
    return True


def split_by_kind(plan: PlanConfig) -> bool:
    """Whether decode instances have nodes of their own, of another kind of GPU."""
    return plan.cluster.decode_gpu not in ("", plan.cluster.gpu)


def nodes_for(plan: PlanConfig, role: Role) -> int:
    """Nodes that instances of this role can be on."""
    if role is Role.DECODE and split_by_kind(plan):
        return plan.cluster.decode_nodes or plan.cluster.nodes
    return plan.cluster.nodes


def located(plan: PlanConfig, unit: Unit, copies: int = 1) -> list[list[int]] | None:
    """On which nodes the stages of each instance are, by instance in the unit's order; None: there are too few.

    The GPUs of a stage share a node, and nothing else has to: stages are put, the widest first, where they fit first.
    Nodes are counted through, those of prefill first where decode instances have nodes of their own.
    """
    per_node = plan.cluster.gpus_per_node
    first_of = dict.fromkeys(Role, 0)
    free = [per_node] * plan.cluster.nodes
    if split_by_kind(plan):
        first_of[Role.DECODE] = len(free)
        free += [per_node] * nodes_for(plan, Role.DECODE)
    instances = [group for _ in range(copies) for group in unit.groups for _ in range(group.instances)]
    places: list[list[int]] = [[] for _ in instances]
    for index in sorted(range(len(instances)), key=lambda index: -instances[index].shape.tp):
        group = instances[index]
        first = first_of[group.role]
        nodes = range(first, first + nodes_for(plan, group.role))
        for _ in range(group.shape.pp):
            node = next((node for node in nodes if free[node] >= group.shape.tp), None)
            if node is None:
                return None
            free[node] -= group.shape.tp
            places[index].append(node)
    return places


def most_copies(plan: PlanConfig, unit: Unit) -> int:
    """How many such units the cluster has room for.

    A unit whose KV stays on the links inside nodes is kept together: one segment of it on each of its nodes (Algorithm
    2: nodes // segments times as many as one node has room for). A lone instance may go over nodes between its stages.
    """
    cluster = plan.cluster
    lone = len(unit.groups) == 1 and unit.groups[0].instances == 1
    if not lone and not unit.kv_crosses_nodes:
        return cluster.nodes // unit.segments * (cluster.gpus_per_node // unit.gpus_per_node)
    if lone:
        shape = unit.groups[0].shape
        return nodes_for(plan, unit.groups[0].role) * (cluster.gpus_per_node // shape.tp) // shape.pp
    copies = sum(nodes_for(plan, role) for role in dict.fromkeys(group.role for group in unit.groups))
    copies = copies * cluster.gpus_per_node // unit.gpus
    while copies and located(plan, unit, copies) is None:
        copies -= 1
    return copies


def colocated_units(arch: Architecture, plan: PlanConfig) -> list[Unit]:
    """vLLM++: one mixed instance of every shape that the cluster has GPUs for."""
    gpus = plan.cluster.nodes * plan.cluster.gpus_per_node
    return lone_units(arch, plan, Role.MIXED, gpus)


def lone_units(arch: Architecture, plan: PlanConfig, role: Role, gpus: int) -> list[Unit]:
    """One instance of every shape of at most so many GPUs, if each of its stages finds room on a node."""
    units = [Unit((Group(role, shape),)) for shape in shapes(arch, plan, gpus)]
    return [unit for unit in units if most_copies(plan, unit)]


def paired_units(arch: Architecture, plan: PlanConfig) -> list[Unit]:
    """Algorithm 2: a prefill and a decode instance, cut into the same number of segments, one node each.

    Each node holds one segment of both, so KV moves over the links inside nodes.
    """
    units = []
    for segments in range(1, plan.cluster.nodes + 1):
        per_node = plan.cluster.gpus_per_node
        inside = shapes(arch, plan, per_node)
        for prefill, decode in _pairs(inside, per_node):
            spread = [Shape(shape.tp, shape.pp * segments) for shape in (prefill, decode)]
            if any(arch.num_layers % shape.pp for shape in spread):
                continue
            if plan.search.max_pp and any(shape.pp > plan.search.max_pp for shape in spread):
                continue
            units.append(Unit((Group(Role.PREFILL, spread[0]), Group(Role.DECODE, spread[1])), segments))
    return units


def _pairs(inside: list[Shape], gpus: int) -> Iterator[tuple[Shape, Shape]]:
    for prefill in inside:
        for decode in inside:
            if prefill.gpus + decode.gpus <= gpus:
                yield prefill, decode


def multiplexed_units(arch: Architecture, plan: PlanConfig, policy: str) -> list[Unit]:
    """Tropical: a node of equal workers, some of which only prefill; every shape and every split.

    Under `deflected` all of them may be mixed: its chunks are small enough for that.
    """
    per_node = plan.cluster.gpus_per_node
    units = []
    for shape in shapes(arch, plan, per_node):
        workers = per_node // shape.gpus
        if policy == "deflected":
            units.append(Unit((Group(Role.MIXED, shape, workers),)))
        for prefill in range(1, workers):
            units.append(Unit((Group(Role.PREFILL, shape, prefill), Group(Role.MIXED, shape, workers - prefill))))
    for first, second in _pairs(shapes(arch, plan, per_node), per_node):
        if first != second:
            units.append(Unit((Group(Role.PREFILL, first), Group(Role.MIXED, second))))
    return units


def units_of(policy: str, arch: Architecture, plan: PlanConfig) -> list[Unit]:
    """All units that a policy may be placed in, both phases together."""
    if policy == "disaggregated":
        return paired_units(arch, plan)
    if policy in ("colocated", "chunked"):
        return colocated_units(arch, plan)
    return multiplexed_units(arch, plan, policy)
