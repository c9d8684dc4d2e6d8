"""What a scheduler hears and what it answers: the only language between planning and doing.

Plain values of ids and integers. No jax, no clock, no token values: the same events and commands pass between a
scheduler and real devices, between a scheduler and the simulator, and through the recorder.

The contract of an executor, on which every scheduler leans:

* each `Run` on a living epoch is answered by exactly one `StepDone`; steps of one (instance, lane) finish in order;
* steps that name the same sequence finish in the order of their commands, also on different lanes;
* each `Copy` with a living end is answered by exactly one `CopyDone`, also when it failed;
* nothing needs to come back from a dead epoch, and what still comes back is ignored.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, dataclass_transform

STAGES = ("prefill_queueing", "prefill_execution", "kv_transmission", "decode_queueing", "decode_execution")
"""The five stages of a request's life (DistServe, section 6.3), in order."""


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def message[T](cls: type[T]) -> type[T]:
    """A dataclass whose values are never changed. The type checker sees to that: `frozen=True` would check it at run
    time, and make each of the millions of events and commands of a simulation cost four times as much."""
    return dataclass(slots=True, unsafe_hash=True)(cls)


class Role(enum.StrEnum):
    """What an instance is for."""

    PREFILL = "prefill"
    DECODE = "decode"
    MIXED = "mixed"


class Medium(enum.StrEnum):
    """Which memory of an instance one end of a copy lies in."""

    DEVICE = "device"
    HOST = "host"


NO_TARGET_NS = 2**62
"""In place of a latency target, where a request has only the other one."""


@message
class Slo:
    """Latency targets of one request, in nanoseconds; one of `NO_TARGET_NS` or more is none."""

    ttft_ns: int
    tpot_ns: int


@message
class Request:
    """One request as the scheduler sees it: lengths and limits, never the tokens themselves.

    Its `n` sequences are `id` to `id + n - 1`: outputs of one prompt, each of at most `max_tokens`. `deadline_ns` is a
    point on the scheduler's clock. `lockstep` marks sequences whose last token's value is needed before their next
    step is planned.
    """

    id: int
    prompt_tokens: int
    max_tokens: int
    seed: int = 0
    deadline_ns: int | None = None
    slo: Slo | None = None
    lockstep: bool = False
    n: int = 1

    @property
    def sequences(self) -> range:
        """Ids of its sequences."""
        return range(self.id, self.id + self.n)


@message
class Instance:
    """A full copy of the weights with its own pool of KV pages; `epoch` counts its lives."""

    id: int
    role: Role
    epoch: int
    pages: int
    page_size: int
    lanes: int = 1
    """Pipeline stages, hence batches in flight side by side."""
    slots: int = 0
    """Sequences that one lane can decode in one step."""
    max_step_tokens: int = 0
    """Prompt tokens that one step can hold; a longer prompt runs in chunks."""
    max_step_sequences: int = 0
    """Prompts that one step can hold."""
    saturation_tokens: int = 0
    """L_m: the shortest prompt that keeps the devices busy (DistServe, section 3.1)."""
    host_pages: int = 0
    """KV pages in pinned host memory, for sequences that are swapped out."""


# --- events -----------------------------------------------------------------------------------------------------------


@message
class Arrived:
    """Requests that arrive together are told one after the other, all but the last with `more`: they are planned
    together, when the last has been told."""

    request: Request
    more: bool = False


@message
class Stopped:
    """The sequence is over (stop token, stop string, client gone); may come late, twice, or for one long gone."""

    sequence: int
    reason: str


@message
class StepDone:
    """A step's results are on the host. `emitted` names the sequences of which it kept a token, each with 1; a sequence
    that is over, or whose token was dropped, is not named. The mapping is only read: one may serve many steps."""

    step: int
    emitted: Mapping[int, int] = field(default_factory=dict)


@message
class CopyDone:
    """A copy has landed (`ok`) or will never land. Neither end is read or written by it from now on."""

    copy: int
    ok: bool


@message
class InstanceUp:
    instance: Instance


@message
class InstanceLost:
    """The instance's epoch is dead, and every page of it gone."""

    instance: int
    epoch: int


@message
class Drain:
    """Give the instance no new work; what it has runs to its end."""

    instance: int


@message
class Timer:
    """A timer asked for by `SetTimer` is due; may be late."""

    key: str


Event = Arrived | Stopped | StepDone | CopyDone | InstanceUp | InstanceLost | Drain | Timer

# --- commands ---------------------------------------------------------------------------------------------------------


class Prefill(NamedTuple):
    """Run tokens [start, start + length) of prompt + confirmed output; sample one more token if `samples`.

    A length of 0 forks: the sequence has the same prompt as the entry before it, and samples a first token of its own
    from what that entry computed. It owns the same pages and gets no page table here.
    """

    sequence: int
    start: int
    length: int
    samples: bool
    new_pages: tuple[int, ...] = ()
    """Appended to the sequence's page table on this instance; a start of 0 begins a new table."""


class Decode(NamedTuple):
    """Feed the sequence's last token and sample the next, in this slot of the lane's running batch."""

    sequence: int
    slot: int
    new_pages: tuple[int, ...] = ()


class Decodes(tuple[Decode, ...]):
    """The decodes of a step that also say how they differ from those of an earlier step.

    A running batch changes little from step to step, and whoever follows it needs only the changes. They are a
    convenience: a plain tuple says the same, and equals it. `parted_and_joined` reads either.
    """

    after: int | None = None
    """Id of the last step before this one on its lane that has decodes. These differ from those of that step in
    `parted` and `joined`, and in nothing else but `new_pages`. None: nothing is said."""
    parted: tuple[int, ...] = ()
    """Sequences that were in that step and are not in this one, or have left in between and come back."""
    joined: tuple[int, ...] = ()
    """Sequences that have come since."""
    grown: tuple[Decode, ...] | None = None
    """Those of these decodes that have new pages. None: nothing is said."""


@message
class Step:
    """All that an instance is told to do in one go; either list may be empty.

    Where two steps of a lane, with none that decodes between them, have the very same `decodes` object, nobody left,
    nobody came, and neither has new pages.
    """

    id: int
    instance: int
    epoch: int
    lane: int
    prefills: tuple[Prefill, ...] = ()
    decodes: tuple[Decode, ...] = ()


class Place(NamedTuple):
    """One end of a copy."""

    instance: int
    epoch: int
    medium: Medium = Medium.DEVICE


@message
class Run:
    step: Step


@message
class Copy:
    """Move KV pages: (source page, destination page) pairs in order of position. The destination's page table of the
    sequence begins anew with the first copy of a series; `last` ends the series. `shared` are pages that the
    destination holds already, of a sequence with the same prompt: the table begins with them."""

    id: int
    sequence: int
    source: Place
    destination: Place
    pages: tuple[tuple[int, int], ...]
    last: bool = True
    shared: tuple[int, ...] = ()


@message
class Reject:
    """The scheduler ends the sequence (it can never run, or ran out of time). `retry_after_s` if trying later helps."""

    sequence: int
    why: str
    retry_after_s: float | None = None


@message
class SetTimer:
    """Ask for `Timer(key)` at this time, or soon after."""

    key: str
    at_ns: int


Command = Run | Copy | Reject | SetTimer


class Scheduler(Protocol):
    """A pure state machine: every decision, no device, no clock, no thread."""

    def handle(self, event: Event, now_ns: int) -> list[Command]:
        """Take one event in; answer with the commands to carry out, in this order. `now_ns` never goes back."""
        ...


def parted_and_joined(before: Step | None, step: Step) -> tuple[Iterable[int], Iterable[int]]:
    """Sequences whose decoding ends with `before` and those whose decoding begins with `step`.

    Args:
        before: the last step before it on the same lane that has decodes; None if there was none.
    """
    decodes = step.decodes
    if before is None:
        return (), [decode[0] for decode in decodes]
    if decodes is before.decodes:
        return (), ()
    if isinstance(decodes, Decodes) and decodes.after == before.id:
        return decodes.parted, decodes.joined
    old, new = {decode[0] for decode in before.decodes}, {decode[0] for decode in decodes}
    return [decode[0] for decode in before.decodes if decode[0] not in new], [
        decode[0] for decode in decodes if decode[0] not in old
    ]


def pages_for(tokens: int, page_size: int) -> int:
    """Pages that hold `tokens` tokens: ceil(tokens / page_size)."""
    return -(-tokens // page_size)
