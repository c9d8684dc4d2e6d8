"""How long a step or a copy takes, in virtual time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from ds_jax.latency import LatencyProfile, StepTime
from ds_jax.protocol import Copy, Medium, Step


class LatencyModel(Protocol):
    """Asked once for every step and copy, in the order of their commands.

    A model may also have `host_ns(step, context_tokens)`: nanoseconds that the host of each stage works on a step
    before its devices begin (`Pipeline.enter`); and `copies_after_steps`: whether a copy between instances waits until
    all that is in the destination's pipeline has left it. `PublicLatency` has both.
    """

    def step_ns(self, step: Step, context_tokens: int) -> int:
        """Nanoseconds that the step runs, through all stages; its decodes attend to `context_tokens` tokens in all."""
        ...

    def copy_ns(self, copy: Copy, now_ns: int) -> int:
        """Nanoseconds from the command, given now, until the copy has landed."""
        ...


@dataclass(frozen=True)
class LinearLatency:
    """prefill = base + token * prompt tokens; decode = base + context * sum of contexts + sequence * batch;
    copy = base + page * pages. All in nanoseconds. A step with both lists costs both, and the larger base once."""

    prefill_base_ns: float = 5e6
    prefill_token_ns: float = 20e3
    decode_base_ns: float = 10e6
    decode_context_ns: float = 20.0
    decode_sequence_ns: float = 50e3
    copy_base_ns: float = 1e6
    copy_page_ns: float = 20e3

    def step_ns(self, step: Step, context_tokens: int) -> int:
        base = cost = 0.0
        if step.prefills:
            base = self.prefill_base_ns
            cost = self.prefill_token_ns * sum([prefill.length for prefill in step.prefills])
        if step.decodes:
            base = max(base, self.decode_base_ns)
            cost += self.decode_context_ns * context_tokens + self.decode_sequence_ns * len(step.decodes)
        return round(base + cost)

    def copy_ns(self, copy: Copy, now_ns: int) -> int:
        return round(self.copy_base_ns + self.copy_page_ns * len(copy.pages))


@dataclass(frozen=True)
class Links:
    """What carries KV between instances."""

    bytes_per_s: float
    """Between two GPUs of a node, one direction. Every GPU of an instance has its own."""
    network_bytes_per_s: float = 0.0
    """Between two nodes, one direction; 0: there is only one node."""
    host_bytes_per_s: float = 32e9
    """Between a GPU and its host's memory, one direction. Every GPU has its own."""
    latency_s: float = 0.5e-3
    """What a copy takes beside its bytes."""

    @classmethod
    def of(
        cls,
        profile: LatencyProfile,
        bytes_per_s: float = 300e9,
        *,
        network_bytes_per_s: float = 0.0,
        host_bytes_per_s: float = 32e9,
    ) -> Links:
        """Those that the profile was measured with, and what is given for those that were not measured."""
        return cls(
            profile.copy_bytes_per_s or bytes_per_s,
            network_bytes_per_s,
            profile.host_bytes_per_s or host_bytes_per_s,
            profile.copy_latency_s or cls.latency_s,
        )


class PlacedLatency:
    """Step times of placed instances, and copies over the links between them.

    Copies that need the same link wait for each other: each has the whole bandwidth when its turn has come, in order of
    command. Links are: that of an instance to the other GPUs of its node, in and out; that of a node to the others, in
    and out; that of an instance to its host.
    """

    def __init__(
        self,
        step_times: Mapping[int, StepTime],
        links: Links,
        page_bytes: float,
        *,
        gpus: Mapping[int, int] | None = None,
        nodes: Mapping[int, int] | None = None,
        host_overhead_s: float = 0.0,
        host_overhead_per_context_token_s: float = 0.0,
    ):
        """
        Args:
            step_times: by instance.
            page_bytes: of one page of KV, over all layers and heads.
            gpus: of each instance; 1 where it is not said. KV is spread over them, so their links work side by side.
            nodes: where each instance is; all on one node where it is not said.
            host_overhead_s: per step, which the devices wait for; and what it takes more for each token of context.
        """
        self._step_s = {instance: step_time.step_s for instance, step_time in step_times.items()}
        self._links, self._page_bytes = links, page_bytes
        self._gpus, self._nodes = gpus or {}, nodes or {}
        self._overhead_s, self._overhead_per_token_s = host_overhead_s, host_overhead_per_context_token_s
        self._free_s: dict[tuple[str, int], float] = {}
        """When each link is free."""

    def place(self, instance: int, step_time: StepTime) -> None:
        """One more instance."""
        self._step_s[instance] = step_time.step_s

    def step_ns(self, step: Step, context_tokens: int) -> int:
        """As `LatencyModel.step_ns`."""
        chunks = [(work[1], work[2]) for work in step.prefills]
        seconds = self._step_s[step.instance](chunks, len(step.decodes), context_tokens)
        return round(1e9 * (seconds + self._overhead_s + self._overhead_per_token_s * context_tokens))

    def copy_ns(self, copy: Copy, now_ns: int) -> int:
        """As `LatencyModel.copy_ns`."""
        source, destination = copy.source, copy.destination
        width = min(self._gpus.get(source.instance, 1), self._gpus.get(destination.instance, 1))
        links: tuple[tuple[str, int], ...]
        if Medium.HOST in (source.medium, destination.medium):
            links = (("to host" if destination.medium is Medium.HOST else "from host", source.instance),)
            rate = self._links.host_bytes_per_s * width
        elif self._nodes.get(source.instance, 0) == self._nodes.get(destination.instance, 0):
            links = (("out", source.instance), ("in", destination.instance))
            rate = self._links.bytes_per_s * width
        else:
            nodes = self._nodes[source.instance], self._nodes[destination.instance]
            links = (("node out", nodes[0]), ("node in", nodes[1]))
            rate = self._links.network_bytes_per_s
        if not rate > 0:
            raise ValueError(
                f"links: a copy from instance {source.instance} to instance {destination.instance} runs over "
                f"{links[0][0]} at {rate:g} bytes/s, which must be greater than 0"
            )
        now_s = now_ns / 1e9
        begin_s = max([now_s, *[self._free_s.get(link, 0.0) for link in links]])
        end_s = begin_s + len(copy.pages) * self._page_bytes / rate
        for link in links:
            self._free_s[link] = end_s
        return round(1e9 * (end_s + self._links.latency_s - now_s))
