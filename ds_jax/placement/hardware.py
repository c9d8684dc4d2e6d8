"""What a plan's model takes on a plan's machines: step times, memory and links of every shape of instance."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ds_jax.architecture import Architecture
from ds_jax.config import SchedulerConfig
from ds_jax.latency import Gpu, LatencyProfile, StepTime, fewest_gpus, gpu, kv_tokens, load, roofline
from ds_jax.latency.fitted import Three
from ds_jax.placement.layouts import Group, Unit, located
from ds_jax.plan import PlanConfig
from ds_jax.protocol import Instance, Role, Scheduler
from ds_jax.scheduling import create_scheduler
from ds_jax.simulation import Links, PlacedLatency
from ds_jax.simulation.public import PUBLIC_DISTSERVE, PUBLIC_VLLM, PublicSystem

PAGE_SIZE = 16
MAX_STEP_SEQUENCES = 16
"""As in `PrefillConfig`: what is found is what will be served."""
OWN = "own"
"""Kind of GPU: the devices that the plan's profile was measured on."""
_ENDLESS = 10**6
"""Tokens of a step, prompts of a step, and pages, where there is to be no limit."""


@dataclass(frozen=True)
class Pace:
    """What the steps of an instance take in a trial, and what limits them: all that bounds and sketches ask."""

    prefill: Three
    """Seconds per step, per token, per squared token, through all stages."""
    decode: Three
    """Seconds per step, per token of context, per sequence."""
    decode_large: Three
    """The same for steps of more than `large_batch` sequences."""
    large_batch: float
    step_tokens: int
    """Prompt tokens that share a step; a longer prompt runs alone."""
    step_prompts: int
    slots: int
    """Sequences that a lane decodes."""
    kv_tokens: int
    ahead: int
    """Steps of a lane that are planned before they can begin, the running one included."""

    def prompts_s(self, prompts: np.ndarray) -> np.ndarray:
        """Seconds of each prompt beside what every step takes."""
        _, token, square = self.prefill
        return token * prompts + square * prompts.astype(float) ** 2

    def decode_of(self, batch: float) -> Three:
        """Coefficients for a step of so many sequences."""
        return self.decode if batch <= self.large_batch else self.decode_large

    def decode_s(self, batch: int, context_tokens: float) -> float:
        """Seconds of a decode step."""
        base, context, sequence = self.decode_of(batch)
        return base + context * context_tokens + sequence * batch


class Instant:
    """Takes no time: the phase that is left out when the other one is looked at alone."""

    stages = 1

    def step_s(self, chunks: Sequence[tuple[int, int]], batch: int, context_tokens: int) -> float:
        return 0.0


class Hardware:
    """Answers for one plan; `arch` is its model."""

    def __init__(self, plan: PlanConfig, arch: Architecture):
        self.plan = plan
        self.max_step_tokens = plan.max_step_tokens
        self.arch = arch
        names = dict.fromkeys(Role, plan.cluster.gpu) | {Role.DECODE: plan.cluster.decode_gpu or plan.cluster.gpu}
        self.gpus = {role: self._own() if name == OWN else gpu(name) for role, name in names.items()}
        self.public = self._public_systems() if plan.search.rule == "published" else {}
        """By policy, the public system whose rules and overheads hold, where the published figures are reproduced."""
        self._unused: dict[str, None] = {}
        """Why a profile that was given is not used."""
        self._profiles = {role: self._profile(role) for role in Role}

    def _own(self) -> Gpu:
        """The devices of the profile, of which only what it says is known: no memory beyond its capacities."""
        if not self.plan.profile:
            raise ValueError(f"cluster.gpu = {OWN} needs profile, the latency profile of those devices")
        profile = load(self.plan.profile)
        return Gpu(OWN, 0.0, 0.0, 0.0, 2 * profile.copy_bytes_per_s, profile.host_bytes_per_s)

    def _public_systems(self) -> dict[str, PublicSystem]:
        """DistServe's code and the vLLM of its time, where their step times are known for this model and GPU."""
        systems = {"disaggregated": PUBLIC_DISTSERVE, "colocated": PUBLIC_VLLM}
        return {policy: system for policy, system in systems.items() if self._public_profile(system)}

    def _public_profile(self, system: PublicSystem) -> LatencyProfile | None:
        path = system.profile.format(model=Path(self.plan.model).name.replace("-", "_"))
        try:
            profile = load(path)
        except FileNotFoundError:
            return None
        return profile if profile.device == self.plan.cluster.gpu and self.plan.profile else None

    def _profile(self, role: Role) -> LatencyProfile:
        """The plan's profile, where it is of this kind of GPU; else a roofline."""
        kind = self.gpus[role]
        if role is Role.MIXED and self.plan.policy in ("colocated", "disaggregated") and "colocated" in self.public:
            profile = self._public_profile(self.public["colocated"])
            assert profile is not None
            return profile
        if self.plan.profile and kind.name == self.plan.cluster.gpu:
            profile = load(self.plan.profile)
            if not (other := self._differs(profile, kind)):
                return profile
            if kind.name == OWN:
                raise ValueError(f"profile = {self.plan.profile} {other}: measure one with experiments.profile")
            self._unused[f"profile {self.plan.profile} {other}: step times are a roofline instead, extrapolated"] = None
        return roofline(self.arch, kind, self.plan.dtype, model=self.plan.model)

    def under(self, plan: PlanConfig) -> Hardware:
        """The same machines under a plan with other targets or another network."""
        other = copy.copy(self)
        other.plan = plan
        return other

    def _differs(self, profile: LatencyProfile, kind: Gpu) -> str:
        """What of the plan the profile was not measured for."""
        for what, measured, wanted in (
            ("device", profile.device, profile.device if kind.name == OWN else kind.name),
            ("model", profile.model, Path(self.plan.model).name),
            ("dtype", profile.dtype, self.plan.dtype),
        ):
            if measured != wanted:
                return f"is of {what} {measured}, not {wanted}"
        return ""

    @property
    def extrapolated(self) -> bool:
        """Whether step times were worked out and not measured."""
        return any(profile.extrapolated for profile in self._profiles.values())

    def notes(self) -> list[str]:
        """What was asked beyond the measured ranges, and profiles that are of something else."""
        outside = [note for profile in self._profiles.values() for note in profile.outside.values()]
        return [*self._unused, *dict.fromkeys(outside)]

    def fingerprint(self) -> str:
        """A digest of all figures."""
        facts = [dataclasses.asdict(profile) | {"outside": None} for profile in self._profiles.values()]
        links = dataclasses.asdict(self._links())
        return hashlib.sha256(json.dumps([facts, links], sort_keys=True, default=str).encode()).hexdigest()

    # --- one instance -------------------------------------------------------------------------------------------------

    def measured(self, group: Group) -> bool:
        """Whether the profile knows the group's tensor parallelism."""
        return group.shape.tp in self._profiles[group.role].fits

    def measured_tps(self) -> list[int]:
        """Tensor parallelisms that are known of every role."""
        return sorted(set.intersection(*(set(profile.fits) for profile in self._profiles.values())))

    def step_time(self, group: Group) -> StepTime:
        """Step times of an instance of the group."""
        return self._profiles[group.role].step_time(group.shape.tp, group.shape.pp)

    def kv_tokens(self, group: Group) -> int:
        """Tokens of KV that an instance of the group holds; 0 if its weights do not fit."""
        tp, pp = group.shape.tp, group.shape.pp
        known = self._profiles[group.role].kv_tokens.get(f"{tp},{pp}")
        return kv_tokens(self.arch, self.gpus[group.role], self.plan.dtype, tp, pp) if known is None else known

    def fewest_gpus(self, group: Group, tokens: int) -> float:
        """GPUs from which on an instance of this role holds the weights and this many tokens; inf: it is not known."""
        kind = self.gpus[group.role]
        return fewest_gpus(self.arch, kind, self.plan.dtype, tokens) if kind.memory_bytes else math.inf

    def pace(self, group: Group, policy: str) -> Pace:
        """Its steps under a policy: the fits, and what a trial adds to them. At least so much, where it depends."""
        public = self.public.get(policy)
        fit = self._profiles[group.role].fit_of(group.shape.tp)
        instance = self._instance(0, group, public)
        base, token, square = fit.prefill
        small, large = fit.decode, fit.decode_large or fit.decode
        if public is None:
            overhead_s = self.overhead_s
            prefill = (base + overhead_s, token, square)
            small, large = ((first + overhead_s, *rest) for first, *rest in (small, large))  # type: ignore[assignment]
        else:
            factor, host = public.prompt_factor, public.host
            prefill = (factor * base, factor * token, factor * square)
            more = host.step_s + public.decode_base_s, host.context_token_s
            each = min(host.sequence_s, host.crowded_sequence_s or host.sequence_s)
            small, large = (
                (first + more[0], second + more[1], third + each) for first, second, third in (small, large)
            )
        together = instance.max_step_tokens
        if policy not in ("colocated", "chunked"):
            together = min(together, instance.saturation_tokens)
        return Pace(
            prefill,
            small,
            large,
            fit.large_batch,
            together,
            instance.max_step_sequences,
            instance.slots,
            instance.pages * instance.page_size,
            (SchedulerConfig() if public is None else public.options).steps_per_lane,
        )

    @property
    def overhead_s(self) -> float:
        """Of the host, which every step waits for."""
        return max(profile.host_overhead_s for profile in self._profiles.values())

    def l_m(self, group: Group) -> int:
        """Shortest prompt that saturates an instance of the group, in tokens."""
        return self._profiles[group.role].l_m(group.shape.tp)

    # --- one unit -----------------------------------------------------------------------------------------------------

    def scheduler(self, unit: Unit, policy: str) -> Scheduler:
        """The policy, with the same figures to foretell with."""
        if policy in self.public:
            return self.public[policy].scheduler()
        by_role = {group.role: group for group in unit.groups}

        def predict(instance: Instance) -> StepTime | None:
            group = by_role.get(instance.role)
            return None if group is None else self.step_time(group)

        return create_scheduler(policy, SchedulerConfig(), predict)

    def instances(self, unit: Unit, phases: Sequence[Role], policy: str = "", pages: int = _ENDLESS) -> list[Instance]:
        """The unit's instances; and, for a phase alone, one of the other that takes no time.

        Args:
            pages: of that one, so many that all prompts of a run find room at once.
        """
        made: list[Instance] = []
        for group in unit.groups:
            for _ in range(group.instances):
                made.append(self._instance(len(made), group, self.public.get(policy)))
        if len(phases) == 1:
            (role,) = {Role.PREFILL, Role.DECODE} - set(phases)
            made.append(
                Instance(
                    len(made),
                    role,
                    0,
                    pages,
                    PAGE_SIZE,
                    slots=1 if role is Role.DECODE else 0,  # requests are over with their first token
                    max_step_tokens=_ENDLESS,
                    max_step_sequences=_ENDLESS,
                    saturation_tokens=_ENDLESS,
                )
            )
        return made

    def _instance(self, id: int, group: Group, public: PublicSystem | None) -> Instance:
        profile = self._profiles[group.role]
        if public is not None:
            known = profile.kv_tokens | {f"{group.shape.tp},{group.shape.pp}": self.kv_tokens(group)}
            whole = dataclasses.replace(profile, kv_tokens=known)
            return public.instance(id, group.role, whole, self.arch.hidden_size, group.shape.tp, group.shape.pp)
        prefills, decodes = group.role is not Role.DECODE, group.role is not Role.PREFILL
        return Instance(
            id,
            group.role,
            0,
            self.kv_tokens(group) // PAGE_SIZE,
            PAGE_SIZE,
            lanes=group.shape.pp,
            slots=self.plan.slots if decodes else 0,
            max_step_tokens=self.max_step_tokens if prefills else 0,
            max_step_sequences=MAX_STEP_SEQUENCES if prefills else 0,
            saturation_tokens=self.l_m(group) if prefills else 0,
        )

    def latency(self, unit: Unit, instances: Sequence[Instance], phases: Sequence[Role], policy: str) -> PlacedLatency:
        """The truth of a trial."""
        groups = [group for group in unit.groups for _ in range(group.instances)]
        if (system := self.public.get(policy)) is not None:
            layout = [(id, group.shape.tp, group.shape.pp) for id, group in enumerate(groups)]
            latency: PlacedLatency = system.latency(self._profiles[groups[0].role], layout)
            for one in instances[len(groups) :]:
                latency.place(one.id, Instant())
            return latency
        steps: dict[int, StepTime] = {one.id: Instant() for one in instances}
        steps |= {one.id: self.step_time(group) for one, group in zip(instances, groups, strict=False)}
        gpus = {one.id: group.shape.gpus for one, group in zip(instances, groups, strict=False)}
        free = Links(bytes_per_s=1e18, network_bytes_per_s=1e18, latency_s=0.0)
        return self.placed(steps, gpus, self._nodes(unit), None if len(phases) > 1 else free)

    def _nodes(self, unit: Unit) -> dict[int, int] | None:
        """The node that each instance's KV leaves or enters: that of its first stage. None: it never leaves a node."""
        places = located(self.plan, unit) if unit.kv_crosses_nodes else None
        return None if places is None else {id: stages[0] for id, stages in enumerate(places)}

    def delay_s(self, policy: str) -> float:
        """From a request's arrival until the scheduler hears of it."""
        return self.public[policy].request_s if policy in self.public else 0.0

    def placed(
        self,
        steps: Mapping[int, StepTime],
        gpus: Mapping[int, int],
        nodes: Mapping[int, int] | None = None,
        links: Links | None = None,
    ) -> PlacedLatency:
        """Instances with these step times and GPUs, joined by the plan's links."""
        page_bytes = PAGE_SIZE * self.arch.kv_bytes_per_token(self.plan.dtype)
        return PlacedLatency(
            steps, links or self._links(), page_bytes, gpus=gpus, nodes=nodes, host_overhead_s=self.overhead_s
        )

    def _links(self) -> Links:
        profile = self._profiles[Role.PREFILL]
        device = self.gpus[Role.PREFILL]
        return Links.of(
            profile,
            device.link_bytes_per_s / 2,
            network_bytes_per_s=self.plan.cluster.network_gbits * 1e9 / 8,
            host_bytes_per_s=device.pcie_bytes_per_s,
        )

    def copy_s(self, unit: Unit, tokens: np.ndarray) -> np.ndarray:
        """Seconds of a hand-over of so many tokens that waits for no other."""
        links, per_token = self._links(), self.arch.kv_bytes_per_token(self.plan.dtype)
        rate = links.network_bytes_per_s
        if not unit.kv_crosses_nodes:
            rate = links.bytes_per_s * min(group.shape.gpus for group in unit.groups)
        return links.latency_s + tokens * (per_token / rate)

    def kv_transfer_s(self, tokens: float) -> float:
        """Seconds that the KV of a prompt takes over the network."""
        return tokens * self.arch.kv_bytes_per_token(self.plan.dtype) / self._links().network_bytes_per_s
