"""Several applications with targets of their own on one cluster: which of them gets which GPUs.

Each application gets a share of the cluster, GPUs of one node or some whole nodes, and on it the placement that the
search finds for its own requests and targets. All divisions into shares that fit together are weighed: where the
applications say what rates they need, by the smallest share of its need that any of them gets; else by the requests/s
of all together.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from ds_jax.architecture import Architecture
from ds_jax.placement.hardware import Hardware
from ds_jax.placement.search import Infeasible, Placement, PlacementSearch
from ds_jax.placement.trial import Requests
from ds_jax.plan import Application, ClusterConfig, PlanConfig


@dataclass(frozen=True, order=True)
class Share:
    """A part of a cluster: GPUs of one node, or whole nodes."""

    nodes: int
    gpus_per_node: int

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node

    def __str__(self) -> str:
        of = f"{self.gpus_per_node} GPU{'s' * (self.gpus_per_node > 1)}"
        return of if self.nodes == 1 else f"{self.nodes} nodes of {of}"


@dataclass(frozen=True)
class Tenant:
    """An application and what it got."""

    application: Application
    share: Share
    placement: Placement
    hardware: Hardware

    @property
    def served(self) -> float:
        """Requests/s inside its targets."""
        return self.placement.goodput_per_gpu * self.placement.gpus

    @property
    def carried(self) -> float | None:
        """That over the rate it asks for; None if it asks for none."""
        return self.served / self.application.workload.rate if self.application.workload.rate else None


@dataclass(frozen=True)
class Division:
    """The end of a search for several applications."""

    tenants: tuple[Tenant, ...]
    served: tuple[dict[Share, float], ...]
    """Of each application, the requests/s of every share on which it meets its targets."""
    configurations: int
    search_s: float
    notes: tuple[str, ...]

    @property
    def carried(self) -> float | None:
        """The smallest share of its rate that an application gets; None if they ask for none."""
        shares = [tenant.carried for tenant in self.tenants if tenant.carried is not None]
        return min(shares, default=None)


def shares(cluster: ClusterConfig) -> list[Share]:
    """Every share that there is: 1 to all GPUs of a node, 2 to all nodes."""
    inside = [Share(1, gpus) for gpus in range(1, cluster.gpus_per_node + 1)]
    return inside + [Share(nodes, cluster.gpus_per_node) for nodes in range(2, cluster.nodes + 1)]


def fit(chosen: Sequence[Share], cluster: ClusterConfig) -> bool:
    """Whether the shares have room beside each other, none of them across a node's border."""
    whole = sum(share.nodes for share in chosen if share.gpus_per_node == cluster.gpus_per_node)
    parts = sorted((share.gpus for share in chosen if share.gpus_per_node < cluster.gpus_per_node), reverse=True)
    return whole <= cluster.nodes and _packs(parts, [cluster.gpus_per_node] * (cluster.nodes - whole))


def _packs(parts: list[int], free: list[int]) -> bool:
    if not parts:
        return True
    first, *others = parts
    for room in sorted({room for room in free if room >= first}):
        left = list(free)
        left[left.index(room)] -= first
        if _packs(others, left):
            return True
    return False


def divide(
    served: Sequence[Mapping[Share, float]], wanted: Sequence[float], cluster: ClusterConfig
) -> tuple[Share, ...] | None:
    """The best division; None if no shares on which all serve fit together.

    Args:
        served: of each application, the requests/s of every share on which it meets its targets.
        wanted: requests/s that each asks for; all 0 if they do not say.

    Of equals the one with the fewest GPUs wins. With rates, equals are two divisions whose shares of need are the same
    from the smallest up.
    """

    def worth(chosen: Sequence[Share]) -> tuple[list[float], int]:
        rates = [rates[share] for rates, share in zip(served, chosen, strict=True)]
        gpus = -sum(share.gpus for share in chosen)
        if not all(wanted):
            return [round(sum(rates), 6)], gpus
        return sorted(round(rate / need, 6) for rate, need in zip(rates, wanted, strict=True)), gpus

    return max(_divisions(served, cluster, ()), key=worth, default=None)


def _divisions(
    served: Sequence[Mapping[Share, float]], cluster: ClusterConfig, chosen: tuple[Share, ...]
) -> Iterator[tuple[Share, ...]]:
    if len(chosen) == len(served):
        yield chosen
        return
    for share in served[len(chosen)]:
        more = (*chosen, share)
        if fit(more, cluster):
            yield from _divisions(served, cluster, more)


Progress = Callable[[int, int, str], None]
"""Called with (searches done, searches in all, what is searched now)."""


def place_applications(plan: PlanConfig, arch: Architecture, progress: Progress | None = None) -> Division:
    """The best placement of every application on its share of the best division.

    Raises:
        Infeasible: an application meets its targets on no share, or all together need more than the cluster has.
    """
    begin = time.perf_counter()
    plan.check()
    every = shares(plan.cluster)
    found: list[dict[Share, Tenant]] = []
    configurations, notes = 0, dict[str, None]()
    with tempfile.TemporaryDirectory() as folder:
        # Shares have many candidates in common: what one search has simulated, the next one knows.
        searching = replace(plan, search=replace(plan.search, cache=plan.search.cache or folder))
        for index, application in enumerate(plan.applications):
            requests: Requests | None = None
            placed: dict[Share, Tenant] = {}
            reason = ""
            for number, share in enumerate(reversed(every)):
                if progress is not None:
                    progress(index * len(every) + number, len(plan.applications) * len(every), application.name)
                cluster = replace(plan.cluster, nodes=share.nodes, gpus_per_node=share.gpus_per_node)
                alone = searching.alone(application, cluster)
                with PlacementSearch(alone, arch, requests=requests) as search:
                    requests = search.requests
                    try:
                        placed[share] = Tenant(application, share, search.place(plan.policy), search.hardware)
                    except Infeasible as error:
                        reason = reason or str(error)
                    configurations += len(search.judged)
                    notes |= dict.fromkeys(search.hardware.notes())
            if requests is not None and requests.assumed:
                notes[f"workload {application.workload.name}: assumed {requests.assumed}"] = None
            if not placed:
                raise Infeasible(f"application {application.name}: {reason}")
            found.append(placed)
    served = tuple({share: tenant.served for share, tenant in placed.items()} for placed in found)
    chosen = divide(served, [one.workload.rate for one in plan.applications], plan.cluster)
    if chosen is None:
        least = ", ".join(f"{one.name} {min(placed)}" for one, placed in zip(plan.applications, found, strict=True))
        raise Infeasible(
            f"cluster.nodes x cluster.gpus_per_node = {plan.cluster.nodes} x {plan.cluster.gpus_per_node} is too small "
            f"for all applications together, whose smallest shares are {least}"
        )
    tenants = tuple(placed[share] for placed, share in zip(found, chosen, strict=True))
    return Division(tenants, served, configurations, time.perf_counter() - begin, tuple(notes))
