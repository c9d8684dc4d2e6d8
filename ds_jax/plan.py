"""What the placement search is told: model, cluster, targets and workload, as frozen dataclasses.

Files `configs/plan_*.py` fill these in; launchers make an absl flag of every knob. The string under a field is its
manual.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ds_jax.config import ROLES, SloConfig


@dataclass(frozen=True)
class ClusterConfig:
    """The machines that there are."""

    nodes: int = 1
    """Machines."""
    gpus_per_node: int = 8
    """GPUs in each, joined by the fast links."""
    gpu: str = "a100-80g"
    """Kind of the GPUs: a name of ds_jax/latency/gpus.py; own: the devices that `profile` was measured on."""
    decode_gpu: str = ""
    """Kind of the GPUs of decode instances, where it is another; these are nodes of their own. Empty: the same."""
    network_gbits: float = 25.0
    """Bandwidth between nodes in Gbit/s; decides what moving KV across nodes costs."""


@dataclass(frozen=True)
class WorkloadConfig:
    """What is asked of the system."""

    name: str = "sharegpt"
    """sharegpt, humaneval, longbench, mooncake; two means such as 512/64; or a trace (.csv, .jsonl) of one's own."""
    cv: float = 1.0
    """Coefficient of variation of the gaps between arrivals: 1 is Poisson, larger is bursty (Gamma)."""
    rate: float = 0.0
    """Requests/s that the plan must carry, by replication; 0: as many as one unit of the plan carries."""


@dataclass(frozen=True)
class SearchConfig:
    """How the search judges and how hard it looks."""

    rule: Literal["joint", "published"] = "joint"
    """joint: share of requests inside both targets, to steady state; published: the percentiles of TTFT and of TPOT
    apart, 300 requests, 0 to 5 requests/s/GPU in steps of 0.25, as DistServe's public code."""
    attainment: float = 0.9
    """Share of requests that must be inside the targets."""
    requests: int = 0
    """Requests of one simulation; 0: 300 for published, 1000 for joint."""
    precision: float = 0.02
    """joint: the goodput is found to this relative precision."""
    max_pp: int = 0
    """Most pipeline stages of an instance; 0: no limit (the engine serves 1)."""
    max_tp: int = 0
    """Most devices that share a layer; 0: no limit but the node."""
    prune: bool = True
    """Leave out what cannot win by a bound, without simulating it."""
    workers: int = 0
    """Processes; 0: one per core."""
    seed: int = 0
    """Seed of arrivals and lengths."""
    cache: str = ""
    """Folder that keeps what was simulated, per model, GPU, parallelism and workload; empty: none."""


@dataclass(frozen=True)
class PlanConfig:
    """Everything that the placement search is told."""

    model: str = "models/published/opt-13b"
    """Hugging Face folder of the model; its config.json is enough."""
    dtype: Literal["bfloat16", "float16", "float32"] = "float16"
    """Type of weights and KV."""
    profile: str = ""
    """Latency profile (a file of experiments.profile or configs/latency); empty: a roofline, marked extrapolated."""
    policy: str = "disaggregated"
    """Scheduling policy that the placement is for; colocated is vLLM++."""
    slots: int = 256
    """Sequences that one instance decodes in a step, per pipeline stage."""
    affinity: Literal["high", "low"] = "high"
    """high: fast links between all nodes, each phase is placed alone (Algorithm 1); low: a prefill and a decode
    instance share nodes stage by stage, so that KV stays on the fast links (Algorithm 2)."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    slo: SloConfig = field(default_factory=lambda: SloConfig(ttft_s=0.25, tpot_s=0.1))
    workload: WorkloadConfig = field(default_factory=WorkloadConfig)
    search: SearchConfig = field(default_factory=SearchConfig)

    def check(self) -> None:
        """Refuse what no cluster could make right.

        Raises:
            ValueError: one sentence with field, value and limit.
        """
        if self.policy not in ROLES:
            raise ValueError(f"policy = {self.policy!r} must be one of {', '.join(ROLES)}")
        for name, value in (
            ("cluster.nodes", self.cluster.nodes),
            ("cluster.gpus_per_node", self.cluster.gpus_per_node),
            ("slots", self.slots),
        ):
            if value < 1:
                raise ValueError(f"{name} = {value} must be at least 1")
        for name, number in (
            ("cluster.network_gbits", self.cluster.network_gbits),
            ("slo.ttft_s", self.slo.ttft_s),
            ("slo.tpot_s", self.slo.tpot_s),
            ("workload.cv", self.workload.cv),
            ("search.precision", self.search.precision),
        ):
            if not number > 0:
                raise ValueError(f"{name} = {number} must be greater than 0")
        if not 0 < self.search.attainment < 1:
            raise ValueError(f"search.attainment = {self.search.attainment} must be between 0 and 1")
        if not self.workload.rate >= 0:
            raise ValueError(f"workload.rate = {self.workload.rate} must be 0 or more")
        for name, value in (
            ("search.requests", self.search.requests),
            ("search.max_pp", self.search.max_pp),
            ("search.max_tp", self.search.max_tp),
            ("search.workers", self.search.workers),
        ):
            if value < 0:
                raise ValueError(f"{name} = {value} must be 0 or more")
