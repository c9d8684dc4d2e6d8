"""The public systems as they were measured: their rules, limits and overheads, as named option sets.

`PUBLIC_DISTSERVE` is DistServe's published code (LLMServe/DistServe), `PUBLIC_VLLM` the vLLM 0.2 that it was compared
with, both on A100-80G. All figures are of the system and none of a run. docs/simulator.md says where each comes from,
what it does to the error against real runs, and which of them were adjusted to such runs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from ds_jax.config import SchedulerConfig
from ds_jax.latency import LatencyProfile, StepFit
from ds_jax.protocol import Instance, Role, Scheduler, Step
from ds_jax.scheduling import create_scheduler
from ds_jax.simulation.latency import Links, PlacedLatency

PAGE_TOKENS = 16


@dataclass(frozen=True)
class HostWork:
    """What the host of a stage does for a step before its devices begin: remote call, page tables, detokenizing."""

    step_s: float = 0.0
    """For every decode step."""
    context_token_s: float = 0.0
    """For each token that the decodes attend to: page tables are sent anew with every step."""
    sequence_s: float = 0.0
    """For each decode of the step, up to `crowd`."""
    crowd: int = 1024
    crowded_sequence_s: float = 0.0
    """For each one beyond."""

    def seconds(self, batch: int, context_tokens: int) -> float:
        """Of a step with `batch` decodes; nothing for a step of prompts, whose fits contain it."""
        if not batch:
            return 0.0
        few = min(batch, self.crowd)
        per_sequence = self.sequence_s * few + self.crowded_sequence_s * (batch - few)
        return self.step_s + self.context_token_s * context_tokens + per_sequence


@dataclass(frozen=True)
class PublicSystem:
    """One public system: a policy with options, the limits that it was started with, and its overheads."""

    name: str
    policy: str
    options: SchedulerConfig
    profile: str
    """File of its step times, with `{model}` in the place of the model's name."""
    max_step_tokens: int
    max_step_sequences: int
    slots: int
    request_s: float
    """From a request's arrival until its prompt is in the queue: HTTP, tokenizing, the loop's sleep."""
    host: HostWork
    links: Links
    copies_after_steps: bool
    prompt_factor: float = 1.0
    """Its prompts took so many times what the fits say."""
    decode_base_s: float = 0.0
    """Its decode steps took so much more than the fits say; negative where the fits contain more than it did."""
    profiled_tokens: int = 0
    """Tokens of the batch that it tried before it sized its pool, whose activations it left room for; 0: none."""
    activation_vectors: int = 0
    """Hidden vectors, 2 bytes a number, that each of those tokens took."""
    host_bytes: float = 0.0
    """Pinned host memory of each GPU, to swap to."""

    def kv_tokens(self, profile: LatencyProfile, hidden_size: int, tp: int, pp: int) -> int:
        """Tokens of KV in the pool of one instance.

        Raises:
            ValueError: the profile does not have this parallelism.
        """
        if f"{tp},{pp}" not in profile.kv_tokens:
            known = "; ".join(sorted(profile.kv_tokens))
            raise ValueError(f"tp,pp = {tp},{pp} has no KV capacity in the profile of {profile.model}: it has {known}")
        reserved = self.profiled_tokens * self.activation_vectors * hidden_size * 2 * pp / profile.kv_bytes_per_token
        return max(0, int(profile.kv_tokens[f"{tp},{pp}"] - reserved))

    def instance(self, id: int, role: Role, profile: LatencyProfile, hidden_size: int, tp: int, pp: int) -> Instance:
        """An instance of this system.

        Raises:
            ValueError: as `kv_tokens`.
        """
        pages = self.kv_tokens(profile, hidden_size, tp, pp) // PAGE_TOKENS
        host = int(self.host_bytes * tp * pp / (profile.kv_bytes_per_token * PAGE_TOKENS))
        return Instance(
            id,
            role,
            0,
            pages,
            PAGE_TOKENS,
            lanes=pp,
            slots=0 if role is Role.PREFILL else min(self.slots, max(1, pages)),
            max_step_tokens=0 if role is Role.DECODE else self.max_step_tokens,
            max_step_sequences=0 if role is Role.DECODE else self.max_step_sequences,
            saturation_tokens=0 if role is Role.DECODE else self.max_step_tokens,
            host_pages=0 if role is Role.PREFILL else host,
        )

    def scheduler(self) -> Scheduler:
        return create_scheduler(self.policy, self.options)

    def latency(self, profile: LatencyProfile, layout: Iterable[tuple[int, int, int]]) -> PublicLatency:
        """The truth to simulate on, of instances (id, tp, pp)."""
        if self.prompt_factor != 1 or self.decode_base_s:
            fits = {tp: self._adjusted(fit) for tp, fit in profile.fits.items()}
            profile = replace(profile, fits=fits, outside=profile.outside)
        return PublicLatency(self, profile, list(layout))

    def _adjusted(self, fit: StepFit) -> StepFit:
        base, token, square = (self.prompt_factor * part for part in fit.prefill)
        few, many = fit.decode, fit.decode_large
        return replace(
            fit,
            prefill=(base, token, square),
            decode=(few[0] + self.decode_base_s, *few[1:]),
            decode_large=None if many is None else (many[0] + self.decode_base_s, *many[1:]),
        )


class PublicLatency(PlacedLatency):
    """`PlacedLatency` with the hosts of a public system."""

    def __init__(self, system: PublicSystem, profile: LatencyProfile, layout: list[tuple[int, int, int]]):
        super().__init__(
            {id: profile.step_time(tp, pp) for id, tp, pp in layout},
            system.links,
            profile.kv_bytes_per_token * PAGE_TOKENS,
            gpus={id: tp * pp for id, tp, pp in layout},
        )
        self.copies_after_steps = system.copies_after_steps
        self._host = system.host

    def host_ns(self, step: Step, context_tokens: int) -> int:
        """As `LatencyModel` says."""
        return round(1e9 * self._host.seconds(len(step.decodes), context_tokens))


_NVLINK = Links(300e9, host_bytes_per_s=25e9, latency_s=4e-3)

PUBLIC_DISTSERVE = PublicSystem(
    name="distserve",
    policy="ds_jax.scheduling.serial:Serial",
    options=SchedulerConfig(pull_watermark=0.05, steps_per_lane=1, preemption="swap"),
    profile="configs/latency/a100_80g_{model}.json",
    max_step_tokens=8192,
    max_step_sequences=128,
    slots=1024,
    request_s=5e-3,
    host=HostWork(step_s=3e-3, context_token_s=1e-7, sequence_s=1.25e-5),
    links=_NVLINK,
    copies_after_steps=True,
    host_bytes=16e9,
)

PUBLIC_VLLM = PublicSystem(
    name="vllm",
    policy="colocated",
    options=SchedulerConfig(steps_per_lane=1),
    profile="configs/latency/a100_80g_{model}_vllm.json",
    max_step_tokens=16384,
    max_step_sequences=1024,
    slots=1024,
    request_s=5.5e-3,
    host=HostWork(sequence_s=0.75e-3, crowd=16, crowded_sequence_s=0.16e-3),
    links=_NVLINK,
    copies_after_steps=False,
    prompt_factor=0.93,
    decode_base_s=-1.5e-3,
    profiled_tokens=16384,
    activation_vectors=66,
)
