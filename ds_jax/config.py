"""The whole configuration, as frozen dataclasses: the schema, the defaults and the manual in one place.

Files under `configs/` fill these in Python; the launchers make an absl flag of every knob (`ds_jax/flags.py`). The
string under a field is its manual.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ds_jax.protocol import Role

DType = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class ModelConfig:
    """Which model is served."""

    path: str = "models/embedded/story"
    """Hugging Face folder (config.json, safetensors, tokenizer); relative to the working folder or the checkout."""
    served_name: str = ""
    """Name in the API; empty: the folder's name."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of weights, activations and KV; auto: the checkpoint's own, float32 on the CPU."""
    load_format: Literal["safetensors", "dummy"] = "safetensors"
    """safetensors reads the weights; dummy makes random ones and needs only config.json."""
    max_model_len: int = 0
    """Most tokens of prompt and output together; 0: what the model was made for."""


@dataclass(frozen=True)
class GroupConfig:
    """A group of equal instances."""

    instances: int = 1
    """Copies of the weights in this role, each on its own devices."""
    tp: int = 1
    """Tensor parallelism: devices that share each layer."""
    pp: int = 1
    """Pipeline parallelism: stages of layers (in the simulator; the engine serves 1)."""


@dataclass(frozen=True)
class PrefillConfig(GroupConfig):
    """Instances that run prompts."""

    max_step_tokens: int = 2048
    """Most prompt tokens in one step; a longer prompt runs in chunks of this size."""
    max_step_sequences: int = 16
    """Most prompts in one step."""
    saturation_tokens: int = 512
    """L_m: shorter prompts are batched up to about this many tokens, longer ones run alone (DistServe, section 3.1)."""
    token_buckets: tuple[int, ...] = ()
    """Step sizes to compile, in tokens; empty: powers of two up to max_step_tokens."""


@dataclass(frozen=True)
class DecodeConfig(GroupConfig):
    """Instances that generate."""

    slots: int = 32
    """Sequences decoded in one step."""
    slot_buckets: tuple[int, ...] = ()
    """Batches to compile, in slots, beside that of all; empty: 1, 16, 256, … as far as there are more slots."""


@dataclass(frozen=True)
class MixedConfig(PrefillConfig):
    """Instances that do both, for policies with one kind of instance."""

    instances: int = 0
    """Copies of the weights in this role, each on its own devices."""
    slots: int = 32
    """Sequences decoded in one step."""
    slot_buckets: tuple[int, ...] = ()
    """Batches to compile, in slots, beside that of all; empty: 1, 16, 256, … as far as there are more slots."""


@dataclass(frozen=True)
class CacheConfig:
    """The paged KV cache of each instance."""

    page_size: int = 16
    """Tokens in a page."""
    num_pages: int = 0
    """Pages in each instance's pool; 0: as many as fit in memory_fraction and can ever be used."""
    memory_fraction: float = 0.9
    """Share of a device's memory for weights and KV together, when num_pages is 0."""
    host_pages: int = 0
    """Pages in each instance's pinned host memory, for scheduler.preemption = swap."""


@dataclass(frozen=True)
class KernelsConfig:
    """Which implementations the programs are made of."""

    backend: Literal["auto", "mosaic", "xla", "definition"] = "auto"
    """auto: the fastest that the platform, type and shape allow; else this one, and XLA's for what it cannot do."""
    cpu_matmul: Literal["ynnpack", "onednn"] = "ynnpack"
    """Library of the matrix products of float32 on a CPU: onednn is up to 1.4 times as fast from about 100 rows on, but
    its programs cannot be kept on disk, every start compiles them."""


@dataclass(frozen=True)
class SchedulerConfig:
    """Knobs of the policies."""

    pull_watermark: float = 0.05
    """A decode instance pulls while sequences that wait for a slot hold less than this share of its pool."""
    steps_per_lane: int = 2
    """Steps in flight on each lane: with 2 the next one is queued behind the one that runs, so that devices never wait
    for the scheduler; with 1 it is planned when that one is done, as the public systems do."""
    preemption: Literal["recompute", "swap"] = "recompute"
    """What happens to a sequence whose pages are taken: recompute replays it, swap moves them to host memory."""
    token_budget: int = 512
    """chunked: most tokens in one step, decodes and prompt chunks together (Sarathi: 512 strict, 2048 relaxed)."""
    chunk_order: Literal["sarathi", "splitfuse", "vllm_v1"] = "sarathi"
    """chunked: whose rules fill the budget."""
    queue_order: Literal["fcfs", "sjf", "ljf", "edf", "llf"] = "sjf"
    """multiplexed: order of waiting prompts: first come, shortest (Tropical's code), longest, deadline, least slack."""
    routing: Literal["code", "readme"] = "code"
    """multiplexed: whose routing, that of Tropical's code or of its README."""
    memory_watermark: float = 0.9
    """multiplexed with routing = readme, deflected: a worker that decodes takes no prompt beyond this share of pages in
    use."""
    early_rejection: bool = False
    """deflected: refuse (HTTP 429) a request as soon as its TTFT target can no longer be met."""
    latency_profile: str = ""
    """multiplexed, deflected: file of experiments.profile to predict step times with; empty: learned while serving."""


@dataclass(frozen=True)
class SloConfig:
    """Latency targets of requests that bring none of their own."""

    ttft_s: float = 0.0
    """Target of the time to the first token in seconds; 0: none."""
    tpot_s: float = 0.0
    """Target of the time per output token after the first in seconds; 0: none."""


@dataclass(frozen=True)
class EngineConfig:
    """Knobs of the engine itself."""

    max_waiting: int = 1024
    """Most requests that wait for their first step; a further one is refused (HTTP 429)."""
    deadline_s: float = 0.0
    """Default time limit of a request in seconds; 0: none."""
    log_capacity: int = 0
    """Most entries that the recorder of events and commands keeps; 0: off."""
    compilation_cache: str = "~/.cache/ds_jax/xla"
    """Folder of compiled programs, kept between runs; empty: none."""


@dataclass(frozen=True)
class Config:
    """Everything that a serving process is told."""

    model: ModelConfig = field(default_factory=ModelConfig)
    policy: str = "disaggregated"
    """Scheduling policy: a name of ds_jax/scheduling, or my.module:Scheduler."""
    prefill: PrefillConfig = field(default_factory=PrefillConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    mixed: MixedConfig = field(default_factory=MixedConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    slo: SloConfig = field(default_factory=SloConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    workers: Literal["in_process"] = "in_process"
    """Where instances live: in_process puts all of them into this process."""

    def groups(self) -> tuple[tuple[Role, GroupConfig], ...]:
        """The instance groups that this config asks for, in the order in which they take devices."""
        groups = ((Role.PREFILL, self.prefill), (Role.DECODE, self.decode), (Role.MIXED, self.mixed))
        return tuple((role, group) for role, group in groups if group.instances)

    def devices(self) -> int:
        """Devices that all instances take together."""
        return sum(group.instances * group.tp * group.pp for _, group in self.groups())

    @property
    def mixes(self) -> bool:
        """Whether steps may have prompt chunks and decodes together; a policy from outside may do anything."""
        return self.policy in MIXING or self.policy not in ROLES

    @property
    def swaps(self) -> bool:
        """Whether KV pages may move to host memory and back."""
        return self.scheduler.preemption == "swap" or self.policy not in ROLES

    @property
    def copies(self) -> set[tuple[Role, Role]] | None:
        """(source, destination) roles between which the policy moves KV pages; None: between any."""
        return COPIES.get(self.policy) if self.policy in ROLES else None

    def check(self) -> None:
        """Refuse what no model and no machine could make right.

        Raises:
            ValueError: one sentence with field, value and limit.
        """
        for name, group in (("prefill", self.prefill), ("decode", self.decode), ("mixed", self.mixed)):
            _at_least(f"{name}.instances", group.instances, 0)
            _at_least(f"{name}.tp", group.tp, 1)
            _at_least(f"{name}.pp", group.pp, 1)
        for name, group in (("prefill", self.prefill), ("mixed", self.mixed)):
            for knob in ("max_step_tokens", "max_step_sequences", "saturation_tokens"):
                _at_least(f"{name}.{knob}", getattr(group, knob), 1)
            for bucket in group.token_buckets:
                _at_least(f"{name}.token_buckets", bucket, 1)
        for name, group in (("decode", self.decode), ("mixed", self.mixed)):
            _at_least(f"{name}.slots", group.slots, 1)
            for bucket in group.slot_buckets:
                _at_least(f"{name}.slot_buckets", bucket, 1)
        _at_least("cache.page_size", self.cache.page_size, 1)
        _at_least("cache.num_pages", self.cache.num_pages, 0)
        _at_least("cache.host_pages", self.cache.host_pages, 0)
        if self.scheduler.preemption == "swap" and not self.cache.host_pages:
            raise ValueError("scheduler.preemption = swap needs cache.host_pages >= 1, got 0")
        _at_least("scheduler.token_budget", self.scheduler.token_budget, 1)
        if self.scheduler.steps_per_lane not in (1, 2):
            raise ValueError(f"scheduler.steps_per_lane = {self.scheduler.steps_per_lane} must be 1 or 2")
        for name, value in (("ttft_s", self.slo.ttft_s), ("tpot_s", self.slo.tpot_s)):
            if not value >= 0:
                raise ValueError(f"slo.{name} = {value} must be 0 or more")
        if not 0 < self.cache.memory_fraction <= 1:
            raise ValueError(f"cache.memory_fraction = {self.cache.memory_fraction} must be greater than 0, at most 1")
        for knob in ("pull_watermark", "memory_watermark"):
            if not 0 < (share := getattr(self.scheduler, knob)) <= 1:
                raise ValueError(f"scheduler.{knob} = {share} must be greater than 0, at most 1")
        _at_least("model.max_model_len", self.model.max_model_len, 0)
        _at_least("engine.max_waiting", self.engine.max_waiting, 1)
        _at_least("engine.log_capacity", self.engine.log_capacity, 0)
        if not self.engine.deadline_s >= 0:
            raise ValueError(f"engine.deadline_s = {self.engine.deadline_s} must be 0 or more")
        self._check_knobs()
        if not self.groups():
            raise ValueError("prefill.instances, decode.instances and mixed.instances are all 0: nothing would serve")
        self._check_roles()

    def _check_knobs(self) -> None:
        """A knob that the policy does not look at would promise what nobody does."""
        if self.policy not in ROLES:
            return  # a policy from outside may look at any
        for knob, policies in KNOBS.items():
            value = getattr(self.scheduler, knob)
            if self.policy not in policies and value != getattr(SchedulerConfig, knob):
                raise ValueError(
                    f"scheduler.{knob} = {value} has no effect with policy = {self.policy}: it is for "
                    f"{' and '.join(policies)}"
                )

    def _check_roles(self) -> None:
        """Each policy needs instances of certain roles, and has no use for the others."""
        present = {role for role, _ in self.groups()}
        needs = ROLES.get(self.policy)
        if needs is None or needs - OPTIONAL.get(self.policy, set()) <= present <= needs:
            return
        for role in Role:
            count = {Role.PREFILL: self.prefill, Role.DECODE: self.decode, Role.MIXED: self.mixed}[role].instances
            if (role in needs) != (count > 0):
                wanted = ">= 1" if role in needs else "= 0"
                raise ValueError(f"policy = {self.policy} needs {role}.instances {wanted}, got {count}")


ROLES = {
    "disaggregated": {Role.PREFILL, Role.DECODE},
    "colocated": {Role.MIXED},
    "chunked": {Role.MIXED},
    "multiplexed": {Role.PREFILL, Role.MIXED},
    "deflected": {Role.PREFILL, Role.MIXED},
}
"""Roles of the instances that each policy works with; multiplexing workers are mixed instances."""

FORETELLING = ("multiplexed", "deflected")
"""Policies that foretell step times."""

KNOBS: dict[str, tuple[str, ...]] = {
    "token_budget": ("chunked",),
    "chunk_order": ("chunked",),
    "queue_order": ("multiplexed",),
    "routing": ("multiplexed",),
    "memory_watermark": FORETELLING,
    "early_rejection": ("deflected",),
    "latency_profile": FORETELLING,
}
"""Fields of `scheduler` that some policies alone look at."""

OPTIONAL = {"deflected": {Role.PREFILL}}
"""Of those, the roles without which it works too."""

MIXING = {"chunked", "deflected"}
"""Policies whose steps may hold prompt chunks and decodes together: programs for such steps take time to compile."""

COPIES: dict[str, set[tuple[Role, Role]]] = {
    "disaggregated": {(Role.PREFILL, Role.DECODE)},
    "colocated": set(),
    "chunked": set(),
    "multiplexed": {(Role.PREFILL, Role.MIXED)},
    "deflected": {(Role.PREFILL, Role.MIXED)},
}
"""Between instances of which roles each policy moves KV pages."""


def _at_least(name: str, value: int, low: int) -> None:
    if value < low:
        raise ValueError(f"{name} = {value} must be at least {low}")
