"""What the placement search is told: model, cluster, targets and workload, as frozen dataclasses.

Files `configs/plan_*.py` fill these in; launchers make an absl flag of every knob. The string under a field is its
manual.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
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
    """Kind of the GPUs of decode instances, where it is another; these are nodes of their own, so that KV always
    crosses the network, and affinity must be high. Empty: the same."""
    decode_nodes: int = 0
    """Machines with GPUs of decode_gpu, beside the others; 0: as many as nodes."""
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

    def check(self, name: str) -> None:
        """Refuse a value out of range; `name` is this field's own in the sentence."""
        if not self.cv > 0:
            raise ValueError(f"{name}.cv = {self.cv} must be greater than 0")
        if not self.rate >= 0:
            raise ValueError(f"{name}.rate = {self.rate} must be 0 or more")


@dataclass(frozen=True)
class Application:
    """One of several applications that share a cluster: requests of its own, with targets of their own."""

    name: str = ""
    """Letters, digits, - and _: its configuration to serve with is serve_NAME.py."""
    workload: WorkloadConfig = field(default_factory=WorkloadConfig)
    slo: SloConfig = field(default_factory=lambda: SloConfig(ttft_s=0.25, tpot_s=0.1))


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
    max_step_tokens: int = 2048
    """Most prompt tokens in one step; a longer prompt runs in chunks of this size."""
    token_buckets: tuple[int, ...] = ()
    """Step sizes to compile when the placement is served, in tokens; empty: powers of two up to max_step_tokens."""
    affinity: Literal["high", "low"] = "high"
    """high: fast links between all nodes, each phase is placed alone (Algorithm 1); low: a prefill and a decode
    instance share nodes stage by stage, so that KV stays on the fast links (Algorithm 2)."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    slo: SloConfig = field(default_factory=lambda: SloConfig(ttft_s=0.25, tpot_s=0.1))
    workload: WorkloadConfig = field(default_factory=WorkloadConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    applications: tuple[Application, ...] = ()
    """Several applications that share the cluster, in place of slo and workload; each gets GPUs of its own. With rates
    the smallest share of what each asks for is made as large as can be, without any the requests/s of all together."""

    def alone(self, application: Application, cluster: ClusterConfig) -> PlanConfig:
        """The plan of one application on a part of the cluster, as many requests as that carries."""
        workload = replace(application.workload, rate=0.0)
        return replace(self, applications=(), slo=application.slo, workload=workload, cluster=cluster)

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
            ("max_step_tokens", self.max_step_tokens),
        ):
            if value < 1:
                raise ValueError(f"{name} = {value} must be at least 1")
        for name, number in (
            ("cluster.network_gbits", self.cluster.network_gbits),
            ("slo.ttft_s", self.slo.ttft_s),
            ("slo.tpot_s", self.slo.tpot_s),
            ("search.precision", self.search.precision),
        ):
            if not number > 0:
                raise ValueError(f"{name} = {number} must be greater than 0")
        self.workload.check("workload")
        if not 0 < self.search.attainment < 1:
            raise ValueError(f"search.attainment = {self.search.attainment} must be between 0 and 1")
        for name, value in (
            ("cluster.decode_nodes", self.cluster.decode_nodes),
            ("search.requests", self.search.requests),
            ("search.max_pp", self.search.max_pp),
            ("search.max_tp", self.search.max_tp),
            ("search.workers", self.search.workers),
        ):
            if value < 0:
                raise ValueError(f"{name} = {value} must be 0 or more")
        self._check_kinds()
        self._check_applications()

    def _check_kinds(self) -> None:
        cluster = self.cluster
        two = cluster.decode_gpu not in ("", cluster.gpu)
        if cluster.decode_nodes and not two:
            raise ValueError(
                f"cluster.decode_nodes = {cluster.decode_nodes} must be 0 unless cluster.decode_gpu names another kind "
                "of GPU than cluster.gpu"
            )
        if two and self.policy == "disaggregated" and self.affinity == "low":
            raise ValueError(
                "affinity = low must be high, since it puts a prefill and a decode instance on the same nodes, and "
                f"cluster.decode_gpu = {cluster.decode_gpu} is on others than cluster.gpu = {cluster.gpu}"
            )

    def _check_applications(self) -> None:
        names = [one.name for one in self.applications]
        for index, one in enumerate(self.applications):
            if not re.fullmatch(r"[\w-]+", one.name):
                raise ValueError(f"applications[{index}].name = {one.name!r} must be of letters, digits, - and _")
            if names.count(one.name) > 1:
                raise ValueError(f"applications: the name {one.name} is given {names.count(one.name)} times, not once")
            for field_name, target in (("ttft_s", one.slo.ttft_s), ("tpot_s", one.slo.tpot_s)):
                if not target > 0:
                    raise ValueError(f"applications.{one.name}.slo.{field_name} = {target} must be greater than 0")
            one.workload.check(f"applications.{one.name}.workload")
        rated = [one.name for one in self.applications if one.workload.rate]
        if rated and len(rated) < len(self.applications):
            missing = next(one.name for one in self.applications if not one.workload.rate)
            raise ValueError(
                f"applications.{missing}.workload.rate = 0 must be greater than 0, as {rated[0]} has a rate: give all "
                "of them one, or none"
            )
        gpus = self.cluster.nodes * self.cluster.gpus_per_node
        if len(self.applications) > gpus:
            raise ValueError(f"applications: {len(self.applications)} of them need a GPU each; the cluster has {gpus}")
        if self.applications and self.cluster.decode_gpu:
            raise ValueError(f"cluster.decode_gpu = {self.cluster.decode_gpu} must be empty with several applications")
